"""IDs for the items that a stream has got since its IDs were built: earlier ones and the tokens stay as they are."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.tokens.build import SIDS, read_sids
from cladapt.tokens.encoder import ENCODER, Encoder, Fit, collisions, shared
from cladapt.tokens.sids import SidTable

MOST_ERROR = 1.5
"""The codebooks still fit while the quantisation error of new items is at most this many times that of block 1."""
MORE_COLLISIONS = 0.2
"""They tell items apart while the share of new items with the codes of another is at most this above block 1's."""
_ROUNDING = 1e-6
_GIVE = "take their IDs from an index that has them: cladapt tokens extend {folder} --index FILE"
_OTHER = "use the index that the stream's IDs came from, with rows for the new items"


@dataclass(frozen=True, eq=False)
class Extension:
    """The whole ID table, and what is to be said of the new rows.

    `sharing`: new items whose ID another item has; `without`: those of which nothing is known, by what they lack;
    `drift`: the fit by "block 1" and "new items". The last two are empty where the IDs came from an index.
    """

    table: SidTable
    new: int
    sharing: int = 0
    without: Mapping[str, int] = field(default_factory=dict)
    drift: Mapping[str, Fit] = field(default_factory=dict)


def extend_sids(folder: Path, stream: Stream) -> Extension:
    """Encode the items that have no ID with the frozen encoder, and write the longer table."""
    table = read_sids(folder)
    items = _new_items(stream, table)
    if items.is_empty():
        return Extension(table, 0)
    if not os.path.lexists(folder / ENCODER):
        raise ConfigError(
            f"{items.height} items of {folder} have no semantic ID, and the IDs of the others came from an index "
            f"(there is no {ENCODER})",
            _GIVE.format(folder=folder),
        )
    encoder = Encoder.load(folder)
    if encoder.sizes != table.sizes:
        raise DataError(
            f"{folder / SIDS} has levels of {list(table.sizes)} codes, {ENCODER} was written for {list(encoder.sizes)}",
            "restore the stream directory",
        )
    vectors = encoder.vectors(stream, items)
    codes = encoder.quantizer.encode(vectors)
    extended = table.with_rows(items["item"].to_list(), encoder.ids(codes, table.codes), "restore the stream directory")
    extended.save(folder / SIDS)
    fit = Fit(
        quantisation_error=encoder.quantizer.error(vectors, codes),
        collisions=collisions(extended.codes[:, : codes.shape[1]], of_last=items.height),
    )
    _warn_of_drift(encoder.block_1, fit)
    return Extension(
        extended,
        items.height,
        _sharing(extended, items.height),
        {encoder.source.lacking: int((~vectors.any(axis=1)).sum())},
        {"block 1": encoder.block_1, "new items": fit},
    )


def extend_with_index(folder: Path, stream: Stream, index: SidTable) -> Extension:
    """Give the items that have no ID those of an index, and write the longer table.

    `DataError` where the index lacks one of them, exceeds a level's capacity, or has another ID for an earlier item.
    """
    table = read_sids(folder)
    if (other := table.first_other(index)) is not None:
        raise DataError(
            f"the index has the ID {index.spelt(other)} for item {other!r}, the stream has {table.spelt(other)}: IDs "
            "never change",
            _OTHER,
        )
    items = _new_items(stream, table)["item"].to_list()
    if not items:
        return Extension(table, 0)
    rows = index.align(items)
    if rows.levels != table.levels:
        raise DataError(f"the index has {rows.levels} levels, the IDs of the stream have {table.levels}", _OTHER)
    extended = table.with_rows(items, rows.codes, f"capacities are fixed when IDs are built; {_OTHER}")
    extended.save(folder / SIDS)
    return Extension(extended, len(items), _sharing(extended, len(items)))


def _new_items(stream: Stream, table: SidTable) -> pl.DataFrame:
    return stream.items.filter(~pl.col("item").is_in(list(table.items)))


def _sharing(table: SidTable, new: int) -> int:
    return int(shared(table.codes)[-new:].sum())


def _warn_of_drift(block_1: Fit, new: Fit) -> None:
    cure = "their IDs say less of them; IDs that fit need a new table, base and adapters (cladapt tokens build)"
    before, after = block_1.quantisation_error, new.quantisation_error
    if before is not None and after is not None and after > MOST_ERROR * before + _ROUNDING:
        warnings.warn(
            f"the quantisation error of the new items is {after:.3f}, more than {MOST_ERROR} times block 1's "
            f"{before:.3f}: {cure}",
            stacklevel=3,
        )
    if new.collisions > block_1.collisions + MORE_COLLISIONS:
        warnings.warn(
            f"{new.collisions:.0%} of the new items have the codes of another item, more than {MORE_COLLISIONS:.0%} "
            f"above block 1's {block_1.collisions:.0%}: {cure}",
            stacklevel=3,
        )
