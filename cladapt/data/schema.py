"""The stream: interactions in time blocks, the item catalogue, and what is known about both.

On disk a block is two files that never change once they are written, `interactions/block_00001.parquet` and
`items/block_00001.parquet` (the items first used there); `manifest.json` names the blocks that count, with their
hashes, and is written last. `sids.parquet` (see `cladapt.tokens.sids`) joins them once the items have semantic IDs. In
memory a `Stream` holds two frames and integer views of them.

A stream grows at its end alone. Every prefix of its blocks has a fingerprint, and what was made on a prefix (IDs, base,
run, adapter) is at home on the longer stream; see `Stream.home_of`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, BeforeValidator, Field, PositiveInt

from cladapt.artifacts import hash_file, hash_value, read_json, read_parquet, read_record, write_json, write_parquet
from cladapt.errors import DataError

SCHEMA_VERSION = 2
INTERACTIONS = {
    "user": pl.String(),  # the source's user id
    "item": pl.String(),  # the source's item id
    "timestamp": pl.Int64(),  # unix seconds, null where the source has only an order
    "position": pl.Int64(),  # 0, 1, 2, … within a user, in time order over all blocks
    "block": pl.Int32(),  # 1, 2, 3, …
}
WEIGHT = {"weight": pl.Float64()}  # optional last column of the interactions: how much an event counts, above 0
ITEMS = {
    "item": pl.String(),
    "text": pl.String(),  # what describes the item, "" where the source has nothing
    "first_block": pl.Int32(),  # first block in whose raw log it occurs: its catalogue has it from then on
}
MANIFEST = "manifest.json"
PARTS = {"interactions": INTERACTIONS, "items": ITEMS}
"""What each block has a file of."""
LEAST_TESTED = 3  # a validation target, a test target and an event before them


def block_file(part: str, block: int) -> str:
    """Name of a block's file below the stream directory."""
    return f"{part}/block_{block:05d}.parquet"


class FilesRecord(BaseModel, extra="forbid"):
    """Hashes of the files of a block."""

    interactions: str
    items: str


class CutRecord(BaseModel):
    """Where a block ends, so that what is new in a later log can be told."""

    until: int | None
    """Last time (unix seconds) of its rows before any filter; None without times."""
    number: int | None
    """Its number in the source, where the source has ready-made blocks."""
    late: int
    """Its rows that are not after `until` of the block before: they came late, and were kept."""


class SettingsRecord(BaseModel):
    """What a stream reads of its import's settings."""

    min_events: int = LEAST_TESTED
    k_core: int = 0


def _as_tuple(value: Any) -> Any:
    """JSON has lists alone."""
    return tuple(value) if isinstance(value, list) else value


class ManifestRecord(BaseModel):
    """What manifest.json must hold."""

    hashes: Annotated[list[FilesRecord], Field(min_length=1)]
    config: SettingsRecord = SettingsRecord()
    withdrawn: list[Annotated[tuple[str, int, int | None], BeforeValidator(_as_tuple)]] = []
    earlier: list[Annotated[list[str], Field(min_length=1)]] = []
    forgotten_from: PositiveInt | None = None
    cuts: list[CutRecord] = []
    appended: list[dict[str, Any]] = []
    notes: dict[str, Any] = {}


class Withdrawal(NamedTuple):
    """An item that is not in the catalogues of the blocks `first` to `last`; `last` None: of no later block."""

    item: str
    first: int
    last: int | None

    def covers(self, block: int) -> bool:
        """Whether the item is withdrawn in `block`."""
        return self.first <= block and (self.last is None or block <= self.last)


@dataclass(frozen=True)
class Stream:
    """Interactions sorted by (user, position), the items known by each block in its order, and the manifest."""

    interactions: pl.DataFrame
    items: pl.DataFrame
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, frame, schema in (
            ("interactions", self.interactions, INTERACTIONS | (WEIGHT if self.weighted else {})),
            ("items", self.items, ITEMS),
        ):
            if dict(frame.schema) != schema:
                raise DataError(f"stream {name} has the columns {dict(frame.schema)}", f"expected {schema}")
        if self.interactions.is_empty():
            raise DataError("the stream has no interactions", "loosen the filters, or check the source file")
        if self.items["item"].n_unique() != self.items.height:
            twice = self.items.filter(pl.col("item").is_duplicated())["item"][0]
            raise DataError(f"item {twice!r} is listed twice in the item table", "keep one row per item")
        if not self.items["first_block"].is_sorted():
            raise DataError("the item table is not in the order of first_block", "sort it by first_block")
        unknown = self.interactions.join(self.items, on="item", how="anti")
        if not unknown.is_empty():
            raise DataError(
                f"{unknown.height} interactions name items that the item table lacks, the first {unknown['item'][0]!r}",
                "add these items to the item table",
            )

    @property
    def weighted(self) -> bool:
        """Whether the interactions carry weights."""
        return "weight" in self.interactions.columns

    @property
    def min_events(self) -> int:
        """Events in a block from which a user is tested there: the import's `min_events`, and never below 3."""
        return _min_events(self.manifest)

    @property
    def n_blocks(self) -> int:
        return int(self.interactions["block"].max())  # type: ignore[arg-type]

    @property
    def n_items(self) -> int:
        return self.items.height

    @cached_property
    def users(self) -> list[str]:
        """User ids in the order of their first row; index = integer user."""
        return self.interactions["user"].unique(maintain_order=True).to_list()

    @cached_property
    def user_index(self) -> np.ndarray:
        """Integer user of each interaction row, int32 [n]."""
        codes = pl.DataFrame({"user": self.users, "u": np.arange(len(self.users), dtype=np.int32)})
        return (
            self.interactions.select("user").join(codes, on="user", how="left", maintain_order="left")["u"].to_numpy()
        )

    @cached_property
    def item_index(self) -> np.ndarray:
        """Integer item (row in `items`) of each interaction row, int32 [n]."""
        codes = pl.DataFrame({"item": self.items["item"], "i": np.arange(self.n_items, dtype=np.int32)})
        return (
            self.interactions.select("item").join(codes, on="item", how="left", maintain_order="left")["i"].to_numpy()
        )

    @cached_property
    def block(self) -> np.ndarray:
        """Block of each interaction row, int32 [n]."""
        return self.interactions["block"].to_numpy()

    def known(self, block: int) -> np.ndarray:
        """Integer items that occur by the end of `block`, ascending, int64."""
        return np.flatnonzero(self.items["first_block"].to_numpy() <= block)

    def catalogue(self, block: int) -> np.ndarray:
        """Integer items that could be recommended at the end of `block`: the known ones that are not withdrawn."""
        return self._without(self.known(block), {w.item for w in self.withdrawn if w.covers(block)})

    def offered(self) -> np.ndarray:
        """Integer items that may be recommended now, after the last block."""
        return self._without(self.known(self.n_blocks), {w.item for w in self.withdrawn if w.covers(self.n_blocks + 1)})

    def _without(self, items: np.ndarray, withdrawn: set[str]) -> np.ndarray:
        return items[~self.items["item"].is_in(list(withdrawn)).to_numpy()[items]] if withdrawn else items

    @cached_property
    def withdrawn(self) -> tuple[Withdrawal, ...]:
        """Every withdrawal, also those that have ended."""
        return _withdrawn(self.manifest)

    def prefix(self, block: int) -> "Stream":
        """The stream as it was at the end of `block`."""
        if block == self.n_blocks:
            return self
        if not 1 <= block < self.n_blocks:
            raise DataError(f"the stream has no block {block}", f"choose one of 1..{self.n_blocks}")
        manifest = dict(self.manifest)
        for key in ("hashes", "blocks", "cuts"):
            if key in manifest:
                manifest[key] = manifest[key][:block]
        manifest["withdrawn"] = [
            (w.item, w.first, w.last if w.last is not None and w.last < block else None)
            for w in self.withdrawn
            if w.first <= block
        ]
        return Stream(
            self.interactions.filter(pl.col("block") <= block),
            self.items.filter(pl.col("first_block") <= block),
            manifest,
        )

    def save(self, folder: Path) -> None:
        """Write the stream directory; the manifest's hashes are those of the files just written."""
        hashes = [self._save_block(folder, block) for block in range(1, self.n_blocks + 1)]
        write_manifest(folder, {**self.manifest, "hashes": hashes})

    def save_after(self, folder: Path, block: int) -> None:
        """Write the blocks after `block` into the directory that holds those up to it, then the manifest.

        A process killed before the manifest leaves the old stream: files that it does not name do not count.
        """
        kept = list(self.manifest["hashes"])[:block]
        hashes = [self._save_block(folder, new) for new in range(block + 1, self.n_blocks + 1)]
        write_manifest(folder, {**self.manifest, "hashes": [*kept, *hashes]})

    def _save_block(self, folder: Path, block: int) -> dict[str, str]:
        frames = {
            "interactions": self.interactions.filter(pl.col("block") == block),
            "items": self.items.filter(pl.col("first_block") == block),
        }
        for part, frame in frames.items():
            # in one piece, so that equal blocks are equal bytes however they came together
            write_parquet(folder / block_file(part, block), frame.rechunk())
        return {part: hash_file(folder / block_file(part, block)) for part in frames}

    @classmethod
    def load(cls, folder: Path) -> "Stream":
        """Read a stream directory; `DataError` when a file is missing, malformed or not the one in the manifest."""
        manifest = read_manifest(folder)
        frames = {
            part: pl.concat(
                [
                    _read_block(folder / block_file(part, block), schema, hashes.get(part))
                    for block, hashes in enumerate(manifest["hashes"], start=1)
                ]
            )
            for part, schema in PARTS.items()
        }
        return cls(frames["interactions"].sort("user", "position"), frames["items"], manifest)

    @cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """Identity of the content of each prefix: entry t - 1 is that of blocks 1 to t.

        Each is the hash of the one before, of the block's files, and of what is withdrawn there.
        """
        return fingerprints_of(self.manifest)

    @property
    def fingerprint(self) -> str:
        """Identity of the whole stream's content."""
        return self.fingerprints[-1]

    def home_of(self, fingerprint: str | None) -> int | None:
        """Blocks of the prefix with this fingerprint, now or before users were forgotten; None for another stream's."""
        return home_of(self.manifest, fingerprint)


def _min_events(manifest: Mapping[str, Any]) -> int:
    return max(LEAST_TESTED, int(manifest.get("config", {}).get("min_events", LEAST_TESTED)))


def _withdrawn(manifest: Mapping[str, Any]) -> tuple[Withdrawal, ...]:
    return tuple(Withdrawal(*row) for row in manifest.get("withdrawn", []))


def fingerprints_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """`Stream.fingerprints` of the stream with this manifest."""
    if not manifest.get("hashes"):
        raise DataError("this stream was not read from files, so it has no fingerprint", "save it and load it again")
    found = [hash_value({"min_events": _min_events(manifest)})]
    for block, files in enumerate(manifest["hashes"], start=1):
        withdrawn = sorted(w.item for w in _withdrawn(manifest) if w.covers(block))
        found.append(hash_value([found[-1], files, withdrawn]))
    return tuple(found[1:])


def home_of(manifest: Mapping[str, Any], fingerprint: str | None) -> int | None:
    """`Stream.home_of` of the stream with this manifest."""
    for chain in (fingerprints_of(manifest), *manifest.get("earlier", [])):
        if fingerprint in chain:
            return list(chain).index(str(fingerprint)) + 1
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The `manifest.json` of a stream directory; `DataError` where there is none or it is of another version."""
    file = folder / MANIFEST
    if not file.is_file():
        if aside := sorted(folder.parent.glob(f".{folder.name}.*.old")):
            raise DataError(
                f"{folder} is not there: a killed command has moved it to {aside[0]}",
                "any command that writes into the stream puts it back, such as `cladapt data forget` again",
            )
        raise DataError(
            f"{folder} is not a stream directory: it has no {MANIFEST}",
            "make one with `cladapt data import SRC --out DIR` or `cladapt data simulate --out DIR`",
        )
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else None
        raise DataError(
            f"{file}: schema_version {found!r}", f"this version reads {SCHEMA_VERSION}: import the source again"
        )
    read_record(file, ManifestRecord, "restore this file, or import the source again")
    cuts, blocks = len(manifest.get("cuts", [])), len(manifest["hashes"])
    if "cuts" in manifest and cuts != blocks:
        raise DataError(f"{file} has {cuts} cuts and {blocks} blocks", "restore this file, or import the source again")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json`, by which the blocks that it names become the stream."""
    write_json(folder / MANIFEST, {**manifest, "schema_version": SCHEMA_VERSION})


def _read_block(path: Path, schema: Mapping[str, Any], expected: str | None) -> pl.DataFrame:
    frame = read_parquet(path, schema)
    if hash_file(path) != expected:
        raise DataError(f"{path} is not the file its manifest was written for", "import the source again")
    return frame
