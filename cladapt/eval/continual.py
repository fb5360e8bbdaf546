"""The continual view of a run: R[t][s], the metric on block s of the model made after block t, and its summaries.

Row `base` is the model before any adaptation. Every summary averages the cells that were measured and says how many
its formula asked for, so that a matrix with holes is never read as a full one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl

from cladapt.errors import DataError

Cells = frozenset[tuple[int, int]]
"""Cells (t, s) of R[t][s]."""


@dataclass(frozen=True)
class Mean:
    """Mean over the `used` terms that exist (NaN when none does); `missing` terms of the formula were not measured."""

    value: float
    used: int
    missing: int


@dataclass(frozen=True)
class Matrix:
    """R[t][s] of one metric: `values` float64 [model_blocks, blocks], NaN where nothing was measured.

    `learned`: cells whose test events the model has learned.
    """

    metric: str
    base: int
    model_blocks: tuple[int, ...]
    blocks: tuple[int, ...]
    values: np.ndarray
    learned: Cells = frozenset()

    def __getitem__(self, cell: tuple[int, int]) -> float:
        """R[t][s] for (t, s); NaN where nothing was measured."""
        t, s = cell
        if t not in self.model_blocks or s not in self.blocks:
            return float("nan")
        return float(self.values[self.model_blocks.index(t), self.blocks.index(s)])

    @property
    def adapted(self) -> tuple[int, ...]:
        """Rows of adapted models: those after `base`."""
        return tuple(t for t in self.model_blocks if t > self.base)

    @classmethod
    def build(cls, summary: pl.DataFrame, metric: str, base: int, learned: Cells = frozenset()) -> "Matrix":
        """From a frame with the columns model_block, block and `metric`, one row per cell; `base` is the row of the
        unadapted model (the last block that the base itself has seen)."""
        lacking = [name for name in ("model_block", "block", metric) if name not in summary.columns]
        if lacking:
            raise DataError(f"the summary lacks the column {lacking[0]!r}", f"it has {', '.join(summary.columns)}")
        twice = summary.filter(pl.struct("model_block", "block").is_duplicated())
        if not twice.is_empty():
            t, s = twice.select("model_block", "block").row(0)
            raise DataError(f"R[{t}][{s}] has several rows in the summary", "summarise by model_block and block alone")
        rows = tuple(sorted(summary["model_block"].unique()))
        columns = tuple(sorted(summary["block"].unique()))
        values = np.full((len(rows), len(columns)), np.nan)
        row = np.searchsorted(rows, summary["model_block"].to_numpy())
        column = np.searchsorted(columns, summary["block"].to_numpy())
        values[row, column] = summary[metric].cast(pl.Float64).fill_null(np.nan).to_numpy()
        return cls(metric, base, rows, columns, values, learned)


def average(matrix: Matrix) -> Mean:
    """Mean over adapted rows t of R[t][t]: quality on the block just learned."""
    return _mean(matrix[t, t] for t in matrix.adapted)


def backward_transfer(matrix: Matrix) -> Mean:
    """Mean over rows 1 <= s < T, T the last row, of R[T][s] - R[s][s]: below zero is forgetting.

    Cells (T, s) that are learned are left out: a model cannot be said to remember what it was shown again.
    """
    if not matrix.model_blocks:
        return _mean(())
    last = matrix.model_blocks[-1]
    return _mean(
        matrix[last, s] - matrix[s, s] for s in matrix.model_blocks[:-1] if s >= 1 and (last, s) not in matrix.learned
    )


def left_out(matrix: Matrix) -> str:
    """Why backward transfer leaves blocks out; empty where it has all."""
    last = max(matrix.model_blocks, default=0)
    blocks = [str(s) for t, s in sorted(matrix.learned) if t == last and s in matrix.blocks]
    if not blocks:
        return ""
    return (
        f"backward transfer without block {', '.join(blocks)}: the last model has learned the held-out events there "
        "(train.held_out=next), so its figure is no test"
    )


def forward_transfer(matrix: Matrix) -> Mean:
    """Mean over blocks s >= base + 2 of R[s-1][s] - R[base][s]: what adapting earlier gives on a block not yet learned.

    At s = base + 1 both terms are the base itself, a structural zero that would only dilute the mean.
    """
    return _mean(matrix[s - 1, s] - matrix[matrix.base, s] for s in matrix.blocks if s >= matrix.base + 2)


def plasticity(matrix: Matrix) -> Mean:
    """Mean over adapted rows t of R[t][t] - R[t-1][t]: what learning block t gives on block t."""
    return _mean(matrix[t, t] - matrix[t - 1, t] for t in matrix.adapted)


def summaries(matrix: Matrix) -> dict[str, Mean]:
    """All four summaries by name."""
    return {
        "average": average(matrix),
        "backward transfer": backward_transfer(matrix),
        "forward transfer": forward_transfer(matrix),
        "plasticity": plasticity(matrix),
    }


def _mean(terms: Iterable[float]) -> Mean:
    values = np.array(list(terms), dtype=np.float64)
    present = values[~np.isnan(values)]
    return Mean(float(present.mean()) if len(present) else float("nan"), len(present), len(values) - len(present))
