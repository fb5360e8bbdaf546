"""What a run's evaluation says, as metrics.json and as one HTML report."""

import json
from typing import Any

import numpy as np
import polars as pl

from cladapt.artifacts import read_json
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
from cladapt.eval.report import Curves, HeatMap, KeyValues, Section, Series, Table, render_report
from cladapt.model.load import Base
from cladapt.run import Run


def run_report(run: Run, measures: Measures, stream: Stream, base: Base) -> tuple[str, dict[str, Any]]:
    """The HTML page and the content of metrics.json."""
    main = f"HR@{max(measures.config.top_k)}"
    headline = [main, f"NDCG@{max(measures.config.top_k)}", "log_likelihood"]
    cells = summarise(measures.rows, measures.config.top_k, beams=measures.config.beams)
    result: dict[str, Any] = {
        "method": measures.name,
        "base_block": measures.base_block,
        "config": measures.config.model_dump(mode="json"),
        "table": table([measures]),
        "differences": differences([measures]),
        "matrix": cells.to_dicts(),
        "continual": continual_summary(measures, headline),
        "slices": slice_table(measures, stream),
        "ceiling": {str(block): dict(values) for block, values in measures.ceiling.items()},
    }
    sections: list[Section] = [
        _rows("Mean over the later blocks", result["table"], "Intervals are 95 %, bootstrap over users."),
        _rows("Paired differences", result["differences"]),
        *(_heat(measures, metric) for metric in headline if cells[metric].null_count() == 0),
        _curves(measures, main),
        _rows("Summaries of R[t][s]", result["continual"]),
        _rows("Slices of the current blocks", result["slices"]),
        _rows("What the method did", regulariser_log(run)),
        KeyValues("Semantic IDs", base.sids.collisions()),
        KeyValues(
            "Provenance",
            {
                "run": str(run.path),
                "config": run.config.model_dump(mode="json"),
                "environment": read_json(run.path / "environment.json"),
                "stream": stream.fingerprint,
                "base": base.fingerprint,
            },
        ),
    ]
    return render_report(f"cladapt: {measures.name}, seed {run.config.seed}", sections), result


def regulariser_log(run: Run) -> list[dict[str, Any]]:
    """Per block: mean and last value of what the method logged at each step."""
    log = run.path / "log.jsonl"
    if not log.is_file():
        return []
    steps = [e for line in log.read_text(encoding="utf-8").splitlines() if (e := json.loads(line))["kind"] == "step"]
    lines = []
    for block in sorted({e["block"] for e in steps}):
        events = [e for e in steps if e["block"] == block]
        line: dict[str, Any] = {"block": block, "steps": len(events), "loss, last": events[-1]["loss"]}
        for key in (k for k in events[-1] if "/" in k):
            line[f"{key}, mean"] = float(np.mean([e[key] for e in events]))
            line[f"{key}, last"] = events[-1][key]
        lines.append(line)
    return lines


def _rows(title: str, rows: list[dict[str, Any]], note: str = "") -> Table:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Table(title, columns, [[row.get(column) for column in columns] for row in rows], note)


def _heat(measures: Measures, metric: str) -> HeatMap:
    grid = matrix(measures, metric)
    note = ", ".join(f"{name} {mean.value:.4f}" for name, mean in summaries(grid).items() if mean.used)
    values = [[None if np.isnan(v) else float(v) for v in row] for row in grid.values]
    return HeatMap(f"R[t][s]: {metric}", grid.model_blocks, grid.blocks, values, "model after t \\ block s", note)


def _curves(measures: Measures, metric: str) -> Curves:
    blocks = sorted(measures.frozen["block"].unique().to_list())
    named = {measures.name: measures.current, "frozen": measures.frozen, **measures.beside}
    series = [
        Series(name, [_point(rows, b, metric, measures) for b in blocks]) for name, rows in named.items() if rows.height
    ]
    if measures.ceiling:
        series.append(Series("ceiling", [measures.ceiling[b].get(metric) for b in blocks]))
    return Curves(f"{metric} on the block just learned", blocks, series, y_name=metric)


def _point(rows: pl.DataFrame, block: int, metric: str, measures: Measures) -> Any:
    part = rows.filter(pl.col("block") == block)
    return block_mean_interval(user_metrics(part, measures.config.top_k), metric, measures.config.bootstrap)
