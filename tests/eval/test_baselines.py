from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.config import BlocksConfig
from cladapt.data.blocks import build_stream
from cladapt.data.histories import TrainingLog
from cladapt.data.readers import read
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import ConfigError, DataError
from cladapt.eval.baselines import (
    MODELS,
    BlockPopularity,
    Markov,
    OwnHistory,
    Popularity,
    evaluate_counts,
    rank_targets,
)
from cladapt.eval.cases import held_out_cases
from cladapt.eval.metrics import ROWS, summarise


def log_of(*sequences: list[tuple[int, int]]) -> TrainingLog:
    """One list of (item, block) per user."""
    rows = [(u, item, block) for u, sequence in enumerate(sequences) for item, block in sequence]
    columns = np.array(rows, dtype=np.int32).reshape(-1, 3).T
    return TrainingLog(columns[0], columns[1], columns[2])


def make_stream(events: dict[str, dict[int, list[str]]], first_block: dict[str, int]) -> Stream:
    """`events[user][block]` lists items in order; `first_block` lists the items in catalogue order."""
    rows = []
    for user, blocks in events.items():
        sequence = [(item, block) for block, items in blocks.items() for item in items]
        rows += [(user, item, None, position, block) for position, (item, block) in enumerate(sequence)]
    items = [(item, "", block) for item, block in first_block.items()]
    return Stream(pl.DataFrame(rows, INTERACTIONS, orient="row"), pl.DataFrame(items, ITEMS, orient="row"))


def markov_by_loop(sequences: list[list[int]], history: list[int], n_items: int) -> list[float]:
    pairs = Counter(pair for sequence in sequences for pair in pairwise(sequence))
    out = Counter(source for sequence in sequences for source in sequence[:-1])
    last = history[-3:]
    return [sum(pairs[i, j] / out[i] for i in last if out[i]) for j in range(n_items)]


def test_popularity_counts_the_whole_log():
    log = log_of([(2, 1), (1, 1), (2, 2)], [(2, 1)])
    scores = Popularity().fit(log, 4).scores([np.array([0]), np.array([], dtype=np.int64)])
    assert scores.tolist() == [[0, 1, 3, 0]] * 2


def test_block_popularity_ranks_by_the_latest_block_then_the_whole_log_then_the_index():
    log = log_of([(3, 1), (3, 1), (3, 1), (1, 2), (4, 2)], [(4, 1), (2, 1), (2, 2), (2, 2)])
    scores = BlockPopularity().fit(log, 6).scores([np.array([0])])[0]
    order = sorted(range(6), key=lambda i: (-scores[i], i))
    # block 2 counts 2 twice, 1 and 4 once; 4 leads 1 and 3 leads the rest over the whole log
    assert order == [2, 4, 1, 3, 0, 5]


def test_the_latest_block_is_that_of_the_log():
    log = log_of([(0, 1), (1, 3)])
    assert np.argmax(BlockPopularity().fit(log, 2).scores([np.array([0])])[0]) == 1


sequences = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=7), min_size=1, max_size=6)
histories = st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
def own_history_by_sort(history: list[int], popularity: np.ndarray) -> list[int]:
    def key(item: int) -> tuple[int, int, float, int]:
        latest = max((place for place, seen in enumerate(history) if seen == item), default=-1)
        return -history.count(item), -latest, -popularity[item], item

    return sorted(range(len(popularity)), key=key)


@given(st.lists(st.integers(0, 7), max_size=30))
def test_own_history_orders_by_count_then_by_the_latest_then_by_block_popularity(history: list[int]):
    log = log_of([(6, 1), (3, 1), (3, 1), (1, 2), (4, 2)], [(4, 2), (2, 2), (2, 2), (2, 2), (7, 2)])
    popularity = BlockPopularity().fit(log, 8).item_scores
    scores = OwnHistory().fit(log, 8).scores([np.array(history, dtype=np.int64)])[0]
    assert sorted(range(8), key=lambda i: (-scores[i], i)) == own_history_by_sort(history, popularity)


@given(sequences, histories)
def test_markov_agrees_with_a_loop(sequences: list[list[int]], histories: list[list[int]]):
    log = log_of(*[[(item, 1) for item in sequence] for sequence in sequences])
    scores = Markov().fit(log, 6).scores([np.array(h, dtype=np.int64) for h in histories])
    expected = [markov_by_loop(sequences, history, 6) for history in histories]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_markov_learns_a_cycle_by_heart():
    cycle = [(i % 5, 1) for i in range(20)]
    scores = Markov().fit(log_of(cycle), 5).scores([np.array([3])])
    assert scores[0].argmax() == 4


def test_markov_orders_what_it_never_saw_by_block_popularity():
    log = log_of([(0, 1), (1, 2)], [(2, 2), (2, 2), (3, 1)])
    popular = BlockPopularity().fit(log, 5).scores([np.array([4])])[0]
    unknown = Markov().fit(log, 5).scores([np.array([4])])[0]
    assert np.argsort(-unknown, kind="stable").tolist() == np.argsort(-popular, kind="stable").tolist()


def test_markov_does_not_step_from_one_user_to_the_next():
    log = log_of([(0, 1), (1, 1)], [(2, 1), (3, 1)])
    assert Markov().fit(log, 4).scores([np.array([1])])[0].max() < Markov.FILL


@pytest.mark.parametrize("name", MODELS)
def test_every_model_scores_all_items_for_all_users(name: str):
    model = MODELS[name]().fit(log_of([(0, 1), (2, 1)]), 7)
    assert model.scores([]).shape == (0, 7)
    assert model.scores([np.array([2]), np.array([], dtype=np.int64)]).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_log_and_a_foreign_item_are_refused(name: str):
    with pytest.raises(DataError, match="the training log is empty"):
        MODELS[name]().fit(log_of([]), 7)
    with pytest.raises(DataError, match="item 9 is outside the 7 items"):
        MODELS[name]().fit(log_of([(9, 1)]), 7)


def test_ranks_by_hand():
    scores = np.array([[0.1, 0.9, 0.5, 0.5], [0.1, 0.9, 0.5, 0.5], [0.1, 0.9, 0.5, 0.5]])
    target, everything = np.array([0, 2, 3]), np.ones(4, dtype=bool)

    def found(*arguments) -> list[tuple[int, int]]:
        return list(zip(*(part.tolist() for part in rank_targets(scores, target, *arguments)), strict=True))

    assert found(everything) == [(3, 1), (1, 2), (1, 2)]
    seen = [np.array([1, 2]), np.array([], dtype=np.int64), np.array([3])]
    assert found(everything, seen) == [(1, 1), (1, 2), (-1, -1)]
    assert found(np.array([True, False, True, False])) == [(1, 1), (0, 1), (-1, -1)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_ranks_agree_with_a_sorted_list(seed: int):
    rng = np.random.default_rng(seed)
    scores = rng.integers(4, size=(3, 8)).astype(float)
    target, catalogue = rng.integers(8, size=3), rng.random(8) < 0.7
    seen = [np.flatnonzero(rng.random(8) < 0.3) for _ in range(3)]
    for u, (rank, ties) in enumerate(zip(*rank_targets(scores, target, catalogue, seen), strict=True)):
        allowed = [i for i in range(8) if catalogue[i] and i not in seen[u]]
        if target[u] not in allowed:
            assert (rank, ties) == (-1, -1)
            continue
        own = scores[u, target[u]]
        assert rank == sum(scores[u, i] > own for i in allowed)
        assert ties == sum(scores[u, i] == own for i in allowed)


def counted(
    stream: Stream, name: str, model_block: int, block: int, exclude_seen: bool = True, beams: int = 20
) -> pl.DataFrame:
    cases = held_out_cases(stream, block, "test", exclude_seen)
    return evaluate_counts(stream, name, model_block, cases, exclude_seen, beams)


@pytest.fixture
def stream() -> Stream:
    events = {
        "x": {1: ["a", "a", "b", "c", "d"], 2: ["b", "b", "e", "a", "e"]},
        "y": {1: ["a", "b", "a", "c", "c"]},
        "z": {2: ["b", "e", "b", "d", "f"]},
    }
    return make_stream(events, {"a": 1, "b": 1, "c": 1, "d": 1, "e": 2, "f": 2, "g": 3})


def test_rows_of_a_block_by_hand(stream: Stream):
    rows = counted(stream, "block popularity", 2, 2, exclude_seen=False).sort("user")
    assert dict(rows.schema) == ROWS
    # training parts of block 2: x = b b e, z = b e b; so b 4, e 2, then over both blocks a 4 (a a, a a), c d g f 0
    assert rows.select("user", "item", "rank", "ties", "frequency", "user_kind", "new_item", "one_hop").rows() == [
        ("x", "e", 1, 1, 2, "returning", True, False),
        ("z", "f", 3, 3, 0, "new", True, False),  # c, d and f were never trained on: the three are equal
    ]
    assert rows["allowed"].to_list() == [True, True]
    for name in ("share", "id_rank", "log_likelihood"):
        assert rows[name].null_count() == 2


def test_seen_items_are_left_out_on_request(stream: Stream):
    rows = counted(stream, "block popularity", 2, 2, exclude_seen=True).sort("user")
    # x consumed e before, so e may not be given; z consumed b, d and e, which leaves a, then c and f alike
    assert rows.select("allowed", "rank", "ties").rows() == [(False, None, None), (True, 1, 2)]


def test_a_rank_beyond_the_beams_is_not_returned(stream: Stream):
    rows = counted(stream, "block popularity", 2, 2, exclude_seen=False, beams=3).sort("user")
    assert rows["rank"].to_list() == [1, None]


def test_an_earlier_model_knows_earlier_blocks_only(stream: Stream):
    rows = counted(stream, "popularity", 1, 2, exclude_seen=False).sort("user")
    # block 1's training parts: a a b, a b a; c, d, e and f are all unknown to it
    assert rows["model_block"].to_list() == [1, 1]
    assert rows.select("rank", "ties").rows() == [(2, 4), (2, 4)]


def test_items_outside_the_catalogue_take_no_place():
    stream = make_stream({"x": {1: ["b", "b", "b", "b", "c"]}}, {"b": 1, "c": 1, "a": 2})
    assert counted(stream, "popularity", 1, 1, exclude_seen=False)["rank"].to_list() == [1]


def test_batches_do_not_change_the_rows(stream: Stream, monkeypatch: pytest.MonkeyPatch):
    whole = counted(stream, "markov", 2, 2)
    monkeypatch.setattr("cladapt.eval.baselines._BATCH", 1)
    assert counted(stream, "markov", 2, 2).equals(whole)


def test_an_unknown_model_is_refused(stream: Stream):
    with pytest.raises(ConfigError, match=r"no counts-only model 'svd'.*popularity, block popularity, markov"):
        counted(stream, "svd", 1, 2)


@pytest.mark.parametrize(
    ("source", "model", "expected"),
    [
        ("peso-cds", "block popularity", {"HR@5": 0.0064, "HR@10": 0.0099, "NDCG@5": 0.0043, "NDCG@10": 0.0054}),
        ("peso-cds", "markov", {"HR@5": 0.0238, "HR@10": 0.0337, "NDCG@5": 0.0151, "NDCG@10": 0.0183}),
        ("movietweetings-2013", "block popularity", {"HR@10": 0.1277}),
        ("movietweetings-2013", "markov", {"HR@10": 0.1278}),
    ],
)
def test_figures_on_real_data_stay_what_they_were(
    source: str, model: str, expected: dict[str, float], real_data: Callable[[str], Path]
) -> None:
    stream = build_stream(read(real_data(source)), BlocksConfig())
    rows = pl.concat([counted(stream, model, t, t, exclude_seen=False) for t in range(2, 6)])
    measured = summarise(rows, (5, 10)).select(expected.keys()).mean().row(0, named=True)
    assert measured == pytest.approx(expected, abs=0.0005)
