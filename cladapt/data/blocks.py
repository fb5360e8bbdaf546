"""From a raw log to a stream: time blocks, k-core block by block, and the check of a stream.

The log is cut first; each block is then filtered by what it and the blocks before it hold, so that a block that is
appended later is filtered as it would have been here. An item is known from the first block that keeps an event of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl

from cladapt.config import BlocksConfig
from cladapt.data.readers import RawLog, frequent_texts
from cladapt.data.schema import INTERACTIONS, ITEMS, WEIGHT, Stream
from cladapt.errors import ConfigError, DataError

LICENSE = "see the source; this directory is derived from it"
LARGE_LOSS = 0.2
"""Share of the users or events above which a loss is worth a warning."""


def build_stream(log: RawLog, config: BlocksConfig) -> Stream:
    """Cut `log` into blocks; equal timestamps never straddle a cut, ready-made blocks keep their order.

    The manifest counts every row dropped since the source, and in `losses` the users and events that each filter costs,
    with a sentence in `warnings` for each above `LARGE_LOSS`. `DataError` when a block comes out empty.
    """
    _check_log(log)
    raw, n_blocks = _assign_blocks(log.events, config)
    kept = raw if config.k_core < 2 else _core_of_blocks(raw, n_blocks, config.k_core)

    items, later = items_of(raw, kept, log.items)
    settings = config.model_dump(mode="json")
    stream = Stream(place(kept), items, {"config": settings})
    given = log.events["block"].drop_nulls().unique().sort().to_list()
    renumbered = bool(given) and given != list(range(1, n_blocks + 1))
    losses = losses_of(raw, kept, stream.min_events)
    report = check_stream(stream)
    manifest = {
        "source": log.source,
        "files": dict(log.files),
        "import": dict(log.settings),
        "license": LICENSE,
        "config": settings,
        "dropped": {**log.dropped, "k_core": raw.height - kept.height},
        "losses": [*log.losses, *losses],
        "warnings": [*log.warnings, *warnings_of(losses, report["blocks"], stream.min_events, config.k_core)],
        "notes": {
            **log.notes,
            **notes_of(stream, log),
            **({"items_with_a_text_in_later_blocks_alone": later} if later else {}),
            **({"rows_sorted_by_time": log.out_of_order} if log.out_of_order else {}),
            **({"blocks_renumbered_from_1": n_blocks} if renumbered else {}),
        },
        "cuts": [
            {"until": until, "number": given[block - 1] if given else None, "late": 0}
            for block, until in raw.group_by("block").agg(pl.col("timestamp").max()).sort("block").iter_rows()
        ],
        **report,
    }
    return replace(stream, manifest=manifest)


def notes_of(stream: Stream, log: RawLog) -> dict[str, int]:
    """Oddities of a stream, with those of the item table of the log that its last blocks are from."""
    return {
        "items_never_used": log.items.join(stream.items, on="item", how="anti").height,
        "items_without_text": stream.items.filter(pl.col("text") == "").height,
        **({"weights_kept_but_unused_in_training": stream.interactions.height} if stream.weighted else {}),
    }


def place(rows: pl.DataFrame, before: pl.DataFrame | None = None) -> pl.DataFrame:
    """Rows in their order as interactions: each user's positions go on from those in `before`."""
    position = pl.int_range(pl.len(), dtype=pl.Int64).over("user")
    if before is not None:
        counts = before.join(rows, on="user", how="semi").group_by("user").agg(pl.len().cast(pl.Int64).alias("before"))
        rows = rows.join(counts, on="user", how="left", maintain_order="left")
        position = position + pl.col("before").fill_null(0)
    columns = [*INTERACTIONS, *(name for name in WEIGHT if name in rows.columns)]
    return rows.with_columns(position=position).select(columns).sort("user", "position")


def items_of(raw: pl.DataFrame, kept: pl.DataFrame, described: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """The items of `kept` in the order of their first rows; the second result counts texts of later blocks alone.

    Their texts are those in `described`, or where the log itself has texts each item's most frequent one in the rows
    of its first block, so that nothing of a later block changes them.
    """
    # rows are in time order, so an item's first row is in its first block
    items = kept.unique("item", keep="first", maintain_order=True).select("item", pl.col("block").alias("first_block"))
    texts, later = described, 0
    if "text" in raw.columns:
        rows = raw.with_columns(order=pl.int_range(pl.len())).join(items, on="item", maintain_order="left")
        texts = frequent_texts(rows.filter(pl.col("block") == pl.col("first_block")))
        absent = texts.filter(pl.col("text").is_null())
        afterwards = rows.filter(pl.col("block") > pl.col("first_block")).drop_nulls("text")
        later = absent.join(afterwards, on="item", how="semi").height
    items = items.join(texts, on="item", how="left", maintain_order="left").with_columns(pl.col("text").fill_null(""))
    return items.select(*ITEMS), later


def core(kept: pl.DataFrame, rows: pl.DataFrame, k: int) -> pl.DataFrame:
    """The rows of a new block whose user and item have at least `k` events in it and in `kept`, the blocks before.

    Rows are dropped from the new block alone, again and again until none is left to drop.
    """
    for name in ("user", "item"):
        known = kept.group_by(name).len(name=f"{name}_known")
        rows = rows.join(known, on=name, how="left", maintain_order="left").with_columns(
            pl.col(f"{name}_known").fill_null(0)
        )
    enough = [pl.len().over(name) + pl.col(f"{name}_known") >= k for name in ("user", "item")]
    while True:
        fewer = rows.filter(*enough)
        if fewer.height == rows.height:
            return rows.drop("user_known", "item_known")
        rows = fewer


def _core_of_blocks(raw: pl.DataFrame, n_blocks: int, k: int) -> pl.DataFrame:
    kept = raw.clear()
    for block in range(1, n_blocks + 1):
        rows = raw.filter(pl.col("block") == block)
        own = core(kept, rows, k)
        if own.is_empty():
            raise DataError(
                f"k_core={k} leaves none of the {rows.height} interactions of block {block} of {n_blocks}",
                "lower k_core, or cut fewer or larger blocks",
            )
        kept = pl.concat([kept, own])
    return kept


def losses_of(raw: pl.DataFrame, kept: pl.DataFrame, min_events: int) -> list[dict[str, Any]]:
    """What k-core drops, and what is kept but never tested: events and users with their shares of the log."""
    users = raw["user"].n_unique()
    often = kept.filter(pl.len().over("user", "block") >= min_events)["user"].unique()
    untested = kept.join(often.to_frame(), on="user", how="anti")
    parts = {
        "dropped by k_core": (raw.height - kept.height, users - kept["user"].n_unique()),
        "kept, never tested": (untested.height, untested["user"].n_unique()),
    }
    return [
        {
            "loss": name,
            "events": events,
            "events_share": events / raw.height,
            "users": lost,
            "users_share": lost / users,
        }
        for name, (events, lost) in parts.items()
    ]


def warnings_of(
    losses: Sequence[Mapping[str, Any]],
    blocks: Sequence[Mapping[str, Any]],
    least: int,
    k_core: int,
    where: str = "every block",
) -> list[str]:
    """A sentence, with its cure, for each large loss, and for each block in which nobody is tested."""
    dropped, untested = losses
    found = []
    if max(dropped["events_share"], dropped["users_share"]) > LARGE_LOSS:
        found.append(
            f"k_core={k_core} drops {dropped['events_share']:.0%} of the events and "
            f"{dropped['users_share']:.0%} of the users: lower it to keep them"
        )
    if untested["users_share"] > LARGE_LOSS:
        found.append(
            f"{untested['users']} users ({untested['users_share']:.0%}) have fewer than {least} events in {where}: "
            "they are learned from and not tested there; lower min_events to test more of them"
        )
    for row in blocks:
        if not row["tested"]:
            found.append(
                f"block {row['block']} tests nobody: none of its {row['users']} users has {least} events there; lower "
                "min_events, or cut larger blocks"
            )
    return found


def _check_log(log: RawLog) -> None:
    for name in ("timestamp", "block"):
        nulls = log.events[name].null_count()
        if nulls not in (0, log.events.height):
            raise DataError(
                f"{nulls} of {log.events.height} interactions have no {name}", f"give every row a {name}, or none"
            )


def _assign_blocks(events: pl.DataFrame, config: BlocksConfig) -> tuple[pl.DataFrame, int]:
    """Rows in time order with their block 1…T, and T; `DataError` when a block is empty."""
    if not events["block"].has_nulls():
        _refuse_cut(config)
        numbered = events.with_columns(pl.col("block").rank("dense").cast(pl.Int32))
        return numbered.sort("block", "timestamp", "order"), events["block"].n_unique()
    events = events.sort("timestamp", "order")
    times = None if events["timestamp"].has_nulls() else events["timestamp"].to_numpy()
    if config.dates:
        if times is None:
            raise DataError("blocks by date need timestamps, and the log has none", "use --fractions")
        starts = starts_of(config.dates)
        block = 1 + np.searchsorted(starts, times, side="right")
        n_blocks = len(starts) + 1
        cure = f"the log is from {moment(int(times[0]))} to {moment(int(times[-1]))} UTC: choose dates inside it"
    else:
        n_blocks = len(config.fractions)
        # halves go up, whatever the rounding error of the sum
        cuts = np.floor(np.cumsum(config.fractions)[:-1] * events.height + 0.5 + 1e-6).astype(np.int64)
        cure = f"{events.height} interactions are too few for these fractions: cut fewer or larger blocks"
        if times is not None:
            cuts = np.searchsorted(times, times[np.maximum(cuts, 1) - 1], side="right")
            if np.unique(times).size < events.height:
                cure = (
                    f"the log has {np.unique(times).size} distinct times, and equal times are never parted: use other "
                    'fractions, or --timestamp "" to go by the order of the rows'
                )
        block = 1 + np.searchsorted(cuts, np.arange(events.height), side="right")
    if empty := sorted(set(range(1, n_blocks + 1)) - set(block.tolist())):
        raise DataError(f"block {empty[0]} of {n_blocks} is empty: no interaction falls into it", cure)
    return events.with_columns(block=pl.Series(block, dtype=pl.Int32)), n_blocks


def _refuse_cut(config: BlocksConfig) -> None:
    if config.dates or config.fractions != BlocksConfig().fractions:
        given = "dates" if config.dates else "fractions"
        raise ConfigError(f"the log has ready-made blocks, so {given} cannot apply", f"leave out --{given} or --block")


def starts_of(dates: tuple[str, ...]) -> np.ndarray:
    """Unix seconds of the midnights (UTC) that begin blocks 2, 3, …."""
    try:
        starts = [int(datetime.strptime(date, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()) for date in dates]
    except ValueError as error:
        raise ConfigError(f"dates={', '.join(dates)}: {error}", "write each date as YYYY-MM-DD") from error
    if sorted(set(starts)) != starts:
        raise ConfigError(f"dates={', '.join(dates)}: not in ascending order", "give the first day of block 2, 3, …")
    return np.array(starts)


def check_stream(stream: Stream) -> dict[str, Any]:
    """Totals and counts per block; `DataError` when the stream is out of order or a block leaks into an earlier one.

    Returns users, items, interactions and `blocks`, a list of block, users, tested (users with at least
    `Stream.min_events` events there), new_users, returning_users (active in an earlier block too), items, new_items
    (first used in this block), catalogue (items known by its end), interactions, first and last (unix seconds or None).
    """
    _check_order(stream)
    born = stream.items["first_block"].to_numpy()
    frame = stream.interactions.with_columns(
        pl.col("block").min().over("user").alias("user_since"),
        pl.Series("item_since", born[stream.item_index]),
        (pl.len().over("user", "block") >= stream.min_events).alias("often"),
    )
    blocks = (
        frame.group_by("block")
        .agg(
            pl.col("user").n_unique().alias("users"),
            pl.col("user").filter(pl.col("often")).n_unique().alias("tested"),
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
            "tested",
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
    _check_times(stream, blocks)
    return {"users": len(stream.users), "items": stream.n_items, "interactions": frame.height, "blocks": blocks}


def late_blocks(stream: Stream) -> dict[int, int]:
    """Block -> its events that came late, as the manifest has recorded them, for blocks that have any."""
    cuts = enumerate(stream.manifest.get("cuts", []), start=1)
    return {block: cut["late"] for block, cut in cuts if cut["late"]}


def count_late(stream: Stream, block: int) -> int:
    """Events of a block that are not after the end of the block before."""
    until = stream.manifest["cuts"][block - 2]["until"]
    return stream.interactions.filter(pl.col("block") == block, pl.col("timestamp") <= until).height


def _check_times(stream: Stream, blocks: Sequence[Mapping[str, Any]]) -> None:
    """No event is before the end of an earlier block, but for as many as are recorded to have come late."""
    late = late_blocks(stream)
    latest: Mapping[str, Any] | None = None
    for row in blocks:
        if row["block"] in late:
            found = count_late(stream, row["block"])
            if found != late[row["block"]]:
                raise DataError(
                    f"block {row['block']} has {found} events that came late, the manifest says {late[row['block']]}",
                    "restore the manifest, or import the source again",
                )
        elif latest is not None and row["first"] is not None and latest["last"] > row["first"]:
            raise DataError(
                f"block {latest['block']} leaks: its last event ({moment(latest['last'])}) is after the first of "
                f"block {row['block']} ({moment(row['first'])})",
                "cut the blocks by time: import the log without its block column",
            )
        if row["last"] is not None and (latest is None or row["last"] > latest["last"]):
            latest = row


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
        shown = ", ".join(map(str, found[:3])) + (f", … ({found.size} of them)" if found.size > 3 else "")
        raise DataError(f"the blocks are {shown}, expected 1, 2, … without a gap", "import again")

    _, starts = np.unique(users, return_index=True)
    expected = np.arange(users.size) - starts[users]
    _refuse(
        frame,
        (np.diff(users, prepend=0) < 0) | (frame["position"].to_numpy() != expected),
        "is out of place: rows must be sorted by user, then by position 0, 1, 2, …",
    )
    within = np.diff(users, prepend=-1) == 0
    # events that came late follow those of the blocks before
    opens_late = np.isin(stream.block, list(late_blocks(stream))) & (np.diff(stream.block, prepend=0) > 0)
    for name, allowed in (("block", False), ("timestamp", opens_late)):
        if not frame[name].has_nulls():
            back = np.diff(frame[name].to_numpy(), prepend=0) < 0
            problem = f"is out of time: its {name} is before that of the previous position"
            _refuse(frame, within & back & ~np.asarray(allowed), problem)
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


def moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
