"""Dumps of one record a line, JSON or Python literals, under names that do not say which: `.json`, `.json.gz`, ….

Python literals are read line by line and never evaluated.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from cladapt.data.readers._base import NO_ITEMS, NO_REJECTS, files_of
from cladapt.data.readers._clean import Items, clean_items
from cladapt.data.readers._parse import to_ids
from cladapt.data.readers._scan import LINE, PACKED, Table, header_line, lines_of, load
from cladapt.errors import DataError

ENDINGS = tuple(ending + packed for ending in (".json", ".jsonl") for packed in PACKED)
BROKEN = (ValueError, SyntaxError, MemoryError, RecursionError)


def record_files(src: Path) -> list[Path]:
    """Files of a source that may hold a record a line."""
    return [path for path in files_of(src) if path.name.lower().endswith(ENDINGS)]


def first_record(path: Path) -> dict[str, Any]:
    """The record of the first line, empty where that is none."""
    try:
        return _record(header_line(path)) or {}
    except (OSError, EOFError, pl.exceptions.PolarsError):
        return {}


def load_records(path: Path, wanted: Sequence[str], hint: str) -> Table:
    """Fields `wanted` of the records as text; `DataError` where the first record lacks one."""
    if _is_json(path):
        return load(path, wanted, hint, "jsonl")
    first = first_record(path)
    missing = [name for name in wanted if name not in first]
    if missing:
        raise DataError(f"{path} has no field {', '.join(map(repr, missing))}; it has: {', '.join(first)}", hint)
    columns: dict[str, list[str | None]] = {name: [] for name in wanted}
    numbers, malformed = [], []
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        record = _record(line)
        numbers.append(number)
        malformed.append(None if record is not None else line.rstrip("\r\n"))
        for name, values in columns.items():
            values.append(_text((record or {}).get(name)))
    data = pl.DataFrame(columns, schema=dict.fromkeys(wanted, pl.String))
    line_numbers = pl.Series(LINE, numbers, dtype=pl.Int64)
    return Table(data, line_numbers, pl.Series(malformed, dtype=pl.String), tuple(first), json=True)


def read_items(path: Path | None, item: str, fields: Sequence[str]) -> Items:
    """The items of a record file with the text `field | field`, of those of `fields` that its first record has."""
    if path is None:
        return NO_ITEMS, NO_REJECTS
    present = list(dict.fromkeys(name for name in fields if name in first_record(path)))
    table = load_records(path, [item, *present], f"each item is a record with {item} and {', '.join(fields)}")
    nothing = pl.repeat("", table.data.height, dtype=pl.String, eager=True)
    text = table.texts(present, str(path)) if present else nothing
    malformed = table.malformed
    reason = pl.repeat("malformed_line", len(malformed), dtype=pl.String, eager=True).set(malformed.is_null(), None)
    rows = {"item": to_ids(table.data[item], str(path)), "text": text, LINE: table.line, "reason": reason}
    return clean_items(pl.DataFrame({**rows, "value": malformed}), str(path))


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(header_line(path)), dict)
    except BROKEN:
        return False


def _record(line: str) -> dict[str, Any] | None:
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(line.strip())
        except BROKEN:
            continue
        if isinstance(value, Mapping):
            return {str(key): each for key, each in value.items()}
    return None


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | tuple | dict) else str(value)
