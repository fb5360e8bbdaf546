"""Recommendations of several runs in one table, and the charts of one run or of many."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from cladapt.config import EvalConfig
from cladapt.eval import tails
from cladapt.eval.continual import left_out, summaries
from cladapt.eval.metrics import user_metrics
from cladapt.eval.protocol import (
    COUNTS,
    FROZEN,
    Measures,
    backward_effects,
    backward_rows,
    block_mean_interval,
    ceiling_row,
    effects,
    effects_by_block,
    headline,
    matrix,
    metric_columns,
    model_row,
    pool,
)
from cladapt.eval.report import Curves, HeatMap, Section, Series, Table, rows_table
from cladapt.eval.significance import Effect
from cladapt.workloads._base import Comparison
from cladapt.workloads._recommend_rows import NEXT

NEXT_TITLE = "The next block: each model on the first events of the block after its own"
NEXT_NOTE = (
    "Over the catalogue at the end of the model's own block: an item born later cannot be recommended, and is a miss."
)
NEW_ITEMS = "new_items"
NEW_ITEMS_TITLE = "New items: tests whose target first occurs in the tested block"
NOT_MEASURED = "evaluated before head and tail were measured: give `cladapt eval` again, which keeps what it has"
BySeed = Mapping[int, pl.DataFrame]


def new_items(measures: Measures) -> Measures:
    """The tests whose target first occurs in the tested block; best reachable scores are not known for them."""
    new = pl.col("new_item")
    counted = {name: rows.filter(new) for name, rows in measures.references.items()}
    return replace(measures, rows=measures.rows.filter(new), references=counted, ceiling={}, next=None)


@dataclass(frozen=True)
class Lines(Comparison[Measures]):
    """Rows by name and seed: the groups, their frozen bases, the counts-only models."""

    tails_note = tails.NOTE
    is_part: bool = False
    """Whether the rows are a part of those of another table, which has no parts of its own."""

    @cached_property
    def rows(self) -> Mapping[str, BySeed]:
        """Per-user rows of every line."""
        groups = {g.name: {seed: each.own for seed, each in g.by_seed.items()} for g in self.groups}
        lines: dict[str, dict[int, pl.DataFrame]] = {**groups}
        trained = {g.name for g in self.groups if any(each.current.height for each in g.by_seed.values())}
        frozen = {group.base: group.name for group in self.groups if group.name not in trained}
        counts: dict[str, dict[int, pl.DataFrame]] = {}
        for group in self.groups:
            first = FROZEN not in {*frozen.values(), *lines}
            name = frozen.setdefault(group.base, FROZEN if first else f"{FROZEN} ({group.name})")
            for seed, each in group.by_seed.items():
                lines.setdefault(name, {}).setdefault(seed, each.frozen)
                for model, rows in each.references.items():
                    counts.setdefault(model, {}).setdefault(seed, rows)
        return {**lines, **counts}

    @cached_property
    def backward(self) -> Mapping[str, BySeed]:
        """Per-user backward transfer of the groups for which it was measured."""
        found = {g.name: {s: backward_rows(e, self._transferred) for s, e in g.by_seed.items()} for g in self.groups}
        return {
            name: {seed: rows for seed, rows in by_seed.items() if rows is not None}
            for name, by_seed in found.items()
            if all(rows is not None for rows in by_seed.values())
        }

    @property
    def further(self) -> "Mapping[str, tuple[str, Lines]]":
        """The same groups on the first events of the block after each model's own, and on new items alone; each where
        all have it."""
        if self.is_part:
            return {}
        parts = {
            NEXT: (NEXT_TITLE, self._part(lambda each: each.next)),
            NEW_ITEMS: (NEW_ITEMS_TITLE, self._part(new_items)),
        }
        return {name: (title, part) for name, (title, part) in parts.items() if part is not None}

    def _part(self, choose: Callable[[Measures], Measures | None]) -> "Lines | None":
        """The groups with a part of what was measured; None unless every run has rows there."""
        groups = []
        for group in self.groups:
            chosen = {seed: part for seed, each in group.by_seed.items() if (part := choose(each)) is not None}
            if chosen.keys() != group.by_seed.keys() or any(part.own.is_empty() for part in chosen.values()):
                return None
            groups.append(replace(group, by_seed=chosen))
        return Lines(groups, is_part=True)

    @property
    def _transferred(self) -> tuple[str, str]:
        hits, _, likelihood = headline(self.config)
        return hits, likelihood

    @property
    def ceiling(self) -> Mapping[int, Mapping[str, float]]:
        """The best reachable score per block, where it is known."""
        known = (each.ceiling for group in self.groups for each in group.by_seed.values())
        return next((found for found in known if found), {})

    @property
    def names(self) -> Sequence[str]:
        return list(self.rows)

    @property
    def references(self) -> Sequence[str]:
        return [name for name in COUNTS if name in self.rows]

    def summary(self) -> list[dict[str, Any]]:
        """One row per line, seeds pooled, and the ceiling where it is known; counting has no seed."""
        rows = [
            model_row(name, pool(by_seed), self.config) | ({} if name in COUNTS else {"seeds": len(by_seed)})
            for name, by_seed in self.rows.items()
        ]
        return [*rows, ceiling_row(self.ceiling, self.config)] if self.ceiling else rows

    def effects(self, name: str, reference: str) -> dict[str, Effect]:
        if self.rows[name].keys() != self.rows[reference].keys():
            return {}
        one, two = (pool(self.rows[line]) for line in (name, reference))
        found = effects(one, two, self.config, metric_columns(self.config))
        transferred = [pool(self.backward[line]) for line in (name, reference) if line in self.backward]
        if len({tuple(rows["block"].unique().sort()) for rows in transferred}) == 1 and len(transferred) == 2:
            one, two = transferred
            transfers = backward_effects(one, two, self.config, self._transferred)
            found |= {f"backward {metric}": effect for metric, effect in transfers.items()}
        return {metric: effect for metric, effect in found.items() if effect is not None}

    def effects_by_block(self, name: str, reference: str) -> dict[tuple[str, str], Effect]:
        if self.rows[name].keys() != self.rows[reference].keys():
            return {}
        one, two = (pool(self.rows[line]) for line in (name, reference))
        return effects_by_block(one, two, self.config, self._transferred)

    @cached_property
    def _placed(self) -> "Lines | None":
        """The groups with where each target stands among the items; None for a part, and where a run did not tell."""
        return None if self.is_part else self._part(tails.placed)

    def tails(self) -> list[dict[str, Any]]:
        """One row per line and group, seeds pooled; where a run lacks them, a row for each such run instead."""
        if self._placed is not None:
            lines = self._placed.rows.items()
            return [row for name, by_seed in lines for row in tails.tail_rows(name, pool(by_seed), self.config)]
        if self.is_part:
            return []
        return [
            {"model": group.name, "seed": seed, "missing": NOT_MEASURED}
            for group in self.groups
            for seed, each in group.by_seed.items()
            if each.places is None
        ]

    def effects_by_tail(self, name: str, reference: str) -> Mapping[tuple[str, str], Effect]:
        if self._placed is None or self.rows[name].keys() != self.rows[reference].keys():
            return {}
        one, two = (pool(self._placed.rows[line]) for line in (name, reference))
        return tails.tail_effects(one, two, self.config)

    def charts(self) -> list[Section]:
        return [*block_curves({name: pool(rows) for name, rows in self.rows.items()}, self.config, self.ceiling)]


def heat_map(measures: Measures, metric: str) -> HeatMap:
    """R[t][s] of one metric with its summaries."""
    grid = matrix(measures, metric)
    notes = [", ".join(f"{name} {mean.value:.4f}" for name, mean in summaries(grid).items() if mean.used)]
    if why := left_out(grid):
        notes += ["struck through: the model has learned the held-out events of the block", why]
    values = [[None if np.isnan(v) else float(v) for v in row] for row in grid.values]
    corner = "model after t \\ block s"
    title = f"R[t][s]: {metric}"
    return HeatMap(title, grid.model_blocks, grid.blocks, values, corner, "; ".join(notes), grid.learned)


def next_block_tables(found: Mapping[str, Any]) -> list[Table]:
    """The tables of the first events of the block after each model's own, where they were tested."""
    if not found["table"]:
        return []
    return [
        rows_table(NEXT_TITLE, found["table"], NEXT_NOTE),
        rows_table("Paired differences on the next block", found["differences"]),
    ]


def block_curves(
    lines: Mapping[str, pl.DataFrame], config: EvalConfig, ceiling: Mapping[int, Mapping[str, float]]
) -> list[Curves]:
    """One chart per headline metric: each line's mean on each block, and the ceiling where it is known."""
    measured = {name: user_metrics(rows, config.top_k, config.beams) for name, rows in lines.items()}
    blocks = sorted({int(b) for rows in measured.values() for b in rows["block"].unique()})
    charts = []
    for metric in headline(config):
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
