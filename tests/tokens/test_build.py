"""Semantic IDs of a stream: stable over time, told apart, frozen after block 1."""

import re
import warnings

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.config import TokensConfig
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import DataError
from cladapt.tokens.build import build_sids, number_in_group, shared_texts

CONFIG = TokensConfig(dimensions=4, levels=2, codes=4)
WORDS = ("river", "stone", "night", "garden", "engine", "winter")


def stream(blocks: int = 3, n: int = 60) -> Stream:
    """Items with few words, so that many share their codes; arrivals of all blocks are mixed in row order."""
    rng = np.random.default_rng(1)
    items = pl.DataFrame(
        {
            "item": [f"i{k}" for k in range(n)],
            "text": [" ".join(sorted(rng.choice(WORDS, 2))) for _ in range(n)],
            "first_block": rng.permuted(np.repeat([1, 2, 3], n // 3)),
        },
        schema=ITEMS,
    ).filter(pl.col("first_block") <= blocks)
    row = {"user": "u", "item": items["item"][0], "timestamp": None, "position": 0, "block": blocks}
    return Stream(pl.DataFrame([row], schema=INTERACTIONS), items)


def test_every_item_gets_its_own_id_when_deduplicated() -> None:
    table, quantizer = build_sids(stream(), CONFIG)
    assert table.items == tuple(stream().items["item"])
    assert table.levels == 3
    assert table.collisions()["distinct"] == 60
    assert table.sizes[:2] == tuple(len(c) for c in quantizer.codebooks)
    plain, _ = build_sids(stream(), CONFIG.model_copy(update={"deduplicate": False}))
    np.testing.assert_array_equal(plain.codes, table.codes[:, :2])
    assert table.sizes[2] == plain.collisions()["largest_group"]


@pytest.mark.parametrize("block", [1, 2])
def test_ids_of_earlier_items_do_not_change_when_later_items_arrive(block: int) -> None:
    full, quantizer = build_sids(stream(), CONFIG)
    early, early_quantizer = build_sids(stream(block), CONFIG)
    np.testing.assert_array_equal(full.align(early.items).codes, early.codes)
    for a, b in zip(quantizer.codebooks, early_quantizer.codebooks, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(1, 3)), min_size=1, max_size=30))
def test_numbers_count_equal_codes_in_order_of_arrival(rows: list[tuple[int, int, int]]) -> None:
    codes, first_block = np.array([r[:2] for r in rows]), np.array([r[2] for r in rows])
    number = number_in_group(codes, first_block)
    for i, (a, b, block) in enumerate(rows):
        before = [j for j, r in enumerate(rows) if r[:2] == (a, b) and (r[2], j) < (block, i)]
        assert number[i] == len(before)


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
    with pytest.raises(DataError, match="all 500 items have the same text") as caught:
        build_sids(with_texts(["the same"] * 500), CONFIG)
    assert "tokens build --index FILE" in caught.value.hint
