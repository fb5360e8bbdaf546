"""Whose neighbours are near, by the cosine of vectors or by a graph, and how many of them two ways share."""

import numpy as np
from scipy import sparse

from cladapt.tokens.cooccurrence import strongest

MOST_ASKED = 2000
"""Items whose neighbours are looked for; of a larger catalogue a sample."""


def nearest(x: np.ndarray, k: int, items: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Items and their k nearest others by cosine: int64 [m], int64 [m, k], -1 where there are not as many.

    Without `items` those with a vector in x [n, d], unit rows or zeros, at most `MOST_ASKED` of them. An item without a
    vector is nobody's neighbour.
    """
    from sklearn.neighbors import NearestNeighbors

    present = np.flatnonzero(x.any(axis=1))
    items = _sample(present) if items is None else items
    near = np.full((len(items), k), -1, dtype=np.int64)
    least = min(k + 1, len(present))
    asked = np.flatnonzero(np.isin(items, present))
    if least < 2 or not asked.size:
        return items, near
    index = NearestNeighbors(n_neighbors=least, algorithm="brute").fit(x[present])
    for row, place in zip(asked, index.kneighbors(x[items[asked]], return_distance=False), strict=True):
        others = present[place]
        others = others[others != items[row]][:k]
        near[row, : len(others)] = others
    return items, near


def strongest_neighbours(
    graph: sparse.csr_array, k: int, items: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Items and the at most k strongest of their neighbours in a graph [n, n], in the form of `nearest`.

    Without `items` those with neighbours, at most `MOST_ASKED` of them.
    """
    kept = strongest(graph, k)
    items = _sample(np.flatnonzero(np.diff(kept.indptr))) if items is None else items
    near = np.full((len(items), k), -1, dtype=np.int64)
    for row, item in enumerate(items):
        others = kept.indices[kept.indptr[item] : kept.indptr[item + 1]]
        near[row, : len(others)] = others
    return items, near


def overlap(near: np.ndarray, wanted: np.ndarray) -> float | None:
    """Share of the `wanted` neighbours [m, k] that are `near` [m, j] the same item; -1 is none, None without any."""
    there = wanted >= 0
    if not there.any():
        return None
    return float(((wanted[:, :, None] == near[:, None]).any(axis=2) & there).sum() / there.sum())


def _sample(items: np.ndarray) -> np.ndarray:
    if len(items) <= MOST_ASKED:
        return items
    return np.sort(np.random.default_rng(0).choice(items, MOST_ASKED, replace=False))
