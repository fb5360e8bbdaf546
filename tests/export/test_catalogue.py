"""The IDs and offered items that go with an export."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import DataError
from cladapt.export.catalogue import Offered
from cladapt.tokens.sids import SidTable

SIDS = SidTable(("a", "b", "c"), np.array([[0], [1], [2]]), (3,))


def stream(withdrawn: list[tuple[str, int, int | None]]) -> Stream:
    items = pl.DataFrame({"item": ["a", "b", "c"], "text": [""] * 3, "first_block": [1, 1, 2]}, schema=ITEMS)
    rows = [("u", item, None, position, 1 + (item == "c")) for position, item in enumerate("abc")]
    interactions = pl.DataFrame(rows, schema=INTERACTIONS, orient="row")
    return Stream(interactions, items, {"withdrawn": withdrawn})


@pytest.mark.parametrize(
    ("withdrawn", "items"),
    [
        ([], ("a", "b", "c")),
        ([("b", 3, None)], ("a", "c")),
        ([("b", 1, 1), ("c", 2, 2), ("a", 2, None)], ("b", "c")),  # of blocks 1 and 2 alone, and from 2 on
    ],
)
def test_what_is_withdrawn_after_the_last_block_is_not_offered(
    withdrawn: list[tuple[str, int, int | None]], items: tuple[str, ...]
) -> None:
    assert Offered.of(stream(withdrawn), SIDS).items == items


def test_a_stream_that_offers_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="every item of the stream is withdrawn"):
        Offered.of(stream([(item, 3, None) for item in "abc"]), SIDS)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    assert Offered.load(tmp_path) is None
    Offered(SIDS, ("a", "c")).save(tmp_path)
    back = Offered.load(tmp_path)
    assert back is not None
    assert (back.sids.fingerprint, back.items) == (SIDS.fingerprint, ("a", "c"))
    assert {path.name for path in tmp_path.iterdir()} == {"sids.parquet", "catalogue.parquet"}


def test_withdrawn_items_of_a_list_are_left_out_and_counted() -> None:
    offered = Offered(SIDS, ("a", "c"))
    assert offered.chosen(None) == (["a", "c"], 0)
    assert offered.chosen(["c", "b", "unknown", "b"]) == (["c", "unknown"], 2)


def test_texts_go_with_the_ids_and_are_compared_where_both_have_them(tmp_path: Path) -> None:
    titled = Offered(SIDS, ("a", "c"), ("A", "B", "C"))
    titled.save(tmp_path)
    back = Offered.load(tmp_path)
    assert back is not None
    assert back.texts == ("A", "B", "C")
    assert back.same(titled)
    assert back.same(Offered(SIDS, ("a", "c")))
    assert not back.same(Offered(SIDS, ("a", "c"), ("A", "B", "D")))
    assert Offered.of(stream([]), SIDS, texts=True).texts == tuple(stream([]).items["text"])
