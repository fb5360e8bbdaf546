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
from cladapt.tokens.versions import folder_of, versions_of

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
    `drift`: the fit by "block 1" (or the blocks that refreshed IDs were fitted on) and "new items". The last two are
    empty where the IDs came from an index.
    """

    table: SidTable
    new: int
    sharing: int = 0
    without: Mapping[str, int] = field(default_factory=dict)
    drift: Mapping[str, Fit] = field(default_factory=dict)


def extend_sids(folder: Path, stream: Stream) -> Extension:
    """Encode the items that have no ID with the frozen encoder, and write the longer table.

    So in every version of the IDs that has an encoder, for what was made with it; what is said is of the current one.
    """
    current, *others = _versions(folder)
    done = _encode(folder, current, stream, warn=True)
    for version in others:
        if os.path.lexists(folder_of(folder, version) / ENCODER):
            _encode(folder, version, stream)
    return done


def _versions(folder: Path) -> list[int]:
    """All versions, the current one first."""
    known = versions_of(folder)
    return sorted(range(1, known.newest + 1), key=lambda version: version != known.current)


def _encode(folder: Path, version: int, stream: Stream, warn: bool = False) -> Extension:
    table, place = read_sids(folder, version), folder_of(folder, version)
    items = _new_items(stream, table)
    if items.is_empty():
        return Extension(table, 0)
    if not os.path.lexists(place / ENCODER):
        raise ConfigError(
            f"{items.height} items of {folder} have no semantic ID, and the IDs of the others came from an index "
            f"(there is no {ENCODER})",
            _GIVE.format(folder=folder),
        )
    encoder = Encoder.load(place)
    if encoder.sizes != table.sizes:
        raise DataError(
            f"{place / SIDS} has levels of {list(table.sizes)} codes, {ENCODER} was written for {list(encoder.sizes)}",
            "restore the stream directory",
        )
    vectors = encoder.vectors(stream, items)
    codes = encoder.quantizer.encode(vectors)
    extended = table.with_rows(items["item"].to_list(), encoder.ids(codes, table.codes), "restore the stream directory")
    extended.save(place / SIDS)
    fit = Fit(
        quantisation_error=encoder.quantizer.error(vectors, codes),
        collisions=collisions(extended.codes[:, : codes.shape[1]], of_last=items.height),
    )
    if warn:
        _warn_of_drift(encoder.block_1, fit, encoder.fitted_on)
    return Extension(
        extended,
        items.height,
        _sharing(extended, items.height),
        {encoder.source.lacking: int((~vectors.any(axis=1)).sum())},
        {encoder.fitted_on: encoder.block_1, "new items": fit},
    )


def extend_with_index(folder: Path, stream: Stream, index: SidTable) -> Extension:
    """Give the items that have no ID those of an index, and write the longer table.

    That is the version whose IDs came from an index, or else the current one; the others go on by their encoders.
    `DataError` where the index lacks one of the items, exceeds a level's capacity, or has another ID for an earlier
    item.
    """
    versions = _versions(folder)
    of_index = [v for v in versions if not os.path.lexists(folder_of(folder, v) / ENCODER)] or versions[:1]
    done = {version: _take(folder, version, stream, index) for version in of_index}
    done |= {version: _encode(folder, version, stream) for version in versions if version not in of_index}
    return done[versions[0]]


def _take(folder: Path, version: int, stream: Stream, index: SidTable) -> Extension:
    table = read_sids(folder, version)
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
    extended.save(folder_of(folder, version) / SIDS)
    return Extension(extended, len(items), _sharing(extended, len(items)))


def _new_items(stream: Stream, table: SidTable) -> pl.DataFrame:
    return stream.items.filter(~pl.col("item").is_in(list(table.items)))


def _sharing(table: SidTable, new: int) -> int:
    return int(shared(table.codes)[-new:].sum())


def _warn_of_drift(fitted: Fit, new: Fit, blocks: str = "block 1") -> None:
    cure = "their IDs say less of them; a new version of the IDs fits again: cladapt tokens refresh STREAM"
    before, after = fitted.quantisation_error, new.quantisation_error
    if before is not None and after is not None and after > MOST_ERROR * before + _ROUNDING:
        warnings.warn(
            f"the quantisation error of the new items is {after:.3f}, more than {MOST_ERROR} times {blocks}'s "
            f"{before:.3f}: {cure}",
            stacklevel=3,
        )
    if new.collisions > fitted.collisions + MORE_COLLISIONS:
        warnings.warn(
            f"{new.collisions:.0%} of the new items have the codes of another item, more than {MORE_COLLISIONS:.0%} "
            f"above {blocks}'s {fitted.collisions:.0%}: {cure}",
            stacklevel=3,
        )
