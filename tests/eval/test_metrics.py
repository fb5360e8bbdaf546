import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.data.histories import TrainingLog
from cladapt.errors import ConfigError, DataError
from cladapt.eval.metrics import ROWS, head_frequency, metric_names, slices, summarise, user_metrics

K = (5, 10)


def make_rows(**columns: list) -> pl.DataFrame:
    n = len(next(iter(columns.values())))
    default = {
        "model_block": [2] * n,
        "block": [2] * n,
        "user": [f"u{i}" for i in range(n)],
        "item": [f"i{i}" for i in range(n)],
        "allowed": [True] * n,
        "rank": [0] * n,
        "ties": [None if rank is None else 1 for rank in columns.get("rank", [0] * n)],
        "id_rank": columns.get("rank", [0] * n),
        "share": [1] * n,
        "log_likelihood": [-1.0] * n,
        "frequency": [0] * n,
        "user_kind": ["new"] * n,
        "new_item": [False] * n,
        "one_hop": [False] * n,
    }
    return pl.DataFrame({**default, **columns}, schema_overrides=ROWS)


def log_of(frequencies: list[int]) -> TrainingLog:
    item = np.repeat(np.arange(len(frequencies), dtype=np.int32), frequencies)
    return TrainingLog(np.zeros_like(item), item, np.ones_like(item))


def test_values_by_hand():
    rows = make_rows(rank=[0, 8, 12, None, 4], ties=[1, 4, 4, None, 2], id_rank=[0, 6, 12, None, 2])
    measured = user_metrics(rows, K)
    # ties at 8, 9, 10, 11: two of four are below 10; at 4 and 5: one of two is below 5
    assert measured["HR@5"].to_list() == [1.0, 0.0, 0.0, 0.0, 0.5]
    assert measured["HR@10"].to_list() == [1.0, 0.5, 0.0, 0.0, 1.0]
    assert measured["HR@10 (ID)"].to_list() == [1.0, 1.0, 0.0, 0.0, 1.0]
    first, second = 1 / math.log2(10), 1 / math.log2(11)
    assert measured["NDCG@10"].to_list()[:4] == pytest.approx([1.0, (first + second) / 4, 0.0, 0.0])
    assert measured["NDCG@10 (ID)"].to_list()[:4] == pytest.approx([1.0, 1 / 3.0, 0.0, 0.0])
    assert measured["MRR"][1] == pytest.approx((1 / 9 + 1 / 10 + 1 / 11 + 1 / 12) / 4)
    assert measured["MRR (ID)"].to_list() == pytest.approx([1.0, 1 / 7, 1 / 13, 0.0, 1 / 3])
    assert user_metrics(rows, (5,), beams=10)["MRR"][1] == pytest.approx((1 / 9 + 1 / 10) / 4)


places = st.none() | st.tuples(st.integers(0, 19), st.integers(1, 7))


@settings(max_examples=30, deadline=None)
@given(st.lists(places, min_size=1, max_size=12), st.lists(st.integers(1, 20), min_size=1, max_size=3, unique=True))
def test_metrics_are_means_over_the_places_of_a_tie(cases: list[tuple[int, int] | None], top_k: list[int]):
    rank, ties = [c and c[0] for c in cases], [c and c[1] for c in cases]
    measured = user_metrics(make_rows(rank=rank, ties=ties), top_k, beams=20)
    for i, case in enumerate(cases):
        where = range(case[0], case[0] + case[1]) if case else []
        for k in top_k:
            below = [j for j in where if j < k]
            assert measured[f"HR@{k}"][i] == pytest.approx(len(below) / max(len(where), 1))
            gains = [1 / math.log2(j + 2) for j in below]
            assert measured[f"NDCG@{k}"][i] == pytest.approx(sum(gains) / max(len(where), 1))
            hit = case is not None and case[0] < k
            assert measured[f"NDCG@{k} (ID)"][i] == pytest.approx(1 / math.log2(case[0] + 2) if hit else 0.0)  # type: ignore[index]
        reciprocal = [1 / (j + 1) for j in where if j < 20]
        assert measured["MRR"][i] == pytest.approx(sum(reciprocal) / max(len(where), 1))


def test_a_model_without_ids_has_no_figures_of_ids():
    measured = user_metrics(make_rows(rank=[0, None], share=[None, None], id_rank=[None, None]), K)
    assert measured["HR@5"].to_list() == [1.0, 0.0]
    assert measured["HR@5 (ID)"].to_list() == measured["MRR (ID)"].to_list() == [None, None]


def test_summary_has_the_means_of_each_cell_and_counts_users():
    rows = make_rows(model_block=[1, 2, 2], block=[2, 2, 2], rank=[None, 0, 7], log_likelihood=[-4.0, -1.0, -3.0])
    summary = summarise(rows, K)
    assert summary.columns == ["model_block", "block", "users", *metric_names(K), "log_likelihood"]
    assert summary["users"].to_list() == [1, 2]
    assert summary["HR@5"].to_list() == [0.0, 0.5]
    assert summary["HR@10"].to_list() == [0.0, 1.0]
    assert summary["log_likelihood"].to_list() == [-4.0, -2.0]


def test_log_likelihood_stays_null_for_a_model_without_one():
    assert summarise(make_rows(log_likelihood=[None, None]), K)["log_likelihood"].to_list() == [None]


def test_users_are_counted_once_over_several_blocks():
    rows = make_rows(block=[2, 3], user=["a", "a"], rank=[0, 0])
    assert summarise(rows, K, by=("model_block",))["users"].to_list() == [1]


def test_slices_hold_the_users_their_names_say():
    rows = make_rows(
        rank=[0, None, 0, None],
        frequency=[9, 3, 2, 0],
        user_kind=["new", "returning", "dormant", "dormant"],
        new_item=[False, False, False, True],
        one_hop=[True, False, False, True],
        allowed=[True, True, True, False],
    )
    parts = {row["slice"]: row for row in slices(rows, K, {2: 3}).iter_rows(named=True)}
    assert {name: (row["users"], row["HR@5"]) for name, row in parts.items()} == {
        "all": (4, 0.5),
        "head items": (2, 0.5),
        "tail items": (2, 0.5),
        "new items": (1, 0.0),
        "one-hop successors": (2, 0.5),
        "no one-hop successors": (2, 0.5),
        "not allowed": (1, 0.0),
        "new users": (1, 1.0),
        "returning users": (1, 0.0),
        "dormant users": (2, 0.5),
    }


def test_the_head_threshold_is_that_of_the_tested_block():
    rows = make_rows(block=[2, 3], frequency=[4, 4])
    parts = slices(rows, K, {2: 4, 3: 5}, by=("block",))
    head = parts.filter(pl.col("slice") == "head items")
    assert head["block"].to_list() == [2, 3]
    assert head["users"].to_list() == [1, 0]


def test_an_empty_slice_is_listed_with_null_means():
    parts = slices(make_rows(rank=[0]), K, {2: 1})
    empty = parts.filter(pl.col("slice") == "dormant users")
    assert empty["users"].to_list() == [0]
    assert empty["HR@5"].to_list() == [None]


def test_slices_of_no_rows_are_all_empty():
    assert slices(make_rows(rank=[]), K, {})["users"].to_list() == [0] * 10


def test_slices_need_a_threshold_for_every_block():
    with pytest.raises(DataError, match="no head frequency for block 2"):
        slices(make_rows(rank=[0]), K, {3: 1})


@pytest.mark.parametrize(
    ("frequencies", "expected"),
    [
        ([10, 5, 1, 1, 1], 6),  # one item of five
        ([10, 5, 1, 1, 1, 0, 0], 6),  # items outside the log do not count
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 1], 8),  # two of ten
        ([3, 3, 3, 1, 1], 4),  # three equals do not fit into one place: the head is empty
        ([7], 8),
    ],
)
def test_head_frequency_by_hand(frequencies: list[int], expected: int):
    assert head_frequency(log_of(frequencies)) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_the_head_is_the_largest_that_fits(frequencies: list[int]):
    threshold = head_frequency(log_of(frequencies))
    assert sum(f >= threshold for f in frequencies) * 5 <= len(frequencies)
    assert sum(f >= threshold - 1 for f in frequencies) * 5 > len(frequencies)


def test_the_whole_log_may_be_head():
    assert head_frequency(log_of([3, 1]), share=1.0) == 1


@pytest.mark.parametrize(
    ("top_k", "beams", "text"),
    [
        ((), None, "top_k is empty"),
        ((5, 0), None, "top_k=0 is not a cut-off"),
        ((5, 30), 20, "top_k=30 exceeds the beams=20"),
    ],
)
def test_impossible_cut_offs_are_refused(top_k: tuple[int, ...], beams: int | None, text: str):
    with pytest.raises(ConfigError, match=text):
        user_metrics(make_rows(rank=[0]), top_k, beams)


def test_wrong_columns_are_named():
    with pytest.raises(DataError, match=r"wrong columns \(rank: Int64; share: missing\)"):
        user_metrics(make_rows(rank=[0]).with_columns(pl.col("rank").cast(pl.Int64)).drop("share"), K)


@pytest.mark.parametrize(
    "column",
    [
        {"rank": [0, -1]},
        {"ties": [1, 0]},
        {"ties": [1, None]},
        {"rank": [0, None], "ties": [1, 2]},
        {"allowed": [True, False]},
        {"share": [1, -1]},
        {"id_rank": [0, -1]},
        {"user_kind": ["new", "old"]},
    ],
)
def test_impossible_values_are_counted_and_shown(column: dict[str, list]):
    with pytest.raises(DataError, match=r"1 per-user rows have impossible values, the first .*'u1'"):
        user_metrics(make_rows(**column), K)


def test_grouping_by_an_absent_column_is_refused():
    with pytest.raises(DataError, match=r"they lack \['seed'\]"):
        summarise(make_rows(rank=[0]), K, by=("seed",))
