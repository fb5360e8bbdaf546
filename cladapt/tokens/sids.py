"""The ID table: every item's semantic ID, one code per level, and the tokens that spell it."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cladapt.artifacts import hash_value, read_json, read_parquet, write_parquet
from cladapt.errors import DataError

COLUMNS = {
    "item": pl.String(),  # the stream's item id
    "codes": pl.List(pl.Int32()),  # one code per level
    "sizes": pl.List(pl.Int32()),  # codes per level of the whole table, the same in every row
}
VERSION = {"version": pl.Int32()}  # column of a table that is not the first of its stream, the same in every row
MAX_LEVELS = len(string.ascii_lowercase)
_TOKEN = re.compile(r"<([a-z])_(0|[1-9][0-9]{0,5})>")
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class SidTable:
    """Items and their codes: `codes` int32 [n_items, levels], 0 <= codes[:, l] < sizes[l]; items may share codes.

    `version`: which table of its stream it is; a refresh makes the next one, with the same levels and other codes.
    """

    items: tuple[str, ...]
    codes: np.ndarray
    sizes: tuple[int, ...]
    version: int = 1

    def __post_init__(self) -> None:
        codes = np.asarray(self.codes)
        if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
            raise DataError(
                f"semantic-ID codes have the shape {codes.shape} and dtype {codes.dtype}",
                "expected integers of shape [items, levels]",
            )
        if len(codes) != len(self.items) or not self.items:
            raise DataError(
                f"the ID table has {len(self.items)} items and {len(codes)} rows of codes",
                "give one row of codes per item, and at least one item",
            )
        if not 1 <= codes.shape[1] <= MAX_LEVELS:
            raise DataError(
                f"the semantic IDs have {codes.shape[1]} levels", f"use 1 to {MAX_LEVELS}: a level is named by a letter"
            )
        if len(self.sizes) != codes.shape[1]:
            raise DataError(f"{codes.shape[1]} levels but {len(self.sizes)} level sizes", "give one size per level")
        outside = np.argwhere((codes < 0) | (codes >= np.array(self.sizes, dtype=np.int64)))
        if len(outside):
            row, level = outside[0]
            raise DataError(
                f"item {self.items[row]!r} has the code {codes[row, level]} at level {level + 1}, whose capacity is "
                f"{self.sizes[level]}",
                f"codes of this level are 0 to {self.sizes[level] - 1}",
            )
        if len(set(self.items)) != len(self.items):
            twice = Counter(self.items).most_common(1)[0][0]
            raise DataError(f"item {twice!r} is listed twice in the ID table", "keep one row per item")
        object.__setattr__(self, "codes", np.ascontiguousarray(codes, dtype=np.int32))

    @property
    def levels(self) -> int:
        return len(self.sizes)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Every semantic-ID token, level by level: `<a_0>`, `<a_1>`, …, `<b_0>`, …"""
        letters = string.ascii_lowercase
        return tuple(f"<{letters[level]}_{code}>" for level, size in enumerate(self.sizes) for code in range(size))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each level starts in `tokens`, and the end: int64 [levels + 1]."""
        return np.cumsum((0, *self.sizes), dtype=np.int64)

    @cached_property
    def token_index(self) -> np.ndarray:
        """Each code's place in `tokens`: int32 [n_items, levels]."""
        return self.codes + self.offsets[:-1].astype(np.int32)

    @cached_property
    def sid(self) -> np.ndarray:
        """Number of each item's code tuple among the distinct ones in ascending order: int64 [n_items]."""
        return np.unique(self.codes, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the content: hash of items, codes and sizes, whatever the version."""
        return hash_value([self.items, self.codes.tolist(), self.sizes])

    def align(self, items: Sequence[str], cure: str = "complete the index: a row for every item") -> "SidTable":
        """The rows of `items`, in that order; sizes stay, so tokens do not change. `cure`: where a row is missing."""
        row_of = {item: row for row, item in enumerate(self.items)}
        missing = [item for item in items if item not in row_of]
        if missing:
            shown = ", ".join(repr(item) for item in missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
            raise DataError(f"{len(missing)} of {len(items)} items have no semantic ID: {shown}", cure)
        return replace(self, items=tuple(items), codes=self.codes[[row_of[item] for item in items]])

    def first(self, n: int) -> "SidTable":
        """The first `n` rows; `DataError` where there are fewer."""
        if n > len(self.items):
            raise DataError(f"the ID table has {len(self.items)} items, not {n}", "restore the table")
        return replace(self, items=self.items[:n], codes=self.codes[:n])

    def with_rows(self, items: Sequence[str], codes: np.ndarray, cure: str) -> "SidTable":
        """The table with rows for new `items` at its end; `DataError` with `cure` where a code exceeds its level."""
        try:
            return replace(self, items=(*self.items, *items), codes=np.concatenate([self.codes, codes]))
        except DataError as error:
            raise DataError(error.message, cure) from error

    def first_other(self, other: "SidTable") -> str | None:
        """The first item that both tables have with different IDs; None where they agree."""
        row_of = {item: row for row, item in enumerate(other.items)}
        both = [(row, row_of[item]) for row, item in enumerate(self.items) if item in row_of]
        if self.levels != other.levels:
            return self.items[both[0][0]] if both else None
        mine, theirs = np.array(both, dtype=np.int64).reshape(-1, 2).T
        differs = np.flatnonzero((self.codes[mine] != other.codes[theirs]).any(axis=1))
        return self.items[mine[differs[0]]] if len(differs) else None

    def spelt(self, item: str) -> str:
        """An item's ID as its tokens."""
        return "".join(self.tokens[t] for t in self.token_index[self.items.index(item)])

    def collisions(self) -> dict[str, Any]:
        """How many items share an ID, and how evenly each level's codes are used (entropy in bits over items)."""
        group = np.bincount(self.sid)
        levels = []
        for level, size in enumerate(self.sizes):
            share = np.bincount(self.codes[:, level]) / len(self.items)
            share = share[share > 0]
            entropy = max(0.0, float(-(share * np.log2(share)).sum()))
            levels.append(
                {
                    "level": string.ascii_lowercase[level],
                    "codes": size,
                    "used": len(share),
                    "entropy": entropy,
                    "perplexity": 2.0**entropy,
                }
            )
        return {
            "items": len(self.items),
            "distinct": len(group),
            "shared_items": int(group[group > 1].sum()),
            "largest_group": int(group.max()),
            "levels": levels,
        }

    def save(self, path: Path) -> None:
        """Write the table as parquet."""
        frame = pl.DataFrame(
            {"item": self.items, "codes": self.codes.tolist(), "sizes": [list(self.sizes)] * len(self.items)},
            schema=COLUMNS,
        )
        if self.version > 1:
            frame = frame.with_columns(pl.lit(self.version, VERSION["version"]).alias("version"))
        write_parquet(path, frame)

    @classmethod
    def load(cls, path: Path) -> "SidTable":
        """Read a table; `DataError` when the file is missing or inconsistent."""
        frame = read_parquet(path, COLUMNS)
        sizes, lengths = frame["sizes"].unique(), frame["codes"].list.len().unique()
        if len(sizes) != 1 or len(lengths) != 1 or sizes[0] is None or lengths[0] is None:
            raise DataError(f"{path}: its rows disagree on the levels", "restore or regenerate this file")
        codes = frame["codes"].explode()
        if codes.null_count() or frame["item"].null_count():
            raise DataError(f"{path}: an item or a code is missing", "restore or regenerate this file")
        versions = frame["version"].unique().to_list() if "version" in frame.columns else [1]
        if len(versions) != 1 or not isinstance(versions[0], int) or versions[0] < 1:
            raise DataError(f"{path}: its rows have the versions {versions}", "restore or regenerate this file")
        try:
            return cls(tuple(frame["item"]), codes.to_numpy().reshape(frame.height, -1), tuple(sizes[0]), versions[0])
        except DataError as error:
            raise DataError(f"{path}: {error.message}", error.hint) from error

    @classmethod
    def from_index(cls, index: Mapping[str, Sequence[str]]) -> "SidTable":
        """Parse `{item: ["<a_51>", "<b_218>", …]}`; a level has as many codes as its largest code needs."""
        if not index:
            raise DataError("the index has no items", 'expected {"item": ["<a_0>", "<b_0>", …], …}')
        codes: list[list[int]] = []
        for item, tokens in index.items():
            if not isinstance(tokens, Sequence) or isinstance(tokens, str):
                raise DataError(f"item {item!r}: {tokens!r} is not a list of tokens", 'expected ["<a_0>", "<b_0>", …]')
            codes.append([_code(item, token, level) for level, token in enumerate(tokens)])
            if len(codes[-1]) != len(codes[0]):
                raise DataError(
                    f"item {item!r} has {len(codes[-1])} tokens, the items before it {len(codes[0])}",
                    "give every item the same number of tokens",
                )
        table = np.array(codes, dtype=np.int32).reshape(len(codes), -1)
        return cls(tuple(index), table, tuple(int(c) + 1 for c in table.max(axis=0)) if table.size else ())


def read_index(path: Path) -> SidTable:
    """Read an index JSON, `{item: ["<a_51>", "<b_218>", …]}`, the form of the LC-Rec family."""
    index = read_json(path)
    if not isinstance(index, dict):
        raise DataError(
            f"{path}: expected an object, found {type(index).__name__}", 'expected {"item": ["<a_0>", …], …}'
        )
    try:
        return SidTable.from_index(index)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", error.hint) from error


def _code(item: str, token: object, level: int) -> int:
    if level >= MAX_LEVELS:
        raise DataError(f"item {item!r} has more than {MAX_LEVELS} tokens", "a level is named by a letter")
    letter = string.ascii_lowercase[level]
    match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
    if match is None or match[1] != letter:
        raise DataError(
            f"item {item!r}: token {token!r} at level {level + 1}",
            f"expected <{letter}_N> with N from 0 to 999999 and no leading zero",
        )
    return int(match[2])
