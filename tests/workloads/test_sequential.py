"""Sequential backbones as a workload: from a stream to figures, continued as if begun with all, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cladapt.artifacts import read_json, read_tensors
from cladapt.config import SimulateConfig, resolve
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError, DataError
from cladapt.model.saved import ADAPTER_FILE, adapted
from cladapt.pipeline import bases, evaluation, runs
from cladapt.pipeline.compare import compare_runs
from cladapt.run import open_run
from cladapt.sequential import SequentialBaseConfig
from cladapt.train.sequence_bases import DIAGNOSTICS
from cladapt.train.sinks import MemorySink
from cladapt.workloads.sequential import Sequential, SequentialConfig
from cladapt_cli.app import run as command

ROWS = "base_model.model.items.rows"
TABLES: dict[str, dict[str, Any]] = {
    "drawn": {},
    "frozen": {"source": "llm", "use": "frozen", "reduction": "none", "dimensions": 12},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream, its first two blocks, and a base for each kind of table."""
    folder = tmp_path_factory.mktemp("world")
    simulation = simulate(SimulateConfig(users=60, items=50, topics=4, blocks=3))
    simulation.save(folder / "stream")
    Stream.load(folder / "stream").prefix(2).save(folder / "short")
    for name, table in TABLES.items():
        config = SequentialBaseConfig.model_validate({"hidden": 8, "layers": 1, "epochs": 2, "table": table})
        bases.sequential_base(folder / "stream", folder / name, config, MemorySink())
    return folder


def settings(world: Path, table: str = "drawn", stream: str = "stream", **values: Any) -> SequentialConfig:
    given = {"adapter": {"rank": 2}, "method": {"name": "finetune"}, "train": {"epochs": 2}, "eval": {"bootstrap": 100}}
    given |= {"data": str(world / stream), "base": str(world / table), **values}
    return resolve(SequentialConfig, given)


@pytest.mark.parametrize("table", TABLES)
def test_a_continued_run_is_one_over_the_whole_stream(world: Path, tmp_path: Path, table: str) -> None:
    sink = MemorySink()
    runs.train(settings(world, table), tmp_path / "whole", sink)
    runs.train(settings(world, table, "short"), tmp_path / "run", sink)
    evaluation.evaluate_run(open_run(tmp_path / "run"), settings(world).eval, None, sink)
    runs.continue_run(tmp_path / "run", sink, data=world / "stream")
    found = [
        evaluation.evaluate_run(open_run(tmp_path / name), settings(world).eval, None, sink)[1]
        for name in ("whole", "run")
    ]
    assert found[0]["table"] == found[1]["table"]
    assert found[0]["matrix"] == found[1]["matrix"]
    stream = Stream.load(world / "stream")
    for block in (2, 3):
        one, other = (open_run(tmp_path / name).adapters[block] for name in ("whole", "run"))
        assert (one / ADAPTER_FILE).read_bytes() == (other / ADAPTER_FILE).read_bytes()
        assert read_json(one / "cladapt.json")[DIAGNOSTICS] == read_json(other / "cladapt.json")[DIAGNOSTICS]
        saved = read_tensors(one / ADAPTER_FILE)
        assert (ROWS in saved) == (table == "drawn")
        assert any("projection.lora_A" in name for name in saved) == (table == "frozen")
        if table == "drawn":
            assert len(saved[ROWS]) == len(stream.known(block))
    assert [line["block"] for line in found[0]["diagnostics"]] == [1, 2, 3]
    assert {line["model"] for line in found[0]["table"]} >= {
        "finetune",
        "frozen",
        "block popularity",
        "markov",
        "ceiling",
    }
    report = (tmp_path / "whole" / "report.html").read_text()
    assert "Training loss, curvature and geometry" in report
    assert "How the base learned" in report


def test_rows_of_new_items_learn_and_those_before_stay(world: Path, tmp_path: Path) -> None:
    known = [len(Stream.load(world / "stream").known(block)) for block in range(4)]
    start = read_tensors(world / "drawn" / "model.safetensors")["items.rows"]
    for rows in ("new", "all", "none"):
        run = tmp_path / rows
        runs.train(settings(world, train={"epochs": 2, "rows": rows}), run, MemorySink())
        second, third = (read_tensors(open_run(run).adapters[block] / ADAPTER_FILE)[ROWS] for block in (2, 3))
        assert torch.equal(second[: known[1]], start) == (rows != "all")
        assert torch.equal(third[: known[2]], second) == (rows != "all")
        stream, base = Sequential().open_inputs(settings(world))
        drawn = base.sequence.items(stream.n_items)
        assert torch.equal(third[known[2] :], drawn[known[2] :]) == (rows == "none")


def test_a_stream_alone_gets_a_base_of_its_own_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(folder: Path, stream: Stream, config: SequentialBaseConfig, sink: Any) -> None:
        made.append(config)
        shutil.copytree(world / "drawn", folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cladapt.workloads.sequential.make_sequence_base", make)
    for name in ("one", "other"):
        runs.train(settings(world, base=""), tmp_path / name, MemorySink())
    assert made == [SequentialBaseConfig()]
    one, other = (open_run(tmp_path / name).adapters[3] / ADAPTER_FILE for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(ConfigError, match=r"base='.*drawn' without data"):
        runs.train(settings(world, data=""), tmp_path / "third", MemorySink())


def test_an_adapter_leaves_the_base_as_it_was(world: Path, tmp_path: Path) -> None:
    runs.train(settings(world, train={"epochs": 1, "rows": "all"}), tmp_path / "run", MemorySink())
    stream, base = Sequential().open_inputs(settings(world))
    before = base.sequence.items(stream.n_items).clone()
    known = len(stream.known(2))
    with adapted(base, open_run(tmp_path / "run").adapters[2]) as model:
        inside = model.get_submodule("items")(stream.n_items)
        assert not torch.equal(inside[:known], before[:known])
        assert torch.equal(inside[known:], before[known:])  # items that the adapter did not know
    assert torch.equal(base.sequence.items(stream.n_items), before)


@pytest.mark.parametrize("method", ["lwf", "eisam", "janus", "retrain", "replay", "full", "olora"])
def test_methods_of_every_kind_learn_it(world: Path, tmp_path: Path, method: str) -> None:
    runs.train(settings(world, method={"name": method}, train={"epochs": 1}), tmp_path / "run", MemorySink())
    assert sorted(open_run(tmp_path / "run").adapters) == [2, 3]


def test_what_cannot_be_is_said_before_anything_is_written(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eisam cannot perturb items\.projection, which all items go through"):
        runs.train(settings(world, "frozen", method={"name": "eisam"}), tmp_path / "run", MemorySink())
    with pytest.raises(ConfigError, match=r"backbone=gru4rec: .* is a base of sasrec \(leave out --backbone"):
        runs.train(settings(world, backbone="gru4rec"), tmp_path / "run", MemorySink())
    with pytest.raises(ConfigError, match=r"train\.checkpointing: a sequential model has no layers"):
        runs.train(settings(world, train={"checkpointing": True}), tmp_path / "run", MemorySink())
    assert not (tmp_path / "run").exists()
    (tmp_path / "other").mkdir()
    simulate(SimulateConfig(seed=1, users=60, items=50, topics=4, blocks=3)).save(tmp_path / "other" / "stream")
    with pytest.raises(DataError, match=r"was trained on block 1 of the stream"):
        runs.train(settings(world, data=str(tmp_path / "other" / "stream")), tmp_path / "run", MemorySink())


def test_it_is_planned_run_and_compared_from_the_command_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = (
        f"base sequential --backbone gru4rec --data {world / 'stream'} --out base -o hidden=8 -o base.epochs=1 --json"
    )
    assert command(base.split()) == 0
    assert json.loads(capsys.readouterr().out)["items"] == len(Stream.load(world / "stream").known(1))
    given = (
        f"train --task sequential --backbone gru4rec --data {world / 'stream'} --base base --method finetune --epochs 1"
    )
    assert command([*given.split(), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [line["block"] for line in planned["blocks"]] == [2, 3]
    assert all(line["learned_rows"] > 0 and line["steps"] > 0 for line in planned["blocks"])
    for seed in ("0", "1"):
        assert command([*given.split(), "--seed", seed, "--out", seed, "--quiet"]) == 0
        assert command(["eval", seed, "-o", "bootstrap=100", "-o", "scope=current", "--quiet"]) == 0
    capsys.readouterr()
    assert command(["config", "show", "--for", "sequential", "-o", "base.table.source=llm", "--json"]) == 0
    shown = {row["key"]: row["value"] for row in json.loads(capsys.readouterr().out)["config"]}
    assert shown["table.source"] == "llm"
    found = compare_runs([tmp_path / "0", tmp_path / "1"])
    assert [group["seeds"] for group in found["groups"]] == [[0, 1]]
