"""What the readers share: the options they take, the raw log they return, and the contract they meet."""

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from cladapt.artifacts import hash_file
from cladapt.data.readers._parse import UNITS, check_time_format
from cladapt.errors import ConfigError, DataError

NO_ITEMS = pl.DataFrame(schema={"item": pl.String(), "text": pl.String()})
REJECTS = {
    "file": pl.String(),
    "line": pl.Int64(),  # line of a text file, row of a parquet or arrow file, both from 1; null where neither is known
    "reason": pl.String(),
    "value": pl.String(),  # what cannot be used, "" where it is missing
}
NO_REJECTS = pl.DataFrame(schema=REJECTS)
NO_PLACES = pl.DataFrame(schema={name: REJECTS[name] for name in ("file", "line")})
ROLES = {
    "user": "user id: text or whole number",
    "item": "item id: text or whole number",
    "timestamp": "time: unix seconds, ISO 8601 or a datetime type",
    "block": "block number: whole numbers, in the order of time",
    "weight": "weight of the event: finite and above 0",
    "rating": "rating: a number",
}


@dataclass(frozen=True)
class RawLog:
    """Interactions as the source has them, cleaned but not cut into blocks."""

    events: pl.DataFrame
    """user String, item String, timestamp Int64 | null (unix seconds), order Int64 (ties in time keep it),
    block Int32 | null (only where the source has ready-made blocks), weight Float64 only when it was asked for, and
    text String | null only where the log itself has the texts of the items."""
    items: pl.DataFrame
    """item String (unique), text String; may hold items that never occur, may be empty. Where the events have texts
    these are the most frequent of the whole log; a stream takes those known by the end of an item's first block."""
    index: Mapping[str, tuple[str, ...]] | None
    """A semantic-ID index found with the source: item -> ("<a_1>", "<b_7>", …)."""
    rejects: pl.DataFrame
    """Rows that cannot be used, in the log or in the item table: the columns of `REJECTS`."""
    files: Mapping[str, str]
    """File name -> hash of its bytes."""
    source: str
    """Name of the reader."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Oddity -> how often it was seen, for oddities that dropped nothing."""
    filtered: Mapping[str, int] = field(default_factory=dict)
    """Filter that was asked for -> rows it removed."""
    losses: Sequence[Mapping[str, Any]] = ()
    """For each reason in `filtered` and `rejects`, in the order they apply: loss, events and users (those that have no
    row left), with their shares of what the source holds."""
    warnings: Sequence[str] = ()
    """Sentences about what is probably not meant, each with its cure."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Format and options it was read with, as JSON: `ReadOptions.from_settings` reads a later log alike."""
    places: pl.DataFrame = field(default_factory=lambda: NO_PLACES)
    """File and line of each row of `events`, as in `REJECTS`; lines of csv files are not exact yet."""

    @cached_property
    def out_of_order(self) -> int:
        """Events before which the source has a later one of the same user; cutting blocks sorts them by time."""
        return int(self.events.select(pl.col("timestamp").diff().over("user") < 0).to_series().sum())

    @cached_property
    def dropped(self) -> dict[str, int]:
        """Reason -> rows of the source that are not in `events` or `items`."""
        return {**self.filtered, **count_reasons(self.rejects)}


class NoRows(DataError):
    """A log without a usable row; `rejects` says what is wrong with each."""

    def __init__(self, message: str, hint: str, rejects: pl.DataFrame) -> None:
        super().__init__(message, hint)
        self.rejects = rejects


@dataclass(frozen=True)
class ReadOptions:
    """Which columns of a log hold what, how they are written, and which rows are wanted."""

    user: str = "user"
    item: str = "item"
    """Item id, in the log and in the item table."""
    timestamp: str = "timestamp"
    """Empty = the source has no times and its row order is the order in time."""
    block: str | None = None
    """Ready-made blocks: increasing whole numbers."""
    weight: str | None = None
    """How much an event counts: finite and above 0."""
    items: Path | None = None
    """Item table: a file or a folder; may be the log itself."""
    text: tuple[str, ...] = ()
    """Text columns of the item table, or of the log where there is none; empty = all of the item table but the id."""
    where: tuple[str, ...] = ()
    """SQL conditions; a row is read where all of them are true."""
    rating: str | None = None
    """Rating column, where the format does not know it."""
    min_rating: float | None = None
    """Rows with a lower rating are left out."""
    time_unit: str = "s"
    """Unit of times written as numbers, one of `UNITS`."""
    time_format: str | None = None
    """How times are written, in strftime's terms; None = unix time or ISO 8601."""

    def __post_init__(self) -> None:
        if self.time_unit not in UNITS:
            raise ConfigError(f"--time-unit {self.time_unit!r} is no unit of time", f"use {', '.join(UNITS)}")
        if self.min_rating is not None and self.min_rating != self.min_rating:
            raise ConfigError("--min-rating is not a number", "give the least rating that counts as an interaction")
        if self.rating is not None and self.min_rating is None:
            raise ConfigError(
                f"--rating {self.rating!r} alone changes nothing", "add --min-rating X, or leave out --rating"
            )
        if self.time_format is not None:
            check_time_format(self.time_format)
        if self.time_format is not None and self.time_unit != "s":
            raise ConfigError(
                "--time-format and --time-unit exclude each other", "times are texts or numbers: give one"
            )

    @property
    def roles(self) -> dict[str, str]:
        """Role -> column, for the columns of the log in use."""
        names = {role: getattr(self, role) for role in ROLES}
        return {role: name for role, name in names.items() if name is not None and (role, name) != ("timestamp", "")}

    @property
    def settings(self) -> dict[str, Any]:
        """The options as JSON."""
        return {**asdict(self), "items": None if self.items is None else str(self.items.absolute())} | {
            name: list(getattr(self, name)) for name in ("text", "where")
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> tuple[str, "ReadOptions"]:
        """The format and the options that `RawLog.settings` keeps."""
        values = {name: value for name, value in settings.items() if name != "format"}
        values["items"] = None if values["items"] is None else Path(values["items"])
        return settings["format"], cls(**values | {name: tuple(values[name]) for name in ("text", "where")})


DEFAULTS = ReadOptions()


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

    def schema(self, options: ReadOptions) -> dict[str, str]:
        """Part of the source (column, file) -> what it must hold."""

    def detects(self, src: Path) -> bool:
        """Whether `src` (file, folder or glob) looks like this format."""

    def read(self, src: Path, options: ReadOptions) -> RawLog:
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
        if not glob.has_magic(str(parent)):
            return parent
    return Path()


def one_log(src: Path, logs: Sequence[Path], reader: Reader, what: str) -> Path:
    """The only log of a source; `DataError` when there is none, or several."""
    if len(logs) != 1:
        found = " and ".join(path.name for path in logs) or f"no {what}"
        raise DataError(f"{src} has {found}, expected one log", f"expected {reader.expects}")
    return logs[0]


def hash_files(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Name below `root` -> hash; a file elsewhere goes by its folder and name."""
    return {
        str(path.relative_to(root) if path.is_relative_to(root) else Path(path.parent.name, path.name)): hash_file(path)
        for path in paths
    }


def refuse_options(reader: Reader, options: ReadOptions, allowed: Sequence[str] = ()) -> None:
    """`ConfigError` when options are given that the format fixes, or has no use for."""
    changed = [name for name, value in vars(options).items() if value != getattr(DEFAULTS, name)]
    given = [f"--{name.replace('_', '-')}" for name in changed if name not in allowed]
    if given:
        raise ConfigError(
            f"the {reader.name} format has fixed columns, so {', '.join(given)} cannot apply",
            "leave these options out, or choose the format of a table: --format csv, parquet, jsonl or arrow",
        )


def event_schema(names: Mapping[str, str]) -> dict[str, str]:
    """Column -> what it must hold, from role -> column."""
    return {name: ROLES[role] for role, name in names.items()}


def count_reasons(rejects: pl.DataFrame) -> dict[str, int]:
    """Reason -> rejected rows."""
    return dict(rejects.group_by("reason", maintain_order=True).len().iter_rows())
