"""Runs that go on when their stream has grown: equal, bit for bit, to runs that had the whole stream at once."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.artifacts import read_json
from cladapt.config import AdapterConfig, MethodConfig, PretrainConfig, RunConfig, SimulateConfig, TrainConfig
from cladapt.data.schema import Stream
from cladapt.errors import CladaptError, ConfigError, DataError
from cladapt.methods import available
from cladapt.pipeline import bases, evaluation, runs, streams
from cladapt.pipeline.compare import compare_runs
from cladapt.run import Run
from cladapt.train.sinks import MemorySink
from cladapt_cli.app import run as command

EVAL: dict[str, Any] = {"bootstrap": 100, "max_users": 4, "beams": 10}
ADAPTER = AdapterConfig(rank=2, targets=("q_proj", "down_proj"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # `runs/latest.json` belongs to the working folder


def config_of(data: Path, base: Path, method: str = "peso", **train: Any) -> RunConfig:
    fit = TrainConfig(epochs=1, batch_tokens=256, row_tokens=128, checkpoint_steps=2, **train)
    return RunConfig(data=str(data), base=str(base), adapter=ADAPTER, method=MethodConfig(name=method), train=fit)


def trained(growth: Path, out: Path, method: str = "peso", stream: str = "whole", **train: Any) -> Path:
    runs.train(config_of(growth / stream, growth / "base", method, **train), out, MemorySink())
    return out


def begun(growth: Path, folder: Path, method: str = "peso", evaluated: bool = True, **train: Any) -> Path:
    """A run over the short stream, which has grown since; `evaluated` before that."""
    shutil.copytree(growth / "short", folder / "stream")
    shutil.copytree(growth / "base", folder / "base")
    runs.train(config_of(folder / "stream", folder / "base", method, **train), folder / "run", MemorySink())
    if evaluated:
        evaluation.evaluate(folder / "run", EVAL, None, MemorySink())
    shutil.copytree(growth / "stream", folder / "stream", dirs_exist_ok=True)
    return folder / "run"


def bytes_of(run: Path, *patterns: str) -> dict[str, bytes]:
    found = (path for pattern in patterns for path in run.glob(pattern) if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


def learned(run: Path) -> dict[str, bytes]:
    """Weights, configuration and provenance of the adapters, and the states of the method."""
    return bytes_of(run, "adapters/*/*.safetensors", "adapters/*/cladapt.json", "method/*")


def measured(run: Path) -> dict[str, bytes]:
    return bytes_of(run, "users/*", "metrics.json")


def page(run: Path) -> str:
    """The report, without where it lies."""
    return (run / "report.html").read_text().partition("<h2>Provenance</h2>")[0]


def notes_of(sink: MemorySink) -> list[str]:
    return [event["text"] for event in sink.events if event["kind"] == "note"]


@pytest.mark.parametrize("method", sorted(name for name, kind in available().items() if kind.trains))
def test_a_continued_run_learns_what_one_over_the_whole_stream_learns(
    method: str, growth: Path, tmp_path: Path
) -> None:
    run, whole = begun(growth, tmp_path, method, evaluated=False), trained(growth, tmp_path / "whole", method)
    report = runs.continue_run(run, MemorySink())
    assert [block["block"] for block in report["blocks"]] == [3, 4]
    assert learned(run) == learned(whole)
    assert len(learned(run)) == 9


@pytest.mark.parametrize("method", ["peso", "frozen"])  # figures follow from what was learned, or from the base alone
def test_a_continued_run_is_measured_as_one_over_the_whole_stream(method: str, growth: Path, tmp_path: Path) -> None:
    run, whole = begun(growth, tmp_path, method), trained(growth, tmp_path / "whole", method)
    evaluation.evaluate(whole, EVAL, None, MemorySink())
    trains = available()[method].trains
    assert [block["block"] for block in runs.continue_run(run, MemorySink())["blocks"]] == ([3, 4] if trains else [])
    cells = evaluation.evaluate(run, EVAL, None, MemorySink())["cells"]
    # R[t][s] of 1 or 4 models on 4 blocks; the base meets block 3 and 4 first, each adapter the block after its own
    assert sum(cells.values()) == (16 + 4 if trains else 4 + 2)
    assert cells["kept"] == (4 if trains else 2)
    assert measured(run) == measured(whole)
    assert page(run) == page(whole)


def test_a_run_is_the_same_however_its_stream_has_grown(growth: Path, tmp_path: Path) -> None:
    run, short = begun(growth, tmp_path), trained(growth, tmp_path / "short", stream="short")
    evaluation.evaluate(short, EVAL, None, MemorySink())
    before = {**learned(run), **measured(run), **bytes_of(run, "report.html", "config.json")}
    sink = MemorySink()
    assert runs.resume(run, sink)["blocks"] == []
    assert notes_of(sink) == [f"{run} is finished: there is nothing to continue"]
    evaluation.evaluate(run, EVAL, None, MemorySink(), everything=True)
    assert {**learned(run), **measured(run), **bytes_of(run, "report.html", "config.json")} == before
    assert measured(run) == measured(short)
    one, other = compare_runs([run]), compare_runs([short])
    assert (one["stream"], one["summary"]) == (other["stream"], other["summary"])


class Stops(MemorySink):
    """Fails at a step, as a kill would, or after the last one of a block."""

    def __init__(self, kind: str, block: int, step: int | None = None) -> None:
        super().__init__()
        self.when = {"kind": kind, "block": block, **({} if step is None else {"step": step})}

    def emit(self, event: Mapping[str, Any]) -> None:
        if self.when.items() <= event.items():
            raise KeyboardInterrupt
        super().emit(event)


@pytest.mark.parametrize("again", [runs.resume, runs.continue_run])
@pytest.mark.parametrize("stops", [Stops("block", 3), Stops("step", 4, 3)], ids=["between blocks", "inside one"])
def test_a_killed_continuation_ends_in_the_same_bits(
    stops: Stops, again: Callable[..., Any], growth: Path, tmp_path: Path
) -> None:
    run, whole = begun(growth, tmp_path), trained(growth, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runs.continue_run(run, stops)
    with pytest.raises(DataError, match=r"adapters for the blocks .*, the stream needs \[2, 3, 4\] ?"):
        evaluation.evaluate(run, EVAL, None, MemorySink())
    again(run, MemorySink())
    assert learned(run) == learned(whole)
    assert not [*(run / "checkpoints").iterdir()]


def test_an_unfinished_run_is_finished_on_the_way(growth: Path, tmp_path: Path) -> None:
    shutil.copytree(growth / "short", tmp_path / "stream")
    config = config_of(tmp_path / "stream", growth / "base")
    with pytest.raises(KeyboardInterrupt):
        runs.train(config, tmp_path / "run", Stops("step", 2, 3))
    shutil.copytree(growth / "stream", tmp_path / "stream", dirs_exist_ok=True)
    report = runs.continue_run(tmp_path / "run", MemorySink())
    assert [block["block"] for block in report["blocks"]] == [2, 3, 4]
    assert learned(tmp_path / "run") == learned(trained(growth, tmp_path / "whole"))


def test_a_moved_run_finds_its_inputs_beside_it(growth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "a")
        begun(growth, Path())
    (tmp_path / "a").rename(tmp_path / "b")
    run, whole = tmp_path / "b" / "run", trained(growth, tmp_path / "whole")
    evaluation.evaluate(run, EVAL, None, MemorySink())
    runs.continue_run(run, MemorySink())
    assert learned(run) == learned(whole)
    assert evaluation.evaluate(run, EVAL, None, MemorySink())["cells"]["kept"] == 4


def test_a_run_that_was_moved_alone_is_told_where_its_inputs_are(growth: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    begun(growth, tmp_path / "a")
    for name in ("run", "stream", "base"):
        (tmp_path / "b" / name).mkdir(parents=True)
        (tmp_path / "a" / name).rename(tmp_path / "b" / name / "it")
    run, stream, base = (tmp_path / "b" / name / "it" for name in ("run", "stream", "base"))
    with pytest.raises(DataError, match="a/stream is not a stream directory"):
        runs.continue_run(run, MemorySink())
    assert runs.resume(run, MemorySink(), data=stream, base=base)["blocks"] == []
    assert evaluation.evaluate(run, EVAL, None, MemorySink(), data=stream, base=base)["cells"]["measured"] == 0
    runs.continue_run(run, MemorySink(), data=stream, base=base)
    assert learned(run) == learned(trained(growth, tmp_path / "whole"))
    paths = read_json(run / "config.json")["paths"]
    assert paths == {"data": "../../stream/it", "base": "../../base/it"}
    evaluation.evaluate(run, EVAL, None, MemorySink())  # they are found from now on


def test_where_nothing_is_new_the_run_stays_as_it_is(growth: Path, tmp_path: Path) -> None:
    run = trained(growth, tmp_path / "run", stream="stream")
    before = {str(path): path.stat().st_mtime_ns for path in run.rglob("*")}
    sink = MemorySink()
    assert runs.continue_run(run, sink, held_out="next")["blocks"] == []
    assert notes_of(sink) == [f"{run} has all 4 blocks of the stream: nothing is new"]
    assert {str(path): path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_held_out_events_may_be_learned_from_the_new_blocks_on(growth: Path, tmp_path: Path) -> None:
    run, never = begun(growth, tmp_path), trained(growth, tmp_path / "never")
    sink = MemorySink()
    with pytest.raises(KeyboardInterrupt):
        runs.continue_run(run, Stops("step", 4, 2), held_out="next")
    with pytest.raises(ConfigError, match=r"--held-out never: .* was to learn block 4 with train\.held_out=next"):
        runs.continue_run(run, sink, held_out="never")
    runs.continue_run(run, sink, held_out="next")
    assert read_json(run / "config.json")["held_out"] == {"3": "next"}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    said = [event["text"] for event in log if event["kind"] == "note"]
    assert said[:2] == [
        "new in the stream: blocks 3 to 4",
        "train.held_out=next from block 3 on, it was never",
    ]
    records = [read_json(folder / "cladapt.json") for folder in Run.open(run).adapters.values()]
    assert [(r["held_out"], r["held_out_blocks"]) for r in records] == [
        ("never", []),
        ("next", [2]),
        ("next", [2, 3]),
    ]
    planned = {
        held_out: {
            line["block"]: line["tokens_per_epoch"]
            for line in runs.plan(config_of(growth / "whole", growth / "base", held_out=held_out))["blocks"]
        }
        for held_out in ("never", "next")
    }
    used = {event["block"]: event["tokens"] for event in log if event["kind"] == "block" and event["block"] < 4}
    assert used == {2: planned["never"][2], 3: planned["next"][3]}
    assert learned(run)["adapters/block_002/cladapt.json"] == learned(never)["adapters/block_002/cladapt.json"]
    evaluation.evaluate(run, EVAL, None, MemorySink())
    cells = read_json(run / "metrics.json")["matrix"]
    assert {(c["model_block"], c["block"]) for c in cells if c["learned"]} == {(3, 2), (4, 2), (4, 3)}
    continual = read_json(run / "metrics.json")["continual"]
    assert all(line["backward transfer"] is not None for line in continual)  # of block 1 alone
    assert all("without block 2, 3:" in line["left out"] for line in continual)


def other_stream(folder: Path) -> dict[str, Path]:
    streams.simulate_data(folder / "other", SimulateConfig(users=50, items=40, topics=4, blocks=4, seed=9))
    shutil.copy(folder / "stream" / "sids.parquet", folder / "other")
    return {"data": folder / "other"}


def shorter_stream(folder: Path) -> dict[str, Path]:
    shutil.copytree(folder / "stream", folder / "shorter")
    Stream.load(folder / "stream").prefix(1).save(folder / "shorter")
    return {"data": folder / "shorter"}


def other_base(folder: Path) -> dict[str, Path]:
    bases.pretrain_base(folder / "stream", folder / "large", PretrainConfig(epochs=0, seed=1), MemorySink())
    return {"base": folder / "large"}


def no_ids(folder: Path) -> dict[str, Path]:
    table = pl.read_parquet(folder / "stream" / "sids.parquet")
    table.head(table.height - 1).write_parquet(folder / "stream" / "sids.parquet")
    return {}


def no_inputs(folder: Path) -> dict[str, Path]:
    file = folder / "run" / "config.json"
    file.write_text(json.dumps({**read_json(file), "inputs": {}}))
    return {}


@pytest.mark.parametrize(
    ("change", "text", "hint"),
    [
        (other_stream, r"other (is|was) .*stream \w+", ""),
        (shorter_stream, r"shorter is the stream \w+ of 1 block, .*run has learned block 2", "give the stream"),
        (other_base, r"run began with other inputs: base \(.*large\) is \w+, it was \w+", "restore them"),
        (no_ids, r"1 of \d+ items have no semantic ID", "cladapt tokens extend"),
        (no_inputs, r"run does not say which stream it has learned", "start a new run"),
    ],
)
def test_what_the_run_cannot_go_on_with_is_refused(
    change: Callable[[Path], dict[str, Path]], text: str, hint: str, growth: Path, tmp_path: Path
) -> None:
    run = begun(growth, tmp_path)
    places = change(tmp_path)
    before = bytes_of(run, "**/*")
    with pytest.raises(DataError, match=text) as caught:
        runs.continue_run(run, MemorySink(), **places)
    assert hint in caught.value.hint
    assert bytes_of(run, "**/*") == before


def test_a_stream_that_went_another_way_is_told_from_a_foreign_one(growth: Path, tmp_path: Path) -> None:
    run = begun(growth, tmp_path)
    runs.continue_run(run, MemorySink())
    stream = Stream.load(tmp_path / "stream")
    shutil.copytree(tmp_path / "stream", tmp_path / "apart")
    other = stream.interactions.filter((pl.col("block") < 4) | (pl.col("user") != stream.users[-1]))
    Stream(other, stream.items, stream.manifest).save_after(tmp_path / "apart", 3)
    with pytest.raises(DataError, match=r"it has block 3 as .*run has learned it, but not what the run learned or was"):
        runs.continue_run(run, MemorySink(), data=tmp_path / "apart")
    assert runs.continue_run(run, MemorySink())["blocks"] == []


@pytest.mark.parametrize(
    ("more", "option"),
    [
        ("recipe.yaml", "RECIPE"),
        ("--resume run", "--resume"),
        ("--out new", "--out"),
        ("--method peso", "--method"),
        ("--lr 1", "--lr"),
        ("-o train.lr=1", "--override"),
        ("--from-adapter a", "--from-adapter"),
        ("--dry-run", "--dry-run"),
        ("--task recommend", "--task"),
    ],
)
def test_what_a_run_has_by_itself_does_not_go_with_continue(more: str, option: str, capsys: Any) -> None:
    assert command(["train", *more.split(), "--continue", "run"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: --continue goes on with a run as it is configured, where it lies: {option} does not fit",
        f"hint: leave out {option}, or start a new run",
    ]


def test_how_held_out_events_are_learned_is_one_of_two(capsys: Any) -> None:
    assert command(["train", "--continue", "run", "--held-out", "always"]) == 2
    assert "error: --held-out always: expected never or next" in capsys.readouterr().err


def test_an_adapter_of_another_stream_is_no_start(growth: Path, tmp_path: Path) -> None:
    adapter = trained(growth, tmp_path / "run", stream="short") / "adapters" / "block_002"
    config = config_of(growth / "stream", growth / "base").model_copy(update={"from_adapter": str(adapter)})
    runs.train(config, tmp_path / "next", MemorySink())  # the stream has grown since
    record = read_json(adapter / "cladapt.json")
    (adapter / "cladapt.json").write_text(json.dumps({**record, "stream": "abc"}))
    with pytest.raises(DataError, match=r"block_002 has learned up to block 2 of the stream abc, .* does not begin"):
        runs.train(config, tmp_path / "other", MemorySink())
    with pytest.raises(CladaptError):
        runs.resume(tmp_path / "next", MemorySink())
