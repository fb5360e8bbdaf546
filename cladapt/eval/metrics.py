"""Ranking metrics from per-user rows: user by user, averaged, and sliced by item frequency and kind of user.

A target's place in a list is known up to ties (items that share a semantic ID, items with equal counts); every metric
is its expectation when they are broken at random. The figure of the ID alone, as most papers report it, is added.
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
    "allowed": pl.Boolean(),  # it may be recommended: in the catalogue, and unseen where seen items are left out
    "rank": pl.Int32(),  # items of the returned list with a better score, from 0; null: the target is not in the list
    "ties": pl.Int32(),  # items of the list with the target's score, itself included; null where rank is
    "id_rank": pl.Int32(),  # place of the target's semantic ID among the returned IDs, from 0; null where rank is
    "share": pl.Int32(),  # items of the catalogue with this semantic ID, 0 outside it; null for a model without IDs
    "log_likelihood": pl.Float64(),  # of the target; null for a model without one, and outside the catalogue
    "frequency": pl.Int32(),  # of the target in the training parts of blocks 1..s
    "user_kind": pl.String(),  # one of USER_KINDS
    "new_item": pl.Boolean(),  # the target first occurs in block s
    "one_hop": pl.Boolean(),  # somewhere in the training data the target follows the last item of the history
}
USER_KINDS = ("new", "returning", "dormant")


def metric_names(top_k: Sequence[int]) -> list[str]:
    """The columns that `user_metrics` adds: item-level metrics first, then their ID-level twins."""
    item_level = [*chain.from_iterable((f"HR@{k}", f"NDCG@{k}") for k in top_k), "MRR"]
    return [*item_level, *(f"{name} (ID)" for name in item_level)]


def user_metrics(rows: pl.DataFrame, top_k: Sequence[int], beams: int | None = None) -> pl.DataFrame:
    """`rows` with one column per metric.

    The target is at each of the places rank, …, rank + ties - 1 (from 0) with equal probability: HR@k = share of them
    below k, NDCG@k = their mean of [place < k] / log2(place + 2), MRR = their mean of [place < beams] / (place + 1); 0
    when the target is not in the list. The `(ID)` columns have the place id_rank, and are null for a model without
    IDs. `beams`, the length of the lists, bounds k and MRR when given.
    """
    check_top_k(top_k, beams)
    check_rows(rows)
    rows = rows.rechunk()  # sums in pieces round by the pieces, and rows that were kept come in others than new ones
    end = int((rows["rank"] + rows["ties"]).max() or 1)  # type: ignore[arg-type]
    gains = _gains(top_k, end if beams is None else beams)
    item = {name: _mean_gain(rows["rank"], rows["ties"], gain) for name, gain in gains.items()}
    one = pl.repeat(1, rows.height, dtype=pl.Int32, eager=True)
    of_ids = rows["share"].is_not_null()
    ident = {name: _mean_gain(rows["id_rank"], one, gain).set(~of_ids, None) for name, gain in gains.items()}
    return rows.with_columns(**item, **{f"{name} (ID)": values for name, values in ident.items()})


def _gains(top_k: Sequence[int], length: int) -> dict[str, np.ndarray]:
    """What the first n places of a list are worth together, float64 [places + 1], by metric."""
    worth: dict[str, np.ndarray] = {}
    for k in top_k:
        worth[f"HR@{k}"] = np.ones(k)
        worth[f"NDCG@{k}"] = 1.0 / np.log2(np.arange(k) + 2)
    worth["MRR"] = 1.0 / (np.arange(length) + 1)
    return {name: np.concatenate([[0.0], np.cumsum(value)]) for name, value in worth.items()}


def _mean_gain(first: pl.Series, ties: pl.Series, gain: np.ndarray) -> pl.Series:
    """Mean worth of the places first, …, first + ties - 1; 0 where there is none."""
    known = (first.is_not_null() & ties.is_not_null()).to_numpy()
    start, count = first.fill_null(0).to_numpy().astype(np.int64), ties.fill_null(1).to_numpy().astype(np.int64)
    beyond = len(gain) - 1
    total = gain[np.minimum(start + count, beyond)] - gain[np.minimum(start, beyond)]
    return pl.Series(np.where(known, total / count, 0.0))


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
        "one-hop successors": pl.col("one_hop"),
        "no one-hop successors": ~pl.col("one_hop"),
        "not allowed": ~pl.col("allowed"),
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
    rank, ties = pl.col("rank"), pl.col("ties")
    placed = pl.when(rank.is_null()).then(ties.is_null()).otherwise((rank >= 0) & (ties >= 1) & pl.col("allowed"))
    counted = (pl.col("share").fill_null(0) >= 0) & (pl.col("id_rank").fill_null(0) >= 0) & (pl.col("frequency") >= 0)
    possible = placed & counted & pl.col("user_kind").is_in(USER_KINDS)
    bad = rows.filter(~possible.fill_null(False)).select(
        "block", "user", "allowed", "rank", "ties", "id_rank", "share", "frequency", "user_kind"
    )
    if not bad.is_empty():
        raise DataError(
            f"{bad.height} per-user rows have impossible values, the first {bad.row(0, named=True)}",
            "expected rank >= 0 and ties >= 1 or both null, a rank for allowed targets alone, id_rank, share and "
            f"frequency >= 0, user_kind one of {', '.join(USER_KINDS)}",
        )


def _means(measured: pl.DataFrame, keys: Sequence[str], top_k: Sequence[int]) -> pl.DataFrame:
    means = [pl.col(name).mean() for name in (*metric_names(top_k), "log_likelihood")]
    return measured.group_by(keys, maintain_order=True).agg(pl.col("user").n_unique().alias("users"), *means)
