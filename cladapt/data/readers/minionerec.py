"""The csv splits of MiniOneRec and ReRe: one sample a row, its history and its target, in global time order.

Columns user_id, item_id, history_item_id, and where there are item_title, item_sid, history_item_title and
history_item_sid; histories are Python lists written out. Splits follow one another in time: train, valid, test. A
user's events are the history of the first row, then the target of every row.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from cladapt.data.readers._base import (
    Columns,
    RawLog,
    clean_events,
    clean_items,
    hash_files,
    parse_events,
    refuse_columns,
)
from cladapt.data.readers._index import shorten
from cladapt.data.readers.tables import header_line, load
from cladapt.errors import DataError

NEEDED = ("user_id", "item_id", "history_item_id")
TARGETS = {"title": "item_title", "sid": "item_sid"}
SPLITS = ("train", "valid", "test")
TOKEN = re.compile(r"<[^<>]+>")


class MiniOneRecReader:
    """Reads the splits of one dataset, or one file of them."""

    name = "minionerec"
    expects = "csv splits train, valid, test (in the file's or its folder's name) with user_id,item_id,history_item_id"
    generic = False

    def detects(self, src: Path) -> bool:
        return bool(_files(src))

    def read(self, src: Path, columns: Columns) -> RawLog:
        refuse_columns(self, columns)
        files = _in_order(src, _files(src), self.expects)
        rows = [row for path in files for row in _rows(path)]
        events, known = _events(rows)
        clean, dropped = clean_events(parse_events(events, str(src)), str(src))
        items, dropped_items = clean_items(
            pl.DataFrame({"item": list(known), "text": [str(k.get("title") or "") for k in known.values()]},
                         schema={"item": pl.String, "text": pl.String})
        )  # fmt: skip
        index = _index(known)
        root = src if src.is_dir() else src.parent
        notes = {"events_from_first_histories": events.height - len(rows)}
        return RawLog(
            clean, items, index, dropped | dropped_items, hash_files(files, root), self.name,
            {name: count for name, count in notes.items() if count},
        )  # fmt: skip


def _files(src: Path) -> list[Path]:
    found = sorted(src.rglob("*.csv")) if src.is_dir() else [src] if src.suffix == ".csv" else []
    return [p for p in found if p.is_file() and set(NEEDED) <= set(header_line(p).split(","))]


def _in_order(src: Path, files: list[Path], expects: str) -> list[Path]:
    """Splits in time order; `DataError` for a file that belongs to none, or for two of one split."""
    if len(files) == 1:
        return files
    by_split: dict[str, Path] = {}
    for path in files:
        words = re.split(r"[^a-z]+", str(path.relative_to(src)).lower())
        splits = [split for split in SPLITS if split in words]
        if len(splits) != 1 or splits[0] in by_split:
            raise DataError(
                f"{path} is not the one file of a split ({' or '.join(SPLITS)})", f"expected {expects}; name one file"
            )
        by_split[splits[0]] = path
    if not by_split:
        raise DataError(f"{src} has no such csv", f"expected {expects}")
    return [by_split[split] for split in SPLITS if split in by_split]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    present = set(header_line(path).split(","))
    optional = [name for t in TARGETS.values() for name in (t, f"history_{t}") if name in present]
    table = load(path, [*NEEDED, *optional], "restore the header of MiniOneRec's splits")
    for line, row in enumerate(table.iter_rows(named=True), start=2):
        yield {**row, "where": f"{path}:{line}"}


def _events(rows: list[dict[str, Any]]) -> tuple[pl.DataFrame, dict[str, dict[str, str]]]:
    """user and item in time order, and item -> its title and sid as first seen."""
    events: list[tuple[Any, Any]] = []
    known: dict[str, dict[str, str]] = {}
    seen: set[Any] = set()
    for row in rows:
        user, item = row["user_id"], row["item_id"]
        if user not in seen:
            seen.add(user)
            past = _list(row, "history_item_id")
            known |= {str(each): {} for each in past if str(each) not in known}
            events += [(user, str(each)) for each in past]
            sides = {key: _list(row, f"history_{name}") for key, name in TARGETS.items() if f"history_{name}" in row}
            for key, values in sides.items():
                if len(values) != len(past):
                    raise DataError(
                        f"{row['where']}: history_{TARGETS[key]} has {len(values)} entries, "
                        f"history_item_id {len(past)}",
                        "make the split again",
                    )
                for each, value in zip(past, values, strict=True):
                    known.setdefault(str(each), {}).setdefault(key, str(value))
        events.append((user, item))
        if item:
            about = known.setdefault(item, {})
            for key, name in TARGETS.items():
                if row.get(name):
                    about.setdefault(key, row[name])
                    if key == "sid" and about[key] != row[name]:
                        raise DataError(
                            f"{row['where']}: item {item!r} has the semantic ID {row[name]!r}, "
                            f"before it had {about[key]!r}",
                            "make all splits from one index",
                        )
    schema = {"user": pl.String, "item": pl.String}
    return pl.DataFrame(events, schema=schema, orient="row"), known


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    """A list written out by Python; nothing is evaluated."""
    text = row[name]
    try:
        value = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise DataError(
            f"{row['where']}: {name} is {shorten(text)}, expected a list", "e.g. ['B01', 'B02'], oldest first"
        )
    return value


def _index(known: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]] | None:
    """Item -> tokens where every item has a semantic ID; None when none has."""
    index = {item: tuple(TOKEN.findall(about["sid"])) for item, about in known.items() if "sid" in about}
    odd = [item for item, tokens in index.items() if "".join(tokens) != known[item]["sid"]]
    if odd:
        raise DataError(f"item {odd[0]!r} has the semantic ID {known[odd[0]]['sid']!r}", "e.g. <a_1><b_7><c_3>")
    return index or None
