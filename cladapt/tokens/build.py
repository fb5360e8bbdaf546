"""Semantic IDs of a stream's items: text, embedding, residual k-means, and a level that tells equal codes apart.

Embedding and codebooks are fitted on the items known at block 1 and then frozen; later items are encoded with them.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cladapt.config import TokensConfig
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.tokens.embed import embed
from cladapt.tokens.quantize import ResidualKMeans
from cladapt.tokens.sids import SidTable

SIDS = "sids.parquet"
CODEBOOKS = "codebooks.safetensors"
_MANY = 10
"""More items of one text than this are worth a warning."""
_CURE = "give them texts of their own, or take the IDs of an index with `cladapt tokens build --index FILE`"


def load_sids(folder: Path, stream: Stream) -> SidTable:
    """The IDs of a stream directory in the order of its items."""
    if not (folder / SIDS).is_file():
        raise DataError(f"{folder} has no {SIDS}", f"give its items semantic IDs: cladapt tokens build {folder}")
    return SidTable.load(folder / SIDS).align(stream.items["item"].to_list())


def save_sids(folder: Path, stream: Stream, config: TokensConfig) -> SidTable:
    """Give the items of a stream directory IDs, and write these with their codebooks."""
    table, codebooks = build_sids(stream, config)
    codebooks.save(folder / CODEBOOKS)
    table.save(folder / SIDS)
    return table


def build_sids(stream: Stream, config: TokensConfig) -> tuple[SidTable, ResidualKMeans]:
    """The ID table in the order of the stream's items, and the frozen codebooks behind it.

    An item's ID depends on block 1 and on the items before it in (first_block, row) order alone. The size of the
    de-duplication level, the last one, is the largest group of equal codes over all blocks.
    """
    first_block = stream.items["first_block"].to_numpy()
    known = first_block == 1
    _check_texts(stream.items["text"].to_list())
    vectors = embed(stream.items["text"].to_list(), known, config.embedding, config.dimensions, config.seed)
    quantizer = ResidualKMeans.fit(vectors[known], config.levels, config.codes, config.seed)
    codes = quantizer.encode(vectors)
    sizes = [len(centres) for centres in quantizer.codebooks]
    if config.deduplicate:
        number = number_in_group(codes, first_block)
        codes = np.column_stack([codes, number])
        sizes.append(int(number.max()) + 1)
    return SidTable(tuple(stream.items["item"]), codes, tuple(sizes)), quantizer


def shared_texts(texts: Sequence[str]) -> dict[str, int]:
    """How many items have the text of another one, and the size of the largest such group; empty texts apart."""
    sizes = Counter(text.strip() for text in texts if text.strip()).values()
    return {
        "items_sharing_a_text": sum(size for size in sizes if size > 1),
        "largest_group_of_a_text": max(sizes, default=0),
    }


def _check_texts(texts: Sequence[str]) -> None:
    """Refuse items of one text, warn of large groups: their IDs differ by a number alone, which says nothing."""
    found = shared_texts(texts)
    sharing, largest = found["items_sharing_a_text"], found["largest_group_of_a_text"]
    if largest == len(texts) > 1:
        raise DataError(f"IDs cannot be built from text: all {len(texts)} items have the same text", _CURE)
    if largest > _MANY:
        warnings.warn(
            f"{sharing} of {len(texts)} items share their text with others, {largest} of them one text: nothing but a "
            f"number tells their IDs apart; {_CURE}",
            stacklevel=3,
        )


def number_in_group(codes: np.ndarray, first_block: np.ndarray) -> np.ndarray:
    """0, 1, 2, … within each group of equal rows of `codes`, in order of (first_block, row): int32 [n]."""
    group = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.lexsort((first_block, group))  # stable: equal keys keep the row order
    size = np.bincount(group)
    number = np.empty(len(codes), dtype=np.int32)
    number[order] = np.arange(len(codes)) - np.repeat(np.cumsum(size) - size, size)
    return number
