"""Item vectors from co-occurrence alone: the item graph's rows on its leading eigenvectors.

    S^ U = U diag(values),   z_i = sum_j S^_ij u_j

over the items j of block 1, of refreshed IDs those of the blocks that they are fitted on. Each of these has the row
U diag(values), its spectral embedding, and an item of a later block is mapped by its edges to those items in the graph
of the blocks up to its own (the Nystroem extension, each eigenvector weighted by its value). An item with no such edge
gets the mean of the vectors of its neighbours that have one, weighted by the edges; one without any gets zeros.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
from scipy import linalg, sparse

from cladapt.artifacts import read_parquet, read_tensors, write_parquet, write_tensors
from cladapt.config import TokensConfig
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.tokens.cooccurrence import Cooccurrence, item_graph
from cladapt.tokens.embed import unit
from cladapt.tokens.language import EMBEDDING

ITEMS_OF_GRAPH = "embedding_items.parquet"
_SCHEMA = {"item": pl.String()}
_MOST_DENSE = 512
# a row this much shorter than the longest is rounding: its part of the graph is not in the leading eigenvectors
_NOTHING = 1e-9


@dataclass(frozen=True, eq=False)
class GraphVectors:
    """Leading eigenvectors of the item graph of the first blocks.

    `items` of these blocks; `eigenvectors` U float64 [items, k]; `values` float64 [k], descending and above zero.
    """

    config: TokensConfig
    items: tuple[str, ...]
    eigenvectors: np.ndarray
    values: np.ndarray
    files: ClassVar[tuple[str, ...]] = (ITEMS_OF_GRAPH, EMBEDDING)
    lacking: ClassVar[str] = "neighbours"
    lack: ClassVar[str] = "no neighbour with a vector in the graph of what users have together"

    @classmethod
    def fit(cls, stream: Stream, config: TokensConfig, through: int = 1) -> "GraphVectors":
        """The spectral embedding of the items known at block `through`, from the training events up to it."""
        graph = _graph(Cooccurrence.of(stream, through, config.window), config)
        if not graph.nnz:
            raise DataError(
                f"IDs cannot be built from co-occurrence: no user has two of the {graph.shape[0]} items known at block "
                f"{through} among the training events there",
                "make block 1 longer (`data import --fractions`), or build IDs from texts or from an index",
            )
        values, vectors = _leading(graph, config.dimensions, config.seed)
        if len(values) < config.dimensions:
            warnings.warn(
                f"the embedding has {len(values)} dimensions instead of {config.dimensions}: the graph of the "
                f"{graph.shape[0]} items known at block {through} has no more eigenvalues above 0",
                stacklevel=3,
            )
        return cls(config, tuple(stream.items["item"][: graph.shape[0]]), vectors, values)

    def vectors(self, stream: Stream, items: pl.DataFrame) -> np.ndarray:
        """Unit vectors of items of a stream, float32 [n, k]; zeros for an item without a neighbour that has one."""
        row_of = {item: row for row, item in enumerate(stream.items["item"])}
        frozen = [row_of[item] for item in self.items]
        old, reduced = np.zeros((2, stream.n_items, len(self.values)))
        old[frozen], reduced[frozen] = self.eigenvectors, self.eigenvectors * self.values
        normal = partial(unit, least=_NOTHING * np.linalg.norm(reduced, axis=1).max())
        counts = Cooccurrence.of(stream, 1, self.config.window)
        for block in range(2, max(items["first_block"].to_list(), default=1) + 1):
            counts = counts.with_next_block(stream)
            new = np.setdiff1d(np.flatnonzero(stream.items["first_block"].to_numpy() == block), frozen)
            graph = _graph(counts, self.config)
            reduced[new] = graph[new] @ old[: graph.shape[0]]
            if (apart := new[~normal(reduced[new]).any(axis=1)]).size:
                reduced[apart] = graph[apart] @ normal(reduced[: graph.shape[0]])
        return normal(reduced[[row_of[item] for item in items["item"]]])

    def save(self, folder: Path) -> None:
        import torch

        write_parquet(folder / ITEMS_OF_GRAPH, pl.DataFrame({"item": self.items}, schema=_SCHEMA))
        kept = {"eigenvectors": self.eigenvectors, "values": self.values}
        write_tensors(folder / EMBEDDING, {name: torch.from_numpy(array) for name, array in kept.items()})

    @classmethod
    def load(cls, folder: Path, config: TokensConfig) -> "GraphVectors":
        items = tuple(read_parquet(folder / ITEMS_OF_GRAPH, _SCHEMA)["item"])
        tensors = {name: t.numpy() for name, t in read_tensors(folder / EMBEDDING).items()}
        vectors, values = tensors.get("eigenvectors"), tensors.get("values")
        if vectors is None or values is None or vectors.shape != (len(items), *values.shape):
            shapes = {name: list(array.shape) for name, array in tensors.items()}
            raise DataError(
                f"{folder / EMBEDDING}: tensors {shapes} do not fit the {len(items)} items of {ITEMS_OF_GRAPH}",
                "restore this file: it belongs to the IDs of the stream",
            )
        return cls(config, items, vectors, values)


def _graph(counts: Cooccurrence, config: TokensConfig) -> sparse.csr_array:
    return item_graph(counts.counts, config.neighbours, config.weighting, regulariser=1.0)


def _leading(graph: sparse.csr_array, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `k` eigenvalues above zero, descending, and their eigenvectors [items, k]."""
    from scipy.sparse.linalg import eigsh
    from threadpoolctl import threadpool_limits

    size = graph.shape[0]
    with threadpool_limits(1):  # several threads add up in varying order
        if size <= _MOST_DENSE or 2 * k >= size:
            values, vectors = linalg.eigh(graph.toarray(), subset_by_index=[max(0, size - k), size - 1])
        else:
            start = np.random.default_rng(seed).standard_normal(size)
            values, vectors = eigsh(graph, k=k, which="LA", v0=start)
    order = [place for place in np.argsort(-values, kind="stable") if values[place] > _NOTHING]
    vectors = vectors[:, order]
    vectors *= np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(order))])
    return values[order], np.ascontiguousarray(vectors)
