"""Tables with named columns: csv, tsv and parquet, as one file, a folder of files or a glob.

Files may be larger than memory: only the columns in use are read, and they alone must fit.
"""

import csv
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import dropwhile, islice
from operator import not_
from pathlib import Path

import polars as pl

from cladapt.data.readers._base import (
    NO_ITEMS,
    NO_REJECTS,
    Columns,
    NoRows,
    RawLog,
    clean_events,
    clean_items,
    event_schema,
    files_of,
    glob_root,
    hash_files,
    parse_events,
)
from cladapt.data.readers._parse import join_text, to_ids
from cladapt.errors import ConfigError, DataError

SEPARATORS = ",;\t|"
LINE = "line"


@dataclass(frozen=True)
class TableReader:
    """Reads logs from tables of one file type by a column map."""

    name: str
    expects: str
    suffixes: tuple[str, ...]
    generic: bool = True

    def schema(self, columns: Columns) -> dict[str, str]:
        fields = ", ".join(columns.text) or "its text columns"
        table = {f"item table {columns.items}": f"{columns.item} and {fields}"} if columns.items else {}
        return event_schema(columns.roles) | table

    def detects(self, src: Path) -> bool:
        return bool(self._files(src))

    def read(self, src: Path, columns: Columns) -> RawLog:
        if columns.text and not columns.items:
            raise ConfigError(f"--text {' --text '.join(columns.text)} without --items", "name the item table: --items")
        items, item_rejects = _read_items(columns) if columns.items else (NO_ITEMS, NO_REJECTS)
        # the item table may lie in the folder of the log
        files = [path for path in self._files(src) if not (columns.items and path.samefile(columns.items))]
        if not files:
            raise DataError(f"{src} has no {' or '.join(self.suffixes)} file", f"expected {self.expects}")
        root = src if src.is_dir() else glob_root(src.parent)
        try:
            events, rejects = clean_events(pl.concat([_parse_file(path, columns) for path in files]), str(src))
        except NoRows as error:
            raise NoRows(error.message, error.hint, exact_rejects(error.rejects)) from error
        hashes = hash_files([*files, *([columns.items] if columns.items else [])], root)
        return RawLog(events, items, None, exact_rejects(pl.concat([rejects, item_rejects])), hashes, self.name)

    def _files(self, src: Path) -> list[Path]:
        # parquet writers partition into folders, and leave hidden and _-prefixed files beside the data
        found = sorted(src.rglob("*")) if src.is_dir() else files_of(src)
        inside = [path.relative_to(src).parts if src.is_dir() else () for path in found]
        return [
            path
            for path, parts in zip(found, inside, strict=True)
            if path.suffix.lower() in self.suffixes
            and path.is_file()
            and not any(part.startswith((".", "_")) for part in parts)
        ]


CSV = TableReader("csv", "csv or tsv files with a header line (--user, --item, --timestamp)", (".csv", ".tsv"))
PARQUET = TableReader("parquet", "parquet files (--user, --item, --timestamp)", (".parquet",))


def scan_table(path: Path) -> pl.LazyFrame:
    """A table file as a lazy frame: csv and tsv with every column as text, parquet with its own types."""
    if path.suffix.lower() == ".parquet":
        return pl.scan_parquet(path, hive_partitioning=any("=" in part for part in path.parts[:-1]))
    if path.suffix.lower() in CSV.suffixes:
        return pl.scan_csv(path, separator=separator_of(path), infer_schema=False)
    raise DataError(f"{path} is no table that can be read", "expected a .csv, .tsv or .parquet file")


def separator_of(path: Path) -> str:
    """Tab for .tsv; else the separator that cuts the header line into most fields, a comma when none does."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = header_line(path)
    return max(SEPARATORS, key=lambda separator: len(next(csv.reader([header], delimiter=separator), [])))


def header_line(path: Path) -> str:
    """First line of a text file, without its byte-order mark."""
    with path.open(encoding="utf-8-sig", errors="replace") as handle:
        return handle.readline().rstrip("\r\n")


def load(path: Path, wanted: Sequence[str], hint: str) -> pl.DataFrame:
    """Columns `wanted` of a table file, all when empty.

    `DataError` lists the columns found when one is missing, and names the line of a row with too many fields.
    """
    try:
        frame = scan_table(path)
        found = frame.collect_schema().names()
        missing = [name for name in wanted if name not in found]
        if missing:
            names = ", ".join(repr(name) for name in missing)
            raise DataError(f"{path} has no column {names}; it has: {', '.join(found)}", hint)
        return frame.select(wanted or pl.all()).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        if path.suffix.lower() in CSV.suffixes and (line := _overlong(path)):
            number, fields, expected = line
            raise DataError(
                f"{path}:{number}: the row has {fields} fields, the header {expected}",
                "quote a field that holds the separator, or mend the row",
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"cannot read {path}: {reason}", "expected a UTF-8 csv, a tsv or a parquet file") from error


def row_numbers(path: Path, table: pl.DataFrame) -> pl.Series:
    """`line` of each row of a table file, for csv as if no row had line breaks; no column of the table is touched."""
    first = 1 if path.suffix.lower() == ".parquet" else 2
    return pl.int_range(first, table.height + first, eager=True).alias(LINE)


def _overlong(path: Path) -> tuple[int, int, int] | None:
    """Line of the first row with more fields than the header, their number and that of the header."""
    with suppress(OSError, UnicodeDecodeError, csv.Error), path.open(encoding="utf-8-sig", newline="") as handle:
        width = 0
        records = dropwhile(not_, csv.reader(handle, delimiter=separator_of(path)))
        for line, fields in zip(_lines(path), records, strict=False):
            width = width or len(fields)
            if len(fields) > width:
                return line, len(fields), width
    return None


def _lines(path: Path) -> Iterator[int]:
    """Line at which each record of a csv begins, the header first: inside quotes a line break is none of its ends."""
    with path.open("rb") as handle:
        started = quoted = False
        for line, text in enumerate(handle, start=1):
            started = started or bool(text.strip(b"\r\n"))
            if started and not quoted:
                yield line
            quoted ^= text.count(b'"') % 2 == 1


def exact_lines(path: Path, rows: pl.Series) -> pl.Series:
    """Lines at which rows of a csv begin, from their numbers (header 1)."""
    lines = array("q", islice(_lines(path), max(rows, default=0)))
    return pl.Series(LINE, lines, dtype=pl.Int64).gather(rows - 1)


def exact_rejects(rejects: pl.DataFrame) -> pl.DataFrame:
    """Rejects of csv files with exact lines."""
    parts = [NO_REJECTS]
    for part in rejects.partition_by("file", maintain_order=True):
        path = Path(part["file"][0])
        is_csv = path.suffix.lower() in CSV.suffixes
        parts.append(part.with_columns(exact_lines(path, part[LINE])) if is_csv else part)
    return pl.concat(parts)


def _parse_file(path: Path, columns: Columns) -> pl.DataFrame:
    options = " ".join(f"--{role} COL" for role in columns.roles)
    hint = f'name the columns: {options}; --timestamp "" takes the row order as time'
    table = load(path, list(dict.fromkeys(columns.roles.values())), hint)
    roles = (pl.col(name).alias(role) for role, name in columns.roles.items())
    frame = table.select(row_numbers(path, table), *roles)
    if columns.block is not None:
        blocks = frame["block"].cast(pl.Int32, strict=False)
        bad = frame["block"].filter(blocks.is_null())
        if not bad.is_empty():
            raise DataError(
                f"{path}: column {columns.block!r} holds {bad[0]!r}, not a block number",
                "every row needs a block 1, 2, 3, …",
            )
        frame = frame.with_columns(block=blocks)
    return parse_events(frame, str(path))


def _read_items(columns: Columns) -> tuple[pl.DataFrame, pl.DataFrame]:
    path = Path(columns.items or "")
    if not path.is_file():
        raise DataError(f"no such item table: {path}", "check --items")
    wanted = list(dict.fromkeys((columns.item, *columns.text))) if columns.text else []
    hint = "--item COL names the id column of the log and of the item table, --text COL a text column"
    table = load(path, wanted, hint)
    if columns.item not in table.columns:
        raise DataError(f"{path} has no column {columns.item!r}; it has: {', '.join(table.columns)}", hint)
    fields = columns.text or [name for name in table.columns if name != columns.item]
    if not fields:
        raise DataError(f"{path} has no column beside {columns.item!r}", "an item table needs a text column")
    ids = to_ids(table[columns.item], f"{path}: {columns.item}")
    texts = join_text(table.select(fields), str(path))
    return clean_items(pl.DataFrame({"item": ids, "text": texts, LINE: row_numbers(path, table)}), str(path))
