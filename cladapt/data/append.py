"""Rows of a later log as new blocks at the end of a stream, so that it equals one imported whole.

A row is old where it is not after the end of the last block: in the stream already, left out by k-core there, or late.
All others, with those that waited from earlier logs, are cut into new blocks and filtered as an import would have. A
block that would test too few users waits, and is joined with the rows that come after it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cladapt.artifacts import read_parquet
from cladapt.data.blocks import (
    check_stream,
    core,
    items_of,
    losses_of,
    moment,
    notes_of,
    place,
    starts_of,
    warnings_of,
)
from cladapt.data.readers import REJECTS, RawLog, frequent_texts, rejects_of
from cladapt.data.schema import WEIGHT, Stream, block_file
from cladapt.errors import ConfigError, DataError

LATE = ("reject", "keep")
PENDING = {
    "user": pl.String(),
    "item": pl.String(),
    "timestamp": pl.Int64(),
    "block": pl.Int32(),  # number of a ready-made block in the source, else null
}
OPTIONAL = {**WEIGHT, "text": pl.String()}  # last columns of pending rows, where the log has them
WAITING = "pending"
"""Folder of the rows that wait to become a block; the file that counts is that of the block after the last."""
NO_ROWS = pl.DataFrame(schema=PENDING)
NO_LATE = pl.DataFrame(schema=REJECTS)
NO_PLACE = (pl.lit("").alias("file"), pl.lit(None, dtype=pl.Int64).alias("line"))
KEYS = ("user", "item", "timestamp")


@dataclass(frozen=True)
class Growth:
    """A stream after a log was appended, the rows that wait for more, and what became of all others."""

    stream: Stream
    """With the new blocks at its end; the very stream that it was where there are none."""
    pending: pl.DataFrame
    """Rows in order that are too few for a block: PENDING, then the columns of OPTIONAL that the log has."""
    late: pl.DataFrame = field(default_factory=lambda: NO_LATE)
    """Rows that come too late, as rejects."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """new_rows (taken up or waiting, and not before), known_rows, late, new_items, changed_texts, withdrawn_events."""


def waiting_rows(folder: Path, blocks: int) -> pl.DataFrame:
    """The rows that wait to become a block after the stream's `blocks`."""
    file = folder / block_file(WAITING, blocks + 1)
    if not os.path.lexists(file):
        return NO_ROWS
    frame = read_parquet(file, PENDING)
    expected = {**PENDING, **{name: kind for name, kind in OPTIONAL.items() if name in frame.columns}}
    if dict(frame.schema) != expected:
        raise DataError(f"{file} has the columns {dict(frame.schema)}", f"expected {expected}")
    return frame


def append(
    stream: Stream,
    log: RawLog,
    pending: pl.DataFrame = NO_ROWS,
    dates: Sequence[str] = (),
    late: str = "reject",
    least: int = 0,
) -> Growth:
    """Append what is new in `log`, and `pending`, as one block or as several; a new one begins at each of `dates`.

    A block tests at least `least` users, or waits. `DataError` where the log cannot tell what is new, or where a block
    comes out empty.
    """
    cuts = _cuts(stream)
    numbered = cuts[-1]["number"] is not None
    _check(stream, log, numbered, dates, late)
    events = log.events.with_columns(log.places if log.places.height else NO_PLACE)
    events = events.sort("block" if numbered else "timestamp", "order", nulls_last=True)
    end = cuts[-1]["number"] if numbered else cuts[-1]["until"]
    is_old = pl.col("block" if numbered else "timestamp") <= end
    old = _ended_in(events.filter(is_old), cuts, numbered)
    known = _among(old, stream.interactions.rename({"block": "place"}), (*KEYS, "place") if numbered else KEYS)
    waiting = _among(old.filter(~known), pending, KEYS)
    rest = old.filter(~known).filter(~waiting)
    left_out = _left_out(rest, stream, int(stream.manifest.get("config", {}).get("k_core", 0)))
    too_late = rest.filter(~left_out)
    new = events.filter(~is_old)
    repeated = _among(new, pending, (*KEYS, "block"))
    new = new.filter(~repeated)
    taken = pl.concat([too_late.select(new.columns), new]) if late == "keep" else new
    columns = [*PENDING, *(name for name in OPTIONAL if name in new.columns)]
    rows = taken.select(columns)
    if pending.height:
        rows = pl.concat([_with_columns(pending, rows), rows])
    counts = {
        "new_rows": taken.height,
        "known_rows": sum(int(found.sum()) for found in (known, waiting, repeated)),
        "late": too_late.height,
        "left_out_by_k_core": int(left_out.sum()),
        "new_items": 0,
        "changed_texts": _changed_texts(new, log, stream),
        "withdrawn_events": 0,
    }
    refused = too_late if late == "reject" else too_late.clear()
    rejects = NO_LATE
    if refused.height:
        event = pl.concat_str(*KEYS, separator=" ", ignore_nulls=True)
        rejects = rejects_of(refused, "late", event)
    if rows.is_empty():
        return Growth(stream, rows, rejects, counts)
    raw, kept, pending, grown = _new_blocks(stream, rows, _groups(rows, end, numbered, dates), least)
    if not grown:
        return Growth(stream, pending, rejects, counts)
    return _grow(stream, log, Growth(stream, pending, rejects, counts), raw, kept, cuts, grown)


def _cuts(stream: Stream) -> list[dict[str, Any]]:
    """Where each block ends; of a stream that has recorded none, at its last event."""
    if "cuts" in stream.manifest:
        return list(stream.manifest["cuts"])
    last = stream.interactions.group_by("block").agg(pl.col("timestamp").max()).sort("block")["timestamp"]
    return [{"until": until, "number": None, "late": 0} for until in last.cum_max()]


def _check(stream: Stream, log: RawLog, numbered: bool, dates: Sequence[str], late: str) -> None:
    timed = not stream.interactions["timestamp"].has_nulls()
    if not timed and not numbered:
        raise DataError(
            "the stream has neither times nor ready-made blocks, so what is new in a log cannot be told",
            "import the whole log again, with --timestamp COL or --block COL",
        )
    if late not in LATE:
        raise ConfigError(f"--late {late!r} is not known", f"choose {' or '.join(LATE)}")
    starts_of(tuple(dates))
    if numbered and (dates or late == "keep"):
        given = "--dates" if dates else "--late keep"
        raise ConfigError(f"the stream has ready-made blocks, so {given} cannot apply", f"leave out {given}")
    for name, needed in (("timestamp", timed), ("block", numbered)):
        nulls = log.events[name].null_count()
        if nulls != (0 if needed else log.events.height):
            found = "none" if nulls == log.events.height else f"{log.events.height - nulls} of {log.events.height}"
            raise DataError(
                f"the stream has {'a' if needed else 'no'} {name} for every row, the log has {found}",
                "append a log of the kind that the stream was imported from",
            )


def _ended_in(old: pl.DataFrame, cuts: Sequence[Mapping[str, Any]], numbered: bool) -> pl.DataFrame:
    """Old rows with `place`, the block of the stream that they belong to."""
    ends = np.array([cut["number" if numbered else "until"] for cut in cuts])
    place = 1 + np.searchsorted(ends, old["block" if numbered else "timestamp"].to_numpy(), side="left")
    return old.with_columns(place=pl.Series(place, dtype=pl.Int32))


def _among(rows: pl.DataFrame, have: pl.DataFrame, keys: Sequence[str]) -> pl.Series:
    """Whether each row is in `have` too, where a row that is there n times accounts for n."""
    if rows.is_empty() or have.is_empty():
        return pl.repeat(False, rows.height, dtype=pl.Boolean, eager=True)
    counts = have.group_by(*keys).agg(pl.len().alias("have"))
    nth = rows.select(*keys, pl.int_range(pl.len()).over(*keys).alias("nth"))
    found = nth.join(counts, on=list(keys), how="left", maintain_order="left", nulls_equal=True)
    return found.select((pl.col("nth") < pl.col("have")).fill_null(False)).to_series()


def _left_out(rows: pl.DataFrame, stream: Stream, k: int) -> pl.Series:
    """Old rows that k-core has left out of their block: their user or item has fewer than `k` events by its end."""
    few = pl.repeat(False, rows.height, dtype=pl.Boolean, eager=True)
    if k < 2 or rows.is_empty():
        return few
    for name in ("user", "item"):
        wanted = stream.interactions.join(rows, on=name, how="semi")
        seen = wanted.group_by(name, "block").agg(pl.len().alias("seen")).sort("block")
        seen = seen.with_columns(pl.col("seen").cum_sum().over(name))
        placed = rows.select(name, pl.col("place").alias("block")).with_row_index("row").sort("block")
        found = placed.join_asof(seen, on="block", by=name, check_sortedness=False).sort("row")
        few = few | (found["seen"].fill_null(0) < k)
    return few


def _with_columns(pending: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    if dict(pending.schema) != dict(rows.schema):
        waiting, given = (", ".join(frame.columns) for frame in (pending, rows))
        raise DataError(
            f"the rows that wait have the columns {waiting}, the log gives {given}",
            "append a log with the columns that the stream was imported with",
        )
    return pending


def _changed_texts(new: pl.DataFrame, log: RawLog, stream: Stream) -> int:
    """Known items that the log describes by another text than the stream."""
    found = frequent_texts(new) if "text" in new.columns else log.items
    both = found.drop_nulls("text").join(stream.items, on="item", suffix="_known")
    return both.filter(pl.col("text") != "", pl.col("text") != pl.col("text_known")).height


def _groups(rows: pl.DataFrame, end: int, numbered: bool, dates: Sequence[str]) -> np.ndarray:
    """Number 0, 1, 2, … of the block that each row is cut into, without a gap; `DataError` when one is empty."""
    if numbered:
        return np.unique(rows["block"].to_numpy(), return_inverse=True)[1]
    if not dates:
        return np.zeros(rows.height, dtype=np.int64)
    times = np.maximum(rows["timestamp"].to_numpy(), end + 1)  # what is late is in the first block
    starts = starts_of(tuple(dates))
    # a date before all new rows opens none
    starts = starts[starts > times.min()]
    group = np.searchsorted(starts, times, side="right")
    if empty := sorted(set(range(len(starts) + 1)) - set(group.tolist())):
        raise DataError(
            f"new block {empty[0] + 1} of {len(starts) + 1} is empty: no interaction falls into it",
            f"the new rows are from {moment(int(times.min()))} to {moment(int(times.max()))} UTC: choose dates inside",
        )
    return group


def _new_blocks(
    stream: Stream, rows: pl.DataFrame, group: np.ndarray, least: int
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, int]:
    """Rows of the new blocks before and after k-core, both with their block; rows that wait; and how many blocks."""
    k = int(stream.manifest.get("config", {}).get("k_core", 0))
    before = stream.interactions.select("user", "item")
    raws: list[pl.DataFrame] = []
    kepts: list[pl.DataFrame] = []
    waiting = rows.clear()
    for part in _parts(rows, group):
        waiting = pl.concat([waiting, part])
        ordered = waiting.sort("block", "timestamp", maintain_order=True, nulls_last=True)
        kept = ordered if k < 2 else core(before, ordered, k)
        if kept.is_empty() and not least:
            raise DataError(
                f"k_core={k} leaves none of the {waiting.height} new interactions",
                "append more of the log at once, or let them wait for the next one: --min-tested 1",
            )
        often = kept.group_by("user").len().filter(pl.col("len") >= stream.min_events).height
        if kept.is_empty() or often < least:
            continue
        number = pl.lit(stream.n_blocks + len(kepts) + 1, dtype=pl.Int32).alias("block")
        raws.append(ordered.with_columns(pl.col("block").alias("number"), number))
        kepts.append(kept.with_columns(number))
        before = pl.concat([before, kept.select("user", "item")])
        waiting = rows.clear()
    empty = rows.clear()
    return pl.concat(raws) if raws else empty, pl.concat(kepts) if kepts else empty, waiting, len(kepts)


def _parts(rows: pl.DataFrame, group: np.ndarray) -> Iterator[pl.DataFrame]:
    for number in range(int(group.max()) + 1):
        yield rows.filter(pl.Series(group == number))


def _grow(
    stream: Stream,
    log: RawLog,
    found: Growth,
    raw: pl.DataFrame,
    kept: pl.DataFrame,
    cuts: list[dict[str, Any]],
    grown: int,
) -> Growth:
    """`found` with the longer stream: its frames, and a manifest that tells what this log has brought."""
    first = stream.n_blocks + 1
    fresh = kept.join(stream.items.select("item"), on="item", how="anti", maintain_order="left")
    items, _ = items_of(raw, fresh, log.items)
    interactions = pl.concat([stream.interactions, place(kept, stream.interactions)]).sort("user", "position")
    ends = raw.group_by("block").agg(pl.col("timestamp").max(), pl.col("number").max()).sort("block")
    for block, until, number in ends.iter_rows():
        end, late = cuts[-1]["until"], 0
        if number is None:
            late = kept.filter(pl.col("block") == block, pl.col("timestamp") <= end).height
        cuts = [*cuts, {"until": end if until is None else max(until, end), "number": number, "late": late}]
    longer = Stream(interactions, pl.concat([stream.items, items]), {**stream.manifest, "cuts": cuts})
    report = check_stream(longer)
    blocks = report["blocks"][first - 1 :]
    losses = losses_of(raw, kept, stream.min_events)
    now = {w.item for w in stream.withdrawn if w.covers(first)}
    counts = {
        **found.counts,
        "new_items": items.height,
        "withdrawn_events": int(kept["item"].is_in(list(now)).sum()) if now else 0,
    }
    k_core = int(stream.manifest.get("config", {}).get("k_core", 0))
    entry = {
        "blocks": [row["block"] for row in blocks],
        "files": dict(log.files),
        "dropped": {
            **log.dropped,
            **({"late": found.late.height} if found.late.height else {}),
            "k_core": raw.height - kept.height,
        },
        "losses": [*log.losses, *losses],
        "warnings": [*log.warnings, *warnings_of(losses, blocks, stream.min_events, k_core, "every new block")],
        "notes": {**log.notes, **counts},
    }
    manifest = {
        **longer.manifest,
        "notes": {**stream.manifest.get("notes", {}), **notes_of(longer, log)},
        "appended": [*stream.manifest.get("appended", []), entry],
        **report,
    }
    return replace(found, stream=replace(longer, manifest=manifest), counts=counts)
