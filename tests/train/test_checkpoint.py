"""Checkpoints on disk: the newest is found, two are kept, and what comes back is bit for bit what was saved."""

import errno
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from cladapt.errors import DataError, EnvironmentProblem
from cladapt.train.checkpoint import KEPT, clear_checkpoints, load_checkpoint, save_checkpoint
from cladapt.train.loop import Position, Snapshot

TENSORS = {
    "parameter/a": torch.tensor([1.0, 0.1, -math.inf]),
    "optimizer/a/step": torch.tensor(3.0),
    "rng/cpu": torch.get_rng_state(),
}


def snapshot(total: int, best_score: float = -math.inf) -> Snapshot:
    scores = {"best_score": best_score, "start_score": best_score}
    return Snapshot(Position(epoch=1, step=2, total_steps=total, best_epoch=1, **scores), TENSORS)


@pytest.mark.parametrize("score", [-math.inf, -1 / 3, math.nan, -1e-300])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path, score: float) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(7, score))
    loaded = load_checkpoint(tmp_path, 2, "hash", pytest.fail)
    assert loaded is not None
    expected = asdict(snapshot(7, score).position)
    assert asdict(loaded.position) == pytest.approx(expected, rel=0.0, abs=0.0, nan_ok=True)
    assert loaded.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_only_json_and_safetensors_are_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(7))
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {
        "block_002_step_00000007",
        "block_002_step_00000007/position.json",
        "block_002_step_00000007/state.safetensors",
    }
    record = json.loads(
        (tmp_path / "block_002_step_00000007" / "position.json").read_text(), parse_constant=pytest.fail
    )
    assert (record["block"], record["config"]) == (2, "hash")


def test_the_newest_counts_and_two_are_kept(tmp_path: Path) -> None:
    for total in (9, 10, 99, 100):  # as text 9 would come after 100
        save_checkpoint(tmp_path, 2, "hash", snapshot(total))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["block_002_step_00000099", "block_002_step_00000100"]
    assert len(list(tmp_path.iterdir())) == KEPT
    loaded = load_checkpoint(tmp_path, 2, "hash", pytest.fail)
    assert loaded is not None
    assert loaded.position.total_steps == 100


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(7, -2.0))
    save_checkpoint(tmp_path, 2, "hash", snapshot(7, -1.0))
    loaded = load_checkpoint(tmp_path, 2, "hash", pytest.fail)
    assert loaded is not None
    assert loaded.position.best_score == -1.0


def test_what_a_killed_write_left_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(7))
    (tmp_path / ".block_002_step_00000008.123.tmp").mkdir()
    loaded = load_checkpoint(tmp_path, 2, "hash", pytest.fail)
    assert loaded is not None
    assert loaded.position.total_steps == 7


def test_there_may_be_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "absent", 2, "hash", pytest.fail) is None
    save_checkpoint(tmp_path, 2, "hash", snapshot(7))
    assert load_checkpoint(tmp_path, 3, "hash", pytest.fail) is None


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "abc", snapshot(7))
    expected = "step_00000007 was written under the configuration abc, this run has xyz"
    with pytest.raises(DataError, match=expected) as caught:
        load_checkpoint(tmp_path, 2, "xyz", pytest.fail)
    assert caught.value.hint == "resume with the run's own configuration, or start a new run"


def cut(folder: Path) -> None:
    state = folder / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])


def flip(folder: Path) -> None:
    state = folder / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, r"state\.safetensors has 100 bytes of \d+"),
    "flipped bit": (flip, r"state\.safetensors is not the file that was written"),
    "no tensors": (lambda f: (f / "state.safetensors").unlink(), r"cannot read state\.safetensors: No such file"),
    "no position": (lambda f: (f / "position.json").unlink(), r"no such file: .*position\.json"),
    "half a position": (
        lambda f: (f / "position.json").write_text('{"block": 2, "po'),
        r"position\.json:1:\d+: not valid",
    ),
    "another form": (
        lambda f: (f / "position.json").write_text('{"block": 2}'),
        r"position\.json lacks config, position, state",
    ),
    "a list": (lambda f: (f / "position.json").write_text("[]"), r"position\.json: expected a JSON object, found \[\]"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], r"no such file: .*position\.json"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    for total in (6, 7):
        save_checkpoint(tmp_path, 2, "hash", snapshot(total))
    damage(tmp_path / "block_002_step_00000007")
    notes: list[str] = []
    loaded = load_checkpoint(tmp_path, 2, "hash", notes.append)
    assert loaded is not None
    assert loaded.position.total_steps == 6
    (note,) = notes
    assert re.search(rf"step_00000007 is damaged \(.*{reason}.*\); continuing from .*block_002_step_00000006$", note)


def test_without_a_whole_checkpoint_the_block_starts_over(tmp_path: Path) -> None:
    for total in (6, 7):
        save_checkpoint(tmp_path, 2, "hash", snapshot(total))
        cut(tmp_path / f"block_002_step_{total:08d}")
    notes: list[str] = []
    assert load_checkpoint(tmp_path, 2, "hash", notes.append) is None
    assert [re.sub(r".*(step_\d+).*; ", r"\1 ", note) for note in notes] == [
        "step_00000007 continuing from the start of block 2",
        "step_00000006 continuing from the start of block 2",
    ]


def test_a_new_checkpoint_outlives_the_damaged_ones_after_it(tmp_path: Path) -> None:
    for total in (6, 7):
        save_checkpoint(tmp_path, 2, "hash", snapshot(total))
        cut(tmp_path / f"block_002_step_{total:08d}")
    save_checkpoint(tmp_path, 2, "hash", snapshot(2))
    assert [p.name for p in tmp_path.iterdir()] == ["block_002_step_00000002"]


@pytest.mark.parametrize("kept", [[], [5], [5, 6]])
def test_a_full_disk_keeps_the_last_good_checkpoint_and_names_it(
    kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for total in kept:
        save_checkpoint(tmp_path, 2, "hash", snapshot(total))

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="No space left on device") as caught:
        save_checkpoint(tmp_path, 2, "hash", snapshot(7))
    last = f"the last good checkpoint, {tmp_path}/block_002_step_{kept[-1]:08d}" if kept else "the start of block 2"
    assert caught.value.message.endswith(f"; the run can continue from {last}")
    assert caught.value.hint.endswith(f"cladapt train --resume {tmp_path.parent}")
    assert caught.value.exit_code == 4
    loaded = load_checkpoint(tmp_path, 2, "hash", pytest.fail)
    assert (loaded.position.total_steps if loaded else None) == (kept[-1] if kept else None)
    assert len(list(tmp_path.iterdir())) == len(kept)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_keeps_the_last_good_checkpoint_and_names_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(6))
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(EnvironmentProblem, match=r"Permission denied; .*the last good checkpoint, .*step_00000006"):
            save_checkpoint(tmp_path, 2, "hash", snapshot(7))
    finally:
        tmp_path.chmod(0o700)


def test_a_finished_block_gives_up_its_own_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(7))
    save_checkpoint(tmp_path, 3, "hash", snapshot(1))
    clear_checkpoints(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["block_003_step_00000001"]
    clear_checkpoints(tmp_path / "absent", 2)
