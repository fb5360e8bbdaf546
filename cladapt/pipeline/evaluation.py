"""Evaluation of a run, whatever its task: measured, written beside its adapters, and read back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cladapt import ranks
from cladapt.artifacts import atomic_dir, atomic_path, read_record, write_json, write_parquet
from cladapt.config import resolve
from cladapt.errors import ConfigError, DataError
from cladapt.eval.expect import check_expected, read_expected
from cladapt.lock import locked
from cladapt.methods import build
from cladapt.model.adapter import adapted_lm
from cladapt.model.history import unload
from cladapt.model.saved import LEARNED, adapter_provenance, load_adapter
from cladapt.pipeline.report import METRICS, REPORT, run_report
from cladapt.run import Run, latest_run, open_run
from cladapt.train.sinks import Sink
from cladapt.workloads._base import FittedBase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METRICS_SCHEMA_VERSION = 2


def evaluate(
    path: Path | None, settings: Mapping[str, Any], block: int | None, sink: Sink, expect: Path | None = None
) -> dict[str, Any]:
    """Test every adapter of a run (by default the latest) on every block, or on one where the workload knows that.

    `expect`: a file of ranges, see `cladapt.eval.expect`; `CheckFailed`, after all is written, when a value is outside.
    """
    run = open_run(latest_run() if path is None else path)
    strange = [key for key in settings if key not in type(run.config.eval).model_fields]
    if block is not None and not run.workload.one_block:
        strange.append("block")
    if known_elsewhere := [f"--{key.replace('_', '-')}" for key in strange if key in ("block", "top_k", "beams")]:
        raise ConfigError(f"{', '.join(known_elsewhere)}: {run.path} is a run of --task {run.task}", "leave them out")
    config = resolve(type(run.config.eval), {**run.config.eval.model_dump(), **settings}, "eval")
    lines, columns = run.workload.table_names(run.config.method.name, config)
    expected = read_expected(expect, columns, lines) if expect else {}
    with locked(run.path):
        _, result = evaluate_run(run, config, block, sink)
    check_expected(expected, result["table"])
    return {
        "run": str(run.path),
        "method": run.config.method.name,
        "report": str(run.path / REPORT),
        **run.workload.printed(result),
    }


def evaluate_run(run: Run[Any], config: Any, block: int | None, sink: Sink) -> tuple[Any, dict[str, Any]]:
    """Measure a run and write its rows, metrics.json and report.html; the measures and the content of metrics.json."""
    stream, base = run.workload.open_inputs(run.config)
    if block is not None and not 1 <= block <= stream.n_blocks:
        raise ConfigError(f"--block {block}: the stream has blocks 1 to {stream.n_blocks}", "choose one of them")
    run.environment()  # the report tells of it: what is damaged shows now
    measures = measure(run, stream, base, config, block, sink)
    return measures, ranks.once(lambda: _write(run, measures, stream, base))


def measure(run: Run[Any], stream: Any, base: FittedBase, config: Any, block: int | None, sink: Sink) -> Any:
    """What the workload measures of what the run starts from and of its adapters."""
    learned = run.workload.learned_block(run.config, base)
    blocks = run.workload.blocks(run.config, stream, base)
    expected = blocks if build(run.config.method).trains else ()
    if sorted(run.adapters) != list(expected):
        raise DataError(
            f"{run.path} has adapters for the blocks {sorted(run.adapters)}, "
            + (f"the stream needs {list(expected)}" if expected else f"{run.config.method.name} leaves none"),
            f"finish it: cladapt train --resume {run.path}" if expected else "start a new run of this method",
        )
    for _ in _models(run, base, learned):
        pass  # a damaged adapter shows now, not when those before it are measured
    models = _models(run, base, learned)
    measures = run.workload.measure(run.config, config, stream, base, models, learned, block, sink)
    seen = {model: adapter_provenance(folder).get(LEARNED, ()) for model, folder in _adapters(run, learned).items()}
    return run.workload.marked(measures, seen)


def _adapters(run: Run[Any], learned: int) -> dict[int, Path]:
    """The adapter that the run starts from, if any, and its own, by the last block that each has learned."""
    start = run.workload.starts_from(run.config)
    return {**({} if start is None else {learned: start}), **run.adapters}


def _models(run: Run[Any], base: FittedBase, learned: int) -> Iterator[tuple[int, "PreTrainedModel"]]:
    """What the run starts from, then each of its adapters in turn; the base is bare again at the end."""
    if run.workload.starts_from(run.config) is None:
        yield learned, base.model
    for block, folder in _adapters(run, learned).items():
        model = load_adapter(base, folder)  # each anew: their ranks may differ
        yield block, adapted_lm(model)
        unload(model)


def _write(run: Run[Any], measures: Any, stream: Any, base: FittedBase) -> dict[str, Any]:
    """Rows, metrics.json and report.html; the content of metrics.json."""
    html, result = run_report(run, measures, stream, base)  # first: it reads files that may be damaged
    with atomic_dir(run.path / run.workload.rows_folder) as folder:  # whole, so that no earlier rows stay
        for name, frame in run.workload.frames(measures).items():
            write_parquet(folder / f"{name}.parquet", frame)
    write_json(run.path / METRICS, {"schema_version": METRICS_SCHEMA_VERSION, **result})
    with atomic_path(run.path / REPORT) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return result


@dataclass(frozen=True)
class Evaluated:
    """A run with what its evaluation wrote; `stream` is None where the evaluation did not record it."""

    run: Run[Any]
    measures: Any
    stream: str | None

    @classmethod
    def read(cls, run: Run[Any]) -> "Evaluated":
        """Read rows and metrics.json; `DataError` when the run was not evaluated."""
        file, rows, again = run.path / METRICS, run.path / run.workload.rows_folder, f"cladapt eval {run.path}"
        if not file.is_file() or not any(rows.glob("*.parquet")):
            raise DataError(f"{run.path} is not evaluated yet", again)
        metrics = read_record(file, run.workload.record, again)
        try:
            config = resolve(type(run.config.eval), metrics["config"], f"{file}: config")
        except ConfigError as error:  # no mistake of a user: `cladapt eval` wrote this file
            raise DataError(error.message, again) from error
        measures = run.workload.read(rows, metrics, run.config.method.name, config, again)
        return cls(run, measures, metrics.get("stream"))
