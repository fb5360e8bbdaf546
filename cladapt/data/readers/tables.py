"""Tables with named columns: csv, json lines, parquet and arrow, as one file, a folder of files or a glob.

Files may be larger than memory: only the columns in use are kept, and they alone must fit.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import polars as pl

from cladapt.data.readers._base import (
    NO_ITEMS,
    NO_REJECTS,
    RawLog,
    ReadOptions,
    event_schema,
    files_of,
    glob_root,
    hash_files,
)
from cladapt.data.readers._clean import LONGEST_VALUE, Items, assemble, clean_items, select_rows
from cladapt.data.readers._parse import to_ids
from cladapt.data.readers._scan import LINE, SUFFIXES, Table, load, names_of, type_of
from cladapt.data.readers._where import columns_of
from cladapt.errors import ConfigError, DataError

RATINGS = ("rating", "ratings", "overall", "stars")
"""Names of columns that look like ratings."""
HARMLESS = ("readme*", "license*", "*.md", "*.crc", "_success", "_metadata", "_common_metadata", "*.index.json")
"""Files of a folder that hold no rows, and are not missed."""
LINE_BREAK = r"[\r\n]"
BAD_IDS = ("bad_user", "bad_item")
"""Reasons of rows whose id holds a line break."""


@dataclass(frozen=True)
class TableReader:
    """Reads logs from tables of one file type by a column map."""

    name: str
    expects: str
    generic: bool = True

    def schema(self, options: ReadOptions) -> dict[str, str]:
        texts = ", ".join(options.text)
        log = event_schema(options.roles) | ({texts: "text of the item"} if texts and not options.items else {})
        table = f"{options.item} and {texts or 'its text columns'}"
        return log | ({f"item table {options.items}": table} if options.items else {})

    def detects(self, src: Path) -> bool:
        return bool(self._files(src))

    def read(self, src: Path, options: ReadOptions) -> RawLog:
        if options.min_rating is not None and options.rating is None:
            raise ConfigError(
                f"--min-rating {options.min_rating:g} without --rating",
                f"name the column of the ratings: --rating COL; the {self.name} format does not know it",
            )
        found = self._files(src)
        if not found:
            raise DataError(f"{src} has no {self.name} file", f"expected {self.expects}")
        tables = item_files(options.items) if options.items else []
        # the item table may lie in the folder of the log, or be the log
        known = {path.resolve() for path in tables}
        files = [path for path in found if path.resolve() not in known]
        own = not files or (options.items is None and bool(options.text))
        files = files or found
        root = src if src.is_dir() else src.parent if src.is_file() else glob_root(src.parent)
        parsed = [_parse_file(path, options, own, root) for path in files]
        ignored = sum(rows.height for rows, rated in parsed if rated)
        items = _read_items(tables, options) if tables and not own else (NO_ITEMS, NO_REJECTS)
        folders = [folder for folder in (src, options.items) if folder is not None and folder.is_dir()]
        unread = unread_files(folders, [*files, *tables])
        notes = {"ratings_ignored": ignored, "files_not_read": len(unread)}
        log = assemble(
            self.name,
            pl.concat([rows for rows, _ in parsed]),
            str(src),
            hash_files([*files, *(path for path in tables if path not in files)] if not own else files, root),
            items,
            notes={name: count for name, count in notes.items() if count},
        )
        return replace(log, warnings=[*log.warnings, *_broken_ids(log.rejects), *self._not_read(unread)])

    def _not_read(self, unread: list[str]) -> list[str]:
        if not unread:
            return []
        named = ", ".join(unread[:3]) + (f" and {len(unread) - 3} more" if len(unread) > 3 else "")
        return [
            f"files not read: {named}; --format {self.name} reads {self.expects}: unpack or convert them, name a "
            "linked folder itself, or move them elsewhere"
        ]

    def _files(self, src: Path) -> list[Path]:
        return [path for path in all_files(src) if type_of(path) == self.name]


CSV = TableReader("csv", "csv or tsv files with a header line, plain, .gz or .zst (--user, --item, --timestamp)")
PARQUET = TableReader("parquet", "parquet files, also partitioned into folders (--user, --item, --timestamp)")
JSONL = TableReader("jsonl", "json lines, one object a line: .jsonl or .ndjson, plain, .gz or .zst (--user, --item, …)")
ARROW = TableReader("arrow", "arrow or feather files: .arrow, .feather or .ipc (--user, --item, --timestamp)")


def all_files(src: Path) -> list[Path]:
    """Files behind a file, a folder with its inner folders, or a glob; hidden and `_`-prefixed ones are left out."""
    # parquet writers partition into folders, and leave hidden and _-prefixed files next to the data
    found = sorted(src.rglob("*")) if src.is_dir() else files_of(src)
    inside = [path.relative_to(src).parts if src.is_dir() else () for path in found]
    return [
        path
        for path, parts in zip(found, inside, strict=True)
        if path.is_file() and not any(part.startswith((".", "_")) for part in parts)
    ]


def item_files(path: Path) -> list[Path]:
    """The files of an item table; `DataError` when there is none."""
    if not path.is_file() and not path.is_dir():
        raise DataError(f"no such item table: {path}", "check --items")
    found = [each for each in all_files(path) if type_of(each) or path.is_file()]
    if not found:
        raise DataError(f"{path} holds no item table", f"expected a table: {', '.join(SUFFIXES)}")
    return found


def unread_files(folders: Iterable[Path], read: Iterable[Path]) -> list[str]:
    """Names of the files and linked folders that are not in `read`, without hidden and harmless ones."""
    known = {os.path.realpath(path) for path in read}
    unread: dict[str, str] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if not (path.is_file() or path.is_symlink()) or any(part.startswith(".") for part in name.parts):
                continue
            if os.path.realpath(path) not in known and not any(fnmatchcase(path.name.lower(), p) for p in HARMLESS):
                unread.setdefault(os.path.realpath(path), str(name))
    return list(unread.values())


def _broken_ids(rejects: pl.DataFrame) -> list[str]:
    found = rejects.filter(pl.col("reason").is_in(BAD_IDS))
    if found.is_empty():
        return []
    return [
        f"rows with a line break in an id: {found.height}, the first at {found['file'][0]}:{found['line'][0]}: a quote "
        "that is not closed takes in the rows after it, so mend the quotes"
    ]


def _reject_broken_ids(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of a log where an id with a line break is a reason to leave its row out."""
    for role in ("user", "item"):
        broken = pl.col("reason").is_null() & pl.col(role).str.contains(LINE_BREAK).fill_null(False)
        rows = rows.with_columns(
            pl.when(broken).then(pl.lit(f"bad_{role}")).otherwise("reason").alias("reason"),
            pl.when(broken).then(pl.col(role).str.head(LONGEST_VALUE)).otherwise("value").alias("value"),
        )
    return rows


def _parse_file(path: Path, options: ReadOptions, own_texts: bool, root: Path) -> tuple[pl.DataFrame, bool]:
    """The parsed rows of one file, and whether it has ratings that nothing asks for."""
    flags = " ".join(f"--{role} COL" for role in options.roles)
    hint = f'name the columns: {flags}; --timestamp "" takes the row order as time'
    roles = dict(zip(options.roles, _stripped(options.roles.values()), strict=True))
    names = names_of(path, root) if options.where or (own_texts and not options.text) else []
    conditions = columns_of(options.where, names, path)
    texts = _stripped(options.text) if own_texts else []
    if own_texts and not texts:
        texts = [name for name in names if name not in (*roles.values(), *conditions)]
        if not texts:
            raise DataError(f"{path} has no column for the text of an item", "an item table needs a text column")
    table = load(path, list(dict.fromkeys([*roles.values(), *conditions, *texts])), hint, root=root)
    rows = _reject_broken_ids(select_rows(table, roles, options, path, texts))
    used = {*roles.values(), *conditions, *texts}
    return rows, any(name.lower() in RATINGS and name not in used for name in table.names)


def _stripped(names: Iterable[str]) -> list[str]:
    return [name.strip() for name in names]


def _read_items(files: list[Path], options: ReadOptions) -> Items:
    parts = [_item_rows(path, options) for path in files]
    return clean_items(pl.concat(parts), str(options.items))


def _item_rows(path: Path, options: ReadOptions) -> pl.DataFrame:
    wanted = list(dict.fromkeys((options.item, *options.text))) if options.text else []
    hint = "--item COL names the id column of the log and of the item table, --text COL a text column"
    root = options.items if options.items is not None and options.items.is_dir() else None
    table = load(path, wanted, hint, root=root)
    item = options.item.strip()
    if item not in table.data.columns:
        listed = ", ".join(map(repr, table.data.columns))
        raise DataError(f"{path} has no column {item!r}; it has: {listed}", hint)
    fields = [name for name in table.data.columns if name != item] if not options.text else _stripped(options.text)
    if not fields:
        raise DataError(f"{path} has no column but {item!r}", "an item table needs a text column")
    return item_rows(table, item, fields, path)


def item_rows(table: Table, item: str, fields: list[str], path: Path) -> pl.DataFrame:
    """Rows of an item table as `clean_items` takes them: item, text, file, line, reason, value."""
    ids = to_ids(table.data[item], f"{path}: {item}")
    problems = pl.DataFrame({"malformed": table.malformed.is_not_null(), "broken": ids.str.contains(LINE_BREAK)})
    return pl.DataFrame(
        {
            "item": ids,
            "text": table.texts(fields, str(path)),
            "file": pl.repeat(str(path), table.data.height, dtype=pl.String, eager=True),
            LINE: table.line,
            "reason": problems.select(
                pl.when("malformed").then(pl.lit("malformed_line")).when("broken").then(pl.lit("bad_item"))
            ).to_series(),
            "value": table.malformed,
        }
    )
