"""Table files by type, in one form: csv and json lines as text, parquet and arrow with their own types.

Only the columns in use are kept, and of parquet and arrow read, in polars' streaming engine; an arrow stream is read
whole, and so may be packed files.
"""

import csv
import gzip
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import dropwhile, islice
from operator import not_
from pathlib import Path
from typing import Any, NoReturn, TextIO
from urllib.parse import unquote

import polars as pl

from cladapt.data.readers._base import NO_REJECTS
from cladapt.data.readers._parse import flatten_json, join_text
from cladapt.errors import DataError

SEPARATORS = ",;\t|"
PACKED = ("", ".gz", ".zst")
SUFFIXES = {  # file type -> endings of its files' names
    "csv": tuple(ending + packed for ending in (".csv", ".tsv") for packed in PACKED),
    "jsonl": tuple(ending + packed for ending in (".jsonl", ".ndjson") for packed in PACKED),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather", ".ipc"),
}
LINE = "line"
LONGEST_LINE = 1 << 20  # characters of a first line that are looked at
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_KEYS_FROM = 200  # lines of json whose keys an error lists
_CUT = "\0"


@dataclass(frozen=True)
class Table:
    """Columns of a table file, and where each row stands in it."""

    data: pl.DataFrame
    line: pl.Series
    """Line (row of a parquet or arrow file), Int64 from 1; of a csv as if no row had line breaks, see `exact_lines`."""
    malformed: pl.Series
    """The line where it is no row, null where it is one: String."""
    names: tuple[str, ...]
    """All columns of the file."""
    json: bool = False
    """Whether lists are written as json."""

    def texts(self, columns: Sequence[str], where: str) -> pl.Series:
        """One text per row from some of the columns, joined as `join_text` does."""
        chosen = self.data.select(list(dict.fromkeys(columns)))
        return join_text(chosen.with_columns(map(flatten_json, chosen)) if self.json else chosen, where)

    @classmethod
    def of(cls, data: pl.DataFrame, first: int, names: Sequence[str] = ()) -> "Table":
        """A table without malformed rows whose first row is at line `first`."""
        line = pl.int_range(first, data.height + first, eager=True).alias(LINE)
        nothing = pl.repeat(None, data.height, dtype=pl.String, eager=True)
        return cls(data, line, nothing, tuple(names or data.columns))


def type_of(path: Path) -> str | None:
    """File type of a table by its name, None when it is none."""
    name = path.name.lower()
    return next((kind for kind, endings in SUFFIXES.items() if name.endswith(endings)), None)


def load(path: Path, wanted: Sequence[str], hint: str, kind: str | None = None, root: Path | None = None) -> Table:
    """Columns `wanted` of a table file, all when empty; spaces around column names do not count.

    `DataError` lists the columns found when one is missing, and names a column that occurs twice or the line of a row
    with too many fields. `kind` is the file type where the name does not say it; folders `name=value` between `root`
    and a parquet file are columns of it.
    """
    kind = kind or type_of(path) or _no_table(path)
    with _readable(path, kind):
        if kind == "jsonl":
            return _load_json(path, wanted, hint)
        if kind == "csv":
            _refuse_repeats(path, wanted)
        frame = _scan(path, kind)
        own = frame.collect_schema().names()
        partitions = _partitions(path, kind, root)
        names = list(dict.fromkeys([*own, *partitions]))
        columns = _columns(path, wanted, names, hint)
        for name in columns:
            if name in own and name in partitions:
                raise DataError(
                    f"{path} has a column {name!r}, and its folder {name}={partitions[name]} gives it another",
                    "rename one of the two; a folder that is named as the source itself gives no column",
                )
        if kind == "csv":  # an empty field in quotes is as empty as one without
            fields = pl.col(columns)
            # polars finds a row with too many fields only where it reads every column
            cut = pl.any_horizontal(pl.all().is_null()).alias(_CUT)
            chosen = frame.select(pl.when(fields != "").then(fields), cut)
            return Table.of(chosen.collect(engine="streaming").drop(_CUT), 2, names)
        values = [pl.lit(value, dtype=pl.String).alias(name) for name, value in partitions.items()]
        return Table.of(frame.with_columns(values).select(columns).collect(engine="streaming"), 1, names)


def names_of(path: Path, root: Path | None = None) -> list[str]:
    """The columns of a table file, and those its folders below `root` give; of json lines those of the first lines."""
    kind = type_of(path) or _no_table(path)
    with _readable(path, kind):
        if kind == "jsonl":
            return _json_names(_json_lines(path))
        return list(dict.fromkeys([*_scan(path, kind).collect_schema().names(), *_partitions(path, kind, root)]))


def _partitions(path: Path, kind: str, root: Path | None) -> dict[str, str | None]:
    """Column -> value of a parquet file's folders `name=value` below `root`: texts, as ids such as 007 have zeros."""
    if kind != "parquet" or root is None or not path.is_relative_to(root):
        return {}
    pairs = [part.partition("=") for part in path.parent.relative_to(root).parts if part.find("=") > 0]
    return {unquote(name): None if value == NO_VALUE else unquote(value) for name, _, value in pairs}


def _no_table(path: Path) -> NoReturn:
    endings = ", ".join(ending for endings in SUFFIXES.values() for ending in endings)
    raise DataError(f"{path} is no table that can be read", f"expected one of {endings}")


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """What the file's type forbids is a `DataError` that names the file, and the line where it can be known."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError, EOFError) as error:
        if kind == "csv" and (line := _overlong(path)):
            number, fields, expected = line
            raise DataError(
                f"{path}:{number}: the row has {fields} fields, the header {expected}",
                "quote a field that holds the separator, or mend the row",
            ) from error
        reason = " ".join(str(error).split())[:300]
        expected_type = "a UTF-8 text file" if kind in ("csv", "jsonl") else f"a whole {kind} file"
        raise DataError(f"cannot read {path}: {reason}", f"expected {expected_type}") from error


def _scan(path: Path, kind: str) -> pl.LazyFrame:
    """The file as a lazy frame; spaces around column names are taken off where the names stay distinct."""
    frame = _scan_as_written(path, kind)
    stripped = {name: name.strip() for name in frame.collect_schema().names()}
    return frame.rename(stripped) if len({*stripped.values()}) == len(stripped) else frame


def _scan_as_written(path: Path, kind: str) -> pl.LazyFrame:
    if kind == "parquet":
        return pl.scan_parquet(path, hive_partitioning=False, glob=False)
    if kind == "arrow":
        try:
            frame = pl.scan_ipc(path, glob=False)
            frame.collect_schema()
            return frame
        except pl.exceptions.PolarsError:
            return pl.read_ipc_stream(path).lazy()
    return pl.scan_csv(path, separator=separator_of(path), infer_schema=False, glob=False)


def _columns(path: Path, wanted: Sequence[str], found: Sequence[str], hint: str) -> list[str]:
    """The columns to read, in the order of `wanted`."""
    names = [name if name in found else name.strip() for name in wanted]
    missing = [name for name in names if name not in found]
    if missing:
        listed = ", ".join(map(repr, found))
        raise DataError(f"{path} has no column {', '.join(map(repr, missing))}; it has: {listed}", hint)
    return list(dict.fromkeys(names)) or list(found)


def _refuse_repeats(path: Path, wanted: Sequence[str]) -> None:
    fields = [field.strip() for field in _split(path, header_line(path), separator_of(path))]
    used = [name for name in ([name.strip() for name in wanted] or fields) if name]
    repeated = [name for name in used if fields.count(name) > 1]
    if repeated:
        raise DataError(
            f"{path} has {fields.count(repeated[0])} columns named {repeated[0]!r}", "give each column its own name"
        )


def _load_json(path: Path, wanted: Sequence[str], hint: str) -> Table:
    """Fields of json lines as text, arrays and objects as json; blank lines do not count."""
    lines = _json_lines(path)
    found = _json_names(lines)
    columns = _columns(path, wanted, found, hint)
    fields = [pl.col(LINE).str.json_path_match(f"$[{json.dumps(name)}]").alias(f"={name}") for name in columns]
    absent = pl.all_horizontal(pl.all().exclude("row", LINE).is_null())
    rows = (
        lines.with_columns(fields)
        .with_columns(pl.when(absent).then(pl.col(LINE)).alias(LINE))
        .collect(engine="streaming")
    )
    text = rows[LINE]
    whole = text.str.strip_chars().str.starts_with("{") & text.str.json_path_match("$").is_not_null()
    data = rows.select(pl.col(f"={name}").alias(name) for name in columns)
    return Table(
        data, rows["row"].cast(pl.Int64).alias(LINE), text.set(whole.fill_null(True), None), tuple(found), json=True
    )


def _json_lines(path: Path) -> pl.LazyFrame:
    header_line(path)  # refuses UTF-16
    lines = pl.scan_lines(path, name=LINE, row_index_name="row", row_index_offset=1, glob=False)
    return lines.filter(pl.col(LINE).str.strip_chars() != "")


def _json_names(lines: pl.LazyFrame) -> list[str]:
    first = lines.head(_KEYS_FROM).collect(engine="streaming")[LINE]
    return list(dict.fromkeys(key for text in first for key in _keys(text)))


def _keys(text: str) -> list[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return list(value) if isinstance(value, dict) else []


def separator_of(path: Path) -> str:
    """Tab for .tsv; else the separator that cuts the header line into most fields, a comma when none does."""
    header = header_line(path)
    separators = "\t" if ".tsv" in path.name.lower()[-8:] else SEPARATORS
    return max(separators, key=lambda separator: len(_split(path, header, separator)))


def _split(path: Path, header: str, separator: str) -> list[str]:
    """The fields of a header line; `DataError` where it is none, as where lines end in carriage returns."""
    try:
        return next(csv.reader([header], delimiter=separator), [])
    except csv.Error as error:
        if "\r" in header:
            raise DataError(
                f"{path}: lines end in carriage returns alone, expected line feeds",
                f"convert them: tr '\\r' '\\n' < {path.name} > lines-{path.name}",
            ) from error
        raise DataError(f"{path}: the header cannot be read: {error}", "expected a line with column names") from error


def header_line(path: Path) -> str:
    """First line of a text file that is not empty, without its byte-order mark; `DataError` for UTF-16."""
    first = _first_line(path).rstrip("\r\n")
    halves = (first[:8:2], first[1:8:2])
    if first.startswith("\ufffd\ufffd") or any(half and not half.strip("\0") for half in halves):
        raise DataError(
            f"{path} is written in UTF-16, expected UTF-8",
            f"convert it to UTF-8: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}",
        )
    return first


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a text file with their line feeds, unpacked where it is .gz or .zst, without a byte-order mark."""
    if path.name.lower().endswith(".zst"):
        frame = pl.scan_lines(path, glob=False)
        for batch in frame.collect_batches(maintain_order=True):
            yield from (f"{line}\n".removeprefix("\ufeff") for line in batch.to_series())
        return
    with _open(path) as handle:
        yield from handle


def _open(path: Path) -> TextIO:
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="\n")


def _first_line(path: Path) -> str:
    """The first line that is not empty, and not more of it than `LONGEST_LINE`."""
    if path.name.lower().endswith(".zst"):
        return next((line for line in lines_of(path) if line.strip("\r\n")), "")
    with _open(path) as handle:
        while (line := handle.readline(LONGEST_LINE)) and not line.strip("\r\n"):
            pass
        return line


def _overlong(path: Path) -> tuple[int, int, int] | None:
    """Line of the first row with more fields than the header, their number and that of the header."""
    with suppress(OSError, EOFError, pl.exceptions.PolarsError, csv.Error):
        width = 0
        records = dropwhile(not_, csv.reader(lines_of(path), delimiter=separator_of(path)))
        for line, fields in zip(_starts(path), records, strict=False):
            width = width or len(fields)
            if len(fields) > width:
                return line, len(fields), width
    return None


def _starts(path: Path) -> Iterator[int]:
    """Line at which each record of a csv begins, the header first: inside quotes a line break is none of its ends."""
    started = quoted = False
    for line, text in enumerate(lines_of(path), start=1):
        started = started or bool(text.strip("\r\n"))
        if started and not quoted:
            yield line
        quoted ^= text.count('"') % 2 == 1


def exact_lines(path: Path, rows: pl.Series) -> pl.Series:
    """Lines at which rows of a csv begin, from their numbers (header 1)."""
    lines = array("q", islice(_starts(path), max(rows, default=0)))
    return pl.Series(LINE, lines, dtype=pl.Int64).gather(rows - 1)


def exact_rejects(rejects: pl.DataFrame) -> pl.DataFrame:
    """Rejects of csv files with exact lines."""
    parts = [NO_REJECTS]
    for part in rejects.partition_by("file", maintain_order=True):
        path = Path(part["file"][0])
        is_csv = type_of(path) == "csv" and path.is_file()
        parts.append(part.with_columns(exact_lines(path, part[LINE])) if is_csv else part)
    return pl.concat(parts)
