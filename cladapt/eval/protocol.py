"""The evaluation protocol: which model meets which block, tables and summaries, and the counts-only rows.

The model of block t is tested on the held-out events of every block s, and on the first events of block t + 1, which is
what it meets when it is served.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import polars as pl

from cladapt.config import EvalConfig
from cladapt.data.histories import training_sequences
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError
from cladapt.eval.baselines import evaluate_counts
from cladapt.eval.cases import Cases
from cladapt.eval.cells import Candidate, Earlier
from cladapt.eval.continual import Cells, Matrix, left_out, summaries
from cladapt.eval.metrics import head_frequency, slices, summarise, user_metrics
from cladapt.eval.significance import Effect, bounds, compare, describe, interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cladapt.eval.prior import Priors

OWN_HISTORY = "own history"
COUNTS = ("block popularity", "markov", OWN_HISTORY)
"""The counts-only models of a table; the last only where seen items may be recommended."""
FROZEN = "frozen"
CEILING = "ceiling"
TESTS, NOT_ALLOWED = "tests", "targets not allowed"
"""Columns of a table: rows (a user in a block, of each seed), and those whose target may not be recommended, misses for
every line alike."""


class Tester(Protocol):
    """Tests models on the blocks of one stream."""

    stream: Stream
    config: EvalConfig

    def cases(self, block: int, first: bool = False) -> Cases:
        """The held-out events of a block, or the first events of all its users."""

    def rows(self, lm: "PreTrainedModel", model_block: int, block: int, first: bool = False) -> pl.DataFrame:
        """One row per user (schema ROWS) for a model made after `model_block`, on the same."""

    def priors(self) -> "Priors | None":
        """How probable the unadapted base finds items; None where it does not know them but by their rows."""


@dataclass(frozen=True)
class Measures:
    """Per-user rows of one run's models and of the reference models.

    `rows`: the run's own, every model block t (the base's row included) on every tested block s. `references`: rows of
    models that only count, on the blocks they were made for. `ceiling`: the best reachable score per block, where it
    is known. `lag`: how far the tested block is ahead of the model that is judged by it. `next`: the same run on the
    first events of the block after each model's, with a lag of 1; None where it was not measured. `learned`: the cells
    (t, s) whose held-out events the model of block t has learned. `places`: where the targets stand among the items of
    their block, see `cladapt.eval.tails.PLACES`; None for an evaluation that did not measure it.
    """

    name: str
    rows: pl.DataFrame
    references: Mapping[str, pl.DataFrame]
    base_block: int
    config: EvalConfig
    ceiling: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    lag: int = 0
    next: "Measures | None" = None
    learned: Cells = frozenset()
    places: pl.DataFrame | None = None

    @property
    def current(self) -> pl.DataFrame:
        """The run's rows on the block each model is judged by: the one it was just adapted to, or the next."""
        adapted = pl.col("model_block") > self.base_block
        return self.rows.filter(adapted & (pl.col("model_block") + self.lag == pl.col("block")))

    @property
    def frozen(self) -> pl.DataFrame:
        """The base's rows on the later blocks."""
        later = pl.col("block") > self.base_block + self.lag
        return self.rows.filter((pl.col("model_block") == self.base_block) & later)

    @property
    def own(self) -> pl.DataFrame:
        """What the run is judged by: its current rows, or the base's where nothing was adapted."""
        return self.current if self.current.height else self.frozen


def measure_run(
    evaluator: Tester,
    models: Sequence[Candidate],
    blocks: Sequence[int],
    note: Callable[[str], None],
    earlier: "Earlier[Measures] | None" = None,
    asked: Collection[int] | None = None,
    others: Mapping[int, Tester] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows of the base, then of each adapted model, on the held-out events of `blocks`, and on the first events of
    those of them that come next.

    What `earlier` has of these is kept; of the rest the blocks in `asked`, by default all, are measured. `others`: the
    evaluators of models, by their block, that read other IDs than the first.
    """
    config = evaluator.config
    earlier, asked = earlier or Earlier(), blocks if asked is None else asked
    found: dict[bool, list[pl.DataFrame]] = {False: [], True: []}
    for index, model in enumerate(models):
        own = (others or {}).get(model.block, evaluator)
        with ExitStack() as stack:
            lm: PreTrainedModel | None = None
            for block, first in _cells(config, model.block, blocks, base=index == 0):
                rows = _kept(earlier, model.block, block, first)
                if rows is None and block in asked:
                    lm = stack.enter_context(model.open()) if lm is None else lm
                    rows = own.rows(lm, model.block, block, first)
                    earlier.measured += 1
                    what = "and on the first events of" if first else f"tested the model of block {model.block} on"
                    note(f"{what} block {block}: {rows.height} users")
                if rows is not None:
                    found[first].append(rows)
    if not found[False]:
        raise ConfigError(
            f"no model is tested on {sorted(asked)} with scope=current", "use scope=matrix, or a later block"
        )
    # one piece, so that sums are the same to the last bit whether rows were measured or kept
    whole = pl.concat(found[False], rechunk=True)
    return whole, pl.concat(found[True], rechunk=True) if found[True] else whole.clear()


def _cells(config: EvalConfig, model: int, blocks: Sequence[int], base: bool) -> Iterator[tuple[int, bool]]:
    """The blocks that a model is tested on, and whether on their first events; the base's rows are the frozen line."""
    for block in blocks:
        if config.scope == "matrix" or (block > model if base else block == model):
            yield block, False
        if tests_next(config) and (block > model + 1 if base else block == model + 1):
            yield block, True


def tests_next(config: EvalConfig) -> bool:
    """Whether first events are tested: they come after a block, so nothing may be chosen by them."""
    return config.next_block and config.targets == "test"


def measure_counts(
    evaluator: Tester, blocks: Sequence[int], lag: int = 0, earlier: "Earlier[Measures] | None" = None
) -> dict[str, pl.DataFrame]:
    """Rows of the counts-only models on the held-out events of each block, counted up to it; with a lag of 1 on the
    first events, counted up to the block before. What `earlier` has is not counted again."""
    config, stream = evaluator.config, evaluator.stream
    found = {}
    for name in COUNTS:
        if name == OWN_HISTORY and config.exclude_seen:
            continue
        frames = []
        for block in blocks:
            rows = _kept_counts(earlier or Earlier(), name, block, lag)
            if rows is None:
                cases = evaluator.cases(block, first=lag > 0)
                rows = evaluate_counts(stream, name, block - lag, cases, config.exclude_seen, config.beams)
            frames.append(rows)
        if frames:
            found[name] = pl.concat(frames, rechunk=True)
    return found


def _kept(earlier: "Earlier[Measures]", model: int, block: int, first: bool) -> pl.DataFrame | None:
    """The rows of a cell that an earlier evaluation has; None where it has none that hold."""
    measures = earlier.of(model, block)
    measures = measures.next if measures and first else measures
    if measures is None:
        return None
    rows = measures.rows.filter((pl.col("model_block") == model) & (pl.col("block") == block))
    earlier.kept += not rows.is_empty()
    return None if rows.is_empty() else rows


def _kept_counts(earlier: "Earlier[Measures]", name: str, block: int, lag: int) -> pl.DataFrame | None:
    """The same of a model that only counts, which the stream alone decides."""
    measures = earlier.on(block)
    measures = measures.next if measures and lag else measures
    if measures is None or name not in measures.references:
        return None
    rows = measures.references[name].filter(pl.col("block") == block)
    return None if rows.is_empty() else rows


def on_block(measures: Measures, block: int) -> Measures:
    """What was measured on one block."""
    here = pl.col("block") == block
    return replace(
        measures,
        rows=measures.rows.filter(here),
        references={name: rows.filter(here) for name, rows in measures.references.items()},
        ceiling={b: best for b, best in measures.ceiling.items() if b == block},
        next=measures.next and (after if (after := on_block(measures.next, block)).rows.height else None),
    )


def metric_columns(config: EvalConfig) -> list[str]:
    """The metrics of a table, item level."""
    return [*(f"{name}@{k}" for name in ("HR", "NDCG") for k in config.top_k), "MRR", "log_likelihood"]


def headline(config: EvalConfig) -> tuple[str, str, str]:
    """The metrics of charts and summaries."""
    return f"HR@{max(config.top_k)}", f"NDCG@{max(config.top_k)}", "log_likelihood"


def table_columns(config: EvalConfig) -> list[str]:
    """All numbers of a line of the table."""
    return ["users", TESTS, NOT_ALLOWED, *metric_columns(config), f"HR@{max(config.top_k)} (ID)"]


def model_row(name: str, rows: pl.DataFrame, config: EvalConfig) -> dict[str, Any]:
    """One line of a table: each metric as the mean over blocks of block means, with intervals over users for two."""
    measured = user_metrics(rows, config.top_k, config.beams)
    main = f"HR@{max(config.top_k)}"
    columns = [*metric_columns(config), f"{main} (ID)"]
    of_blocks = measured.group_by("block").agg(pl.col(columns).mean()).sort("block")
    means_of_blocks = of_blocks.select(pl.col(columns).mean()).row(0, named=True)
    row: dict[str, Any] = {"model": name, "users": rows["user"].n_unique(), TESTS: rows.height}
    row |= {NOT_ALLOWED: int((~rows["allowed"]).sum()), **means_of_blocks}
    for column in (main, "log_likelihood"):
        row[f"{column} 95 %"] = bounds(block_mean_interval(measured, column, config.bootstrap))
    return row


def pool(by_seed: Mapping[int, pl.DataFrame]) -> pl.DataFrame:
    """Rows of several seeds as one frame with a column `seed`; its mean is the mean over seeds."""
    return pl.concat([rows.with_columns(seed=pl.lit(seed)) for seed, rows in sorted(by_seed.items())])


def block_mean_interval(measured: pl.DataFrame, column: str, resamples: int) -> Effect | None:
    """Interval of the mean over blocks of the block means, of rows that have it; None for fewer than two users."""
    measured = measured.drop_nulls(column)
    if measured["user"].n_unique() < 2:
        return None
    return interval(block_weighted(measured, column)[column].to_numpy(), measured["user"].to_numpy(), resamples)


def block_weighted(measured: pl.DataFrame, column: str) -> pl.DataFrame:
    """`column` weighted by the inverse of its block's size, so that the mean over rows is the mean of block means."""
    size = pl.len().over("block")
    return measured.with_columns(pl.col(column) * measured.height / (pl.col("block").n_unique() * size))


def ceiling_row(ceiling: Mapping[int, Mapping[str, float]], config: EvalConfig) -> dict[str, Any]:
    """The table line of the best reachable score: mean over blocks."""
    names = metric_columns(config)
    values = {n: [block[n] for block in ceiling.values() if n in block] for n in names}
    return {"model": CEILING, **{n: float(np.mean(v)) if v else None for n, v in values.items()}}


def rows_by_line(measures: Measures) -> dict[str, pl.DataFrame]:
    """Rows by the name of their line: the run where it adapted, the frozen base, the counts-only models."""
    own = {measures.name: measures.current} if measures.current.height else {}
    return {**own, FROZEN: measures.frozen, **measures.references}


def table(measures: Sequence[Measures]) -> list[dict[str, Any]]:
    """Runs on one stream, then frozen, the counts-only models and the ceiling: one line each."""
    first = measures[0]
    lines = [model_row(m.name, m.current, m.config) for m in measures if m.current.height]
    lines.append(model_row(FROZEN, first.frozen, first.config))
    lines += [model_row(name, rows, first.config) for name, rows in first.references.items()]
    if first.ceiling:
        lines.append(ceiling_row(first.ceiling, first.config))
    return lines


def differences(measures: Sequence[Measures]) -> list[dict[str, Any]]:
    """Paired differences over users of the first run against every other line, with what the data shows."""
    first = measures[0]
    if not first.current.height:
        return []
    main = f"HR@{max(first.config.top_k)}"
    others = {m.name: m.current for m in measures[1:] if m.current.height}
    others |= {FROZEN: first.frozen, **first.references}
    lines = []
    for name, rows in others.items():
        found = effects(first.current, rows, first.config, (main, "log_likelihood"))
        line: dict[str, Any] = {"difference": f"{first.name} - {name}"}
        for metric, effect in found.items():
            line[metric] = None if effect is None else effect.mean
            if effect is not None:
                line[f"{metric} shown"] = describe(effect)
        lines.append(line)
    return lines


def effects(a: pl.DataFrame, b: pl.DataFrame, config: EvalConfig, metrics: Iterable[str]) -> dict[str, Effect | None]:
    """Paired difference of the rows `a` minus `b` (by block, user and seed) in each metric, over the rows that have it;
    None where one side lacks it, and for fewer than two users."""
    left, right = (user_metrics(rows, config.top_k, config.beams) for rows in (a, b))
    found: dict[str, Effect | None] = {}
    for metric in metrics:
        one, other = (block_weighted(rows.drop_nulls(metric), metric) for rows in (left, right))
        enough = min(one["user"].n_unique(), other["user"].n_unique()) >= 2
        found[metric] = compare(one, other, metric, config.bootstrap) if enough else None
    return found


def effects_by_block(
    a: pl.DataFrame, b: pl.DataFrame, config: EvalConfig, metrics: Sequence[str]
) -> dict[tuple[str, str], Effect]:
    """Paired differences of the rows `a` minus `b` by (block, metric), and under "slope" how the difference grows from
    one block to the next: the least-squares line through the differences of the blocks, users resampled.

    Blocks with fewer than two users, and a slope through fewer than two blocks, are left out.
    """
    left, right = (user_metrics(rows, config.top_k, config.beams) for rows in (a, b))
    found: dict[tuple[str, str], Effect] = {}
    for metric in metrics:
        one, other = left.drop_nulls(metric), right.drop_nulls(metric)
        sizes = {int(block): n for block, n in one.group_by("block").len().sort("block").iter_rows()}
        for block in sizes:
            here, there = one.filter(pl.col("block") == block), other.filter(pl.col("block") == block)
            if min(here["user"].n_unique(), there["user"].n_unique()) >= 2:
                found[str(block), metric] = compare(here, there, metric, config.bootstrap)
        if len(sizes) >= 2:
            blocks = np.array([*sizes])
            slope = (blocks - blocks.mean()) / ((blocks - blocks.mean()) ** 2).sum()
            # so that the mean over all rows is the sum over blocks of slope times the mean of the block
            weight = {block: s * one.height / sizes[block] for block, s in zip(sizes, slope, strict=True)}
            scaled = pl.col(metric) * pl.col("block").replace_strict(weight, return_dtype=pl.Float64)
            found["slope", metric] = compare(
                one.with_columns(scaled), other.with_columns(scaled), metric, config.bootstrap
            )
    return found


def backward_rows(measures: Measures, metrics: Sequence[str]) -> pl.DataFrame | None:
    """Each user's part of backward transfer: R[T][s] - R[s][s] on every earlier block s, T the last.

    Blocks whose held-out events the last model has learned are left out. None where no other is left, where the last
    model was not tested on all of them (scope=current), or a metric is missing.
    """
    last = int(measures.rows["model_block"].max() or 0)  # type: ignore[arg-type]
    earlier = [s for s in range(max(measures.base_block, 1), last) if (last, s) not in measures.learned]
    rows = measures.rows.filter(pl.col("block").is_in(earlier))
    measured = user_metrics(rows, measures.config.top_k, measures.config.beams)
    then = measured.filter(pl.col("model_block") == pl.col("block"))
    now = measured.filter(pl.col("model_block") == last)
    if {*then["block"]} != {*earlier} or {*now["block"]} != {*earlier} or not earlier:
        return None
    pairs = now.join(then, on=["block", "user"], suffix=" then", validate="1:1")
    if any(pairs[name].null_count() for name in metrics):
        return None
    return pairs.select("block", "user", *(pl.col(name) - pl.col(f"{name} then") for name in metrics))


def backward_effects(a: pl.DataFrame, b: pl.DataFrame, config: EvalConfig, metrics: Iterable[str]) -> dict[str, Effect]:
    """Paired difference of backward transfer, `a` minus `b`: frames of `backward_rows`, pooled over seeds."""
    return {m: compare(block_weighted(a, m), block_weighted(b, m), m, config.bootstrap) for m in metrics}


def cells(measures: Measures) -> list[dict[str, Any]]:
    """Every cell of R[t][s] with its metrics; `learned` where the model has learned the held-out events of s."""
    means = summarise(measures.rows, measures.config.top_k, beams=measures.config.beams).to_dicts()
    return [{**cell, "learned": (cell["model_block"], cell["block"]) in measures.learned} for cell in means]


def matrix(measures: Measures, metric: str) -> Matrix:
    """R[t][s] of a run for one metric."""
    summary = summarise(measures.rows, measures.config.top_k, beams=measures.config.beams)
    return Matrix.build(summary, metric, measures.base_block, measures.learned)


def continual_summary(measures: Measures, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The summaries of R[t][s]: one line per metric, with what backward transfer leaves out."""
    lines = []
    for metric in metrics:
        grid = matrix(measures, metric)
        line = {"metric": metric, **{n: m.value if m.used else None for n, m in summaries(grid).items()}}
        lines.append(line | ({"left out": note} if (note := left_out(grid)) else {}))
    return lines


def slice_table(measures: Measures, stream: Stream) -> list[dict[str, Any]]:
    """Head and tail items, new items, kinds of users: the run's current rows."""
    rows = measures.own
    head = {int(b): head_frequency(training_sequences(stream, int(b))) for b in rows["block"].unique().to_list()}
    main = f"HR@{max(measures.config.top_k)}"
    return slices(rows, measures.config.top_k, head).select("slice", "users", main, "MRR", "log_likelihood").to_dicts()
