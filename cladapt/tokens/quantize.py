"""Residual k-means: each level quantises what the levels before it left over."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cladapt.artifacts import read_tensors, write_tensors
from cladapt.errors import DataError

_CHUNK = 1 << 16
# finer differences, relative to the largest entry, are rounding: points that close count as one
_GRAIN = 1e-6


@dataclass(frozen=True, eq=False)
class ResidualKMeans:
    """One codebook per level, float32 [codes, d]; the codes of x are those of its nearest centres, level by level.

    A row of infinities is a code without a centre, which is nearest to nothing.
    """

    codebooks: tuple[np.ndarray, ...]

    @classmethod
    def fit(
        cls,
        x: np.ndarray,
        levels: int,
        codes: int | Sequence[int],
        seed: int,
        groups: np.ndarray | None = None,
    ) -> "ResidualKMeans":
        """Fit `levels` codebooks of at most `codes` centres (one number, or one per level) to x [n, d].

        `groups` int [n, levels]: each level starts from the means of its groups of rows, those of earlier codes, and
        not from rows that the seed draws. Every code is the code of some row of x: a level with fewer distinct
        residuals than `codes` gets fewer, which a warning counts.
        """
        if not len(x):
            raise DataError("no item is known at block 1 to fit semantic IDs on", "check the stream's blocks")
        residual = x.astype(np.float64)
        grain = (float(np.abs(residual).max()) or 1.0) * _GRAIN
        codebooks = []
        most = [codes] * levels if isinstance(codes, int) else codes
        for level in range(levels):
            own = None if groups is None else groups[:, level]
            centres = _centres(residual, most[level], seed + level, grain, own)
            if len(centres) < most[level]:
                warnings.warn(
                    f"level {level + 1} has {len(centres)} codes instead of {most[level]}: the {len(x)} items differ "
                    "in no more ways there",
                    stacklevel=2,
                )
            codebooks.append(centres)
            residual -= centres[_nearest(residual, centres)]
        return cls(tuple(codebooks))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Codes of x [n, d]: int32 [n, levels]; ties go to the lowest code, and no row depends on another."""
        residual = x.astype(np.float64)
        codes = np.empty((len(x), len(self.codebooks)), dtype=np.int32)
        for level, centres in enumerate(self.codebooks):
            codes[:, level] = _nearest(residual, centres)
            residual -= centres[codes[:, level]]
        return codes

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """Sum of the centres that `codes` [n, levels] name: float32 [n, d]."""
        return sum(centres[codes[:, level]].astype(np.float64) for level, centres in enumerate(self.codebooks)).astype(
            np.float32
        )

    def error(self, x: np.ndarray, codes: np.ndarray) -> float | None:
        """Mean squared residual / mean squared norm of the rows of x [n, d] that are not zero; None without any."""
        rows = x.any(axis=1)
        if not rows.any():
            return None
        residual = x[rows].astype(np.float64) - self.reconstruct(codes[rows])
        return float((residual**2).sum() / (x[rows].astype(np.float64) ** 2).sum())

    def renamed(self, names: Sequence[np.ndarray], sizes: Sequence[int]) -> "ResidualKMeans":
        """The same centres under other codes: centre j of level l gets the code names[l][j] of sizes[l]."""
        codebooks = []
        for centres, codes, size in zip(self.codebooks, names, sizes, strict=True):
            codebook = np.full((size, centres.shape[1]), np.inf, dtype=np.float32)
            codebook[codes] = centres
            codebooks.append(codebook)
        return ResidualKMeans(tuple(codebooks))

    def save(self, path: Path) -> None:
        """Write the codebooks as safetensors."""
        import torch

        write_tensors(path, {f"codebook_{i:02d}": torch.from_numpy(c) for i, c in enumerate(self.codebooks)})

    @classmethod
    def load(cls, path: Path) -> "ResidualKMeans":
        """Read codebooks; `DataError` when the file holds something else."""
        tensors = read_tensors(path)
        codebooks = tuple(tensors[name].numpy() for name in sorted(tensors) if name.startswith("codebook_"))
        shapes = [c.shape for c in codebooks]
        if len(codebooks) != len(tensors) or not codebooks or any(len(s) != 2 or s[1] != shapes[0][1] for s in shapes):
            raise DataError(
                f"{path}: not the codebooks of a residual k-means (tensors {', '.join(sorted(tensors)) or 'none'})",
                "expected codebook_00, codebook_01, … of shape [codes, d]",
            )
        return cls(codebooks)


def _centres(x: np.ndarray, codes: int, seed: int, grain: float, groups: np.ndarray | None) -> np.ndarray:
    """At most `codes` centres, float32, each the nearest one of some row of x."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    rounded = np.round(x / grain) * grain
    distinct = len(np.unique(rounded, axis=0))
    count = min(codes, distinct)
    kmeans = KMeans(count, n_init=3, random_state=seed)
    if groups is not None:
        kmeans = KMeans(count, init=_starts(rounded, groups, count), n_init=1)
    # several threads add up a centre in varying order
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer clusters are counted by the caller
        centres = kmeans.fit(rounded).cluster_centers_.astype(np.float32)
    return centres[np.unique(_nearest(x, centres))]


def _starts(x: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """`count` rows to start from: the means of the largest groups of x [n, d], then what lies farthest from all."""
    from scipy.spatial.distance import cdist

    names, sizes = np.unique(groups, return_counts=True)
    largest = names[np.argsort(-sizes, kind="stable")][:count]
    starts = [x[groups == name].mean(axis=0) for name in largest]
    distance = cdist(x, np.stack(starts), "sqeuclidean").min(axis=1)
    while len(starts) < count:
        starts.append(x[distance.argmax()])
        distance = np.minimum(distance, cdist(x, starts[-1][None], "sqeuclidean")[:, 0])
    return np.stack(starts)


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Lowest index of the nearest centre of each row, int64 [n].

    Differences row by row, not the expanded square: a BLAS product rounds a row by the rows around it.
    """
    from scipy.spatial.distance import cdist

    parts = [cdist(x[i : i + _CHUNK], centres, "sqeuclidean").argmin(axis=1) for i in range(0, len(x), _CHUNK)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
