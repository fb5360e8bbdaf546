"""Checkpoints inside a block: one folder each, written whole or not at all, tensors and JSON only."""

import shutil
from dataclasses import asdict
from pathlib import Path

from cladapt.artifacts import atomic_dir, read_json, read_tensors, write_json, write_tensors
from cladapt.errors import DataError
from cladapt.train.loop import Position, Snapshot

KEPT = 2


def save_checkpoint(root: Path, block: int, config_hash: str, snapshot: Snapshot) -> None:
    """Write `root/block_<t>_step_<n>` and drop all but the newest two."""
    target = root / f"block_{block:03d}_step_{snapshot.position.total_steps:08d}"
    with atomic_dir(target) as folder:
        write_tensors(folder / "state.safetensors", snapshot.tensors)
        position = {**asdict(snapshot.position), "best_score": repr(snapshot.position.best_score)}
        write_json(folder / "position.json", {"block": block, "config": config_hash, "position": position})
    for old in sorted(root.glob("block_*_step_*"))[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(root: Path, block: int, config_hash: str) -> Snapshot | None:
    """The newest checkpoint of `block`, or None; `DataError` when it belongs to another configuration."""
    found = sorted(root.glob(f"block_{block:03d}_step_*"))
    if not found:
        return None
    record = read_json(found[-1] / "position.json")
    if record["config"] != config_hash:
        raise DataError(
            f"{found[-1]} was written under the configuration {record['config']}, this run has {config_hash}",
            "resume with the run's own configuration, or start a new run",
        )
    position = {**record["position"], "best_score": float(record["position"]["best_score"])}
    return Snapshot(Position(**position), read_tensors(found[-1] / "state.safetensors"))


def clear_checkpoints(root: Path, block: int) -> None:
    """Remove the checkpoints of a finished block."""
    for folder in root.glob(f"block_{block:03d}_step_*"):
        shutil.rmtree(folder)
