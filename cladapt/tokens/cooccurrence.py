"""Which items the same users have: pair counts, their update by a block, and the normalised item graph.

S_ij is the number of users whose training events hold both i and j, i != j; what a block holds out is never counted.
The graph is D^-1/2 S D^-1/2 with D = diag(S 1). Re-derived: TF-LLMER (arXiv 2604.20490) names a co-occurrence graph
built from histories, and no public code of it was found.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from scipy import sparse

from cladapt.data.histories import training_sequences
from cladapt.data.schema import Stream

Weighting = Literal["count", "log1p"]


@dataclass(frozen=True, eq=False)
class Cooccurrence:
    """Pair counts over the training events of the blocks 1 to `block`.

    `counts` int32 CSR [items, items], symmetric with an empty diagonal, of the items known by `block`: users who have
    both items at most `window` - 1 events apart, anywhere where `window` is 0. A user counts once for a pair.
    """

    counts: sparse.csr_array
    window: int
    block: int

    @classmethod
    def of(cls, stream: Stream, block: int, window: int = 0) -> "Cooccurrence":
        """Count the pairs of blocks 1 to `block`."""
        log = training_sequences(stream, block)
        return cls(count_pairs(log.user, log.item, len(stream.known(block)), window), window, block)

    def with_next_block(self, stream: Stream) -> "Cooccurrence":
        """The counts with those of the next block added: what `of` gives, at the cost of the users active there.

        A user's pairs are counted once, so what is added is the pairs of the user's longer history less those of the
        shorter one.
        """
        block = self.block + 1
        log = training_sequences(stream, block)
        active = np.isin(log.user, log.user[log.block == block])
        earlier = active & (log.block < block)
        size = len(stream.known(block))
        now, before = (count_pairs(log.user[rows], log.item[rows], size, self.window) for rows in (active, earlier))
        counts = self.counts.copy()
        counts.resize((size, size))
        grown = sparse.csr_array(counts + (now - before))
        grown.eliminate_zeros()
        return Cooccurrence(grown, self.window, block)


def count_pairs(user: np.ndarray, item: np.ndarray, n_items: int, window: int) -> sparse.csr_array:
    """Users who have each pair of items, as `Cooccurrence.counts`.

    `user`, `item` int [events], sorted by user, then time.
    """
    if window:
        return _pairs_within(user, item, n_items, window)
    users, row = np.unique(user, return_inverse=True)
    has = sparse.csr_array((np.ones(len(item), dtype=np.int32), (row, item)), shape=(len(users), n_items))
    has.sum_duplicates()
    has.data[:] = 1
    pairs = has.T @ has
    pairs = sparse.csr_array(pairs - sparse.diags_array(pairs.diagonal(), dtype=np.int32))
    pairs.eliminate_zeros()
    pairs.sort_indices()
    return pairs


def _pairs_within(user: np.ndarray, item: np.ndarray, n_items: int, window: int) -> sparse.csr_array:
    pairs = pl.DataFrame(schema={"user": pl.Int32(), "low": pl.Int32(), "high": pl.Int32()})
    for apart in range(1, min(window, len(item))):
        same = user[apart:] == user[:-apart]
        if not same.any():
            break
        first, second = item[:-apart][same], item[apart:][same]
        found = {"user": user[apart:][same], "low": np.minimum(first, second), "high": np.maximum(first, second)}
        pairs = pl.concat([pairs, pl.DataFrame(found, schema=pairs.schema)]).unique()
    counted = pairs.filter(pl.col("low") != pl.col("high")).group_by("low", "high").len()
    places = (counted["low"].to_numpy(), counted["high"].to_numpy())
    upper = sparse.csr_array((counted["len"].to_numpy().astype(np.int32), places), shape=(n_items, n_items))
    both = sparse.csr_array(upper + upper.T)
    both.sort_indices()
    return both


def item_graph(
    counts: sparse.csr_array, neighbours: int, weighting: Weighting = "count", regulariser: float = 0.0
) -> sparse.csr_array:
    """The symmetrically normalised item graph S^ = D^-1/2 S D^-1/2, float64 CSR [items, items].

    S has the `neighbours` largest weights of each row of `counts` (0 keeps all; of equal ones the first columns), by
    `weighting` the counts or log(1 + count), and the larger of S_ij and S_ji. D = diag(S 1) + `regulariser` times the
    mean degree, which keeps small components of the graph from filling its leading eigenvectors (Qin and Rohe, NIPS
    2013). An item without neighbours has a row of zeros.
    """
    weights = counts.astype(np.float64)
    if weighting == "log1p":
        weights = weights.log1p()
    if neighbours:
        weights = strongest(weights, neighbours)
    weights = sparse.csr_array(weights.maximum(weights.T))
    weights.sort_indices()
    degree = weights.sum(axis=1)
    degree += regulariser * degree.mean()
    scale = 1 / np.sqrt(np.where(degree > 0, degree, 1.0))
    weights.data *= scale[_rows(weights)] * scale[weights.indices]
    return weights


def strongest(weights: sparse.csr_array, k: int) -> sparse.csr_array:
    """The k largest entries of each row of a CSR matrix, of equal ones those of the first columns."""
    row = _rows(weights)
    order = np.lexsort((weights.indices, -weights.data, row))
    kept = np.sort(order[np.arange(len(order)) - weights.indptr[row] < k])
    return sparse.csr_array((weights.data[kept], (row[kept], weights.indices[kept])), shape=weights.shape)


def _rows(matrix: sparse.csr_array) -> np.ndarray:
    return np.repeat(np.arange(matrix.shape[0], dtype=matrix.indices.dtype), np.diff(matrix.indptr))
