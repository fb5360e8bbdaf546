"""The ID table: naming, validation, collisions, round trips and index files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cladapt.errors import DataError
from cladapt.tokens.sids import SidTable, read_index


def table() -> SidTable:
    return SidTable(("x", "y", "z", "w"), np.array([[1, 0], [0, 2], [1, 0], [1, 1]]), (2, 4))


def test_tokens_are_listed_level_by_level_and_indexed_by_code() -> None:
    sids = table()
    assert sids.tokens == ("<a_0>", "<a_1>", "<b_0>", "<b_1>", "<b_2>", "<b_3>")
    assert sids.offsets.tolist() == [0, 2, 6]
    assert sids.offsets.dtype == np.int64
    assert sids.codes.dtype == sids.token_index.dtype == np.int32
    assert [[sids.tokens[i] for i in row] for row in sids.token_index] == [
        ["<a_1>", "<b_0>"],
        ["<a_0>", "<b_2>"],
        ["<a_1>", "<b_0>"],
        ["<a_1>", "<b_1>"],
    ]
    assert sids.sid.tolist() == [1, 0, 1, 2]
    assert sids.levels == 2


def test_collisions_count_shared_ids_and_code_usage() -> None:
    report = table().collisions()
    assert {k: report[k] for k in ("items", "distinct", "shared_items", "largest_group")} == {
        "items": 4,
        "distinct": 3,
        "shared_items": 2,
        "largest_group": 2,
    }
    first, second = report["levels"]
    assert (first["level"], first["codes"], first["used"]) == ("a", 2, 2)
    assert (second["level"], second["codes"], second["used"]) == ("b", 4, 3)
    assert first["entropy"] == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))
    assert second["entropy"] == pytest.approx(1.5)
    assert second["perplexity"] == pytest.approx(2**1.5)


def test_a_level_with_one_code_has_zero_entropy() -> None:
    level = SidTable(("x", "y"), np.zeros((2, 1), dtype=np.int32), (1,)).collisions()["levels"][0]
    assert (level["entropy"], level["perplexity"]) == (0.0, 1.0)


def test_align_reorders_rows_and_keeps_the_tokens() -> None:
    aligned = table().align(["w", "x"])
    assert aligned.items == ("w", "x")
    assert aligned.codes.tolist() == [[1, 1], [1, 0]]
    assert aligned.tokens == table().tokens


def test_align_names_the_first_items_without_an_id_and_counts_them() -> None:
    with pytest.raises(DataError, match=r"6 of 7 items have no semantic ID: 'p0', 'p1', 'p2', 'p3', 'p4', …"):
        table().align(["x", *(f"p{i}" for i in range(6))])


def test_fingerprint_follows_the_content() -> None:
    sids = table()
    assert sids.fingerprint == table().fingerprint
    assert sids.fingerprint != SidTable(sids.items, sids.codes, (2, 5)).fingerprint
    assert sids.fingerprint != SidTable(("x", "y", "z", "v"), sids.codes, (2, 4)).fingerprint
    assert sids.fingerprint != SidTable(sids.items, sids.codes[::-1], (2, 4)).fingerprint


def test_a_saved_table_loads_exactly(tmp_path: Path) -> None:
    sids = table()
    sids.save(tmp_path / "sids.parquet")
    back = SidTable.load(tmp_path / "sids.parquet")
    assert (back.items, back.sizes, back.fingerprint) == (sids.items, sids.sizes, sids.fingerprint)
    np.testing.assert_array_equal(back.codes, sids.codes)
    assert (back.version, "version" in pl.read_parquet_schema(tmp_path / "sids.parquet")) == (1, False)
    replace(sids, version=3).save(tmp_path / "sids.parquet")
    assert SidTable.load(tmp_path / "sids.parquet").version == 3
    pl.read_parquet(tmp_path / "sids.parquet").with_columns(version=0).write_parquet(tmp_path / "sids.parquet")
    with pytest.raises(DataError, match=r"sids\.parquet: its rows have the versions \[0\]"):
        SidTable.load(tmp_path / "sids.parquet")


def test_the_first_rows_are_a_table() -> None:
    first = replace(table(), version=2).first(2)
    assert (first.items, first.codes.tolist(), first.sizes, first.version) == (("x", "y"), [[1, 0], [0, 2]], (2, 4), 2)
    with pytest.raises(DataError, match="the ID table has 4 items, not 5"):
        table().first(5)


@pytest.mark.parametrize(
    ("codes", "sizes", "text"),
    [
        ([[0], [0, 0]], [[1], [1]], "rows disagree on the levels"),
        ([[0], [0]], [[1], [2]], "rows disagree on the levels"),
        ([[0], [None]], [[1], [1]], "an item or a code is missing"),
        ([[0], [7]], [[1], [1]], "item 'y' has the code 7 at level 1"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, codes: list, sizes: list, text: str) -> None:
    path = tmp_path / "sids.parquet"
    schema = {"item": pl.String(), "codes": pl.List(pl.Int32()), "sizes": pl.List(pl.Int32())}
    pl.DataFrame({"item": ["x", "y"], "codes": codes, "sizes": sizes}, schema=schema).write_parquet(path)
    with pytest.raises(DataError, match=rf"sids\.parquet: .*{text}"):
        SidTable.load(path)


@pytest.mark.parametrize(
    ("items", "codes", "sizes", "text"),
    [
        (("x", "x"), [[0], [0]], (1,), "item 'x' is listed twice"),
        (("x",), [[0], [0]], (1,), "1 items and 2 rows"),
        (("x",), [[-1]], (1,), "item 'x' has the code -1 at level 1"),
        (("x",), [[0, 3]], (1, 3), "item 'x' has the code 3 at level 2"),
        (("x",), [[0]], (1, 1), "1 levels but 2 level sizes"),
        (("x",), [[0.5]], (1,), "dtype float64"),
        (("x",), [0], (1,), "shape"),
        (("x",), [[0] * 27], (1,) * 27, "27 levels"),
        ((), np.empty((0, 1), dtype=int), (1,), "0 items"),
    ],
)
def test_an_inconsistent_table_is_refused(items: tuple, codes: list, sizes: tuple, text: str) -> None:
    with pytest.raises(DataError, match=text):
        SidTable(items, np.array(codes), sizes)


def test_an_index_becomes_a_table_with_sizes_from_its_largest_codes(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"7": ["<a_51>", "<b_2>"], "3": ["<a_0>", "<b_10>"]}))
    sids = read_index(path)
    assert sids.items == ("7", "3")
    assert sids.codes.tolist() == [[51, 2], [0, 10]]
    assert sids.sizes == (52, 11)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ({"5": ["<b_1>"]}, r"item '5': token '<b_1>' at level 1 \(expected <a_N>"),
        ({"5": ["<a_1>", "<b_x>"]}, "item '5': token '<b_x>' at level 2"),
        ({"5": ["<a_01>"]}, "'<a_01>'"),
        ({"5": ["<a_9999999>"]}, "'<a_9999999>'"),
        ({"5": [3]}, "token 3 at level 1"),
        ({"5": "<a_1>"}, "item '5': '<a_1>' is not a list"),
        ({"4": ["<a_1>"], "5": ["<a_1>", "<b_1>"]}, "item '5' has 2 tokens, the items before it 1"),
        ({"5": []}, "0 levels"),
        ({}, "no items"),
        ([["<a_1>"]], "expected an object, found list"),
    ],
)
def test_a_bad_index_names_the_file_the_item_and_the_token(tmp_path: Path, index: object, text: str) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=rf"index\.json: .*{text}"):
        read_index(path)


def test_the_released_cds_index_has_its_known_counts(real_data: Callable[[str], Path]) -> None:
    report = read_index(next(real_data("peso-cds").glob("*.index.*.json"))).collisions()
    assert (report["items"], report["distinct"], report["largest_group"]) == (39191, 38508, 38)
