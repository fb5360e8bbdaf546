"""What an evaluation was measured of, so that a later one knows which of its cells it would only measure again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cladapt import __version__
from cladapt.artifacts import hash_file, hash_value, read_record
from cladapt.errors import ConfigError, DataError
from cladapt.eval.cells import Earlier
from cladapt.model.saved import ADAPTER_FILE, adapter_settings
from cladapt.pipeline.evaluated import METRICS, Evaluated
from cladapt.run import Run
from cladapt.train.sinks import Sink
from cladapt.workloads._base import FittedBase

SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""Settings of an adapter that decide what its weights do."""


class MeasuredRecord(BaseModel):
    """What `measured` in metrics.json must hold."""

    cladapt: str
    run: str
    stream: str
    meaning: str
    base: str
    adapters: dict[str, str]
    scaling: dict[str, str]
    rows: dict[str, str]
    ids: dict[str, str] = {}


class _Record(BaseModel):
    measured: MeasuredRecord


def measured_of(
    run: Run[Any], stream: Any, base: FittedBase, adapters: Mapping[int, Path], rows: Path
) -> dict[str, Any]:
    """What the rows in the folder `rows` were measured of: everything by its fingerprint, and the rows themselves."""
    return {
        "cladapt": __version__,
        "run": run.config_hash,
        "stream": stream.fingerprint,
        "meaning": (alone := _meaning(run, stream, base, None, stream.n_blocks)),
        "base": base.fingerprint,
        "adapters": {str(block): hash_file(folder / ADAPTER_FILE) for block, folder in adapters.items()},
        "scaling": {str(block): _scaling(folder) for block, folder in adapters.items()},
        "rows": {path.name: hash_file(path) for path in sorted(rows.iterdir())},
        "ids": {
            str(block): meaning
            for block, folder in adapters.items()
            if (meaning := _meaning(run, stream, base, folder, stream.n_blocks)) != alone
        },
    }


def _meaning(run: Run[Any], stream: Any, base: FittedBase, adapter: Path | None, block: int) -> str:
    """What the outputs of an adapter, or of the base alone, stand for in the blocks up to `block`."""
    return run.workload.meaning(stream, run.workload.base_of(run.config, stream, base, adapter), block)


def _scaling(folder: Path) -> str:
    settings = adapter_settings(folder)
    return hash_value([settings.get(key) or None for key in SCALING])


def earlier_of(
    run: Run[Any],
    stream: Any,
    base: FittedBase,
    adapters: Mapping[int, Path],
    learned: int,
    config: Any,
    block: int | None,
    sink: Sink,
) -> Earlier[Any]:
    """The cells of the run's last evaluation that still hold; a note says why where none do.

    `DataError` where one `block` alone is asked for then: its rows would take the place of all others.
    """

    def none(why: str) -> Earlier[Any]:
        if block is not None:
            raise DataError(
                f"--block {block}: {why}, so the other blocks' rows would be lost", "leave out --block to measure all"
            )
        sink.emit({"kind": "note", "text": f"all is measured anew: {why}"})
        return Earlier()

    file = run.path / METRICS
    if not file.is_file():
        rows = run.path / run.workload.rows_folder
        return none(f"{file} is missing") if rows.is_dir() and any(rows.iterdir()) else Earlier()
    try:
        found = Evaluated.read(run)
        measured = read_record(file, _Record, "evaluate it again")["measured"]
        _check_rows(run.path / run.workload.rows_folder, measured["rows"])
    except DataError as error:
        return none(f"the earlier evaluation cannot be used, {error.message}")
    work = run.workload
    blocks = work.unchanged(stream, measured["stream"])
    now = {"cladapt": __version__, "run": run.config_hash, "base": base.fingerprint}
    apart = [f"{key} {measured[key]}, now {value}" for key, value in now.items() if measured[key] != value]
    if not blocks or measured["meaning"] != _meaning(run, stream, base, None, blocks):
        apart.append(f"another stream or other IDs than {stream.fingerprint}")
    apart += differing(found.measures.config, config, work.same_rows)
    if apart:
        return none(f"the earlier evaluation was of {'; '.join(apart)}")
    models = {
        block
        for block, folder in adapters.items()
        if measured["adapters"].get(str(block)) == hash_file(folder / ADAPTER_FILE)
        and measured["scaling"].get(str(block)) == _scaling(folder)
        and measured.get("ids", {}).get(str(block), measured["meaning"]) == _meaning(run, stream, base, folder, blocks)
    }
    if learned not in adapters:  # the base itself
        models.add(learned)
    return Earlier(found.measures, models, range(1, blocks + 1))


def _check_rows(folder: Path, recorded: Mapping[str, str]) -> None:
    """`DataError` unless the files of an evaluation are those that were written."""
    found = {path.name: hash_file(path) if path.is_file() else "" for path in folder.iterdir()}
    changed = sorted(name for name in {*found, *recorded} if found.get(name) != recorded.get(name))
    if changed:
        raise DataError(f"{', '.join(changed)} in {folder} are not what it wrote", "evaluate it again")


def differing(then: Any, now: Any, keys: Any) -> list[str]:
    """The settings among `keys` that two evaluations do not share, with both values."""
    pairs = ((key, getattr(then, key), getattr(now, key)) for key in keys)
    return [f"{key}={one!r}, now {two!r}" for key, one, two in pairs if one != two]


def refuse_mixture(run: Run[Any], config: Any, block: int) -> None:
    """`ConfigError` where one block would stand beside others that were measured by other settings."""
    try:
        found = Evaluated.read(run)
    except DataError:
        return
    others = [b for b in run.workload.question(found.measures).get("blocks", ()) if b != block]
    keys = (*run.workload.same_rows, *run.workload.same_cells)
    apart = differing(found.measures.config, config, keys)
    if others and apart:
        raise ConfigError(
            f"--block {block}: {run.path} is evaluated on the blocks {others} too, with other settings: "
            f"{'; '.join(apart)}",
            "give the same settings (-o KEY=VALUE), or leave out --block to evaluate all blocks with the new ones",
        )
