"""The stream: interactions in time blocks, the item catalogue, and what is known about both.

On disk: `interactions.parquet`, `items.parquet` and `manifest.json`; `sids.parquet` (see `cladapt.tokens.sids`) joins
them once the items have semantic IDs. In memory a `Stream` holds the two frames and integer views of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cladapt.artifacts import hash_file, hash_value, read_json, read_parquet, write_json, write_parquet
from cladapt.errors import DataError

SCHEMA_VERSION = 1
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
FILES = ("interactions.parquet", "items.parquet")
LEAST_TESTED = 3  # a validation target, a test target and an event before them


@dataclass(frozen=True)
class Stream:
    """Interactions sorted by (user, position), the items that occur in them or in the raw log, and the manifest."""

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
        return max(LEAST_TESTED, int(self.manifest.get("config", {}).get("min_events", LEAST_TESTED)))

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

    def catalogue(self, block: int) -> np.ndarray:
        """Integer items known by the end of `block`, ascending, int64."""
        return np.flatnonzero(self.items["first_block"].to_numpy() <= block)

    def save(self, folder: Path) -> None:
        """Write the stream directory; the manifest's hashes are those of the files just written."""
        write_parquet(folder / "interactions.parquet", self.interactions)
        write_parquet(folder / "items.parquet", self.items)
        hashes = {name: hash_file(folder / name) for name in FILES}
        write_json(folder / "manifest.json", {"schema_version": SCHEMA_VERSION, **self.manifest, "hashes": hashes})

    @classmethod
    def load(cls, folder: Path) -> "Stream":
        """Read a stream directory; `DataError` when a file is missing, malformed or not the one in the manifest."""
        if not (folder / "manifest.json").is_file():
            raise DataError(
                f"{folder} is not a stream directory: it has no manifest.json",
                "make one with `cladapt data import SRC --out DIR` or `cladapt data simulate --out DIR`",
            )
        manifest = read_json(folder / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
            found = manifest.get("schema_version") if isinstance(manifest, dict) else None
            raise DataError(
                f"{folder / 'manifest.json'}: schema_version {found!r}", f"this version reads {SCHEMA_VERSION}"
            )
        hashes = manifest.get("hashes")
        if not isinstance(hashes, dict) or not set(FILES) <= set(hashes):
            raise DataError(
                f"{folder / 'manifest.json'} lacks the hashes of {', '.join(FILES)}", "import the source again"
            )
        interactions = read_parquet(folder / "interactions.parquet", INTERACTIONS)
        items = read_parquet(folder / "items.parquet", ITEMS)
        for name in FILES:
            if hash_file(folder / name) != hashes[name]:
                raise DataError(
                    f"{folder / name} is not the file its manifest was written for", "import the source again"
                )
        return cls(interactions, items, manifest)

    @property
    def fingerprint(self) -> str:
        """Identity of the stream's content: the hash of its files' hashes."""
        hashes = self.manifest.get("hashes")
        if not hashes:
            raise DataError(
                "this stream was not read from files, so it has no fingerprint", "save it and load it again"
            )
        return hash_value(hashes)
