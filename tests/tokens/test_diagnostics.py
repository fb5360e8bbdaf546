"""Diagnostics of IDs against enumerations of all ways to break ties, and what is known by construction."""

from itertools import permutations
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cladapt.config import SimulateConfig, TokensConfig
from cladapt.data.histories import training_sequences
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import DataError
from cladapt.tokens.build import save_index, save_sids
from cladapt.tokens.diagnostics import (
    by_popularity,
    churn,
    kept_by_prefix,
    kept_neighbours,
)
from cladapt.tokens.sids import SidTable

CODES = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1]])


def agreement(i: int, j: int) -> int:
    same = (CODES[i] == CODES[j]).tolist()
    return same.index(False) if False in same else 3


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_neighbours_kept_are_those_of_all_ways_to_break_ties(k: int) -> None:
    rng = np.random.default_rng(k)
    near = np.stack([rng.permutation([j for j in range(6) if j != i])[:k] for i in range(6)])
    near[2, 1:] = -1
    found = []
    for i, row in enumerate(near):
        others = [j for j in range(6) if j != i]
        firsts = [sorted(order, key=lambda j: -agreement(i, j))[:k] for order in permutations(others)]
        found += [np.mean([j in first for first in firsts]) for j in row if j >= 0]
    assert kept_by_prefix(CODES, np.arange(6), near, k) == pytest.approx(np.mean(found), rel=1e-12)


def test_of_no_neighbours_none_is_kept_or_lost() -> None:
    assert kept_by_prefix(CODES, np.arange(1), np.full((1, 3), -1), 3) is None


def test_random_codes_keep_what_chance_does() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (400, 2))
    near = rng.integers(0, 400, (400, 10))
    assert kept_by_prefix(codes, np.arange(400), near, 10) == pytest.approx(10 / 399, abs=0.01)


@pytest.fixture(scope="module")
def stream() -> Stream:
    return simulate(SimulateConfig(users=60, items=43, topics=4, blocks=3)).stream


def saved(stream: Stream, folder: Path, config: TokensConfig) -> SidTable:
    stream.save(folder)
    return save_sids(folder, stream, config)


SMALL = TokensConfig(dimensions=8, levels=2, codes=4, capacity=64)


def test_fifths_go_from_the_most_to_the_least_popular(stream: Stream, tmp_path: Path) -> None:
    table = saved(stream, tmp_path, SMALL)
    rows = by_popularity(tmp_path, stream, table)
    events = np.bincount(training_sequences(stream, 3).item, minlength=43)
    assert [row["items"] for row in rows] == [9, 9, 9, 8, 8]
    assert sum(row["events"] for row in rows) == events.sum()
    assert rows[0]["events"] == np.sort(events)[::-1][:9].sum()
    codes = [tuple(row) for row in table.codes[:, :2].tolist()]
    sharing = sum(codes.count(row) > 1 for row in codes)
    assert sum(row["sharing_codes"] * row["items"] for row in rows) == pytest.approx(sharing)
    assert {row["sharing_an_id"] for row in rows} == {0.0}


def test_neighbours_are_reported_for_texts_and_for_users(stream: Stream, tmp_path: Path) -> None:
    table = saved(stream, tmp_path / "plain", SMALL)
    semantic, collaborative = kept_neighbours(tmp_path / "plain", stream, table, 5)
    assert (semantic["graph"], collaborative["graph"]) == ("semantic", "collaborative")
    assert semantic["by_vectors"] == 1.0  # nothing was reduced
    assert semantic["by_chance"] == pytest.approx(5 / 42) == collaborative["by_chance"]
    assert semantic["kept"] > 2 * semantic["by_chance"]
    assert (semantic["items"], semantic["k"]) == (43, 5)
    graph = SMALL.model_copy(update={"embedding": "cooccurrence"})
    table = saved(stream, tmp_path / "graph", graph)
    (row,) = kept_neighbours(tmp_path / "graph", stream, table, 5)
    assert row["graph"] == "collaborative"
    assert row["by_vectors"] > 2 * row["by_chance"]


def test_ids_of_an_index_have_no_vectors(stream: Stream, tmp_path: Path) -> None:
    stream.save(tmp_path)
    index = SidTable(tuple(stream.items["item"]), np.arange(43)[:, None], (43,))
    table = save_index(tmp_path, stream, index, SMALL)
    (row,) = kept_neighbours(tmp_path, stream, table, 5)
    assert (row["graph"], row["by_vectors"]) == ("collaborative", None)
    assert row["kept"] == pytest.approx(row["by_chance"])  # one level, every code another: all ties
    assert {r["sharing_codes"] for r in by_popularity(tmp_path, stream, table)} == {0.0}


def test_users_of_one_item_each_have_no_graph(stream: Stream, tmp_path: Path) -> None:
    first = stream.interactions.filter(pl.col("block") == 1).unique("user", maintain_order=True)
    alone = Stream(first, stream.items.filter(pl.col("first_block") == 1), stream.prefix(1).manifest)
    table = saved(alone, tmp_path, SMALL)
    row = kept_neighbours(tmp_path, alone, table, 5)[1]
    assert (row["items"], row["kept"], row["by_vectors"]) == (0, None, None)


def test_churn_counts_what_moved(tmp_path: Path) -> None:
    old = SidTable(("a", "b", "c", "d"), np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), (2, 2))
    new = SidTable(("b", "a", "d", "e"), np.array([[1, 1], [0, 1], [1, 1], [0, 0]]), (2, 2))
    rows = churn(new, old, "old")
    third = pytest.approx(1 / 3)
    assert rows == [
        {"level": "a", "items": 3, "moved": third, "prefix_moved": third},
        {"level": "b", "items": 3, "moved": third, "prefix_moved": pytest.approx(2 / 3)},
        {"level": "whole ID", "items": 3, "moved": pytest.approx(2 / 3), "prefix_moved": pytest.approx(2 / 3)},
    ]
    longer = SidTable(("a",), np.array([[0, 0, 5]]), (2, 2, 9))
    assert [row["moved"] for row in churn(longer, old, "old")] == [0.0, 0.0, 1.0]
    with pytest.raises(DataError, match="old has IDs of none of the 1 items"):
        churn(SidTable(("z",), np.array([[0, 0]]), (2, 2)), old, "old")
