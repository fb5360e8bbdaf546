"""What the readers share: the raw log they return, the contract they meet, and the cleaning of rows.

A row that cannot be used becomes a reject with its file, line and reason; nothing disappears without a number.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import polars as pl

from cladapt.artifacts import hash_file
from cladapt.data.readers._parse import to_ids, to_seconds, to_weights
from cladapt.errors import ConfigError, DataError

NO_ITEMS = pl.DataFrame(schema={"item": pl.String(), "text": pl.String()})
REJECTS = {
    "file": pl.String(),
    "line": pl.Int64(),  # line of a text file, row of a parquet file, both from 1; null where neither is known
    "reason": pl.String(),
    "value": pl.String(),  # what cannot be used, "" where it is missing
}
NO_REJECTS = pl.DataFrame(schema=REJECTS)
LONGEST_VALUE = 80
ROLES = {
    "user": "user id: text or whole number",
    "item": "item id: text or whole number",
    "timestamp": "time: unix seconds, ISO 8601 or a datetime type",
    "block": "block number 1, 2, 3, …",
    "weight": "weight of the event: finite and above 0",
}


@dataclass(frozen=True)
class RawLog:
    """Interactions as the source has them, cleaned but neither cut into blocks nor filtered."""

    events: pl.DataFrame
    """user String, item String, timestamp Int64 | null (unix seconds), order Int64 (ties in time keep it),
    block Int32 | null (only where the source has ready-made blocks), and weight Float64 only when it was asked for."""
    items: pl.DataFrame
    """item String (unique), text String; may hold items that never occur, may be empty."""
    index: Mapping[str, tuple[str, ...]] | None
    """A semantic-ID index found with the source: item -> ("<a_1>", "<b_7>", …)."""
    rejects: pl.DataFrame
    """Rows that are not in `events` or `items`: the columns of `REJECTS`."""
    files: Mapping[str, str]
    """File name -> hash of its bytes."""
    source: str
    """Name of the reader."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Oddity -> how often it was seen, for oddities that dropped nothing."""

    @cached_property
    def out_of_order(self) -> int:
        """Events before which the source has a later one of the same user; cutting blocks sorts them by time."""
        return int(self.events.select(pl.col("timestamp").diff().over("user") < 0).to_series().sum())

    @cached_property
    def dropped(self) -> dict[str, int]:
        """Reason -> rejected rows."""
        return count_reasons(self.rejects)


class NoRows(DataError):
    """A log without a usable row; `rejects` says what is wrong with each."""

    def __init__(self, message: str, hint: str, rejects: pl.DataFrame) -> None:
        super().__init__(message, hint)
        self.rejects = rejects


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
    weight: str | None = None
    """How much an event counts: finite and above 0."""
    items: Path | None = None
    """Item table."""
    text: tuple[str, ...] = ()
    """Text columns of the item table; empty = all but the id."""

    @property
    def roles(self) -> dict[str, str]:
        """Role -> column, for the columns of the log in use."""
        names = {role: getattr(self, role) for role in ROLES}
        return {role: name for role, name in names.items() if name is not None and (role, name) != ("timestamp", "")}


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

    def schema(self, columns: Columns) -> dict[str, str]:
        """Part of the source (column, file) -> what it must hold."""

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


def event_schema(names: Mapping[str, str]) -> dict[str, str]:
    """Column -> what it must hold, from role -> column."""
    return {name: ROLES[role] for role, name in names.items()}


def parse_events(frame: pl.DataFrame, where: str) -> pl.DataFrame:
    """Ids, exact unix seconds and the reason to reject a row, from columns of any readable type.

    In: user, item, and where the source has them timestamp, weight, block (Int32), file, line, reason and value
    (String). A frame without timestamp has only an order. Out: user String, item String, exact Float64, block Int32,
    file String (`where` unless given), line Int64, reason String (null = keep), value String, and weight if it was in.
    """
    user = to_ids(frame["user"], f"{where}: user")
    item = to_ids(frame["item"], f"{where}: item")
    exact = pl.Series("exact", dtype=pl.Float64).extend_constant(None, frame.height)
    # reason, where it applies, the value to show; a row is told the first that applies
    problems: list[tuple[str, pl.Series, str | pl.Series]] = [
        ("no_user", user.is_null(), ""),
        ("no_item", item.is_null(), ""),
    ]
    if "timestamp" in frame.columns:
        exact = to_seconds(frame["timestamp"], f"{where}: timestamp").alias("exact")
        problems += _number_problems("time", frame["timestamp"], exact)
    weights: list[pl.Series] = []
    if "weight" in frame.columns:
        weights = [to_weights(frame["weight"], f"{where}: weight").alias("weight")]
        problems += _number_problems("weight", frame["weight"], *weights)
    given = {"block": None, "file": where, "line": None, "reason": None, "value": None}
    rows = frame.with_columns(pl.lit(value).alias(name) for name, value in given.items() if name not in frame.columns)
    reasons = [pl.when(applies).then(pl.lit(reason)) for reason, applies, _ in problems]
    values = [pl.when(applies).then(pl.lit(shown)) for _, applies, shown in problems]
    return rows.select(
        user.alias("user"),
        item.alias("item"),
        exact,
        pl.col("block").cast(pl.Int32),
        "file",
        pl.col("line").cast(pl.Int64),
        pl.coalesce("reason", *reasons).cast(pl.String),
        pl.coalesce("value", *values).cast(pl.String).str.head(LONGEST_VALUE),
        *weights,
    )


def _number_problems(what: str, column: pl.Series, numbers: pl.Series) -> list[tuple[str, pl.Series, str | pl.Series]]:
    """Rows where a column is empty, and rows where it holds something that gave no number."""
    blank = column.is_null() | (column.str.strip_chars() == "") if column.dtype == pl.String else column.is_null()
    return [(f"no_{what}", blank, ""), (f"bad_{what}", ~blank & numbers.is_null(), column.cast(pl.String))]


def clean_events(parsed: pl.DataFrame, where: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The `events` and the `rejects` of a log, in its order: rows with a reason, then exact repeats of timed rows.

    Without times a repeat cannot be told from a second visit, so it stays.
    """
    rows = parsed.with_row_index("order")
    usable = rows.filter(pl.col("reason").is_null())
    rejects = rows.drop_nulls("reason")
    if usable.is_empty():
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(count_reasons(rejects).items()))
        raise NoRows(
            f"{where}: none of the {parsed.height} rows can be used" + (f" ({counts})" if counts else ""),
            "check that the columns hold user ids, item ids and times (unix seconds or ISO dates)",
            rejects.select(*REJECTS),
        )
    order = pl.col("order").cast(pl.Int64)
    if not usable["exact"].has_nulls():
        first = usable.select(pl.struct("user", "item", "exact").is_first_distinct()).to_series()
        event = pl.concat_str("user", "item", "exact", separator=" ").str.head(LONGEST_VALUE)
        repeats = usable.filter(~first).with_columns(reason=pl.lit("duplicate"), value=event)
        usable, rejects = usable.filter(first), pl.concat([rejects, repeats])
        if (usable["exact"] % 1 != 0).any():
            # timestamps are whole seconds; the order keeps what they lose
            order = pl.col("exact").rank("ordinal").cast(pl.Int64) - 1
    events = usable.select(
        "user",
        "item",
        pl.col("exact").floor().cast(pl.Int64).alias("timestamp"),
        order.alias("order"),
        "block",
        *(["weight"] if "weight" in usable.columns else []),
    )
    return events, rejects.sort("order").select(*REJECTS)


def clean_items(items: pl.DataFrame, where: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The `items` and the `rejects` of an item table: rows without an id, then later rows of an id.

    In: item, text, and where the source has them line, reason and value. An item's first usable row stays.
    """
    absent = [name for name in ("line", "reason", "value") if name not in items.columns]
    rows = items.with_columns(*(pl.lit(None, dtype=REJECTS[name]).alias(name) for name in absent))
    unnamed = pl.when(pl.col("item").is_null()).then(pl.lit("item_row_without_id"))
    rows = rows.with_columns(reason=pl.coalesce("reason", unnamed))
    usable = pl.col("reason").is_null()
    again = pl.when(usable & ~pl.col("item").is_first_distinct().over(usable)).then(pl.lit("item_row_repeated"))
    rows = rows.with_columns(reason=pl.coalesce("reason", again))
    value = pl.coalesce("value", "item", pl.lit("")).str.head(LONGEST_VALUE)
    rejects = rows.drop_nulls("reason").with_columns(value=value, file=pl.lit(where))
    kept = rows.filter(pl.col("reason").is_null()).select("item", pl.col("text").fill_null(""))
    return kept, rejects.with_columns(pl.col("line").cast(pl.Int64)).select(*REJECTS)


def count_reasons(rejects: pl.DataFrame) -> dict[str, int]:
    """Reason -> rejected rows."""
    return dict(rejects.group_by("reason", maintain_order=True).len().iter_rows())
