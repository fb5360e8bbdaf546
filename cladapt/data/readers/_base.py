"""What the readers share: the raw log they return, the contract they meet, and the cleaning of rows.

A row that cannot be used is dropped and counted under a reason; nothing disappears without a number.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import polars as pl

from cladapt.artifacts import hash_file
from cladapt.data.readers._parse import to_ids, to_seconds
from cladapt.errors import ConfigError, DataError

NO_ITEMS = pl.DataFrame(schema={"item": pl.String(), "text": pl.String()})


@dataclass(frozen=True)
class RawLog:
    """Interactions as the source has them, cleaned but neither cut into blocks nor filtered."""

    events: pl.DataFrame
    """user String, item String, timestamp Int64 | null (unix seconds), order Int64 (ties in time keep it),
    block Int32 | null (only where the source has ready-made blocks)."""
    items: pl.DataFrame
    """item String (unique), text String; may hold items that never occur, may be empty."""
    index: Mapping[str, tuple[str, ...]] | None
    """A semantic-ID index found with the source: item -> ("<a_1>", "<b_7>", …)."""
    dropped: Mapping[str, int]
    """Reason -> rows that are not in `events` or `items`."""
    files: Mapping[str, str]
    """File name -> hash of its bytes."""
    source: str
    """Name of the reader."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Oddity -> how often it was seen, for oddities that dropped nothing."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what."""

    user: str = "user"
    item: str = "item"
    """Item id, in the log and in the item table."""
    timestamp: str = "timestamp"
    """Empty = the source has no times and its row order is the order in time."""
    block: str | None = None
    """Ready-made blocks 1, 2, 3, …"""
    items: Path | None = None
    """Item table."""
    text: tuple[str, ...] = ()
    """Text columns of the item table; empty = all but the id."""


DEFAULT_COLUMNS = Columns()


class Reader(Protocol):
    """One source format. To add a format, write one module with such an object and list it in `READERS`."""

    @property
    def name(self) -> str:
        """What `--format` calls it."""

    @property
    def expects(self) -> str:
        """What the source must look like, for error texts."""

    @property
    def generic(self) -> bool:
        """Whether other formats may use the same file type, so that `auto` asks this reader after the others."""

    def detects(self, src: Path) -> bool:
        """Whether `src` (file, folder or glob) looks like this format."""

    def read(self, src: Path, columns: Columns) -> RawLog:
        """Read `src`; `DataError` when it is not what `expects` says."""


def files_of(src: Path) -> list[Path]:
    """Files behind a file, folder (one level) or glob, sorted; hidden and `_`-prefixed ones are left out."""
    if src.is_file():
        return [src]
    if src.is_dir():
        found: Iterable[Path] = src.iterdir()
    else:
        root = glob_root(src)
        found = root.glob(str(src.relative_to(root))) if root != src else ()
    return sorted(path for path in found if path.is_file() and not path.name.startswith((".", "_")))


def glob_root(src: Path) -> Path:
    """The folders of a glob before its first wildcard; `src` itself when it has none."""
    for parent in (src, *src.parents):
        if not any(mark in str(parent) for mark in "*?["):
            return parent
    return Path()


def hash_files(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Name below `root` -> hash; a file elsewhere goes by its folder and name."""
    return {
        str(path.relative_to(root) if path.is_relative_to(root) else Path(path.parent.name, path.name)): hash_file(path)
        for path in paths
    }


def refuse_columns(reader: Reader, columns: Columns) -> None:
    """`ConfigError` when columns are mapped although the format fixes them."""
    given = [f"--{name}" for name, value in vars(columns).items() if value != getattr(DEFAULT_COLUMNS, name)]
    if given:
        raise ConfigError(
            f"the {reader.name} format has fixed columns, so {', '.join(given)} cannot apply",
            "leave these options out, or choose --format csv or --format parquet",
        )


def parse_events(frame: pl.DataFrame, where: str) -> pl.DataFrame:
    """Ids, exact unix seconds and the reason to drop a row, from columns of any readable type.

    In: user, item, and where the source has them timestamp, block (Int32), reason (String). A frame without timestamp
    has only an order. Out: user String, item String, exact Float64, block Int32, reason String (null = keep).
    """
    user = to_ids(frame["user"], f"{where}: user")
    item = to_ids(frame["item"], f"{where}: item")
    missing = pl.lit(None)
    reason = pl.coalesce(
        pl.col("reason") if "reason" in frame.columns else missing,
        pl.when(user.is_null()).then(pl.lit("no_user")).when(item.is_null()).then(pl.lit("no_item")),
    )
    exact = pl.lit(None, dtype=pl.Float64)
    if "timestamp" in frame.columns:
        times = frame["timestamp"]
        seconds = to_seconds(times, f"{where}: timestamp")
        blank = times.is_null() | (times.str.strip_chars() == "") if times.dtype == pl.String else times.is_null()
        reason = pl.coalesce(
            reason, pl.when(blank).then(pl.lit("no_time")).when(seconds.is_null()).then(pl.lit("bad_time"))
        )
        exact = pl.lit(seconds)
    return frame.select(
        user.alias("user"),
        item.alias("item"),
        exact.alias("exact"),
        (pl.col("block") if "block" in frame.columns else missing).cast(pl.Int32).alias("block"),
        reason.cast(pl.String).alias("reason"),
    )


def clean_events(parsed: pl.DataFrame, where: str) -> tuple[pl.DataFrame, dict[str, int]]:
    """The `events` frame of a log and what was dropped: rows with a reason, then exact repeats of timed rows.

    Without times a repeat cannot be told from a second visit, so it stays.
    """
    dropped = dict(parsed.drop_nulls("reason").group_by("reason").len().sort("reason").iter_rows())
    kept = parsed.with_row_index("order").filter(pl.col("reason").is_null())
    if kept.is_empty():
        counts = ", ".join(f"{reason}: {rows}" for reason, rows in dropped.items())
        raise DataError(
            f"{where}: none of the {parsed.height} rows can be used" + (f" ({counts})" if counts else ""),
            "check that the columns hold user ids, item ids and times (unix seconds or ISO dates)",
        )
    if not kept["exact"].has_nulls():
        unique = kept.unique(["user", "item", "exact"], keep="first", maintain_order=True)
        if unique.height < kept.height:
            dropped["duplicate"] = kept.height - unique.height
        kept = unique
        if (kept["exact"] % 1 != 0).any():
            # timestamps are whole seconds; the order keeps what they lose
            kept = kept.sort("exact", "order").with_columns(order=pl.int_range(pl.len()))
    events = kept.select(
        "user",
        "item",
        pl.col("exact").floor().cast(pl.Int64).alias("timestamp"),
        pl.col("order").cast(pl.Int64),
        "block",
    )
    return events, dropped


def clean_items(items: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """The `items` frame of a log and what was dropped: rows without an id, then later rows of an id."""
    known = items.select("item", pl.col("text").fill_null("")).drop_nulls("item")
    unique = known.unique("item", keep="first", maintain_order=True)
    counts = {"item_row_without_id": items.height - known.height, "item_row_repeated": known.height - unique.height}
    return unique, {reason: rows for reason, rows in counts.items() if rows}
