"""LC-Rec's and LETTER's json trio: `<D>.inter.json`, `<D>.item.json` and `<D>.index.json`.

The log is {user: [items, oldest first]} without any time, so only the order within a user is known. Users are put on
one clock by relative position: event k of n stands at (k + 1/2) / n. The log's `notes` count these users.
"""

import re
from pathlib import Path
from typing import Any

import polars as pl

from cladapt.artifacts import read_json
from cladapt.data.readers._base import (
    NO_ITEMS,
    NO_REJECTS,
    RawLog,
    ReadOptions,
    files_of,
    hash_files,
    one_log,
    refuse_options,
)
from cladapt.data.readers._clean import Items, assemble, clean_items, parse_events
from cladapt.data.readers._index import find_index, read_index, shorten
from cladapt.errors import DataError

LOG = re.compile(r"(?P<dataset>.+)\.inter\.json")


class LcRecReader:
    """Reads one dataset; the item table and the index may be missing."""

    name = "lcrec"
    expects = "a <D>.inter.json file {user: [items]} or its folder, <D>.item.json and <D>.index.json beside it"
    generic = False

    def schema(self, options: ReadOptions) -> dict[str, str]:
        return {
            "<D>.inter.json": "{user: [items, oldest first]}",
            "<D>.item.json": "{item: {title: …, description: …}}, may be missing",
            "<D>.index.json": "{item: [tokens]}, may be missing",
        }

    def detects(self, src: Path) -> bool:
        return bool(_logs(src))

    def read(self, src: Path, options: ReadOptions) -> RawLog:
        refuse_options(self, options)
        logs = _logs(src)
        log = one_log(src, list(logs.values()), self, ".inter.json file")
        (dataset,) = logs
        rows = _read_log(log)
        table = log.with_name(f"{dataset}.item.json")
        items = _read_items(table) if table.is_file() else (NO_ITEMS, NO_REJECTS)
        index_file = find_index(log.parent, dataset)
        index = read_index(index_file) if index_file else None
        notes = {"users_without_times_ordered_by_relative_position": rows["user"].n_unique()}
        if index is not None:
            notes["items_missing_in_index"] = len(set(rows["item"]) - {*index, ""})
        files = [path for path in (log, table, index_file) if path is not None and path.is_file()]
        hashes = hash_files(files, log.parent)
        notes = {name: count for name, count in notes.items() if count}
        return assemble(self.name, parse_events(rows, str(log)), str(log), hashes, items, index, notes)


def _logs(src: Path) -> dict[str, Path]:
    found = {match["dataset"]: path for path in files_of(src) if (match := LOG.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _read_log(path: Path) -> pl.DataFrame:
    """user, item in the order of relative positions; ties keep the file's order of users."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected {{user: [items]}}, found a {type(value).__name__}", "restore this file")
    for user, items in value.items():
        if not isinstance(items, list) or not all(isinstance(i, str | int) and not isinstance(i, bool) for i in items):
            raise DataError(
                f"{path}: user {user!r} has {shorten(items)}, expected a list of item ids",
                "ids are texts or whole numbers, oldest first",
            )
    rows = [(user, str(item)) for user, items in value.items() for item in items]
    frame = pl.DataFrame(rows, schema={"user": pl.String, "item": pl.String}, orient="row")
    place = (pl.int_range(pl.len()).over("user") + 0.5) / pl.len().over("user")
    return frame.with_columns(place=place).sort("place", maintain_order=True).drop("place")


def _read_items(path: Path) -> Items:
    """Items with the text `field | field | …` of their non-empty fields, in the file's order."""
    value = read_json(path)
    if not isinstance(value, dict) or not all(isinstance(fields, dict) for fields in value.values()):
        raise DataError(f"{path}: expected {{item: {{field: text}}}}", "restore this file")
    texts = [" | ".join(text for field in fields.values() if (text := _text(field))) for fields in value.values()]
    schema = {"item": pl.String, "text": pl.String}
    return clean_items(pl.DataFrame({"item": list(value), "text": texts}, schema=schema), str(path))


def _text(field: Any) -> str:
    if isinstance(field, list):
        return ", ".join(filter(None, map(_text, field)))
    return "" if field is None else str(field).strip()
