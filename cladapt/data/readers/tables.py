"""Tables with named columns: csv, tsv and parquet, as one file, a folder of files or a glob."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from cladapt.data.readers._base import (
    NO_ITEMS,
    Columns,
    RawLog,
    clean_events,
    clean_items,
    files_of,
    glob_root,
    hash_files,
    parse_events,
)
from cladapt.data.readers._parse import join_text, to_ids
from cladapt.errors import DataError

SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class TableReader:
    """Reads logs from tables of one file type by a column map."""

    name: str
    expects: str
    suffixes: tuple[str, ...]
    generic: bool = True

    def detects(self, src: Path) -> bool:
        return bool(self._files(src))

    def read(self, src: Path, columns: Columns) -> RawLog:
        items, dropped_items = _read_items(columns) if columns.items else (NO_ITEMS, {})
        # the item table may lie in the folder of the log
        files = [path for path in self._files(src) if not (columns.items and path.samefile(columns.items))]
        if not files:
            raise DataError(f"{src} has no {' or '.join(self.suffixes)} file", f"expected {self.expects}")
        root = src if src.is_dir() else glob_root(src.parent)
        parsed = pl.concat([_parse_file(path, columns) for path in files])
        events, dropped = clean_events(parsed, str(src))
        hashes = hash_files([*files, *([columns.items] if columns.items else [])], root)
        return RawLog(events, items, None, dropped | dropped_items, hashes, self.name)

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
    """Columns `wanted` of a table file, all when empty; `DataError` lists the columns found when one is missing."""
    try:
        frame = scan_table(path)
        found = frame.collect_schema().names()
        missing = [name for name in wanted if name not in found]
        if missing:
            names = ", ".join(repr(name) for name in missing)
            raise DataError(f"{path} has no column {names}; it has: {', '.join(found)}", hint)
        return frame.select(wanted or pl.all()).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"cannot read {path}: {reason}", "expected a UTF-8 csv, a tsv or a parquet file") from error


def _parse_file(path: Path, columns: Columns) -> pl.DataFrame:
    names = {"user": columns.user, "item": columns.item}
    if columns.timestamp:
        names["timestamp"] = columns.timestamp
    if columns.block is not None:
        names["block"] = columns.block
    options = " ".join(f"--{role} COL" for role in ("user", "item", "timestamp", *(["block"] if columns.block else [])))
    hint = f'name the columns: {options}; --timestamp "" takes the row order as time'
    table = load(path, list(dict.fromkeys(names.values())), hint)
    frame = table.select(pl.col(name).alias(role) for role, name in names.items())
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


def _read_items(columns: Columns) -> tuple[pl.DataFrame, dict[str, int]]:
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
    return clean_items(pl.DataFrame({"item": ids, "text": join_text(table.select(fields), str(path))}))
