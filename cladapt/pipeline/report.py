"""What a run's evaluation says, as metrics.json and as one HTML report."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl

from cladapt.config import EvalConfig
from cladapt.data.schema import Stream
from cladapt.eval.continual import summaries
from cladapt.eval.metrics import summarise, user_metrics
from cladapt.eval.protocol import (
    Measures,
    block_mean_interval,
    continual_summary,
    differences,
    matrix,
    slice_table,
    table,
)
from cladapt.eval.report import Curves, HeatMap, KeyValues, Section, Series, Table, Trace, Traces, render_report
from cladapt.eval.significance import Effect
from cladapt.model.load import Base
from cladapt.model.saved import adapter_provenance
from cladapt.model.spectrum import Spectrum, saved_spectra, summary
from cladapt.run import Run

POINTS = 300
"""Points of a curve over steps, above which neighbours are averaged."""
INTERVALS = (
    "Intervals are 95 %, bootstrap over users. Hits are of items, ties broken at random in expectation; a target that "
    "may not be recommended is a miss for every line. (ID): of the semantic ID alone. log_likelihood: of the item."
)
NEXT = (
    "Over the catalogue at the end of the model's own block: an item born later cannot be recommended, and is a miss."
)
SPECTRUM = (
    "Means over the modules of the singular values of delta W = scale * B A: Frobenius norm, effective rank "
    "(exponential of the entropy of their shares in the sum), largest over mean of those above 0 (1: all are equal), "
    "largest, smallest. own: of what the block itself has learned, without the history in its adapter."
)


def run_report(run: Run, measures: Measures, stream: Stream, base: Base) -> tuple[str, dict[str, Any]]:
    """The HTML page and the content of metrics.json."""
    main = f"HR@{max(measures.config.top_k)}"
    headline = [main, f"NDCG@{max(measures.config.top_k)}", "log_likelihood"]
    spectra = Spectra.read(run)
    cells = summarise(measures.rows, measures.config.top_k, beams=measures.config.beams)
    result: dict[str, Any] = {
        "method": measures.name,
        "stream": stream.fingerprint,
        "base_block": measures.base_block,
        "config": measures.config.model_dump(mode="json"),
        "table": table([measures]),
        "differences": differences([measures]),
        "matrix": cells.to_dicts(),
        "continual": continual_summary(measures, headline),
        "slices": slice_table(measures, stream),
        "ceiling": {str(block): dict(values) for block, values in measures.ceiling.items()},
        "next_block": {
            "table": table([measures.next]) if measures.next else [],
            "differences": differences([measures.next]) if measures.next else [],
        },
        "spectrum": spectra.log(),
    }
    beside = {"frozen": measures.frozen, **measures.beside}
    if measures.current.height:
        beside = {measures.name: measures.current, **beside}
    sections: list[Section] = [
        rows_table("Mean over the later blocks", result["table"], INTERVALS),
        rows_table("Paired differences", result["differences"]),
        *(_heat(measures, metric) for metric in headline if cells[metric].null_count() == 0),
        *block_curves(beside, measures.config, measures.ceiling, headline),
        rows_table("Summaries of R[t][s]", result["continual"]),
        rows_table("Slices of the current blocks", result["slices"]),
        *_next_block(result["next_block"]),
        rows_table("What the method did", regulariser_log(run)),
        step_curves(run),
        *spectra.sections(),
        KeyValues("Semantic IDs", base.sids.collisions()),
        KeyValues(
            "Provenance",
            {
                "run": str(run.path),
                "config": run.config.model_dump(mode="json"),
                "environment": run.environment(),
                "stream": stream.fingerprint,
                "base": base.fingerprint,
            },
        ),
    ]
    return render_report(f"cladapt: {measures.name}, seed {run.config.seed}", sections), result


def _next_block(found: Mapping[str, Any]) -> list[Section]:
    """The tables of the first events of the block after each model's own, where they were tested."""
    if not found["table"]:
        return []
    return [
        rows_table("The next block: each model on the first events of the block after its own", found["table"], NEXT),
        rows_table("Paired differences on the next block", found["differences"]),
    ]


@dataclass(frozen=True)
class StepLog:
    """Logged steps by block, in order; of a step that an interrupted run did again, the last."""

    blocks: Mapping[int, Sequence[Mapping[str, Any]]]
    unreadable: int = 0
    """Lines that are no event, as a killed process may leave."""

    @classmethod
    def read(cls, run: Run) -> "StepLog":
        log = run.path / "log.jsonl"
        if not log.is_file():
            return cls({})
        found: dict[tuple[int, int], dict[str, Any]] = {}
        unreadable = 0
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
                if event["kind"] == "step":
                    found[int(event["block"]), int(event["step"])] = {"loss": None, **event}
            except (ValueError, TypeError, KeyError, RecursionError):
                unreadable += 1
        blocks = groupby(sorted(found), key=lambda key: key[0])
        return cls({block: [found[key] for key in keys] for block, keys in blocks}, unreadable)


def regulariser_log(run: Run) -> list[dict[str, Any]]:
    """Per block: mean and last value of what the method logged at each step."""
    lines = []
    for block, steps in StepLog.read(run).blocks.items():
        line: dict[str, Any] = {"block": block, "steps": len(steps), "loss, last": steps[-1]["loss"]}
        for key in (k for k in steps[-1] if "/" in k):
            values = [step[key] for step in steps if step.get(key) is not None]
            line[f"{key}, mean"] = float(np.mean(values)) if values else None
            line[f"{key}, last"] = steps[-1][key]
        lines.append(line)
    return lines


def step_curves(run: Run) -> Traces:
    """The loss and what the method logged, over the steps of all blocks; see `POINTS`."""
    log = StepLog.read(run)
    blocks = log.blocks
    stride = max(1, math.ceil(sum(map(len, blocks.values())) / POINTS))
    starts = dict(zip(blocks, np.cumsum([0, *map(len, blocks.values())]).tolist(), strict=False))
    steps = [step for each in blocks.values() for step in each]
    logged = dict.fromkeys(key for step in steps for key in step if "/" in key)
    traces = []
    for key in ("loss", *logged):
        lines = []
        for block, each in blocks.items():
            y = np.array([step.get(key) for step in each], dtype=np.float64)  # None becomes NaN
            lines.append(_downsample(starts[block] + 1 + np.arange(len(y)), y, stride))
        traces.append(Trace(key, lines, {start + 1: f"block {block}" for block, start in starts.items()}))
    notes = [f"Each point is the mean of {stride} steps."] if stride > 1 else []
    if log.unreadable:
        notes.append(f"{log.unreadable} lines of log.jsonl are unreadable and left out.")
    return Traces("Step by step", traces, "step over all blocks", " ".join(notes))


def _downsample(x: np.ndarray, y: np.ndarray, stride: int) -> list[tuple[float, float]]:
    """(x, y) averaged over runs of `stride` neighbours; what is not finite is left out."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if not len(x):
        return []
    first = np.arange(0, len(x), stride)
    size = np.diff([*first, len(x)])
    return list(zip(*((np.add.reduceat(v, first) / size).tolist() for v in (x, y)), strict=True))


@dataclass(frozen=True)
class Spectra:
    """Singular values of a run's adapters by block and module; `own`: of what a block added to its history."""

    whole: Mapping[int, Mapping[str, Spectrum]]
    own: Mapping[int, Mapping[str, Spectrum]]

    @classmethod
    def read(cls, run: Run) -> "Spectra":
        beside = {block: path for block, path in run.adapters.items() if adapter_provenance(path).get("history_rank")}
        return cls(
            {block: saved_spectra(path) for block, path in run.adapters.items()},
            {block: saved_spectra(path, own=True) for block, path in beside.items()},
        )

    def log(self) -> list[dict[str, Any]]:
        """Per block: means over the modules, those of its own delta W under `own_` names."""
        lines = []
        for block, found in self.whole.items():
            own = summary(self.own[block]) if block in self.own else {}
            lines.append({"block": block, **summary(found), **{f"own_{name}": value for name, value in own.items()}})
        return lines

    def sections(self) -> list[Section]:
        """The log as a table, and the last block's values as one line per module."""
        if not self.whole:
            return []
        last = max(self.whole)
        drawn = {"delta W": self.whole[last], "own delta W": self.own.get(last, {})}
        traces = [_values(name, found) for name, found in drawn.items() if found]
        title = f"Singular values of the adapter of block {last}"
        return [
            rows_table("Spectrum of the adapters", self.log(), SPECTRUM),
            Traces(title, traces, "singular value", "One line per module; what is 0 is left out."),
        ]


def _values(name: str, found: Mapping[str, Spectrum]) -> Trace:
    lines = [[(i, v) for i, v in enumerate(spectrum.values, 1) if v > 0] for spectrum in found.values()]
    return Trace(name, lines, labels=[module.removeprefix("base_model.model.") for module in found], log=True)


def rows_table(title: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> Table:
    """A table of dicts; an interval stands beside its metric."""
    names = list(dict.fromkeys(column for row in rows for column in row))
    beside = {name: f"{name} 95 %" for name in names}
    ends = {end for end in beside.values() if end in names}
    columns = [c for name in names if name not in ends for c in (name, beside[name]) if c == name or c in ends]
    return Table(title, columns, [[row.get(column) for column in columns] for row in rows], note)


def _heat(measures: Measures, metric: str) -> HeatMap:
    grid = matrix(measures, metric)
    note = ", ".join(f"{name} {mean.value:.4f}" for name, mean in summaries(grid).items() if mean.used)
    values = [[None if np.isnan(v) else float(v) for v in row] for row in grid.values]
    return HeatMap(f"R[t][s]: {metric}", grid.model_blocks, grid.blocks, values, "model after t \\ block s", note)


def block_curves(
    lines: Mapping[str, pl.DataFrame],
    config: EvalConfig,
    ceiling: Mapping[int, Mapping[str, float]],
    metrics: Sequence[str],
) -> list[Curves]:
    """One chart per metric: the mean on each block of each line that has it, and the ceiling where it is known."""
    measured = {name: user_metrics(rows, config.top_k, config.beams) for name, rows in lines.items()}
    blocks = sorted({int(b) for rows in measured.values() for b in rows["block"].unique()})
    charts = []
    for metric in metrics:
        series = [
            Series(name, [_point(rows.filter(pl.col("block") == b), metric, config.bootstrap) for b in blocks])
            for name, rows in measured.items()
        ]
        best = [ceiling.get(b, {}).get(metric) for b in blocks]
        if any(value is not None for value in best):
            series.append(Series("ceiling", best))
        charts.append(Curves(f"{metric} on the block just learned", blocks, series, y_name=metric))
    return charts


def _point(measured: pl.DataFrame, metric: str, resamples: int) -> Effect | float | None:
    """Mean and interval of one block; one user has no interval, and a model may lack the metric."""
    if measured.is_empty() or measured[metric].null_count():
        return None
    return block_mean_interval(measured, metric, resamples) or float(measured[metric].mean())  # type: ignore[arg-type]
