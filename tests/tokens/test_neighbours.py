"""Neighbours against brute force, and how many of them two ways share."""

import numpy as np
import pytest
from scipy import sparse

from cladapt.tokens import neighbours
from cladapt.tokens.neighbours import nearest, overlap, strongest_neighbours


def test_nearest_are_those_of_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[[3, 8]] = 0.0
    items, near = nearest(x, 5)
    assert items.tolist() == [i for i in range(30) if i not in (3, 8)]
    similarity = x @ x.T
    similarity[:, [3, 8]] = -np.inf
    np.fill_diagonal(similarity, -np.inf)
    np.testing.assert_array_equal(near, np.argsort(-similarity[items], axis=1)[:, :5])
    asked, none = nearest(x, 5, np.array([3, 4]))
    assert (asked.tolist(), none[0].tolist()) == ([3, 4], [-1] * 5)
    np.testing.assert_array_equal(none[1], near[3])
    assert nearest(x[:2], 5)[1].tolist() == [[1, -1, -1, -1, -1], [0, -1, -1, -1, -1]]
    assert nearest(x[3:4], 2)[0].tolist() == []
    monkeypatch.setattr(neighbours, "MOST_ASKED", 7)
    few, theirs = nearest(x, 5)
    assert len(few) == 7
    np.testing.assert_array_equal(theirs, near[np.searchsorted(items, few)])


def test_neighbours_of_a_graph_are_the_strongest() -> None:
    weights = np.zeros((5, 5))
    weights[0, 1:4] = weights[1:4, 0] = 3, 1, 2
    items, near = strongest_neighbours(sparse.csr_array(weights), 2)
    assert items.tolist() == [0, 1, 2, 3]
    assert near.tolist() == [[1, 3], [0, -1], [0, -1], [0, -1]]
    asked, theirs = strongest_neighbours(sparse.csr_array(weights), 2, np.array([2, 4]))
    assert (asked.tolist(), theirs.tolist()) == ([2, 4], [[0, -1], [-1, -1]])


def test_neighbours_that_are_shared_are_counted_among_those_wanted() -> None:
    wanted, near = np.array([[1, 3], [0, -1], [-1, -1]]), np.array([[3, 2, -1], [0, 3, -1], [0, 1, -1]])
    assert overlap(near, wanted) == 2 / 3
    assert overlap(near, np.full((3, 2), -1)) is None
