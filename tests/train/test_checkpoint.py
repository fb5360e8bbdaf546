"""Checkpoints on disk: the newest is found, two are kept, and what comes back is bit for bit what was saved."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cladapt.errors import DataError
from cladapt.train.checkpoint import KEPT, clear_checkpoints, load_checkpoint, save_checkpoint
from cladapt.train.loop import Position, Snapshot

TENSORS = {
    "parameter/a": torch.tensor([1.0, 0.1, -math.inf]),
    "optimizer/a/step": torch.tensor(3.0),
    "rng/cpu": torch.get_rng_state(),
}


def snapshot(total: int, best_score: float = -math.inf) -> Snapshot:
    return Snapshot(Position(epoch=1, step=2, total_steps=total, best_epoch=1, best_score=best_score), TENSORS)


@pytest.mark.parametrize("score", [-math.inf, -1 / 3, math.nan, -1e-300])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path, score: float) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(7, score))
    loaded = load_checkpoint(tmp_path, 2, "hash")
    assert loaded is not None
    assert replace(loaded.position, best_score=0.0) == replace(snapshot(7).position, best_score=0.0)
    assert loaded.position.best_score == score or (math.isnan(score) and math.isnan(loaded.position.best_score))
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
    loaded = load_checkpoint(tmp_path, 2, "hash")
    assert loaded is not None
    assert loaded.position.total_steps == 100


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(7, -2.0))
    save_checkpoint(tmp_path, 2, "hash", snapshot(7, -1.0))
    loaded = load_checkpoint(tmp_path, 2, "hash")
    assert loaded is not None
    assert loaded.position.best_score == -1.0


def test_what_a_killed_write_left_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(7))
    (tmp_path / ".block_002_step_00000008.123.tmp").mkdir()
    loaded = load_checkpoint(tmp_path, 2, "hash")
    assert loaded is not None
    assert loaded.position.total_steps == 7


def test_there_may_be_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "absent", 2, "hash") is None
    save_checkpoint(tmp_path, 2, "hash", snapshot(7))
    assert load_checkpoint(tmp_path, 3, "hash") is None


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "abc", snapshot(7))
    expected = "step_00000007 was written under the configuration abc, this run has xyz"
    with pytest.raises(DataError, match=expected) as caught:
        load_checkpoint(tmp_path, 2, "xyz")
    assert caught.value.hint == "resume with the run's own configuration, or start a new run"


def test_a_damaged_checkpoint_is_a_data_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(7))
    state = tmp_path / "block_002_step_00000007" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(DataError, match=r"state\.safetensors: not a readable safetensors file"):
        load_checkpoint(tmp_path, 2, "hash")


def test_a_finished_block_gives_up_its_own_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, "hash", snapshot(7))
    save_checkpoint(tmp_path, 3, "hash", snapshot(1))
    clear_checkpoints(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["block_003_step_00000001"]
    clear_checkpoints(tmp_path / "absent", 2)
