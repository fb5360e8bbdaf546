"""The csv splits of MiniOneRec and ReRe: one sample a row, its history and its target, in global time order.

Columns user_id, item_id, history_item_id, and where there are item_title, item_sid, timestamp and their history_… lists
(written out by Python). A user's events are the history of the first row, then the target of every row; without a
timestamp column the rows of train, valid, test, in this order, are the clock. `notes` count histories that disagree.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from cladapt.data.readers._base import (
    NO_REJECTS,
    RawLog,
    ReadOptions,
    hash_files,
    refuse_options,
)
from cladapt.data.readers._clean import assemble, clean_items, parse_events
from cladapt.data.readers._index import shorten
from cladapt.data.readers._scan import exact_lines, header_line, load
from cladapt.errors import DataError

NEEDED = ("user_id", "item_id", "history_item_id")
SIDES = {"title": "item_title", "sid": "item_sid"}
TIME = "timestamp"
SPLITS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}  # word in a name -> split, in time order
TOKEN = re.compile(r"<[^<>]+>")
EVENTS = {"user": pl.String, "item": pl.String, "timestamp": pl.String, "file": pl.String, "line": pl.Int64}


class MiniOneRecReader:
    """Reads the splits of one dataset, or one file of them."""

    name = "minionerec"
    expects = "csv splits train, valid, test (in the file's or its folder's name) with user_id,item_id,history_item_id"
    generic = False

    def schema(self, options: ReadOptions) -> dict[str, str]:
        return {
            "user_id": "user id",
            "item_id": "item id of the target",
            "history_item_id": "list of item ids, oldest first, e.g. ['B01', 'B02']",
            "timestamp, history_timestamp": "unix seconds of the target, list of those of the history; may be missing",
            "item_title, history_item_title": "text, list of texts; may be missing",
            "item_sid, history_item_sid": "semantic ID such as <a_1><b_7>, list of them; may be missing",
        }

    def detects(self, src: Path) -> bool:
        return bool(_files(src))

    def read(self, src: Path, options: ReadOptions) -> RawLog:
        refuse_options(self, options)
        files = _in_order(src, _files(src), self.expects)
        rows = [row for path in files for row in _rows(path)]
        timed = {TIME in row for row in rows}
        if len(timed) > 1:
            raise DataError(f"{src}: some splits have a {TIME} column, others have none", "make all splits alike")
        events, known, notes = _events(rows)
        parsed = parse_events(events if True in timed else events.drop("timestamp"), str(src))
        texts = [about.get("title", "") for about in known.values()]
        schema = {"item": pl.String, "text": pl.String}
        items, _ = clean_items(pl.DataFrame({"item": list(known), "text": texts}, schema=schema), str(src))
        hashes = hash_files(files, src if src.is_dir() else src.parent)
        return assemble(self.name, parsed, str(src), hashes, (items, NO_REJECTS), _index(known), notes, exact=True)


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
        splits = list({SPLITS[word] for word in words if word in SPLITS})
        if len(splits) != 1 or splits[0] in by_split:
            raise DataError(
                f"{path} is not the one file of a split (train or valid or test)", f"expected {expects}; name one file"
            )
        by_split[splits[0]] = path
    if not by_split:
        raise DataError(f"{src} has no such csv", f"expected {expects}")
    return [by_split[split] for split in dict.fromkeys(SPLITS.values()) if split in by_split]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    present = set(header_line(path).split(","))
    optional = [name for target in (*SIDES.values(), TIME) for name in (target, f"history_{target}") if name in present]
    table = load(path, [*NEEDED, *optional], "restore the header of MiniOneRec's splits")
    for row in table.data.with_columns(exact_lines(path, table.line)).iter_rows(named=True):
        yield {**row, "file": str(path)}


def _events(rows: list[dict[str, Any]]) -> tuple[pl.DataFrame, dict[str, dict[str, str]], dict[str, int]]:
    """Events in the order of the rows, item -> its title and sid as first seen, and the oddities.

    A row without a user is one event, whatever its history: nobody else can be told to have had it.
    """
    events: list[tuple[Any, ...]] = []
    known: dict[str, dict[str, str]] = {}
    notes: Counter[str] = Counter()
    before: dict[str, list[str]] = {}
    for row in rows:
        user, item = row["user_id"], row["item_id"]
        place = (row["file"], row["line"])
        past = [str(each) for each in _list(row, "history_item_id")]
        sides = {key: _side(row, name, len(past)) for key, name in SIDES.items() if f"history_{name}" in row}
        for k, each in enumerate(past):
            _learn(known, each, {key: values[k] for key, values in sides.items()}, row)
        if item:
            _learn(known, item, {key: row.get(name) for key, name in SIDES.items()}, row)
        if not user:
            events.append((user, item, row.get(TIME), *place))
            continue
        if user not in before:
            before[user] = past
            has_times = f"history_{TIME}" in row
            # a history without times of its own stands at its first target's
            times = _side(row, TIME, len(past)) if has_times else [row.get(TIME)] * len(past)
            events += [(user, each, time, *place) for each, time in zip(past, times, strict=True)]
            notes["events_from_first_histories"] += len(past)
            notes["events_at_the_time_of_the_next"] += len(past) if TIME in row and not has_times else 0
        elif past != before[user][len(before[user]) - len(past) :]:
            notes["histories_that_disagree_with_earlier_rows"] += 1
        events.append((user, item, row.get(TIME), *place))
        before[user] = [*before[user], *([item] if item else [])]
    return pl.DataFrame(events, schema=EVENTS, orient="row"), known, dict(+notes)


def _learn(known: dict[str, dict[str, str]], item: str, about: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Keep what a row says of an item; an item has one semantic ID."""
    entry = known.setdefault(item, {})
    for key, value in about.items():
        if value and entry.setdefault(key, value) != value and key == "sid":
            raise DataError(
                f"{_place(row)}: item {item!r} has the semantic ID {value!r}, before it had {entry[key]!r}",
                "make all splits from one index",
            )


def _side(row: Mapping[str, Any], name: str, count: int) -> list[str]:
    """The history_… list of a column as texts, as long as history_item_id."""
    values = _list(row, f"history_{name}")
    if len(values) != count:
        raise DataError(
            f"{_place(row)}: history_{name} has {len(values)} entries, history_item_id {count}", "make the split again"
        )
    return [str(value) for value in values]


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    """A list written out by Python; nothing is evaluated."""
    text = row[name]
    try:
        value = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise DataError(
            f"{_place(row)}: {name} is {shorten(text)}, expected a list", "e.g. ['B01', 'B02'], oldest first"
        )
    return value


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['file']}:{row['line']}"


def _index(known: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]] | None:
    """Item -> tokens where every item has a semantic ID; None when none has."""
    index = {item: tuple(TOKEN.findall(about["sid"])) for item, about in known.items() if "sid" in about}
    odd = [item for item, tokens in index.items() if "".join(tokens) != known[item]["sid"]]
    if odd:
        raise DataError(f"item {odd[0]!r} has the semantic ID {known[odd[0]]['sid']!r}", "e.g. <a_1><b_7><c_3>")
    return index or None
