"""Semantic IDs of a stream's items: vectors of them, residual k-means, and a level that tells equal codes apart.

Vectors, codebooks and the sizes of all levels are fixed by the items known at block 1; later items are encoded with
them, in order of first appearance, so that IDs are the same however the stream has grown.
"""

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cladapt.config import TokensConfig
from cladapt.data.schema import Stream
from cladapt.embedding import COOCCURRENCE
from cladapt.errors import DataError
from cladapt.tokens.encoder import ENCODER, Encoder
from cladapt.tokens.sids import SidTable
from cladapt.tokens.versions import folder_of, version_folder

SIDS = "sids.parquet"
_MANY = 10
"""More items of one text than this are worth a warning."""
_CURE = "give them texts of their own, or take the IDs of an index with `cladapt tokens build --index FILE`"


def read_sids(folder: Path, version: int | None = None) -> SidTable:
    """The IDs of a stream directory, in the order of the file; by default those of the current version."""
    place = version_folder(folder, version)
    if not (place / SIDS).is_file():
        if place != folder:
            raise DataError(f"{place} has no {SIDS}", "restore the stream directory")
        raise DataError(f"{folder} has no {SIDS}", f"give its items semantic IDs: cladapt tokens build {folder}")
    table = SidTable.load(place / SIDS)
    if folder_of(folder, table.version) != place:
        raise DataError(f"{place / SIDS} is version {table.version} of the IDs", "restore the stream directory")
    return table


def load_sids(folder: Path, stream: Stream, version: int | None = None) -> SidTable:
    """The IDs of a stream directory in the order of the stream's items; by default those of the current version."""
    table = read_sids(folder, version)
    option = "" if os.path.lexists(version_folder(folder, version) / ENCODER) else " --index FILE"
    cure = f"give the new items semantic IDs: cladapt tokens extend {folder}{option}"
    return table.align(stream.items["item"].to_list(), cure)


def save_sids(folder: Path, stream: Stream, config: TokensConfig) -> SidTable:
    """Give the items of a stream directory IDs, and write these with all that `tokens extend` needs."""
    table, encoder = build_sids(stream, config)
    encoder.save(folder)
    table.save(folder / SIDS)
    return table


def save_index(folder: Path, stream: Stream, index: SidTable, config: TokensConfig) -> SidTable:
    """Give the items of a stream directory the IDs of an index."""
    table = index_sids(stream, index, config)
    (folder / ENCODER).unlink(missing_ok=True)  # of IDs that were removed
    table.save(folder / SIDS)
    return table


def build_sids(stream: Stream, config: TokensConfig) -> tuple[SidTable, Encoder]:
    """The ID table in the order of the stream's items, and the frozen encoder behind it."""
    if config.embedding != COOCCURRENCE:
        _check_texts(stream)
    encoder = Encoder.fit(stream, config)
    codes = encoder.quantizer.encode(encoder.vectors(stream, stream.items))
    ids = encoder.ids(codes, np.empty((0, len(encoder.sizes)), dtype=np.int32))
    return SidTable(tuple(stream.items["item"]), ids, encoder.sizes), encoder


def index_sids(stream: Stream, index: SidTable, config: TokensConfig) -> SidTable:
    """The rows of an index in the order of the stream's items, with room for later ones.

    A level has the next power of two of the largest code among the items known at block 1, plus one, and at least
    `codes` codes; the last level at least `capacity`.
    """
    table = index.align(stream.items["item"].to_list())
    largest = table.codes[stream.known(1)].max(axis=0).tolist()
    least = [config.codes] * (table.levels - 1) + [config.capacity]
    sizes = tuple(max(1 << code.bit_length(), size) for code, size in zip(largest, least, strict=True))
    try:
        return SidTable(table.items, table.codes, sizes)
    except DataError as error:
        cure = (
            "the items of block 1 fix the capacities; import without the index and give more room: cladapt tokens "
            "build STREAM --index FILE -o codes=N -o capacity=N (codes: the levels before the last)"
        )
        raise DataError(error.message, cure) from error


def shared_texts(texts: Sequence[str]) -> dict[str, int]:
    """How many items have the text of another one, and the size of the largest such group; empty texts apart."""
    sizes = Counter(text.strip() for text in texts if text.strip()).values()
    return {
        "items_sharing_a_text": sum(size for size in sizes if size > 1),
        "largest_group_of_a_text": max(sizes, default=0),
    }


def _check_texts(stream: Stream) -> None:
    """Refuse items of one text at block 1, warn of large groups: their IDs differ by a number, which says nothing."""
    texts = stream.items["text"].to_list()
    first = [texts[item] for item in stream.known(1)]
    if shared_texts(first)["largest_group_of_a_text"] == len(first) > 1:
        raise DataError(
            f"IDs cannot be built from text: all {len(first)} items known at block 1 have the same text", _CURE
        )
    found = shared_texts(texts)
    sharing, largest = found["items_sharing_a_text"], found["largest_group_of_a_text"]
    if largest > _MANY:
        warnings.warn(
            f"{sharing} of {len(texts)} items share their text with others, {largest} of them one text: nothing but a "
            f"number tells their IDs apart; {_CURE}",
            stacklevel=3,
        )
