"""What an export recommends from: the semantic IDs of a stream's items, and the items that may be recommended now.

An adapter whose prompts name items by their texts has these with it too.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from cladapt.artifacts import read_parquet, write_parquet
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.tokens.sids import SidTable

SIDS = "sids.parquet"
CATALOGUE = "catalogue.parquet"
TEXTS = "texts.parquet"
_TEXTS = {"item": pl.String(), "text": pl.String()}
_AGAIN = "export the adapter again"


@dataclass(frozen=True, eq=False)
class Offered:
    """The IDs of all items of a stream, and the items that are offered, in its order.

    `texts`: what describes each item of the ID table, where prompts need it.
    """

    sids: SidTable
    items: tuple[str, ...]
    texts: tuple[str, ...] | None = None

    @classmethod
    def of(cls, stream: Stream, sids: SidTable, texts: bool = False) -> "Offered":
        """What may be recommended after the last block, with the `texts` of the items or without.

        `DataError` where every item is withdrawn.
        """
        return cls(sids, offered_items(stream), tuple(stream.items["text"]) if texts else None)

    def save(self, folder: Path) -> None:
        """Write the files; the IDs first, so that the catalogue never names an item without one."""
        self.sids.save(folder / SIDS)
        self.save_items(folder)

    def save_items(self, folder: Path) -> None:
        """Write the offered items, and the texts where prompts need them, to IDs that are there."""
        if self.texts is not None:
            write_parquet(folder / TEXTS, pl.DataFrame([self.sids.items, self.texts], schema=_TEXTS))
        write_parquet(folder / CATALOGUE, pl.DataFrame({"item": self.items}, schema={"item": pl.String()}))

    @classmethod
    def load(cls, folder: Path) -> "Offered | None":
        """What `save` wrote into an export; None where it has neither file."""
        if not any(os.path.lexists(folder / name) for name in (SIDS, CATALOGUE)):
            return None
        sids = SidTable.load(folder / SIDS)
        items = tuple(read_parquet(folder / CATALOGUE, {"item": pl.String()})["item"])
        if unknown := sorted({*items} - {*sids.items}, key=str):
            raise DataError(
                f"{folder / CATALOGUE} offers {len(unknown)} items that {SIDS} lacks, the first {unknown[0]!r}", _AGAIN
            )
        if not items:
            raise DataError(f"{folder / CATALOGUE} offers no item", _AGAIN)
        texts = None
        if os.path.lexists(folder / TEXTS):
            frame = read_parquet(folder / TEXTS, _TEXTS)
            if tuple(frame["item"]) != sids.items or frame["text"].null_count():
                raise DataError(f"{folder / TEXTS} has not one text for each item of {SIDS}, in its order", _AGAIN)
            texts = tuple(frame["text"])
        return cls(sids, items, texts)

    def same(self, other: "Offered") -> bool:
        """Whether both offer the same items under the same IDs, and the same texts where both have them."""
        same_texts = None in (self.texts, other.texts) or self.texts == other.texts
        return same_texts and self.items == other.items and self.sids.fingerprint == other.sids.fingerprint

    def chosen(self, wanted: Sequence[str] | None) -> tuple[list[str], int]:
        """The offered items among those `wanted` (None: all), and how many wanted ones are withdrawn."""
        return chosen(self.items, self.sids.items, wanted)


def chosen(offered: Sequence[str], known: Sequence[str], wanted: Sequence[str] | None) -> tuple[list[str], int]:
    """The `offered` items among those `wanted` (None: all), and how many wanted ones of the `known` are withdrawn."""
    if wanted is None:
        return list(offered), 0
    withdrawn = {*known} - {*offered}
    kept = [item for item in wanted if item not in withdrawn]
    return kept, len(wanted) - len(kept)


def offered_items(stream: Stream) -> tuple[str, ...]:
    """What may be recommended after the last block of a stream; `DataError` where every item is withdrawn."""
    items = tuple(stream.items["item"].gather(stream.offered()))
    if not items:
        raise DataError("every item of the stream is withdrawn", "put some back, or append a block")
    return items
