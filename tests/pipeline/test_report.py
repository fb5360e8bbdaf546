"""metrics.json and the page of a run against the rows they come from."""

import json
import re
from pathlib import Path

import pytest

from cladapt.artifacts import read_json
from cladapt.config import BaseConfig, EvalConfig, RunConfig, SimulateConfig, TokensConfig, TrainConfig
from cladapt.eval.protocol import Measures, continual_summary, differences, slice_table, table
from cladapt.pipeline import bases, runs, streams
from cladapt.pipeline.report import regulariser_log, run_report
from cladapt.run import Run
from cladapt.train.sinks import MemorySink

EVAL = EvalConfig(bootstrap=100)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        streams.simulate_data(folder / "stream", SimulateConfig(users=60, items=40, topics=4, blocks=3))
        streams.build_tokens(folder / "stream", TokensConfig(dimensions=8, levels=2, codes=4), None)
        bases.pretrain_base(folder / "stream", folder / "base", BaseConfig(epochs=2), MemorySink())
        config = RunConfig(data=str(folder / "stream"), base=str(folder / "base"), train=TrainConfig(epochs=2))
        runs.train(config, folder / "run", MemorySink())
    return Run.open(folder / "run")


@pytest.fixture(scope="module")
def measures(run: Run) -> Measures:
    return runs.evaluate_run(run, EVAL, None, MemorySink())[0]


def test_metrics_are_the_tables_of_the_protocol(run: Run, measures: Measures) -> None:
    stream, _ = runs.open_inputs(run.config)
    metrics = read_json(run.path / "metrics.json")
    assert metrics["schema_version"] == 1
    assert (metrics["method"], metrics["base_block"]) == ("peso", 1)
    assert EvalConfig(**metrics["config"]) == EVAL
    assert metrics["table"] == table([measures])
    assert metrics["differences"] == differences([measures])
    assert metrics["continual"] == continual_summary(measures, ["HR@10", "NDCG@10", "log_likelihood"])
    assert metrics["slices"] == slice_table(measures, stream)


def test_the_page_shows_every_table_and_where_it_comes_from(run: Run, measures: Measures) -> None:
    stream, base = runs.open_inputs(run.config)
    html, result = run_report(run, measures, stream, base)
    assert html == (run.path / "report.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    for title in (
        "Mean over the later blocks",
        "Paired differences",
        "R[t][s]: HR@10",
        "R[t][s]: NDCG@10",
        "R[t][s]: log_likelihood",
        "HR@10 on the block just learned",
        "Summaries of R[t][s]",
        "Slices of the current blocks",
        "What the method did",
        "Semantic IDs",
        "Provenance",
    ):
        assert title in headings
    assert stream.fingerprint in html
    assert base.fingerprint in html
    assert f"{result['table'][0]['HR@10']:.4f}" in html
    assert "http://" not in re.sub(r'xmlns="[^"]*"', "", html)  # nothing is fetched
    assert "<script src" not in html


def test_the_log_of_the_method_is_summed_up_per_block(run: Run, tmp_path: Path) -> None:
    made_up = Run(tmp_path, run.config)
    assert regulariser_log(made_up) == []
    events = [
        {"kind": "kernels"},
        {"kind": "step", "block": 2, "loss": 3.0, "peso/term": 1.0},
        {"kind": "step", "block": 2, "loss": 2.0, "peso/term": 3.0},
        {"kind": "epoch", "block": 2},
        {"kind": "step", "block": 3, "loss": 5.0, "peso/term": 4.0},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, events)))
    assert regulariser_log(made_up) == [
        {"block": 2, "steps": 2, "loss, last": 2.0, "peso/term, mean": 2.0, "peso/term, last": 3.0},
        {"block": 3, "steps": 1, "loss, last": 5.0, "peso/term, mean": 4.0, "peso/term, last": 4.0},
    ]


def test_a_run_without_an_adapter_has_a_page_too(run: Run, measures: Measures) -> None:
    stream, base = runs.open_inputs(run.config)
    bare = Measures("frozen", measures.rows.filter(measures.rows["model_block"] == 1), {}, 1, EVAL)
    html, result = run_report(run, bare, stream, base)
    assert [line["model"] for line in result["table"]] == ["frozen"]
    assert result["differences"] == []
    assert html.startswith("<!")
