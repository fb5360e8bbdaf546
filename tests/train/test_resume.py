"""Resuming a run: only with its own settings and inputs, from what is whole on the disk, to the same adapters."""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cladapt.artifacts import read_json, read_tensors, write_json, write_tensors
from cladapt.config import MethodConfig, PretrainConfig, RunConfig, SimulateConfig, TokensConfig, TrainConfig
from cladapt.errors import ConfigError, DataError, EnvironmentProblem
from cladapt.model.load import load_base, save_base
from cladapt.pipeline import bases, runs, streams
from cladapt.train import checkpoint
from cladapt.train.sinks import MemorySink
from cladapt_cli.app import run as command

STOP = {"kind": "step", "block": 3, "step": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `stream`, `base`, the finished run `whole` and the same run `part`, stopped in block 3."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        streams.simulate_data(Path("stream"), SimulateConfig(users=60, items=40, topics=4, blocks=3))
        streams.build_tokens(Path("stream"), TokensConfig(dimensions=8, levels=2, codes=4, capacity=16), None)
        bases.pretrain_base(Path("stream"), Path("base"), PretrainConfig(epochs=1), MemorySink())
        runs.train(config(), Path("whole"), MemorySink())
        with pytest.raises(KeyboardInterrupt):
            runs.train(config(), Path("part"), Stops())
    return folder


@pytest.fixture
def part(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world around the stopped run; the working folder."""
    for name in ("stream", "base", "whole", "part"):
        shutil.copytree(world / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return Path("part")


def config(**changes: Any) -> RunConfig:
    train = TrainConfig(epochs=3, batch_tokens=512, checkpoint_steps=1)
    return RunConfig(data="stream", base="base", train=train).model_copy(update=changes)


class Stops(MemorySink):
    """Fails at one step, as a kill would."""

    def emit(self, event: Mapping[str, Any]) -> None:
        super().emit(event)
        if STOP.items() <= event.items():
            raise KeyboardInterrupt


def adapters(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("adapters/*/*.safetensors"))}


def resumed(run: Path, asked: Mapping[str, Any] | None = None) -> list[str]:
    """Resume, and return the notes."""
    sink = MemorySink()
    runs.resume(run, sink, asked)
    return [e["text"] for e in sink.events if e["kind"] == "note"]


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_what_is_torn_is_skipped_told_and_logged(part: Path) -> None:
    newest = max((part / "checkpoints").iterdir())
    assert newest.name == "block_003_step_00000002"
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    (part / "checkpoints" / f".block_003_step_00000003.{os.getpid()}.tmp").mkdir()
    (part / "adapters" / f".block_003.{os.getpid()}.tmp").mkdir()
    shutil.copy(part / "method" / "block_002.safetensors", part / "method" / "block_003.safetensors")
    notes = resumed(part)
    assert len(notes) == 3
    assert [text.split(":")[1] for text in notes[:2]] == [" a killed process had not finished it"] * 2
    assert notes[2].endswith("continuing from part/checkpoints/block_003_step_00000001")
    assert adapters(part) == adapters(Path("whole"))
    assert all(text in (part / "log.jsonl").read_text() for text in notes)
    assert list((part / "checkpoints").iterdir()) == []


def test_an_adapter_that_had_stepped_aside_is_taken_back(part: Path) -> None:
    (part / "adapters" / "block_002").rename(part / "adapters" / f".block_002.{os.getpid()}.old")
    assert [text.split(":")[0] for text in resumed(part)] == ["part/adapters/block_002 is back"]
    assert adapters(part) == adapters(Path("whole"))


def test_a_full_disk_ends_with_4_and_resuming_continues(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.write_tensors

    def full(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        if "step_00000005" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(
            EnvironmentProblem, match=r"No space left.*checkpoint, part/checkpoints/.*00000004"
        ) as caught:
            runs.resume(part, MemorySink())
    assert caught.value.exit_code == 4
    assert caught.value.hint == "mend the permissions or free some space, then: cladapt train --resume part"
    resumed(part)
    assert adapters(part) == adapters(Path("whole"))


def test_a_finished_run_says_so_and_is_left_alone(part: Path) -> None:
    before = tree(Path("whole"))
    assert resumed(Path("whole")) == ["whole is finished: there is nothing to continue"]
    assert tree(Path("whole")) == before
    runs.train(config(method=MethodConfig(name="frozen")), Path("frozen"), MemorySink())
    assert resumed(Path("frozen")) == ["frozen is finished: there is nothing to continue"]


def test_checkpoints_that_outlived_their_block_go(part: Path) -> None:
    shutil.copytree(part / "checkpoints", Path("whole") / "checkpoints", dirs_exist_ok=True)
    resumed(Path("whole"))
    assert list((Path("whole") / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"seed": 0, "train": {"epochs": 3}, "method": {"name": "peso"}},
        {"data": "./stream", "base": "stream/../base"},
        {"train": {"row_tokens": 256}, "eval": {"beams": 20}},
    ],
)
def test_settings_that_are_the_run_s_own_are_no_hindrance(asked: dict[str, Any], part: Path) -> None:
    assert resumed(part, asked) == []
    assert adapters(part) == adapters(Path("whole"))


def test_every_changed_setting_is_named_with_both_values(part: Path) -> None:
    before = tree(part)
    asked = {"seed": 4, "train": {"lr": 0.5, "epochs": 3}, "method": {"name": "finetune"}, "eval": {"beams": 50}}
    with pytest.raises(ConfigError) as caught:
        runs.resume(part, MemorySink(), asked)
    assert caught.value.message == (
        "--resume continues a run as it was configured: seed=4, the run has 0; method.name='finetune', the run has "
        "'peso'; train.lr=0.5, the run has 0.002; eval.beams=50, the run has 20"
    )
    assert caught.value.hint.startswith(
        "leave these out, or start a new run; evaluation settings are for `cladapt eval"
    )
    with pytest.raises(ConfigError, match=r"--resume: 1 mistake: unknown key 'train\.lrr', did you mean 'lr'"):
        runs.resume(part, MemorySink(), {"train": {"lrr": 1}})
    assert tree(part) == before


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("--from-adapter whole/adapters/block_002", "--from-adapter does not fit"),
        ("--dry-run", "--dry-run does not fit"),
        ("--out elsewhere", "--out does not fit"),
        ("--lr 1", "train.lr=1.0, the run has 0.002"),
        ("-o train.epochs=9", "train.epochs=9, the run has 3"),
        ("--data whole", "whole is not a stream directory"),
    ],
)
def test_the_command_refuses_what_does_not_fit(more: str, text: str, part: Path, capsys: Any) -> None:
    before = tree(part)
    assert command(f"train --resume part {more}".split()) == (3 if "stream directory" in text else 2)
    assert text in capsys.readouterr().err
    assert tree(part) == before


def test_the_same_command_line_with_resume_beside_it_continues(part: Path, capsys: Any) -> None:
    Path("recipe.yaml").write_text("train: {epochs: 3, batch_tokens: 512}\nmethod: {name: peso}\n")
    line = "train recipe.yaml --data stream --base base --seed 0 -o train.checkpoint_steps=1 --out part"
    assert command(f"{line} --resume part --quiet".split()) == 0, capsys.readouterr().err
    assert adapters(part) == adapters(Path("whole"))


def other_stream() -> None:
    shutil.rmtree("stream")
    streams.simulate_data(Path("stream"), SimulateConfig(users=60, items=40, topics=4, blocks=3, drift=0.9))
    record = read_json(Path("base/cladapt.json"))  # as if the base had been made from it
    write_json(Path("base/cladapt.json"), {**record, "fitted_block": 0})


def other_weights() -> None:
    file = Path("base/model.safetensors")
    write_tensors(file, {name: t + 1.0 for name, t in read_tensors(file).items()}, {"format": "pt"})


def other_base() -> None:
    base = load_base(Path("base"))
    with torch.no_grad():
        next(base.model.parameters()).add_(1.0)
    save_base(Path("base"), base.model, base.tokenizer, base.sids, base.provenance)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_stream, r"data \(stream\) is \w+, it was \w+"),
        (other_base, r"base \(base\) is \w+, it was \w+; base weights \(base\)"),
    ],
    ids=["stream", "base"],
)
def test_a_changed_input_is_named(change: Callable[[], None], named: str, part: Path) -> None:
    change()
    with pytest.raises(DataError, match=named) as caught:
        runs.resume(part, MemorySink())
    assert caught.value.message.startswith("part began with other inputs: ")
    assert caught.value.hint == "restore them, or start a new run from these"


def test_changed_weights_of_the_base_are_found_on_loading_it(part: Path) -> None:
    other_weights()
    with pytest.raises(DataError, match=r"base: its weights have the fingerprint \w+, cladapt\.json has recorded \w+"):
        runs.resume(part, MemorySink())


def test_a_changed_parent_adapter_is_named(part: Path) -> None:
    shutil.copytree("whole/adapters/block_002", "given")
    with pytest.raises(KeyboardInterrupt):
        runs.train(config(from_adapter="given"), Path("run"), Stops())
    shutil.copytree("run", "again")
    resumed(Path("again"))
    assert (
        adapters(Path("again"))["adapters/block_003/adapter_model.safetensors"]
        == (adapters(Path("whole"))["adapters/block_003/adapter_model.safetensors"])
    )
    shutil.copy("whole/adapters/block_003/adapter_model.safetensors", "given/adapter_model.safetensors")
    with pytest.raises(DataError, match=r"run began with other inputs: from_adapter \(given\) is \w+, it was \w+"):
        runs.resume(Path("run"), MemorySink())
    Path("given/adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match="no such file: given/adapter_model"):
        runs.resume(Path("run"), MemorySink())


def test_a_run_without_recorded_inputs_says_that_they_are_not_compared(part: Path) -> None:
    record = read_json(part / "config.json")
    del record["inputs"]
    write_json(part / "config.json", record)
    assert resumed(part) == ["part does not say which inputs it began with, so they are not compared"]
    assert adapters(part) == adapters(Path("whole"))


def test_another_machine_is_noted(part: Path) -> None:
    record = read_json(part / "environment.json")
    write_json(part / "environment.json", {**record, "threads": 99})
    (note,) = resumed(part)
    assert note.startswith("this is not the machine the run began on, its last bits may differ: threads: 99 -> ")
