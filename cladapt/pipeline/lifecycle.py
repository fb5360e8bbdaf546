"""The life of a run, whatever its task: it begins from checked inputs, learns block after block, and is continued."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cladapt import ops, ranks
from cladapt.artifacts import hash_file, recover
from cladapt.config import ClassifyConfig, RunConfig, describe, resolve
from cladapt.errors import ConfigError, DataError
from cladapt.methods import build
from cladapt.model.load import weights_hash
from cladapt.model.saved import ADAPTER_FILE
from cladapt.run import Run, locked, new_run_path
from cladapt.train.checkpoint import clear_checkpoints
from cladapt.train.loop import FitResult
from cladapt.train.sinks import Fan, JsonlSink, Sink
from cladapt.train.track import require, tracking

FOLDERS = ("data", "base", "from_adapter")
C = TypeVar("C", bound=RunConfig | ClassifyConfig)


@dataclass(frozen=True)
class Workload(Generic[C]):
    """What recommending and classifying differ in."""

    open_inputs: Callable[[C], tuple[Any, Any]]
    """The stream and the base of a configuration, checked to belong together."""
    blocks: Callable[[C, Any, Any], Sequence[int]]
    """The blocks to learn of configuration, stream and base; `ConfigError` where there are none."""
    learn: Callable[..., dict[int, FitResult]]
    """(run directory, configuration, stream, base, sink, hash, provenance) -> what each block gave."""
    provenance: Callable[[C], Mapping[str, Any]]
    """What an adapter's `cladapt.json` says beside stream, configuration, method and seed."""


def names_inputs(config: RunConfig | ClassifyConfig, embedded: str) -> bool:
    """Whether stream and base are named; `ConfigError` where only one is, without both the `embedded` ones serve."""
    if bool(config.data) != bool(config.base):
        given, missing = ("data", "base") if config.data else ("base", "data")
        raise ConfigError(
            f"{given}={getattr(config, given)!r} without {missing}", f"give both, or neither for {embedded}"
        )
    return bool(config.data)


def refuse_unnamed(config: RunConfig | ClassifyConfig) -> None:
    """A plan makes nothing, so it needs what a run would make."""
    if not config.data or not config.base:
        raise ConfigError("--dry-run needs --data and --base", "name them; the embedded ones are made by a real run")


def refuse_unfinished(run: Run[Any], expected: Sequence[int]) -> None:
    """Only a run that has learned all its blocks is measured."""
    if sorted(run.adapters) != list(expected):
        raise DataError(
            f"{run.path} has adapters for the blocks {sorted(run.adapters)}, the stream needs {list(expected)}",
            f"finish it: cladapt train --resume {run.path}",
        )


def begin(work: Workload[C], config: C, stream: Any, base: Any, out: Path | None, sink: Sink) -> dict[str, Any]:
    """Make a run directory and learn."""
    work.blocks(config, stream, base)
    require(config.track)
    inputs = _fingerprints(config, stream, base)
    path = ranks.once(lambda: out or new_run_path(config.method.name, config.seed))
    with locked(path):
        run = ranks.once(lambda: Run.create(path, config, inputs))
        return _learn(work, run, stream, base, sink)


def resume(work: Workload[C], run: Run[C], sink: Sink, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Continue an interrupted run exactly where its last checkpoint or finished block stands.

    `asked`: settings given beside the run, nested as in a recipe; they must be the run's own. `DataError` when an input
    is not what it was when the run began. A finished run is left as it is.
    """
    _refuse_changes(run, asked or {})
    with locked(run.path):
        return _continue(work, run, sink)


def _continue(work: Workload[C], run: Run[C], sink: Sink) -> dict[str, Any]:
    stream, base = work.open_inputs(run.config)
    notes = [*_verify_inputs(run, stream, base), *ranks.once(lambda: _mend(run))]
    blocks = work.blocks(run.config, stream, base)
    if not build(run.config.method).trains or set(blocks) <= set(run.adapters):
        for text in (*notes, f"{run.path} is finished: there is nothing to continue"):
            sink.emit({"kind": "note", "text": text})
        return _summary(run, {})
    if changes := run.environment_changes():
        other = any(change.startswith("processes:") for change in changes)
        what = "dropout masks and last bits" if other else "last bits"
        notes.append(f"this is not the machine the run began on, its {what} may differ: {', '.join(changes)}")
    ranks.once(run.begin)
    return _learn(work, run, stream, base, sink, notes)


def _mend(run: Run[Any]) -> list[str]:
    """Clean up behind a killed process; returns a sentence for each thing done."""
    done = recover(run.path)
    for block in run.adapters:
        clear_checkpoints(run.path / "checkpoints", block)
    return done


def _refuse_changes(run: Run[Any], asked: Mapping[str, Any]) -> None:
    """`ConfigError` that names every setting asked for with another value than the run's."""
    config = resolve(type(run.config), _over(run.config.model_dump(mode="json"), asked), "--resume")
    own = {row["key"]: row["value"] for row in describe(run.config)}
    wanted = {row["key"]: row["value"] for row in describe(config)}
    changed = [
        f"{key}={wanted[key]!r}, the run has {value!r}"
        for key, value in own.items()
        if wanted[key] != value and not (key in FOLDERS and value and _same_folder(wanted[key], value))
    ]
    if changed:
        raise ConfigError(
            f"--resume continues a run as it was configured: {'; '.join(changed)}",
            "leave these out, or start a new run; evaluation settings are for `cladapt eval RUN -o KEY=VALUE`",
        )


def _over(values: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in asked.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _over(merged[key], value) if nested else value
    return merged


def _same_folder(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _fingerprints(config: RunConfig | ClassifyConfig, stream: Any, base: Any) -> dict[str, str]:
    """Content of all that a run starts from, by name."""
    found = {"data": stream.fingerprint, "base": base.fingerprint, "base weights": weights_hash(base.model)}
    if isinstance(config, RunConfig) and config.from_adapter:
        file = Path(config.from_adapter) / ADAPTER_FILE
        if not file.is_file():
            raise DataError(f"no such file: {file}", "restore the adapter that the run starts from")
        found["from_adapter"] = hash_file(file)
    return found


def _verify_inputs(run: Run[Any], stream: Any, base: Any) -> list[str]:
    """`DataError` when an input is not what the run began with; a note when that was not recorded."""
    if not run.inputs:
        return [f"{run.path} does not say which inputs it began with, so they are not compared"]
    found = _fingerprints(run.config, stream, base)
    changed = [
        f"{name} ({getattr(run.config, name.split()[0], 'unknown')}) is {found.get(name)}, it was {then}"
        for name, then in run.inputs.items()
        if found.get(name) != then
    ]
    if changed:
        raise DataError(
            f"{run.path} began with other inputs: {'; '.join(changed)}", "restore them, or start a new run from these"
        )
    return []


def _learn(
    work: Workload[C], run: Run[C], stream: Any, base: Any, sink: Sink, notes: Sequence[str] = ()
) -> dict[str, Any]:
    sink.emit({"kind": "run", "path": str(run.path)})
    log: Sink = JsonlSink(run.path / "log.jsonl") if ranks.is_main() else Fan([])
    backends = {op: {"implementation": i, "reason": r} for op, (i, r) in ops.backends(run.config.kernels).items()}
    log.emit({"kind": "kernels", "ops": backends})
    everywhere = Fan([log, sink])
    for text in notes:
        everywhere.emit({"kind": "note", "text": text})
    provenance = {
        "stream": stream.fingerprint,
        "config": run.config_hash,
        "method": run.config.method.name,
        "seed": run.config.seed,
        **work.provenance(run.config),
    }
    with tracking(run.config.track if ranks.is_main() else "none", run.path, run.config) as tracked:
        sinks = Fan([everywhere, tracked])
        results = work.learn(run.path, run.config, stream, base, sinks, run.config_hash, provenance)
    return _summary(run, results)


def _summary(run: Run[Any], results: Mapping[int, FitResult]) -> dict[str, Any]:
    blocks = [
        {
            "block": block,
            "kept_epoch": r.epoch,
            "valid_log_likelihood": r.score,
            "steps": r.steps,
            "seconds": round(r.seconds, 1),
        }
        for block, r in results.items()
    ]
    return {
        "run": str(run.path),
        "method": run.config.method.name,
        "next": f"cladapt eval {run.path}",
        "blocks": blocks,
    }
