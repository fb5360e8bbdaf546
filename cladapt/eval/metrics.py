"""Ranking metrics from per-user rows: user by user, averaged, and sliced by item frequency and kind of user.

A semantic ID may stand for m items, of which one is the target: a returned ID then counts 1/m, the expected value when
the tie is broken at random. The figure of the ID alone (m = 1), as most papers report it, stands beside it.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import polars as pl

from cladapt.data.histories import TrainingLog
from cladapt.errors import ConfigError, DataError

ROWS = {
    "model_block": pl.Int32(),  # t: the block after which the model was made
    "block": pl.Int32(),  # s: the block tested
    "user": pl.String(),
    "item": pl.String(),  # the target
    "rank": pl.Int32(),  # place of the target's semantic ID in the returned list, from 0; null: not returned
    "share": pl.Int32(),  # m: items of the catalogue with this semantic ID
    "log_likelihood": pl.Float64(),  # of the target; null for a model without one
    "frequency": pl.Int32(),  # of the target in the training parts of blocks 1..s
    "user_kind": pl.String(),  # one of USER_KINDS
    "new_item": pl.Boolean(),  # the target first occurs in block s
}
USER_KINDS = ("new", "returning", "dormant")


def metric_names(top_k: Sequence[int]) -> list[str]:
    """The columns that `user_metrics` adds: item-level metrics first, then their ID-level twins."""
    item_level = [*chain.from_iterable((f"HR@{k}", f"NDCG@{k}") for k in top_k), "MRR"]
    return [*item_level, *(f"{name} (ID)" for name in item_level)]


def user_metrics(rows: pl.DataFrame, top_k: Sequence[int], beams: int | None = None) -> pl.DataFrame:
    """`rows` with one column per metric.

    HR@k = [rank < k] / m,  NDCG@k = [rank < k] / (m log2(rank + 2)),  MRR = 1 / (m (rank + 1));  all 0 when the target
    was not returned; the `(ID)` columns have m = 1. `beams`, the length of the returned lists, bounds k when given.
    """
    check_top_k(top_k, beams)
    check_rows(rows)
    rank, share = pl.col("rank"), pl.col("share")
    item_level: dict[str, pl.Expr] = {}
    for k in top_k:
        item_level[f"HR@{k}"] = (rank < k).cast(pl.Float64)
        item_level[f"NDCG@{k}"] = (rank < k).cast(pl.Float64) / (rank + 2).log(2)
    item_level["MRR"] = 1.0 / (rank + 1)
    return rows.with_columns(
        **{name: (value / share).fill_null(0.0) for name, value in item_level.items()},
        **{f"{name} (ID)": value.fill_null(0.0) for name, value in item_level.items()},
    )


def summarise(
    rows: pl.DataFrame, top_k: Sequence[int], by: Sequence[str] = ("model_block", "block"), beams: int | None = None
) -> pl.DataFrame:
    """Mean of every metric and of the log-likelihood for each group, with its number of `users`, sorted by `by`."""
    lacking = [name for name in by if name not in rows.columns]
    if lacking or not by:
        raise DataError(f"cannot group rows by {list(by)}: they lack {lacking}", f"choose from {rows.columns}")
    return _means(user_metrics(rows, top_k, beams), by, top_k).sort(by)


def slices(
    rows: pl.DataFrame,
    top_k: Sequence[int],
    head: Mapping[int, int],
    by: Sequence[str] = (),
    beams: int | None = None,
) -> pl.DataFrame:
    """Means for parts of the test: column `slice`, then `by`, `users`, the metrics; an empty part has null means.

    `head` gives, for each tested block, the least frequency of a head item (see `head_frequency`); all other targets,
    those never trained on included, are tail.
    """
    blocks = set(rows["block"].unique())
    if missing := sorted(blocks - set(head)):
        raise DataError(f"no head frequency for block {missing[0]}", "compute one per tested block: `head_frequency`")
    threshold = pl.col("block").replace_strict(dict(head), return_dtype=pl.Int64) if blocks else pl.lit(0)
    parts = {
        "all": pl.lit(True),
        "head items": pl.col("frequency") >= threshold,
        "tail items": pl.col("frequency") < threshold,
        "new items": pl.col("new_item"),
        **{f"{kind} users": pl.col("user_kind") == kind for kind in USER_KINDS},
    }
    measured = user_metrics(rows, top_k, beams)
    tagged = pl.concat([measured.filter(part).with_columns(slice=pl.lit(name)) for name, part in parts.items()])
    grid = pl.DataFrame({"slice": list(parts)})
    if by:
        grid = grid.join(rows.select(by).unique().sort(by), how="cross")
    keys = ["slice", *by]
    means = grid.join(_means(tagged, keys, top_k), on=keys, how="left", nulls_equal=True, maintain_order="left")
    return means.with_columns(pl.col("users").fill_null(0))


def head_frequency(log: TrainingLog, share: float = 0.2) -> int:
    """Least frequency of a head item: the head is the largest set of most frequent items that holds at most `share` of
    the items in the log. Equally frequent items stay together, so it may be smaller, even empty."""
    count = np.bincount(log.item)
    frequency = np.sort(count[count > 0])[::-1]
    size = int(share * len(frequency) + 1e-9)
    if size >= len(frequency):
        return 1
    return int(frequency[size]) + 1


def check_top_k(top_k: Sequence[int], beams: int | None = None) -> None:
    """`ConfigError` unless every cut-off is positive and no larger than the returned lists."""
    if not top_k:
        raise ConfigError("top_k is empty", "give at least one cut-off, e.g. 5,10")
    if min(top_k) < 1:
        raise ConfigError(f"top_k={min(top_k)} is not a cut-off", "use 1 or more")
    if beams is not None and max(top_k) > beams:
        raise ConfigError(
            f"top_k={max(top_k)} exceeds the beams={beams} that were returned", "raise eval.beams, or lower eval.top_k"
        )


def check_rows(rows: pl.DataFrame) -> None:
    """`DataError` unless `rows` has the columns of ROWS (others may follow) with possible values."""
    wrong = [f"{name}: {rows.schema.get(name, 'missing')}" for name in ROWS if rows.schema.get(name) != ROWS[name]]
    if wrong:
        raise DataError(f"per-user rows have wrong columns ({'; '.join(wrong)})", "make them again with `cladapt eval`")
    known = pl.col("user_kind").is_in(USER_KINDS)
    possible = (pl.col("rank").fill_null(0) >= 0) & (pl.col("share") >= 1) & (pl.col("frequency") >= 0) & known
    bad = rows.filter(~possible.fill_null(False)).select("block", "user", "rank", "share", "frequency", "user_kind")
    if not bad.is_empty():
        raise DataError(
            f"{bad.height} per-user rows have impossible values, the first {bad.row(0, named=True)}",
            f"expected rank >= 0 or null, share >= 1, frequency >= 0, user_kind one of {', '.join(USER_KINDS)}",
        )


def _means(measured: pl.DataFrame, keys: Sequence[str], top_k: Sequence[int]) -> pl.DataFrame:
    means = [pl.col(name).mean() for name in (*metric_names(top_k), "log_likelihood")]
    return measured.group_by(keys, maintain_order=True).agg(pl.col("user").n_unique().alias("users"), *means)
