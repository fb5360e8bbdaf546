"""What the geometry of an item table does to learning: curvature, lengths of rows, and whose neighbours are near.

    H = d^2 L / dh^2 = Cov_p(e) / tau^2 = (E^T diag(p) E - m m^T) / tau^2,   m = E^T p,   p = softmax(E h / tau)

is the Hessian of the softmax loss with respect to the sequence vector h, whatever the target. TF-LLMER (arXiv
2604.20490) lays high training losses to its conditioning, through lengths of rows that differ and neighbours that are
semantic instead of collaborative. The forms are derived here: the paper's own were not at hand.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from cladapt.data.schema import Stream
from cladapt.sequential import TableConfig
from cladapt.tokens.cooccurrence import Cooccurrence, item_graph
from cladapt.tokens.embed import embed, fit_embedding
from cladapt.tokens.neighbours import nearest, overlap, strongest_neighbours
from cladapt.tokens.table import TextMap

NEIGHBOURS = 10
ITEMS = 1024
"""Items whose neighbours are compared, evenly spaced over the catalogue; fewer where it has fewer."""


def hessians(query: Tensor, table: Tensor, temperature: float = 1.0) -> Tensor:
    """The Hessian of -log softmax(table @ h / tau)[i] with respect to h for each query = h / tau: float64 [b, d, d].

    `query` [b, d]; `table` [n, d], rows as they are scored.
    """
    rows, query = table.double(), query.double()
    p = torch.softmax(query @ rows.T, 1)
    mean = p @ rows
    second = torch.stack([(rows * weight[:, None]).T @ rows for weight in p])
    return (second - mean[:, :, None] * mean[:, None, :]) / temperature**2


def conditioning(hessian: Tensor) -> dict[str, float]:
    """Means over matrices [b, d, d]: the largest eigenvalue, the condition number and its decimal logarithm, the rank.

    A condition number is the largest eigenvalue over the smallest that is above d eps times it; those below are
    rounding, directions in which the loss is flat. The rank counts what is above, so a singular matrix shows there, and
    its condition number is that of the directions which are not flat. The mean of the logarithm is not ruled by one.
    """
    values = torch.linalg.eigvalsh(hessian.double())
    largest = values[:, -1]
    alive = values > (values.shape[1] * torch.finfo(torch.float64).eps * largest)[:, None]
    smallest = torch.where(alive, values, torch.inf).amin(1)
    condition = torch.where(largest > 0, largest / smallest, 1.0)
    return {
        "largest_eigenvalue": largest.mean().item(),
        "condition": condition.mean().item(),
        "condition_log10": condition.log10().mean().item(),
        "rank": alive.sum(1).double().mean().item(),
    }


def norm_dispersion(table: Tensor) -> float:
    """Standard deviation of the rows' lengths over their mean, [n, d]; 0 where all are zero."""
    norm = table.double().norm(dim=1)
    return (norm.std(correction=0) / norm.mean()).item() if bool(norm.any()) else 0.0


@dataclass(frozen=True, eq=False)
class Graphs:
    """Neighbours of some items, int64 [m, k] with -1 where there are fewer: by their texts, None without any text, and
    by the users that they share."""

    items: np.ndarray
    semantic: np.ndarray | None
    collaborative: np.ndarray

    @classmethod
    def of(cls, stream: Stream, block: int, texts: TextMap | None, table: TableConfig, seed: int) -> "Graphs":
        """The neighbours among the items known by `block`, users' by the training events up to it.

        `texts`: whose embedding is compared; None: one is fitted as `table` says.
        """
        known = stream.items.filter(pl.col("first_block") <= block)
        items = np.unique(np.linspace(0, known.height - 1, min(ITEMS, known.height)).round().astype(np.int64))
        graph = item_graph(Cooccurrence.of(stream, block, table.window).counts, 0, table.weighting)
        vectors = _text_vectors(known, texts, table, seed)
        semantic = None if vectors is None else _by_cosine(torch.from_numpy(vectors), items)
        return cls(items, semantic, strongest_neighbours(graph, NEIGHBOURS, items)[1])

    def overlaps(self, table: Tensor) -> dict[str, float | None]:
        """Share of the neighbours of either kind that are among an item's nearest rows by cosine, [n, d]; None where
        there are none of that kind."""
        near = _by_cosine(table, self.items)
        return {
            "semantic_overlap": None if self.semantic is None else overlap(near, self.semantic),
            "collaborative_overlap": overlap(near, self.collaborative),
        }


def _text_vectors(known: pl.DataFrame, texts: TextMap | None, table: TableConfig, seed: int) -> np.ndarray | None:
    """The embedding of the items' texts, float32 [n, D]."""
    if texts is not None:
        return texts.embedded(known).astype(np.float32)
    first = known.filter(pl.col("first_block") == 1)["text"].to_list()
    if not any(text.strip() for text in first):
        return None
    with warnings.catch_warnings():  # that it has fewer dimensions concerns no result
        warnings.simplefilter("ignore", UserWarning)
        embedding = fit_embedding(first, table.embedding, table.dimensions, seed)
    return embed(embedding, known["text"].to_list())


def _by_cosine(vectors: Tensor, items: np.ndarray) -> np.ndarray:
    """The NEIGHBOURS nearest other rows of `vectors` [n, d] to each of `items` [m], int64 [m, k], -1 for none."""
    return nearest(F.normalize(vectors.float(), dim=1).cpu().numpy(), NEIGHBOURS, items)[1]
