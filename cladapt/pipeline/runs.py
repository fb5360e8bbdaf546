"""The life of a run, whatever its task: it begins from checked inputs, learns block after block, and is continued."""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cladapt import ops, ranks, workloads
from cladapt.artifacts import recover
from cladapt.config import RunSettings, describe, resolve
from cladapt.errors import ConfigError, DataError
from cladapt.lock import locked
from cladapt.methods import Context, Method, build
from cladapt.model.adapter import adapter_parameters, create_adapter
from cladapt.model.anchors import module_of
from cladapt.model.history import unload
from cladapt.model.saved import adapter_block, adapter_provenance, start_from
from cladapt.pipeline.inputs import fingerprints, open_inputs, verify_inputs
from cladapt.run import FOLDERS, RUNS, Run, new_run_path, open_run
from cladapt.train.checkpoint import clear_checkpoints
from cladapt.train.loop import FitResult
from cladapt.train.memory import weight_bytes
from cladapt.train.sinks import Fan, JsonlSink, Sink
from cladapt.train.track import require, tracking
from cladapt.workloads._base import FittedBase

if TYPE_CHECKING:
    from peft import PeftModel


def train(config: RunSettings, out: Path | None, sink: Sink) -> dict[str, Any]:
    """Start a run: adapt the base to every block that it has not learned.

    Where there is none yet, the run waits for the blocks that the stream will have.
    """
    if out is not None:
        ranks.once(lambda: Run.refuse_existing(out))
    config = settled(with_embedded(config, sink))
    work = workloads.get(config.task)
    stream, base = work.open_inputs(config)
    with _adapted(config, stream, base):  # mistakes show before anything is written
        pass
    require(config.track)
    notes = []
    if not work.blocks(config, stream, base):
        notes.append(
            f"the base has learned all blocks of the stream, 1 to {stream.n_blocks}: the run waits for the next"
        )
    config = work.settled(config, base)
    inputs = fingerprints(config, stream, base)
    path = ranks.once(lambda: out or new_run_path(config.method.name, config.seed))
    with locked(path):
        run = ranks.once(lambda: Run.create(path, config, inputs))
        return _learn(run, stream, base, sink, notes)


def resume(
    path: Path,
    sink: Sink,
    asked: Mapping[str, Any] | None = None,
    task: str | None = None,
    data: Path | None = None,
    base: Path | None = None,
) -> dict[str, Any]:
    """Continue an interrupted run exactly where its last checkpoint or finished block stands.

    `asked`: settings given with --resume, nested as in a recipe; they must be the run's own, and so must `task`.
    `data` and `base`: where the stream and the base are now. The stream may have grown, which changes nothing.
    `DataError` when an input is not what it was when the run began. A finished run is left as it is.
    """
    run = open_run(path, data, base)
    if task not in (None, run.task):
        raise ConfigError(f"--task {task}: {path} is a run of --task {run.task}", "leave out --task")
    _refuse_changes(run, asked or {})
    with locked(run.path):
        stream, opened = open_inputs(run, learning=True)
        notes = verify_inputs(run, opened)
        return _finish(run, stream, opened, sink, notes, f"{run.path} is finished: there is nothing to continue")


def continue_run(
    path: Path,
    sink: Sink,
    *,
    data: Path | None = None,
    base: Path | None = None,
    held_out: str | None = None,
    ids: int | None = None,
) -> dict[str, Any]:
    """Learn the blocks that the stream has and the run has not, by the run's own settings, as if it had begun with all.

    `data` and `base`: where the stream and the base are now. `held_out`: what `train.held_out` is for the new blocks.
    `ids`: the version of the stream's IDs that they are learned by; `ConfigError` without it where the stream's is not
    the run's.
    An unfinished run is finished on the way. `DataError` for a stream that does not begin with what the run has
    learned, and for another base. Where nothing is new the run stays as it is.
    """
    # one reading for all processes: the first may have changed the file when another comes to read it
    run = ranks.once(lambda: open_run(path, data, base))
    if held_out is not None and "held_out" not in type(run.config.train).model_fields:
        raise ConfigError(f"--held-out {held_out}: {path} is a run of --task {run.task}", "leave out --held-out")
    if ids is not None and "ids" not in type(run.config).model_fields:
        raise ConfigError(f"--ids {ids}: {path} is a run of --task {run.task}", "leave out --ids")
    with locked(run.path):
        if "data" not in run.inputs:
            raise DataError(
                f"{run.path} does not say which stream it has learned, so none is known to begin with it",
                "start a new run",
            )
        stream, opened = run.workload.open_inputs(run.config)
        home = _home(run, stream)
        notes = verify_inputs(run, opened)
        run, said = _with_new_blocks(run, stream, opened, home, held_out, ids)
        if not said:
            _refuse_late_change(run, stream, opened, held_out, ids)
        finished = f"{run.path} has all {stream.n_blocks} blocks of the stream: nothing is new"
        return _finish(run, stream, opened, sink, [*notes, *said], finished)


def _home(run: Run[Any], stream: Any) -> int:
    """Blocks of the stream that the run is to learn already."""
    work = run.workload
    known = work.prefix(stream, run.inputs["data"])
    if known is not None:
        return int(known.n_blocks)
    size = "1 block" if stream.n_blocks == 1 else f"{stream.n_blocks} blocks"
    there = f"{run.config.data} is the stream {stream.fingerprint} of {size}"
    give = "give the stream that the run has learned, or a longer one: --data DIR"
    if stream.n_blocks < (last := max(run.adapters, default=0)):
        raise DataError(f"{there}, {run.path} has learned block {last}", give)
    made = {block: adapter_provenance(folder).get("stream", "") for block, folder in run.adapters.items()}
    common = [block for block, recorded in made.items() if work.prefix(stream, recorded) is not None]
    if common:
        raise DataError(
            f"{there}: it has block {max(common)} as {run.path} has learned it, but not what the run learned or was to "
            f"learn after it, up to the stream {run.inputs['data']}",
            give,
        )
    raise DataError(
        f"{there}, which does not begin with the stream {run.inputs['data']} that {run.path} has learned",
        f"{give}; or start a new run",
    )


def check_version(run: Run[Any], ids: int | None) -> None:
    """`ConfigError` where the stream's IDs are not of the version that the run learns by, and none is asked for."""
    before, now = run.config_at(sys.maxsize), run.workload.version(run.config)
    if ids is None and now and before.ids != now:
        raise ConfigError(
            f"{run.path} has learned by version {before.ids} of the IDs, {run.config.data} is at version {now}",
            f"--ids {now} learns the new blocks by the new IDs, --ids {before.ids} goes on by the old ones; or go "
            f"back: cladapt tokens refresh {run.config.data} --back",
        )


def _with_new_blocks(
    run: Run[Any], stream: Any, base: FittedBase, home: int, held_out: str | None, ids: int | None
) -> tuple[Run[Any], list[str]]:
    """The run, told of the blocks after `home` before any is learned; a sentence for each thing that changes."""
    if home == stream.n_blocks:
        return run, []
    new = range(home + 1, stream.n_blocks + 1)
    said = [f"new in the stream: {_named(new)}"]
    check_version(run, ids)
    changes, versions = {}, {}
    if ids is not None and (known := run.config_at(new[0]).ids) != ids:
        asked = run.config.model_copy(update={"ids": ids})
        run.workload.reading(asked, stream, base, stream.n_blocks)
        versions[new[0]] = ids
        said.append(f"version {ids} of the IDs from block {new[0]} on, it was {known}")
    if held_out is not None and (before := run.config_at(new[0]).train.held_out) != held_out:
        changes[new[0]] = held_out
        said.append(f"train.held_out={held_out} from block {new[0]} on, it was {before}")
    return ranks.once(lambda: run.go_on(stream.fingerprint, changes, versions)), said


def _refuse_late_change(run: Run[Any], stream: Any, base: FittedBase, held_out: str | None, ids: int | None) -> None:
    """`ConfigError` where blocks that the run was to learn already are left, and would be learned in another way."""
    if not build(run.config.method).trains:
        return
    left = [block for block in run.workload.blocks(run.config, stream, base) if block not in run.adapters]
    own = [run.config_at(block) for block in left]
    changes: Sequence[tuple[str, str, Any, Sequence[Any]]] = (
        ("--held-out", "train.held_out", held_out, [config.train.held_out for config in own] if held_out else ()),
        ("--ids", "ids", ids, [config.ids for config in own] if ids else ()),
    )
    for option, key, asked, then in changes:
        if any(value != asked for value in then):
            raise ConfigError(
                f"{option} {asked}: {run.path} was to learn {_named(left)} with {key}={then[0]}",
                f"finish it first: cladapt train --resume {run.path}",
            )


def _named(blocks: Sequence[int]) -> str:
    return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"


def _finish(
    run: Run[Any], stream: Any, base: FittedBase, sink: Sink, notes: Sequence[str], finished: str
) -> dict[str, Any]:
    """Learn what is left; where nothing is, only the notes are said, and `finished`."""
    notes = [*notes, *ranks.once(lambda: _mend(run))]
    for folder in run.adapters.values():
        run.workload.check_adapter(run.config, folder)
    if not build(run.config.method).trains or set(run.workload.blocks(run.config, stream, base)) <= set(run.adapters):
        for text in (*notes, finished):
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
        stream, base = _embedded(config)
        raise ConfigError(
            "--dry-run needs --data and --base",
            f"name them; a run without makes embedded ones: --data {stream} --base {base}",
        )
    config = settled(config)
    work = workloads.get(config.task)
    stream, base = work.open_inputs(config)
    blocks = work.blocks(config, stream, base)
    weights = weight_bytes(base.model, ranks.ranks() if getattr(config, "sharding", "none") == "full" else 1)
    total = sum(p.numel() for p in base.model.parameters())
    with _adapted(config, stream, base) as (method, model):
        parameters = adapter_parameters(model)
        state = method.state_bytes(parameters)
        activations = work.activation_bytes(config, stream, base, model, blocks)
    if method.trains and not blocks:
        warnings.warn(
            f"{config.base} has learned all {stream.n_blocks} blocks of {config.data}: nothing is left to learn",
            stacklevel=2,
        )
    trained = sum(p.numel() for p in parameters.values())
    # in float32: the adapter as it is, as it began and as it was best, and two moments of Adam
    memory = {"weights": weights, "adapter": 12 * trained, "optimiser": 8 * trained, "method": state}
    estimate = {}
    if activations is not None:
        memory["activations"] = activations
        estimate = {"memory_bytes": sum(memory.values()), "memory": memory}
    return {
        "method": config.method.name,
        "base_parameters": total,
        "trained_parameters": trained,
        "adapted_modules": len({module_of(name) for name in parameters}),
        "method_state_bytes": state,
        **estimate,
        "kernels": {op: implementation for op, (implementation, _) in ops.backends(config.kernels).items()},
        "blocks": work.plan(config, stream, base, blocks),
    }


def with_embedded(config: RunSettings, sink: Sink) -> RunSettings:
    """Fill in the workload's embedded stream and base where the configuration names none, making them once.

    `ConfigError` where it names one of the two alone, unless the workload makes the base of a stream itself.
    """
    work = workloads.get(config.task)
    if config.data and not config.base and (own := work.own_base(config, RUNS / "bases", sink)) is not None:
        return config.model_copy(update={"base": str(own)})
    if bool(config.data) != bool(config.base):
        given, missing = ("data", "base") if config.data else ("base", "data")
        raise ConfigError(
            f"{given}={getattr(config, given)!r} without {missing}", f"give both, or neither for {work.embedded}"
        )
    if config.data:
        return config
    stream, base = _embedded(config)
    work.make_embedded(config, stream, base, sink)
    return config.model_copy(update={"data": str(stream), "base": str(base)})


def _embedded(config: RunSettings) -> tuple[Path, Path]:
    """Where the embedded stream and base of a configuration are kept."""
    work = workloads.get(config.task)
    folder = RUNS / work.embedded_folder
    return folder / "stream", folder / work.embedded_base(config)


def settled(config: RunSettings) -> RunSettings:
    """The configuration with the precision that `auto` is on this machine; a run keeps it wherever it goes on.

    `ConfigError` where the base is to be kept in a form that the method cannot work with.
    """
    forms = {key: getattr(config, key, "none") for key in ("quantisation", "sharding")}
    asked = [f"{key}={form}" for key, form in forms.items() if form != "none"]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)}: bitsandbytes' packed weights are not cut", "use one of them")
    for what in asked:
        method, name = build(config.method), config.method.name
        if method.weight_gradients:
            raise _unfit(what, f"{name} takes gradients of the base's own weights, which are not there as a whole")
        if method.parameters == "weights":
            raise _unfit(what, f"{name} learns matrices as large as the base's own, which saves no memory")
        if method.flattens and what.startswith("quantisation"):
            raise _unfit(what, f"{name} perturbs the factors of plain linears, not of packed weights")
    precision = ranks.once(lambda: ops.precision(config.train.precision))
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def _unfit(what: str, reason: str) -> ConfigError:
    return ConfigError(f"{what}: {reason}", f"use {what.split('=')[0]}=none, or another method")


@contextmanager
def _adapted(config: RunSettings, stream: Any, base: FittedBase) -> Iterator[tuple[Method, "PeftModel"]]:
    """The run's method and its adapted model, which is the base again afterwards; mistakes in the settings show."""
    work = workloads.get(config.task)
    method = build(config.method)
    work.examples(config, stream, base)
    model = create_adapter(base, config.adapter, config.seed, method.parameters, config.kernels, method.flattens)
    if (start := work.starts_from(config)) is not None:
        adapter_block(start)
        start_from(model, start, base)
    first = min(work.blocks(config, stream, base), default=1)
    method.check(Context.of(model, first, {}, config.kernels))
    work.check_model(config, method, model)
    yield method, model
    unload(model)


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
        if wanted[key] != value
        and not (key in FOLDERS and value and _same_folder(wanted[key], value))
        and not (key == "train.precision" and wanted[key] == "auto")  # which is what the run made of it
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
            "stream": work.fingerprint(stream, block),
            "config": run.config_hash,
            "method": config.method.name,
            "seed": config.seed,
            **work.provenance(run.config_at(block), block),
            **work.reading(run.config_at(block), stream, base, block),
        }

    with tracking(config.track if ranks.is_main() else "none", run.path, config) as tracked:
        sinks = Fan([everywhere, tracked])
        results = work.learn(run.path, config, stream, base, sinks, run.config_hash, provenance, run.config_at)
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
        "next": f"cladapt eval {run.path}" if run.adapters else f"cladapt update LOG --run {run.path}",
        "blocks": blocks,
    }
