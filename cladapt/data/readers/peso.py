"""PESO's released streams: one JSON file per ready-made block, and the semantic-ID index beside them.

`<D>.all.block_<k>.json` holds {user: {"previous_block": [items], "current_block": [items]}}, oldest first; file k is
block k + 1. Only `current_block` is read as events; `previous_block` must repeat the earlier ones and is checked.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from cladapt.artifacts import read_json
from cladapt.data.readers._base import (
    NO_REJECTS,
    RawLog,
    ReadOptions,
    files_of,
    hash_files,
    refuse_options,
)
from cladapt.data.readers._clean import assemble, parse_events
from cladapt.data.readers._index import find_index, read_index, shorten
from cladapt.errors import DataError

BLOCK_FILE = re.compile(r"(?P<dataset>.+)\.all\.block_(?P<k>\d+)\.json")


class PesoReader:
    """Reads the block files of one dataset, or one of them."""

    name = "peso"
    expects = "a folder with <D>.all.block_<k>.json files, and <D>.index*.json where there is one"
    generic = False

    def schema(self, options: ReadOptions) -> dict[str, str]:
        return {
            "<D>.all.block_<k>.json": "{user: {previous_block: [items], current_block: [items]}}, oldest first",
            "<D>.index*.json": "{item: [tokens]}, may be missing",
        }

    def detects(self, src: Path) -> bool:
        return bool(_block_files(src))

    def read(self, src: Path, options: ReadOptions) -> RawLog:
        refuse_options(self, options)
        datasets = _block_files(src)
        if len(datasets) != 1:
            found = f"has the blocks of {' and '.join(datasets)}" if datasets else "has no block file"
            raise DataError(f"{src} {found}, expected one dataset", f"expected {self.expects}")
        ((dataset, files),) = datasets.items()
        blocks = {k + 1: _read_block(path) for k, path in sorted(files.items())}
        names = {k + 1: str(path) for k, path in files.items()}
        events = _events(blocks, names)
        index_file = find_index(files[min(files)].parent, dataset)
        index = read_index(index_file) if index_file else None
        notes = _check_previous(blocks)
        if index is not None:
            notes["items_missing_in_index"] = len(set(events["item"]) - set(index))
        items = pl.Series("item", list(index or ()), dtype=pl.String).to_frame().with_columns(text=pl.lit(""))
        sources = [*files.values(), *([index_file] if index_file else [])]
        hashes = hash_files(sorted(sources), sources[0].parent)
        parsed = parse_events(events, str(src))
        return assemble(self.name, parsed, str(src), hashes, (items, NO_REJECTS), index, +notes)


def _block_files(src: Path) -> dict[str, dict[int, Path]]:
    """Dataset -> {k: file}."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in files_of(src):
        if match := BLOCK_FILE.fullmatch(path.name):
            found[match["dataset"]][int(match["k"])] = path
    return dict(found)


def _read_block(path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """User -> (previous items, current items)."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected {{user: …}}, found a {type(value).__name__}", "restore this file")
    return {
        user: (_ids(path, user, row, "previous_block"), _ids(path, user, row, "current_block"))
        for user, row in value.items()
    }


def _ids(path: Path, user: str, row: Any, key: str) -> list[str]:
    ids = row.get(key) if isinstance(row, dict) else None
    if not isinstance(ids, list) or not all(isinstance(item, str) and item for item in ids):
        raise DataError(
            f"{path}: user {user!r}: {key} is {shorten(ids)}, expected a list of item ids", "ids are non-empty texts"
        )
    return ids


def _events(blocks: Mapping[int, dict[str, tuple[list[str], list[str]]]], files: Mapping[int, str]) -> pl.DataFrame:
    rows = [
        (user, current, block, files[block]) for block, users in blocks.items() for user, (_, current) in users.items()
    ]
    schema: dict[str, Any] = {"user": pl.String, "item": pl.List(pl.String), "block": pl.Int32, "file": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row").explode("item").drop_nulls("item")


def _check_previous(blocks: Mapping[int, dict[str, tuple[list[str], list[str]]]]) -> Counter[str]:
    """Users whose previous_block is not what the earlier files say, and those whose earlier files are not all here."""
    notes: Counter[str] = Counter()
    history: dict[str, list[str]] = defaultdict(list)
    for position, (block, users) in enumerate(blocks.items(), start=1):
        complete = block == position
        for user, (previous, _) in users.items():
            if not complete:
                notes["previous_block_unchecked"] += 1
            elif previous != history[user]:
                notes["previous_block_disagrees"] += 1
        for user, (_, current) in users.items():
            history[user] += current
    return notes
