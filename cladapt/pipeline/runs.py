"""The life of a run, whatever its task: it begins from checked inputs, learns block after block, and is continued."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cladapt import ops, ranks, workloads
from cladapt.artifacts import hash_file, recover
from cladapt.config import RunSettings, describe, resolve
from cladapt.errors import ConfigError, DataError
from cladapt.lock import locked
from cladapt.methods import Method, build
from cladapt.model.adapter import adapter_parameters, create_adapter
from cladapt.model.anchors import module_of
from cladapt.model.history import unload
from cladapt.model.load import weights_hash
from cladapt.model.saved import ADAPTER_FILE, adapter_block, start_from
from cladapt.run import RUNS, Run, new_run_path, open_run
from cladapt.train.checkpoint import clear_checkpoints
from cladapt.train.loop import FitResult
from cladapt.train.sinks import Fan, JsonlSink, Sink
from cladapt.train.track import require, tracking
from cladapt.workloads._base import FittedBase

FOLDERS = ("data", "base", "from_adapter")


def train(config: RunSettings, out: Path | None, sink: Sink) -> dict[str, Any]:
    """Start a run: adapt the base to every block that it has not learned."""
    if out is not None:
        ranks.once(lambda: Run.refuse_existing(out))
    config = with_embedded(config, sink)
    work = workloads.get(config.task)
    stream, base = work.open_inputs(config)
    _prepare(config, stream, base)
    work.blocks(config, stream, base)
    require(config.track)
    inputs = _fingerprints(config, stream, base)
    path = ranks.once(lambda: out or new_run_path(config.method.name, config.seed))
    with locked(path):
        run = ranks.once(lambda: Run.create(path, config, inputs))
        return _learn(run, stream, base, sink)


def resume(path: Path, sink: Sink, asked: Mapping[str, Any] | None = None, task: str | None = None) -> dict[str, Any]:
    """Continue an interrupted run exactly where its last checkpoint or finished block stands.

    `asked`: settings given with --resume, nested as in a recipe; they must be the run's own, and so must `task`.
    `DataError` when an input is not what it was when the run began. A finished run is left as it is.
    """
    run = open_run(path)
    if task not in (None, run.task):
        raise ConfigError(f"--task {task}: {path} is a run of --task {run.task}", "leave out --task")
    _refuse_changes(run, asked or {})
    with locked(run.path):
        return _continue(run, sink)


def _continue(run: Run[Any], sink: Sink) -> dict[str, Any]:
    stream, base = run.workload.open_inputs(run.config)
    notes = [*_verify_inputs(run, stream, base), *ranks.once(lambda: _mend(run))]
    if not build(run.config.method).trains or set(run.workload.blocks(run.config, stream, base)) <= set(run.adapters):
        for text in (*notes, f"{run.path} is finished: there is nothing to continue"):
            sink.emit({"kind": "note", "text": text})
        return _summary(run, {})
    if changes := run.environment_changes():
        other = any(change.startswith("processes:") for change in changes)
        what = "dropout masks and last bits" if other else "last bits"
        notes.append(f"this is not the machine the run began on, its {what} may differ: {', '.join(changes)}")
    ranks.once(run.begin)
    return _learn(run, stream, base, sink, notes)


def plan(config: RunSettings) -> dict[str, Any]:
    """What a run would do: everything validated, examples and parameters counted, memory estimated, nothing written."""
    if not config.data or not config.base:
        raise ConfigError("--dry-run needs --data and --base", "name them; the embedded ones are made by a real run")
    work = workloads.get(config.task)
    stream, base = work.open_inputs(config)
    method, parameters = _prepare(config, stream, base)
    trained = sum(p.numel() for p in parameters.values())
    total = sum(p.numel() for p in base.model.parameters())
    activations = work.activation_bytes(config, base)
    width = 2 if config.train.precision == "bf16" else 4
    # weights, and the adapter with its gradient and two moments of Adam
    memory = {} if activations is None else {"memory_bytes": width * total + 16 * trained + activations}
    return {
        "method": config.method.name,
        "base_parameters": total,
        "trained_parameters": trained,
        "adapted_modules": len({module_of(name) for name in parameters}),
        "method_state_bytes": method.state_bytes(parameters),
        **memory,
        "kernels": {op: implementation for op, (implementation, _) in ops.backends(config.kernels).items()},
        "blocks": work.plan(config, stream, base, work.blocks(config, stream, base)),
    }


def with_embedded(config: RunSettings, sink: Sink) -> RunSettings:
    """Fill in the workload's embedded stream and base where the configuration names none, making them once.

    `ConfigError` where it names one of the two alone.
    """
    work = workloads.get(config.task)
    if bool(config.data) != bool(config.base):
        given, missing = ("data", "base") if config.data else ("base", "data")
        raise ConfigError(
            f"{given}={getattr(config, given)!r} without {missing}", f"give both, or neither for {work.embedded}"
        )
    if config.data:
        return config
    folder = RUNS / work.embedded_folder
    stream, base = folder / "stream", folder / "base"
    work.make_embedded(stream, base, sink)
    return config.model_copy(update={"data": str(stream), "base": str(base)})


def _prepare(config: RunSettings, stream: Any, base: FittedBase) -> tuple[Method, dict[str, torch.nn.Parameter]]:
    """Method and adapter parameters of a run: mistakes in its settings show before anything is written."""
    work = workloads.get(config.task)
    method = build(config.method)
    work.examples(config, stream, base)
    model = create_adapter(base, config.adapter, config.seed, method.parameters, config.kernels)
    if (start := work.starts_from(config)) is not None:
        adapter_block(start)
        start_from(model, start, base)
    parameters = adapter_parameters(model)
    unload(model)
    return method, parameters


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


def _fingerprints(config: RunSettings, stream: Any, base: FittedBase) -> dict[str, str]:
    """Content of all that a run starts from, by name."""
    found = {"data": stream.fingerprint, "base": base.fingerprint, "base weights": weights_hash(base.model)}
    if (start := workloads.get(config.task).starts_from(config)) is not None:
        file = start / ADAPTER_FILE
        if not file.is_file():
            raise DataError(f"no such file: {file}", "restore the adapter that the run starts from")
        found["from_adapter"] = hash_file(file)
    return found


def _verify_inputs(run: Run[Any], stream: Any, base: FittedBase) -> list[str]:
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


def _learn(run: Run[Any], stream: Any, base: FittedBase, sink: Sink, notes: Sequence[str] = ()) -> dict[str, Any]:
    config, work = run.config, run.workload
    sink.emit({"kind": "run", "path": str(run.path)})
    log: Sink = JsonlSink(run.path / "log.jsonl") if ranks.is_main() else Fan([])
    backends = {op: {"implementation": i, "reason": r} for op, (i, r) in ops.backends(config.kernels).items()}
    log.emit({"kind": "kernels", "ops": backends})
    everywhere = Fan([log, sink])
    for text in notes:
        everywhere.emit({"kind": "note", "text": text})

    def provenance(block: int) -> dict[str, Any]:
        return {
            "stream": stream.fingerprint,
            "config": run.config_hash,
            "method": config.method.name,
            "seed": config.seed,
            **work.provenance(config, block),
        }

    with tracking(config.track if ranks.is_main() else "none", run.path, config) as tracked:
        sinks = Fan([everywhere, tracked])
        results = work.learn(run.path, config, stream, base, sinks, run.config_hash, provenance)
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
