"""Checkpoints inside a block: one folder each, written whole or not at all, tensors and JSON only.

A checkpoint knows the hash of its tensors, so what a disk has lost is recognised and an older one is used.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from cladapt.artifacts import atomic_dir, hash_file, read_record, read_tensors, write_json, write_tensors
from cladapt.errors import DataError, EnvironmentProblem
from cladapt.train.loop import Position, Snapshot

KEPT = 2
STATE = "state.safetensors"
SCORES = ("best_score", "start_score")


class _Place(BaseModel):
    """`Position`, as JSON: the scores are texts, for JSON has no infinity."""

    model_config = ConfigDict(extra="forbid")

    epoch: NonNegativeInt
    step: NonNegativeInt
    total_steps: NonNegativeInt
    best_epoch: NonNegativeInt
    best_score: str
    start_score: str = "nan"


class _State(BaseModel):
    bytes: NonNegativeInt
    hash: str


class _Record(BaseModel):
    """What a checkpoint's position.json must hold."""

    block: int
    config: str
    position: _Place
    state: _State


def save_checkpoint(root: Path, block: int, config_hash: str, snapshot: Snapshot, again: str = "") -> None:
    """Write `root/block_<t>_step_<n>` and drop all but the newest two of this block.

    Where it cannot be written, the `EnvironmentProblem` names the checkpoint from which the work will continue, and the
    command that does so: `again`, or that of a run.
    """
    target = root / f"block_{block:03d}_step_{snapshot.position.total_steps:08d}"
    try:
        with atomic_dir(target) as folder:
            write_tensors(folder / STATE, snapshot.tensors)
            place = asdict(snapshot.position)
            position = {**place, **{name: repr(place[name]) for name in SCORES}}
            state = {"bytes": (folder / STATE).stat().st_size, "hash": hash_file(folder / STATE)}
            record = {"block": block, "config": config_hash, "position": position, "state": state}
            write_json(folder / "position.json", record)
    except EnvironmentProblem as error:
        good = next((f for f, found in _checkpoints(root, block, config_hash) if isinstance(found, Snapshot)), None)
        last = f"the start of block {block}" if good is None else f"the last good checkpoint, {good}"
        raise EnvironmentProblem(
            f"{error.message}; the run can continue from {last}",
            f"mend the permissions or free some space, then: {again or f'cladapt train --resume {root.parent}'}",
        ) from error
    # what lies after this step was found damaged, or this block would stand there
    earlier = sorted(f for f in root.glob(f"block_{block:03d}_step_*") if f.name < target.name)
    kept = {target, *earlier[-(KEPT - 1) :]}
    for folder in root.glob("block_*_step_*"):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(root: Path, block: int, config_hash: str, note: Callable[[str], None]) -> Snapshot | None:
    """The newest whole checkpoint of `block`, or None; `note` is told of each damaged one and of what is used instead.

    `DataError` when it belongs to another configuration.
    """
    damaged: list[str] = []
    used: Snapshot | None = None
    instead = f"the start of block {block}"
    for folder, found in _checkpoints(root, block, config_hash):
        if isinstance(found, Snapshot):
            used, instead = found, str(folder)
            break
        damaged.append(found)
    for text in damaged:
        note(f"{text}; continuing from {instead}")
    return used


def clear_checkpoints(root: Path, block: int) -> None:
    """Remove the checkpoints of a finished block."""
    for folder in root.glob(f"block_{block:03d}_step_*"):
        shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(root: Path, block: int, config_hash: str) -> Iterator[tuple[Path, Snapshot | str]]:
    """Every checkpoint of a block, the newest first: its snapshot, or what is wrong with it."""
    for folder in sorted(root.glob(f"block_{block:03d}_step_*"), reverse=True):
        try:
            yield folder, _read(folder, block, config_hash)
        except _Damaged as error:
            yield folder, f"the checkpoint {folder} is damaged ({error})"


class _Damaged(Exception):
    """A checkpoint that is not what was written."""


def _read(folder: Path, block: int, config_hash: str) -> Snapshot:
    try:
        record = read_record(folder / "position.json", _Record, "resume from another checkpoint")
        place = record["position"]
        position = Position(**{**place, **{name: float(place[name]) for name in SCORES if name in place}})
    except DataError as error:
        raise _Damaged(error.message) from error
    except ValueError as error:
        raise _Damaged(f"{folder / 'position.json'}: {error}") from error
    written, size, digest = record["config"], record["state"]["bytes"], record["state"]["hash"]
    if written != config_hash:
        raise DataError(
            f"{folder} was written under the configuration {written}, this run has {config_hash}",
            "resume with the run's own configuration, or start a new run",
        )
    state = folder / STATE
    try:
        found = state.stat().st_size
        if found != size:
            raise _Damaged(f"{STATE} has {found} bytes of {size}")
        if hash_file(state) != digest:
            raise _Damaged(f"{STATE} is not the file that was written")
        tensors = read_tensors(state)
    except OSError as error:
        raise _Damaged(f"cannot read {STATE}: {error.strerror}") from error
    except DataError as error:
        raise _Damaged(error.message) from error
    if record["block"] != block:
        raise _Damaged(f"it is of block {record['block']}")
    return Snapshot(position, tensors)
