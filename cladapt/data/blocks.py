"""From a raw log to a stream: k-core, time blocks, the least events per user and block; and the check of a stream.

The order of filters is fixed: k-core over the whole log, then the cut into blocks, then the least events inside each.
The catalogue is that of the log before the last filter: an item is known once anybody used it.
"""

from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from cladapt.config import BlocksConfig
from cladapt.data.readers import RawLog
from cladapt.data.schema import INTERACTIONS, ITEMS, WEIGHT, Stream
from cladapt.errors import ConfigError, DataError

LICENSE = "see the source; this directory is derived from it"


def build_stream(log: RawLog, config: BlocksConfig) -> Stream:
    """Cut `log` into blocks; equal timestamps never straddle a cut, ready-made blocks are kept as they are.

    The manifest counts every row dropped since the source. `DataError` when a block comes out empty.
    """
    _check_log(log)
    core = _k_core(log.events, config.k_core)
    if core.is_empty():
        raise DataError(
            f"k_core={config.k_core} leaves none of the {log.events.height} interactions", "lower k_core, or 0"
        )
    raw, n_blocks = _assign_blocks(core, config)
    kept = raw.filter(pl.len().over("user", "block") >= config.min_events)
    _check_filled(raw, kept, n_blocks, config)

    # rows are in time order, so an item's first row is in its first block
    items = raw.unique("item", keep="first", maintain_order=True).select("item", pl.col("block").alias("first_block"))
    items = items.join(log.items, on="item", how="left", maintain_order="left").with_columns(
        pl.col("text").fill_null("")
    )
    kept = kept.with_columns(position=pl.int_range(pl.len(), dtype=pl.Int64).over("user")).sort("user", "position")
    columns = [*INTERACTIONS, *(name for name in WEIGHT if name in kept.columns)]
    stream = Stream(kept.select(columns), items.select(*ITEMS))
    manifest = {
        "source": log.source,
        "files": dict(log.files),
        "license": LICENSE,
        "config": config.model_dump(mode="json"),
        "dropped": {
            **log.dropped,
            "k_core": log.events.height - core.height,
            "min_events": raw.height - kept.height,
        },
        "notes": {
            **log.notes,
            "items_never_used": log.items.join(items, on="item", how="anti").height,
            "items_without_text": items.filter(pl.col("text") == "").height,
            **({"rows_sorted_by_time": log.out_of_order} if log.out_of_order else {}),
            **({"weights_kept_but_unused_in_training": kept.height} if stream.weighted else {}),
        },
        **check_stream(stream),
    }
    return replace(stream, manifest=manifest)


def _check_log(log: RawLog) -> None:
    for name in ("timestamp", "block"):
        nulls = log.events[name].null_count()
        if nulls not in (0, log.events.height):
            raise DataError(
                f"{nulls} of {log.events.height} interactions have no {name}", f"give every row a {name}, or none"
            )


def _k_core(events: pl.DataFrame, k: int) -> pl.DataFrame:
    """Drop users and items with fewer than k rows until none is left to drop."""
    while k > 1:
        kept = events.filter(pl.len().over("user") >= k, pl.len().over("item") >= k)
        if kept.height == events.height:
            break
        events = kept
    return events


def _assign_blocks(events: pl.DataFrame, config: BlocksConfig) -> tuple[pl.DataFrame, int]:
    """Rows in time order with their block 1…T, and T."""
    if not events["block"].has_nulls():
        return events.sort("block", "timestamp", "order"), _ready_made(events["block"], config)
    events = events.sort("timestamp", "order")
    times = None if events["timestamp"].has_nulls() else events["timestamp"].to_numpy()
    if config.dates:
        if times is None:
            raise DataError("blocks by date need timestamps, and the log has none", "use --fractions")
        starts = _starts(config.dates)
        block = 1 + np.searchsorted(starts, times, side="right")
        n_blocks = len(starts) + 1
    else:
        n_blocks = len(config.fractions)
        # halves go up, whatever the rounding error of the sum
        cuts = np.floor(np.cumsum(config.fractions)[:-1] * events.height + 0.5 + 1e-6).astype(np.int64)
        if times is not None:
            cuts = np.searchsorted(times, times[np.maximum(cuts, 1) - 1], side="right")
        block = 1 + np.searchsorted(cuts, np.arange(events.height), side="right")
    return events.with_columns(block=pl.Series(block, dtype=pl.Int32)), n_blocks


def _ready_made(block: pl.Series, config: BlocksConfig) -> int:
    default = BlocksConfig()
    if config.dates or config.fractions != default.fractions:
        given = "dates" if config.dates else "fractions"
        raise ConfigError(f"the log has ready-made blocks, so {given} cannot apply", f"leave out --{given} or --block")
    found = block.unique().sort().to_list()
    if found != list(range(1, len(found) + 1)):
        raise DataError(
            f"the ready-made blocks are {', '.join(map(str, found))}, expected 1, 2, … without a gap",
            "renumber the blocks in the source, or add the missing files",
        )
    return len(found)


def _starts(dates: tuple[str, ...]) -> np.ndarray:
    """Unix seconds of the midnights (UTC) that begin blocks 2, 3, …."""
    try:
        starts = [int(datetime.strptime(date, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()) for date in dates]
    except ValueError as error:
        raise ConfigError(f"dates={', '.join(dates)}: {error}", "write each date as YYYY-MM-DD") from error
    if sorted(set(starts)) != starts:
        raise ConfigError(f"dates={', '.join(dates)}: not in ascending order", "give the first day of block 2, 3, …")
    return np.array(starts)


def _check_filled(raw: pl.DataFrame, kept: pl.DataFrame, n_blocks: int, config: BlocksConfig) -> None:
    left = set(kept["block"])
    for block in range(1, n_blocks + 1):
        if block in left:
            continue
        rows = raw.filter(pl.col("block") == block)
        per_user = rows.group_by("user").len()["len"].to_list()
        raise DataError(
            f"block {block} of {n_blocks} is empty: it has {rows.height} interactions of {len(per_user)} users, "
            f"the most active with {max(per_user, default=0)}, and min_events={config.min_events} keeps none",
            "lower min_events, or cut fewer or larger blocks",
        )


def check_stream(stream: Stream) -> dict[str, Any]:
    """Totals and counts per block; `DataError` when the stream is out of order or a block leaks into an earlier one.

    Returns users, items, interactions and `blocks`, a list of block, users, new_users, returning_users (kept in an
    earlier block too), items, new_items (first used in this block's raw log), catalogue (items known by its end),
    interactions, first and last (unix seconds or None).
    """
    _check_order(stream)
    born = stream.items["first_block"].to_numpy()
    frame = stream.interactions.with_columns(
        pl.col("block").min().over("user").alias("user_since"),
        pl.Series("item_since", born[stream.item_index]),
    )
    blocks = (
        frame.group_by("block")
        .agg(
            pl.col("user").n_unique().alias("users"),
            pl.col("user").filter(pl.col("user_since") == pl.col("block")).n_unique().alias("new_users"),
            pl.col("user").filter(pl.col("user_since") < pl.col("block")).n_unique().alias("returning_users"),
            pl.col("item").n_unique().alias("items"),
            pl.col("item").filter(pl.col("item_since") == pl.col("block")).n_unique().alias("new_items"),
            pl.len().alias("interactions"),
            pl.col("timestamp").min().alias("first"),
            pl.col("timestamp").max().alias("last"),
        )
        .sort("block")
        .with_columns(pl.Series("catalogue", [stream.catalogue(t).size for t in range(1, stream.n_blocks + 1)]))
        .select(
            "block",
            "users",
            "new_users",
            "returning_users",
            "items",
            "new_items",
            "catalogue",
            "interactions",
            "first",
            "last",
        )
        .to_dicts()
    )
    for earlier, later in pairwise(blocks):
        if earlier["last"] is not None and later["first"] is not None and earlier["last"] > later["first"]:
            raise DataError(
                f"block {earlier['block']} leaks: its last event ({_moment(earlier['last'])}) is after the first of "
                f"block {later['block']} ({_moment(later['first'])})",
                "cut the blocks by time: import the log without its block column",
            )
    return {"users": len(stream.users), "items": stream.n_items, "interactions": frame.height, "blocks": blocks}


def _check_order(stream: Stream) -> None:
    frame, users = stream.interactions, stream.user_index
    nulls = [name for name in INTERACTIONS if name != "timestamp" and frame[name].has_nulls()]
    if nulls or frame["timestamp"].null_count() not in (0, frame.height):
        raise DataError(
            f"interactions have gaps in {', '.join(nulls) or 'timestamp'}",
            "every row needs it (timestamp: all or none)",
        )
    found = np.unique(stream.block)
    if not np.array_equal(found, np.arange(1, found.size + 1)):
        raise DataError(f"the blocks are {', '.join(map(str, found))}, expected 1, 2, … without a gap", "import again")

    _, starts = np.unique(users, return_index=True)
    expected = np.arange(users.size) - starts[users]
    _refuse(
        frame,
        (np.diff(users, prepend=0) < 0) | (frame["position"].to_numpy() != expected),
        "is out of place: rows must be sorted by user, then by position 0, 1, 2, …",
    )
    within = np.diff(users, prepend=-1) == 0
    for name in ("block", "timestamp"):
        if not frame[name].has_nulls():
            steps = np.diff(frame[name].to_numpy(), prepend=0)
            _refuse(frame, within & (steps < 0), f"is out of time: its {name} is before that of the previous position")
    if stream.weighted:
        weights = frame["weight"].fill_null(0.0).to_numpy()
        _refuse(frame, ~(np.isfinite(weights) & (weights > 0)), "has a weight that is not finite and above 0")
    born = stream.items["first_block"].to_numpy()[stream.item_index]
    _refuse(frame, born > stream.block, "leaks: its item's first_block is later")


def _refuse(frame: pl.DataFrame, wrong: np.ndarray, problem: str) -> None:
    rows = np.flatnonzero(wrong)
    if rows.size:
        row = frame.row(int(rows[0]), named=True)
        where = ", ".join(f"{name} {row[name]!r}" for name in ("user", "position", "item", "block"))
        raise DataError(
            f"interaction ({where}) {problem}" + (f"; {rows.size} such rows" if rows.size > 1 else ""),
            "make the stream again with `cladapt data import`",
        )


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
