"""What an export recommends from: the semantic IDs of a stream's items, and the items that may be recommended now."""

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
_AGAIN = "export the adapter again"


@dataclass(frozen=True, eq=False)
class Offered:
    """The IDs of all items of a stream, and the items that are offered, in its order."""

    sids: SidTable
    items: tuple[str, ...]

    @classmethod
    def of(cls, stream: Stream, sids: SidTable) -> "Offered":
        """What may be recommended after the last block; `DataError` where every item is withdrawn."""
        items = tuple(stream.items["item"].gather(stream.offered()))
        if not items:
            raise DataError("every item of the stream is withdrawn", "put some back, or append a block")
        return cls(sids, items)

    def save(self, folder: Path) -> None:
        """Write both files; the IDs first, so that the catalogue never names an item without one."""
        self.sids.save(folder / SIDS)
        self.save_items(folder)

    def save_items(self, folder: Path) -> None:
        """Write the offered items alone."""
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
        return cls(sids, items)

    def same(self, other: "Offered") -> bool:
        """Whether both offer the same items under the same IDs."""
        return self.items == other.items and self.sids.fingerprint == other.sids.fingerprint

    def chosen(self, wanted: Sequence[str] | None) -> tuple[list[str], int]:
        """The offered items among those `wanted` (None: all), and how many wanted ones are withdrawn."""
        if wanted is None:
            return list(self.items), 0
        withdrawn = {*self.sids.items} - {*self.items}
        kept = [item for item in wanted if item not in withdrawn]
        return kept, len(wanted) - len(kept)
