"""metrics.json and the page of a run against the rows they come from."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cladapt.artifacts import read_json
from cladapt.config import EvalConfig, PretrainConfig, RunConfig, SimulateConfig, TokensConfig, TrainConfig
from cladapt.eval.protocol import Measures, continual_summary, differences, slice_table, table
from cladapt.eval.report import render_report
from cladapt.eval.tails import tail_table
from cladapt.model.saved import adapter_provenance
from cladapt.model.spectrum import saved_spectra, summary
from cladapt.pipeline import bases, evaluation, runs, streams
from cladapt.pipeline.report import (
    interference_log,
    interference_sections,
    regulariser_log,
    run_report,
    step_curves,
)
from cladapt.run import Run
from cladapt.train.sinks import MemorySink

EVAL = EvalConfig(bootstrap=100)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        streams.simulate_data(folder / "stream", SimulateConfig(users=60, items=40, topics=4, blocks=3))
        streams.build_tokens(folder / "stream", TokensConfig(dimensions=8, levels=2, codes=4, capacity=16), None)
        bases.pretrain_base(folder / "stream", folder / "base", PretrainConfig(epochs=2), MemorySink())
        config = RunConfig(data=str(folder / "stream"), base=str(folder / "base"), train=TrainConfig(epochs=2))
        runs.train(config, folder / "run", MemorySink())
    return Run.open(folder / "run")


@pytest.fixture(scope="module")
def measures(run: Run) -> Measures:
    return evaluation.evaluate_run(run, EVAL, None, MemorySink())[0]


def test_metrics_are_the_tables_of_the_protocol(run: Run, measures: Measures) -> None:
    stream, _ = run.workload.open_inputs(run.config)
    metrics = read_json(run.path / "metrics.json")
    assert metrics["schema_version"] == 2
    assert (metrics["method"], metrics["base_block"], metrics["stream"]) == ("peso", 1, stream.fingerprint)
    assert EvalConfig(**metrics["config"]) == EVAL
    assert metrics["table"] == table([measures])
    assert metrics["differences"] == differences([measures])
    assert measures.next is not None
    assert metrics["next_block"] == {"table": table([measures.next]), "differences": differences([measures.next])}
    assert metrics["continual"] == continual_summary(measures, ["HR@10", "NDCG@10", "log_likelihood"])
    assert metrics["slices"] == slice_table(measures, stream)
    assert metrics["tails"] == tail_table(measures)
    assert {row["model"] for row in metrics["tails"]} == {"peso", "frozen", "block popularity", "markov"}
    for line in metrics["spectrum"]:
        assert line == {"block": line["block"], **summary(saved_spectra(run.adapters[line["block"]]))}


def test_the_page_shows_every_table_and_where_it_comes_from(run: Run, measures: Measures) -> None:
    stream, base = run.workload.open_inputs(run.config)
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
        "log_likelihood on the block just learned",
        "Summaries of R[t][s]",
        "Slices of the current blocks",
        "Head and tail of the items",
        "What the method did",
        "Step by step",
        "Spectrum of the adapters",
        "Singular values of the adapter of block 3",
        "What blocks change for earlier inputs",
        "Change for earlier inputs by layer",
        "Semantic IDs",
        "Provenance",
    ):
        assert title in headings
    assert stream.fingerprint in html
    assert base.fingerprint in html
    assert f"{result['table'][0]['HR@10']:.4f}" in html
    assert "http://" not in re.sub(r'xmlns="[^"]*"', "", html)  # nothing is fetched
    assert "<script src" not in html


def test_what_blocks_change_for_earlier_inputs_is_in_metrics_and_on_the_page(run: Run, measures: Measures) -> None:
    lines = read_json(run.path / "metrics.json")["interference"]
    assert [line["block"] for line in lines] == [2, 3]
    records = {block: adapter_provenance(path)["interference"] for block, path in run.adapters.items()}
    for line in lines:
        for figure in ("change", "alignment"):
            each = [found[figure] for found in records[line["block"]].values()]
            assert line[figure] == pytest.approx(sum(each) / len(each))
            assert min(each) > 0
    table, curves = interference_sections(run)
    assert [row[0] for row in table.rows] == [2, 3]  # type: ignore[union-attr]
    (trace,) = curves.traces  # type: ignore[union-attr]
    assert trace.labels == [module.removeprefix("base_model.model.") for module in records[2]]
    for module, line in zip(records[2], trace.lines, strict=True):
        assert line == [(block, found[module]["change"]) for block, found in records.items()]


def test_runs_without_earlier_blocks_or_without_a_change_have_a_page_too(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    copy = Run.open(tmp_path / "run")
    file = copy.adapters[3] / "cladapt.json"
    record = json.loads(file.read_text())
    still, other, *_ = record["interference"]
    record["interference"][still] = {"change": 0.0, "alignment": 0.0}
    del record["interference"][other]  # a head that saw no target
    file.write_text(json.dumps(record))
    (trace,) = interference_sections(copy)[1].traces  # type: ignore[union-attr]
    assert [len(line) for line in trace.lines[:3]] == [1, 1, 2]
    for path in copy.adapters.values():
        record = json.loads((path / "cladapt.json").read_text())
        record["interference"] = {m: {"change": 0.0, "alignment": 0.0} for m in record["interference"]}
        (path / "cladapt.json").write_text(json.dumps(record))
    assert "Change for earlier inputs by layer" in render_report("still", interference_sections(copy))
    for path in copy.adapters.values():
        record = json.loads((path / "cladapt.json").read_text())
        del record["interference"]
        (path / "cladapt.json").write_text(json.dumps(record))
    assert interference_log(copy) == interference_sections(copy) == []


def write_log(folder: Path, *events: dict[str, Any] | str) -> Run:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    (folder / "log.jsonl").write_text("\n".join(lines))
    return Run(folder, RunConfig())


def step(block: int, at: int, loss: float, **more: float | None) -> dict[str, Any]:
    return {"kind": "step", "block": block, "step": at, "loss": loss, **{f"peso/{k}": v for k, v in more.items()}}


def test_the_log_of_the_method_is_summed_up_per_block(tmp_path: Path) -> None:
    assert regulariser_log(Run(tmp_path, RunConfig())) == []
    made_up = write_log(
        tmp_path,
        {"kind": "kernels"},
        step(2, 1, 3.0, term=1.0),
        step(2, 2, 9.0, term=9.0),
        '{"kind": "st',  # the process was killed here, and did step 2 again
        step(2, 2, 2.0, term=3.0),
        {"kind": "epoch", "block": 2},
        step(3, 1, 5.0, term=None),
    )
    assert regulariser_log(made_up) == [
        {"block": 2, "steps": 2, "loss, last": 2.0, "peso/term, mean": 2.0, "peso/term, last": 3.0},
        {"block": 3, "steps": 1, "loss, last": 5.0, "peso/term, mean": None, "peso/term, last": None},
    ]
    curves = step_curves(made_up)
    assert curves.note == "1 lines of log.jsonl are unreadable and left out."
    loss, term = curves.traces
    assert loss.lines == [[(1.0, 3.0), (2.0, 2.0)], [(3.0, 5.0)]]
    assert (term.name, term.lines) == ("peso/term", [[(1.0, 1.0), (2.0, 3.0)], []])
    assert loss.marks == {1: "block 2", 3: "block 3"}


def test_long_logs_are_averaged_and_keep_their_mean(tmp_path: Path) -> None:
    run = write_log(tmp_path, *(step(b, i, float(i * b)) for b in (2, 3) for i in range(1, 1001)))
    curves = step_curves(run)
    assert curves.note == "Each point is the mean of 7 steps."
    for b, line in zip((2, 3), curves.traces[0].lines, strict=True):
        assert len(line) == 143
        assert line[0] == pytest.approx((1000 * (b - 2) + 4, 4 * b))  # steps 1 to 7
        assert line[-1] == pytest.approx((1000 * (b - 2) + 997.5, 997.5 * b))  # the 6 that are left


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH to open the page with")
def test_a_browser_opens_the_page_without_a_word(run: Run, measures: Measures, tmp_path: Path) -> None:
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    page = (run.path / "report.html").as_uri()
    done = subprocess.run(
        [*command, "--enable-logging=stderr", "--v=0", "--dump-dom", page],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    # three metrics per block; loss, term, distance, gradient ratio and cosine over the steps; the last block's
    # spectrum; what blocks change for earlier inputs
    assert done.stdout.count("<svg") == 3 + 5 + 1 + 1
    for name in ("loss", "peso/term", "peso/distance", "peso/ratio", "peso/cosine"):
        assert f"<figcaption>{name}</figcaption>" in done.stdout


def test_a_run_without_an_adapter_has_a_page_too(run: Run, measures: Measures) -> None:
    stream, base = run.workload.open_inputs(run.config)
    bare = Measures("frozen", measures.rows.filter(measures.rows["model_block"] == 1), {}, 1, EVAL)
    html, result = run_report(run, bare, stream, base)
    assert [line["model"] for line in result["table"]] == ["frozen"]
    assert result["differences"] == []
    assert html.startswith("<!")
