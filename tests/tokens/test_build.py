"""Semantic IDs of a stream: stable over time, told apart, frozen after block 1."""

import re
import warnings
from collections import Counter

import numpy as np
import polars as pl
import pytest

from cladapt.config import TokensConfig
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import DataError
from cladapt.tokens.build import build_sids, index_sids, shared_texts
from cladapt.tokens.sids import SidTable

CONFIG = TokensConfig(dimensions=4, levels=2, codes=4, capacity=20)
WORDS = ("river", "stone", "night", "garden", "engine", "winter")


def stream(blocks: int = 3, n: int = 60) -> Stream:
    """Items with few words, so that many share their codes."""
    rng = np.random.default_rng(1)
    items = pl.DataFrame(
        {
            "item": [f"i{k}" for k in range(n)],
            "text": [" ".join(sorted(rng.choice(WORDS, 2))) for _ in range(n)],
            "first_block": np.repeat([1, 2, 3], n // 3),
        },
        schema=ITEMS,
    ).filter(pl.col("first_block") <= blocks)
    row = {"user": "u", "item": items["item"][0], "timestamp": None, "position": 0, "block": blocks}
    return Stream(pl.DataFrame([row], schema=INTERACTIONS), items)


def test_every_item_gets_its_own_id_when_deduplicated() -> None:
    table, encoder = build_sids(stream(), CONFIG)
    assert table.items == tuple(stream().items["item"])
    assert table.levels == 3
    assert table.collisions()["distinct"] == 60
    assert table.sizes == (*(len(c) for c in encoder.quantizer.codebooks), 20)
    plain, _ = build_sids(stream(), CONFIG.model_copy(update={"deduplicate": False}))
    np.testing.assert_array_equal(plain.codes, table.codes[:, :2])
    assert plain.sizes == table.sizes[:2]
    assert table.codes[:, 2].max() + 1 == plain.collisions()["largest_group"] <= 20


@pytest.mark.parametrize("block", [1, 2])
def test_neither_ids_nor_sizes_change_when_later_items_arrive(block: int) -> None:
    full, encoder = build_sids(stream(), CONFIG)
    early, early_encoder = build_sids(stream(block), CONFIG)
    np.testing.assert_array_equal(full.align(early.items).codes, early.codes)
    assert full.sizes == early.sizes
    assert encoder.block_1 == early_encoder.block_1
    for a, b in zip(encoder.quantizer.codebooks, early_encoder.quantizer.codebooks, strict=True):
        np.testing.assert_array_equal(a, b)


def test_items_share_ids_where_a_group_is_fuller_than_the_capacity() -> None:
    whole, _ = build_sids(stream(), CONFIG)
    small, _ = build_sids(stream(), CONFIG.model_copy(update={"capacity": 3}))
    assert small.sizes == (*whole.sizes[:2], 3)
    np.testing.assert_array_equal(small.codes[:, :2], whole.codes[:, :2])
    np.testing.assert_array_equal(small.codes[:, 2], whole.codes[:, 2] % 3)
    expected = sum(count for count in Counter(map(tuple, small.codes.tolist())).values() if count > 1)
    assert small.collisions()["shared_items"] == expected > 0


def by_index(numbers: list[int], first_block: list[int], config: TokensConfig) -> SidTable:
    """IDs of an index with the tokens <a_k> <b_(2 k)> for each number k."""
    items = pl.DataFrame(
        {"item": [f"i{k}" for k in range(len(numbers))], "text": [""] * len(numbers), "first_block": first_block},
        schema=ITEMS,
    )
    row = {"user": "u", "item": "i0", "timestamp": None, "position": 0, "block": max(first_block)}
    given = {f"i{k}": [f"<a_{number}>", f"<b_{2 * number}>"] for k, number in enumerate(numbers)}
    return index_sids(Stream(pl.DataFrame([row], schema=INTERACTIONS), items), SidTable.from_index(given), config)


@pytest.mark.parametrize(("largest", "sizes"), [(0, (2, 8)), (1, (2, 8)), (3, (4, 8)), (4, (8, 16)), (100, (128, 256))])
def test_levels_of_an_index_have_room_by_the_codes_of_block_1(largest: int, sizes: tuple[int, ...]) -> None:
    config = TokensConfig(codes=2, capacity=8)
    assert by_index([0, largest], [1, 1], config).sizes == sizes
    assert by_index([0, largest, 1], [1, 1, 2], config).sizes == sizes


def test_a_later_code_without_room_is_named() -> None:
    with pytest.raises(DataError, match="item 'i1' has the code 9 at level 1, whose capacity is 8") as caught:
        by_index([7, 9], [1, 2], TokensConfig(codes=2, capacity=512))
    assert "-o codes=N -o capacity=N" in caught.value.hint
    assert by_index([7, 9], [1, 2], TokensConfig(codes=10)).sizes == (10, 512)


def with_texts(texts: list[str]) -> Stream:
    items = pl.DataFrame(
        {"item": [f"i{k}" for k in range(len(texts))], "text": texts, "first_block": [1] * len(texts)}, schema=ITEMS
    )
    row = {"user": "u", "item": "i0", "timestamp": None, "position": 0, "block": 1}
    return Stream(pl.DataFrame([row], schema=INTERACTIONS), items)


def test_items_of_one_text_are_counted_and_warned_of() -> None:
    texts = ["the same"] * 12 + ["a pair", " a pair "] + [f"{a} {b}" for a in WORDS for b in WORDS if a != b] + ["", ""]
    assert shared_texts(texts) == {"items_sharing_a_text": 14, "largest_group_of_a_text": 12}
    assert shared_texts(["", " "]) == {"items_sharing_a_text": 0, "largest_group_of_a_text": 0}
    expected = (
        f"14 of {len(texts)} items share their text with others, 12 of them one text: .*tokens build --index FILE"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_sids(with_texts(texts), CONFIG)
    assert [w for w in caught if re.match(expected, str(w.message))]


def test_items_that_all_have_one_text_get_no_ids() -> None:
    with pytest.raises(DataError, match="all 500 items known at block 1 have the same text") as caught:
        build_sids(with_texts(["the same"] * 500), CONFIG)
    assert "tokens build --index FILE" in caught.value.hint


def test_items_without_a_usable_text_are_counted() -> None:
    texts = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_sids(with_texts([*texts, "", "  !!"]), CONFIG)
    assert "2 of 32 items have no text, or none that shares a word with block 1: they get a zero vector" in [
        str(w.message) for w in caught
    ]


def test_no_text_at_block_1_is_refused() -> None:
    with pytest.raises(DataError, match="all 2 items known at block 1 have an empty text"):
        build_sids(with_texts(["", " "]), CONFIG)
