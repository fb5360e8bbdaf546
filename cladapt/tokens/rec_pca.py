"""Rec-PCA: a linear reduction of item embeddings that keeps their variance and is smooth over an item graph.

    max_{P^T P = I} tr(P^T X~^T X~ P) - lambda tr(P^T X~^T L X~ P),   X~ = X - 1 mu^T,   L = I - S^

whose second term is the total variation of Z = X~ P over the graph. The solution is the k leading eigenvectors of the
D x D matrix M = (1 - lambda) C + lambda K, C = X~^T X~, K = X~^T S^ X~: PCA at lambda = 0. Re-derived from the abstract
of TF-LLMER (arXiv 2604.20490), of which no public code was found: its own graph, lambda and scaling may differ.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from cladapt.artifacts import read_tensors, write_tensors
from cladapt.errors import ConfigError, DataError

MOST_DENSE = 2048
"""Columns up to which the D x D matrices are made; above, their products alone are."""
_CHUNK = 4096
# variances below this share of the largest are rounding
_NOTHING = 1e-10
_PRECISION = 1e-10


@dataclass(frozen=True, eq=False)
class Projection:
    """A frozen map z = (x - mean) P: `mean` float64 [D], `matrix` P float64 [D, k]."""

    mean: np.ndarray
    matrix: np.ndarray

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Rows of x [n, D] reduced, float32 [n, k]; a row of zeros, an item without an embedding, stays zero."""
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise DataError(
                f"embeddings of the shape {list(x.shape)} are given to a projection of {len(self.mean)} columns",
                "use the embedding that the projection was fitted on",
            )
        reduced = np.empty((len(x), self.matrix.shape[1]), dtype=np.float32)
        for rows, centred in _Table(x, np.asarray(x.any(axis=1)), self.mean).chunks():
            reduced[rows] = centred @ self.matrix
        return reduced

    def save(self, path: Path) -> None:
        """Write mean and matrix as safetensors."""
        import torch

        write_tensors(path, {"mean": torch.from_numpy(self.mean), "matrix": torch.from_numpy(self.matrix)})

    @classmethod
    def load(cls, path: Path) -> "Projection":
        """Read what `save` wrote; `DataError` when the file holds something else."""
        tensors = {name: t.numpy() for name, t in read_tensors(path).items()}
        mean, matrix = tensors.get("mean"), tensors.get("matrix")
        if mean is None or matrix is None or matrix.ndim != 2 or mean.shape != matrix.shape[:1]:
            shapes = {name: list(values.shape) for name, values in tensors.items()}
            raise DataError(f"{path}: not a projection (tensors {shapes})", "expected mean [D] and matrix [D, k]")
        return cls(mean, matrix)


def fit(
    x: np.ndarray,
    graph: sparse.csr_array | None,
    dimensions: int,
    smoothness: float = 1.0,
    whitening: float = 0.0,
    balance: bool = False,
    standardise: bool = False,
    solver: Literal["auto", "dense", "lanczos"] = "auto",
    seed: int = 0,
) -> Projection:
    """The projection on the k leading eigenvectors of M.

    Args:
        x: embeddings [n, D], float32 or float64, read in chunks and never copied; rows of zeros are items without an
            embedding and count neither for the mean nor for M.
        graph: S^ of `cooccurrence.item_graph`, [n, n]; None leaves M = C, which is PCA.
        dimensions: k; fewer, with a warning, where the embeddings do not vary in as many directions. Where it is all
            of them the result is X~ turned, of which a warning tells too.
        smoothness: lambda. 0 is PCA; above 1 variance that is not smooth over the graph counts against a direction.
        whitening: exponent a; singular values s of X~ become s^(1 - a) before M is made. At 1, C = I and the result is
            the same for every smoothness above 0.
        balance: divide C and K by their traces, that of K being far smaller as a rule.
        standardise: scale the columns of Z to variance 1, which with M = C is PCA whitening.
        solver: `dense` makes C and K in float64 and decomposes M, n D^2 + n D k' operations; `lanczos` multiplies by M
            without making it, for embeddings of many columns, and knows neither whitening nor balance; where it finds
            directions without variance, as with fewer embeddings than columns, M is made after all. `auto` is lanczos
            above 2,048 columns where it can be.
        seed: where Lanczos starts.

    Raises:
        DataError: a shape or a value that does not fit, or a graph without an edge.
    """
    _check(x, graph)
    plain = whitening == 0.0 and not balance
    if solver == "auto":
        solver = "lanczos" if plain and x.shape[1] > MOST_DENSE and 2 * dimensions < x.shape[1] else "dense"
    if solver == "lanczos" and not plain:
        raise ConfigError("Lanczos knows neither whitening nor balance", "use solver='dense', or leave both out")
    from threadpoolctl import threadpool_limits

    table = _Table.of(np.ascontiguousarray(x))
    weight = 0.0 if graph is None else smoothness
    smoother = graph.astype(x.dtype) if graph is not None and weight else None
    kept = min(dimensions, x.shape[1])
    with threadpool_limits(1):  # several threads add up in varying order
        if solver == "dense":
            matrix = _leading(*table.moments(smoother), kept, weight, whitening, balance)
        else:
            matrix = _leading_by_products(table, smoother, kept, weight, seed)
            if not _vary(table.variances(matrix)).all():  # see `_leading`
                matrix = _leading(*table.moments(smoother), kept, weight, whitening, balance)
        matrix *= np.sign(matrix[np.abs(matrix).argmax(axis=0), np.arange(matrix.shape[1])])
        matrix = matrix[:, _vary(table.variances(matrix))]
    if not matrix.shape[1]:
        raise DataError(f"the {len(x)} embeddings do not differ", "give the items texts that tell them apart")
    if matrix.shape[1] < dimensions:
        warnings.warn(
            f"the reduced embedding has {matrix.shape[1]} dimensions instead of {dimensions}: {len(x)} embeddings of "
            f"{x.shape[1]} columns vary in no more",
            stacklevel=2,
        )
    if matrix.shape[1] == x.shape[1] and not whitening and not standardise:
        warnings.warn(
            f"all {x.shape[1]} columns of the embeddings are kept: they are turned, and no distance changes; keep "
            "fewer, or make the embedding wider",
            stacklevel=2,
        )
    if standardise:
        matrix = matrix / np.sqrt(table.variances(matrix))
    return Projection(table.mean, matrix)


def _vary(variances: np.ndarray) -> np.ndarray:
    """Which variances are more than rounding: bool [k]."""
    return variances > _NOTHING * variances.max(initial=0.0)


def _check(x: np.ndarray, graph: sparse.csr_array | None) -> None:
    if x.ndim != 2 or x.dtype not in (np.float32, np.float64) or not x.size:
        raise DataError(
            f"embeddings of the shape {list(x.shape)} and dtype {x.dtype}",
            "expected float32 or float64 [items, columns]",
        )
    if graph is not None and graph.shape != (len(x), len(x)):
        raise DataError(
            f"the item graph has the shape {list(graph.shape)}, there are {len(x)} embeddings",
            "make the graph of the items that the embeddings are of",
        )
    if graph is not None and not graph.nnz:
        raise DataError(
            "the item graph has no edge: no user has two of the items among the training events",
            "reduce without a graph (pca, whiten), or take a wider window",
        )


@dataclass(frozen=True, eq=False)
class _Table:
    """Embeddings x [n, D] seen as X~: rows that are present less their mean, all others zero."""

    x: np.ndarray
    present: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> "_Table":
        present = np.asarray(x.any(axis=1))
        mean = x.sum(axis=0, dtype=np.float64) / max(1, present.sum())
        if not np.isfinite(mean).all():
            raise DataError("the embeddings have values that are not finite", "check the model that made them")
        if not present.any():
            raise DataError(f"all {len(x)} embeddings are zero", "give the items texts that the embedding knows")
        return cls(x, present, mean)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows and their part of X~, float64."""
        for start in range(0, len(self.x), _CHUNK):
            rows = slice(start, start + _CHUNK)
            yield rows, self.x[rows] - np.outer(self.present[rows], self.mean)

    def moments(self, graph: sparse.csr_array | None) -> tuple[np.ndarray, np.ndarray | None]:
        """C / n and K / n, float64 [D, D], n the number of rows that are present."""
        size = self.x.shape[1]
        variance, smooth = np.zeros((size, size)), np.zeros((size, size))
        for rows, centred in self.chunks():
            variance += centred.T @ centred
            if graph is not None:
                near = graph[rows]
                smooth += centred.T @ (near @ self.x - np.outer(near @ self.present.astype(self.x.dtype), self.mean))
        count = self.present.sum()
        return variance / count, None if graph is None else (smooth + smooth.T) / (2 * count)

    def times(self, matrix: np.ndarray) -> np.ndarray:
        """X~ times a matrix [D, b]: float64 [n, b]."""
        return np.concatenate([centred @ matrix for _, centred in self.chunks()])

    def transposed_times(self, matrix: np.ndarray) -> np.ndarray:
        """X~^T times a matrix [n, b]: float64 [D, b]."""
        return sum(centred.T @ matrix[rows] for rows, centred in self.chunks())

    def variances(self, matrix: np.ndarray) -> np.ndarray:
        """Variance of each column of X~ P: float64 [k]."""
        return sum(((centred @ matrix) ** 2).sum(axis=0) for _, centred in self.chunks()) / self.present.sum()


def _leading(
    variance: np.ndarray, smooth: np.ndarray | None, k: int, smoothness: float, whitening: float, balance: bool
) -> np.ndarray:
    """P [D, k] from the D x D matrices, the columns in the order of their eigenvalues."""
    turn = None
    if whitening or smooth is not None:
        values, vectors = linalg.eigh(variance)
        alive = values > _NOTHING * values[-1]
    if whitening or (smooth is not None and not alive.all()):
        # directions without variance have the eigenvalue 0, and would come before those that lambda makes negative
        turn = vectors[:, alive] * values[alive] ** (-whitening / 2)
        variance = turn.T @ variance @ turn
        smooth = None if smooth is None else turn.T @ smooth @ turn
    if smooth is None:
        mixed = variance
    else:
        traces = (np.trace(variance), np.trace(smooth)) if balance else (1.0, 1.0)
        if traces[1] <= 0:
            raise DataError(
                f"C and K cannot be balanced: the trace of K is {traces[1]:.3g}, items that are used together have "
                "opposite embeddings",
                "leave the balance out",
            )
        mixed = (1 - smoothness) / traces[0] * variance + smoothness / traces[1] * smooth
    size = len(mixed)
    vectors = linalg.eigh(mixed, subset_by_index=[max(0, size - k), size - 1])[1][:, ::-1]
    return vectors if turn is None else turn @ vectors


def _leading_by_products(
    table: _Table, graph: sparse.csr_array | None, k: int, smoothness: float, seed: int
) -> np.ndarray:
    """P [D, k] from products with M alone: two passes over the embeddings for each."""
    size = table.x.shape[1]

    def product(vector: np.ndarray) -> np.ndarray:
        image = table.times(vector.reshape(size, -1))
        if graph is not None:
            image = (1 - smoothness) * image + smoothness * (graph @ image)
        return table.transposed_times(image)

    operator = LinearOperator((size, size), matvec=product, matmat=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    try:
        values, vectors = eigsh(operator, k=k, which="LA", v0=start, tol=_PRECISION)
    except ArpackNoConvergence as error:
        raise DataError(
            f"{len(error.eigenvalues)} of {k} eigenvectors of M were found in {size} columns", "take fewer dimensions"
        ) from error
    return vectors[:, np.argsort(-values, kind="stable")]
