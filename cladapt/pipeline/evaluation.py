"""Evaluation of a run, whatever its task: measured where it was not before, and written beside its adapters."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from cladapt import ranks
from cladapt.artifacts import atomic_dir, atomic_path, write_json, write_parquet
from cladapt.config import resolve
from cladapt.errors import ConfigError, DataError
from cladapt.eval.cells import Candidate, Earlier
from cladapt.eval.expect import check_expected, read_expected
from cladapt.eval.perplexity import Text, read_text
from cladapt.lock import locked
from cladapt.methods import build
from cladapt.model.load import Base
from cladapt.model.saved import LEARNED, adapted, adapter_block, adapter_provenance
from cladapt.pipeline.evaluated import Evaluated
from cladapt.pipeline.inputs import open_inputs, verify_inputs
from cladapt.pipeline.language import earlier_text, measure_text, text_windows
from cladapt.pipeline.measured import earlier_of, measured_of, refuse_mixture
from cladapt.pipeline.report import METRICS, REPORT, run_report
from cladapt.run import Run, latest_run, open_run
from cladapt.train.sinks import Sink
from cladapt.workloads._base import FittedBase

__all__ = ["Evaluated", "evaluate", "evaluate_run"]
METRICS_SCHEMA_VERSION = 2


def evaluate(
    path: Path | None,
    settings: Mapping[str, Any],
    block: int | None,
    sink: Sink,
    expect: Path | None = None,
    data: Path | None = None,
    base: Path | None = None,
    everything: bool = False,
    text: Path | None = None,
) -> dict[str, Any]:
    """Test every adapter of a run (by default the latest) on every block, or on one where the workload knows that.

    What an earlier evaluation has measured of the same models, blocks and settings is kept, unless `everything` is to
    be measured anew; with `block`, what it has of the others. `data` and `base`: where the stream and the base are now.
    `text`: a file whose perplexity is measured under every model, for a base that is a language model.
    `expect`: a file of ranges, see `cladapt.eval.expect`; `CheckFailed`, after all is written, when a value is outside.
    """
    run = open_run(latest_run() if path is None else path, data, base)
    strange = [key for key in settings if key not in type(run.config.eval).model_fields]
    if block is not None and not run.workload.one_block:
        strange.append("block")
    if known_elsewhere := [f"--{key.replace('_', '-')}" for key in strange if key in ("block", "top_k", "beams")]:
        raise ConfigError(f"{', '.join(known_elsewhere)}: {run.path} is a run of --task {run.task}", "leave them out")
    config = resolve(type(run.config.eval), {**run.config.eval.model_dump(), **settings}, "eval")
    if text is not None and not run.workload.language:
        raise ConfigError(f"--text {text}: {run.path} is a run of --task {run.task}", "leave it out")
    read = None if text is None else read_text(text)
    lines, columns = run.workload.table_names(run.config.method.name, config)
    expected = read_expected(expect, columns, lines) if expect else {}
    with locked(run.path):
        done = _evaluate(run, config, block, sink, everything, read)
    figures = done.metrics if block is None else run.workload.figures(done.on_block(block), done.stream)
    check_expected(expected, figures["table"])
    return {
        "run": str(run.path),
        "method": run.config.method.name,
        "report": str(run.path / REPORT),
        "cells": {"measured": done.earlier.measured, "kept": done.earlier.kept},
        **run.workload.printed(figures),
        **({} if read is None else {"text": done.metrics["text"]["rows"]}),
    }


def evaluate_run(run: Run[Any], config: Any, block: int | None, sink: Sink) -> tuple[Any, dict[str, Any]]:
    """Measure a run and write its rows, metrics.json and report.html; the measures and the content of metrics.json."""
    done = _evaluate(run, config, block, sink)
    return done.measures, done.metrics


@dataclass(frozen=True)
class _Done:
    """An evaluation: what it measured on which stream, the content of metrics.json, and what it kept."""

    run: Run[Any]
    stream: Any
    measures: Any
    metrics: dict[str, Any]
    earlier: Earlier[Any]

    def on_block(self, block: int) -> Any:
        return self.run.workload.on_block(self.measures, block)


def _evaluate(
    run: Run[Any], config: Any, block: int | None, sink: Sink, everything: bool = False, text: Text | None = None
) -> _Done:
    stream, base = open_inputs(run)
    if block is not None and not 1 <= block <= stream.n_blocks:
        raise ConfigError(f"--block {block}: the stream has blocks 1 to {stream.n_blocks}", "choose one of them")
    verify_inputs(run, base)
    run.environment()  # the report tells of it: what is damaged shows now
    learned = run.workload.learned_block(run.config, base)
    if learned >= stream.n_blocks:
        raise ConfigError(
            f"there is nothing to test {run.path} on: its stream has {stream.n_blocks} blocks, learned by its base",
            f"append the next block: cladapt update LOG --run {run.path}",
        )
    adapters = _checked_adapters(run, stream, base, learned)

    def known() -> Earlier[Any]:
        if block is not None:
            refuse_mixture(run, config, block)
        elif everything:
            return Earlier()
        found = earlier_of(run, stream, base, adapters, learned, config, block, sink)
        return replace(found, blocks=[b for b in found.blocks if b != block]) if everything else found

    if text is not None:
        text_windows(text, cast(Base, base))  # what is no text for the base shows now
    earlier = ranks.once(known)  # the first process may have replaced the files when another comes to read them
    measures = measure(run, stream, base, config, block, sink, earlier)

    def written() -> dict[str, Any]:
        if text is None:
            language = earlier_text(run, base.fingerprint, adapters, sink)
        else:
            language = measure_text(text, cast(Base, base), adapters, sink)
        return _write(run, measures, stream, base, adapters, language)

    metrics = ranks.once(written)
    return _Done(run, stream, measures, metrics, earlier)


def measure(
    run: Run[Any],
    stream: Any,
    base: FittedBase,
    config: Any,
    block: int | None,
    sink: Sink,
    earlier: Earlier[Any] | None = None,
) -> Any:
    """What the workload measures of what the run starts from and of its adapters."""
    learned = run.workload.learned_block(run.config, base)
    models = []
    base_of = partial(run.workload.base_of, run.config, stream, base)
    if run.workload.starts_from(run.config) is None:
        models.append(Candidate(learned, lambda: nullcontext(base.model), base=base_of(None)))
    for after, folder in _adapters(run, learned).items():
        known = adapter_provenance(folder).get(LEARNED, ())
        models.append(Candidate(after, partial(adapted, base, folder), known, base_of(folder)))
    return run.workload.measure(run.config, config, stream, base, models, block, earlier or Earlier(), sink)


def _checked_adapters(run: Run[Any], stream: Any, base: FittedBase, learned: int) -> dict[int, Path]:
    """The adapters that are tested beside the base; `DataError` unless they are those of the stream, and whole."""
    blocks = run.workload.blocks(run.config, stream, base)
    expected = blocks if build(run.config.method).trains else ()
    if sorted(run.adapters) != list(expected):
        raise DataError(
            f"{run.path} has adapters for the blocks {sorted(run.adapters)}, "
            + (f"the stream needs {list(expected)}" if expected else f"{run.config.method.name} leaves none"),
            f"finish it: cladapt train --resume {run.path}" if expected else "start a new run of this method",
        )
    adapters = _adapters(run, learned)
    for block, folder in run.adapters.items():
        run.workload.check_adapter(run.config, folder)
        if (recorded := adapter_block(folder)) != block:
            raise DataError(f"{folder} holds the adapter of block {recorded}", "restore the adapter of its block")
    for folder in adapters.values():  # a damaged adapter shows now, not when those before it are measured
        with adapted(base, folder):
            pass
    return adapters


def _adapters(run: Run[Any], learned: int) -> dict[int, Path]:
    """The adapter that the run starts from, if any, and its own, by the last block that each has learned."""
    start = run.workload.starts_from(run.config)
    return {**({} if start is None else {learned: start}), **run.adapters}


def _write(
    run: Run[Any],
    measures: Any,
    stream: Any,
    base: FittedBase,
    adapters: Mapping[int, Path],
    text: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Rows, metrics.json and report.html; the content of metrics.json."""
    html, result = run_report(run, measures, stream, base, text)  # first: it reads files that may be damaged
    rows = run.path / run.workload.rows_folder
    with atomic_dir(rows) as folder:  # whole, so that no earlier rows stay
        for name, frame in run.workload.frames(measures).items():
            write_parquet(folder / f"{name}.parquet", frame)
    result["measured"] = measured_of(run, stream, base, adapters, rows)
    write_json(run.path / METRICS, {"schema_version": METRICS_SCHEMA_VERSION, **result})
    with atomic_path(run.path / REPORT) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return result
