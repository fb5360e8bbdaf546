"""Pair counts against a loop over users, the update by a block against counting anew, and the graph in closed form."""

from itertools import combinations

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from cladapt.data.histories import training_sequences
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.tokens.cooccurrence import Cooccurrence, count_pairs, item_graph


def random_stream(blocks: int = 4, users: int = 15, items: int = 20, seed: int = 0) -> Stream:
    """Users are active in some blocks, with up to nine events there of items known by then, some of them twice."""
    rng = np.random.default_rng(seed)
    first = np.sort(rng.integers(1, blocks + 1, size=items))
    first[: items // 2] = 1
    table = pl.DataFrame(
        {"item": [f"i{k}" for k in range(items)], "text": [""] * items, "first_block": first}, schema=ITEMS
    )
    rows = []
    for user in range(users):
        position = 0
        for block in range(1, blocks + 1):
            for item in rng.choice(np.flatnonzero(first <= block), rng.integers(0, 10) * (rng.random() < 0.7)):
                rows.append((f"u{user:02d}", f"i{item}", None, position, block))
                position += 1
    frame = pl.DataFrame(rows, schema=INTERACTIONS, orient="row").sort("user", "position")
    return Stream(frame, table, {"config": {"min_events": 4}})


def brute_force(stream: Stream, block: int, window: int) -> np.ndarray:
    log = training_sequences(stream, block)
    counts = np.zeros((len(stream.known(block)),) * 2, dtype=int)
    for user in np.unique(log.user):
        items = log.item[log.user == user].tolist()
        near = {
            frozenset((a, b))
            for (i, a), (j, b) in combinations(enumerate(items), 2)
            if a != b and (not window or j - i < window)
        }
        for a, b in map(tuple, near):
            counts[a, b] += 1
            counts[b, a] += 1
    return counts


@pytest.mark.parametrize("window", [0, 2, 3, 5, 100])
def test_pairs_are_those_of_a_loop_over_users(window: int) -> None:
    stream = random_stream()
    for block in range(1, 5):
        counts = Cooccurrence.of(stream, block, window).counts
        np.testing.assert_array_equal(counts.toarray(), brute_force(stream, block, window))
        assert counts.nnz == (counts.toarray() > 0).sum() > 0
        assert counts.dtype == np.int32


@pytest.mark.parametrize("window", [0, 2, 4])
def test_block_after_block_gives_the_counts_of_all(window: int) -> None:
    stream = random_stream(seed=3)
    grown = Cooccurrence.of(stream.prefix(1), 1, window)
    for block in range(2, 5):
        grown = grown.with_next_block(stream)
        whole = Cooccurrence.of(stream, block, window)
        assert grown.block == block
        assert grown.counts.shape == whole.counts.shape
        for name in ("indptr", "indices", "data"):
            np.testing.assert_array_equal(getattr(grown.counts, name), getattr(whole.counts, name))


def test_held_out_events_make_no_pair() -> None:
    table = pl.DataFrame({"item": ["a", "b", "c", "d"], "text": [""] * 4, "first_block": [1] * 4}, schema=ITEMS)
    rows = [("u", item, None, position, 1) for position, item in enumerate("abcd")]
    stream = Stream(pl.DataFrame(rows, schema=INTERACTIONS, orient="row"), table, {"config": {"min_events": 3}})
    expected = np.zeros((4, 4))
    expected[[0, 1], [1, 0]] = 1
    np.testing.assert_array_equal(Cooccurrence.of(stream, 1).counts.toarray(), expected)


def test_one_event_makes_no_pair() -> None:
    for window in (0, 3):
        counts = count_pairs(np.array([0, 1], dtype=np.int32), np.array([0, 1], dtype=np.int32), 3, window)
        assert (counts.shape, counts.nnz) == ((3, 3), 0)


COUNTS = sparse.csr_array(
    np.array([[0, 5, 1, 1, 0], [5, 0, 2, 0, 0], [1, 2, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=np.int32)
)


@pytest.mark.parametrize("weighting", ["count", "log1p"])
def test_the_strongest_of_each_row_stay_on_both_sides(weighting: str) -> None:
    # item 0 keeps 1, item 1 keeps 0, item 2 keeps 1, item 3 keeps 0
    kept = np.array([[0, 5, 0, 1, 0], [5, 0, 2, 0, 0], [0, 2, 0, 0, 0], [1, 0, 0, 0, 0], [0] * 5], dtype=float)
    weights = np.log1p(kept) if weighting == "log1p" else kept
    degree = weights.sum(axis=1)
    scale = np.array([1 / np.sqrt(d) if d else 0 for d in degree])
    graph = item_graph(COUNTS, 1, weighting)  # type: ignore[arg-type]
    np.testing.assert_allclose(graph.toarray(), scale[:, None] * weights * scale, rtol=1e-14)
    assert graph.nnz == 6


def test_of_equal_weights_the_first_columns_stay() -> None:
    counts = sparse.csr_array(np.ones((4, 4), dtype=np.int32) - np.eye(4, dtype=np.int32))
    graph = item_graph(counts, 1)
    assert sorted(zip(*(axis.tolist() for axis in graph.nonzero()), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0)
    ]  # fmt: skip


@pytest.mark.parametrize("neighbours", [0, 2])
def test_total_variation_is_the_sum_over_edges(neighbours: int) -> None:
    counts = Cooccurrence.of(random_stream(users=40), 4).counts
    graph = item_graph(counts, neighbours).toarray()
    weights = np.where(graph > 0, counts.toarray(), 0).astype(float)
    degree = weights.sum(axis=1)
    assert (degree > 0).all()
    z = np.random.default_rng(0).standard_normal((len(degree), 3))
    scaled = z / np.sqrt(degree)[:, None]
    edges = 0.5 * (weights * ((scaled[:, None] - scaled[None]) ** 2).sum(axis=2)).sum()
    assert np.trace(z.T @ (np.eye(len(degree)) - graph) @ z) == pytest.approx(edges, rel=1e-12)


def test_a_regulariser_is_a_share_of_the_mean_degree() -> None:
    weights = COUNTS.toarray().astype(float)
    degree = weights.sum(axis=1)
    scale = 1 / np.sqrt(degree + 0.5 * degree.mean())
    np.testing.assert_allclose(item_graph(COUNTS, 0, regulariser=0.5).toarray(), scale[:, None] * weights * scale)
