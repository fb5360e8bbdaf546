"""Vectors of items for the table of a sequential model: from their texts by a map fitted on block 1, or drawn.

Unlike the vectors behind semantic IDs these keep their lengths. One number scales them so that the root mean square of
block 1's lengths is `length`, as that of drawn rows is: tables of every kind start at scores of one size.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import polars as pl

from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.sequential import TableConfig
from cladapt.tokens import rec_pca
from cladapt.tokens.cooccurrence import Cooccurrence, item_graph
from cladapt.tokens.embed import NO_TEXT, Embedding, fit_embedding, load_embedding
from cladapt.tokens.rec_pca import Projection

PROJECTION = "projection.safetensors"


@dataclass(frozen=True, eq=False)
class TextMap:
    """A frozen map from texts to rows of a table: an embedding, its reduction if any, and the scale."""

    embedding: Embedding
    projection: Projection | None
    scale: float

    @classmethod
    def fit(cls, stream: Stream, config: TableConfig, width: int, seed: int) -> "TextMap":
        """Fit on the items known at block 1, and for Rec-PCA on the training events there; rows of `width`."""
        items = stream.items.filter(pl.col("first_block") == 1)
        if not any(text.strip() for text in items["text"]):
            raise DataError(
                f"table.source=llm: all {items.height} items known at block 1 have an empty text",
                f"use table.source=random; or {NO_TEXT}",
            )
        embedding = fit_embedding(items["text"].to_list(), config.embedding, config.dimensions, seed)
        x = embedding.vectors(items["text"].to_list())
        projection = None if config.reduction == "none" else _reduction(stream, x, config, width, seed)
        found = cls(embedding, projection, 1.0).rows(items)
        if not config.frozen and found.shape[1] != width:
            raise ConfigError(
                f"table.reduction={config.reduction}: the rows have {found.shape[1]} columns, hidden={width}",
                f"use hidden={found.shape[1]}, a reduction to a width that the embedding has (table.dimensions), or "
                "table.use=frozen with table.reduction=none",
            )
        present = found.any(axis=1)
        squared = (found[present].astype(np.float64) ** 2).sum(axis=1).mean()
        return cls(embedding, projection, float(config.length * squared**-0.5))

    def embedded(self, items: pl.DataFrame) -> np.ndarray:
        """The embedding of the items' texts, float64 [n, D]; a row of zeros where it knows nothing of a text.

        Block by block: what a model computes for a text may depend on the texts that are given with it.
        """
        groups = groupby(items.select("first_block", "text").iter_rows(), key=lambda row: row[0])
        return np.concatenate([self.embedding.vectors([text for _, text in rows]) for _, rows in groups])

    def rows(self, items: pl.DataFrame) -> np.ndarray:
        """Rows of the table for items of a stream, float32 [n, k]; zeros as of `embedded`."""
        x = self.embedded(items)
        reduced = x if self.projection is None else self.projection.apply(x)
        return (self.scale * reduced).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write embedding and reduction; the scale is the caller's to keep."""
        self.embedding.save(folder)
        if self.projection is not None:
            self.projection.save(folder / PROJECTION)

    @property
    def files(self) -> Sequence[str]:
        """Names of the files that `save` writes."""
        return (*self.embedding.files, *([] if self.projection is None else [PROJECTION]))

    @classmethod
    def load(cls, folder: Path, config: TableConfig, scale: float) -> "TextMap":
        """Read what `save` wrote for the same settings."""
        projection = None if config.reduction == "none" else Projection.load(folder / PROJECTION)
        return cls(load_embedding(folder, config.embedding), projection, scale)


def _reduction(stream: Stream, x: np.ndarray, config: TableConfig, width: int, seed: int) -> Projection:
    if config.reduction != "rec-pca":
        return rec_pca.fit(x, None, width, standardise=config.reduction != "pca", seed=seed)
    graph = item_graph(Cooccurrence.of(stream, 1, config.window).counts, config.neighbours, config.weighting)
    return rec_pca.fit(x, graph, width, config.smoothness, config.whitening, config.balance, seed=seed)


def start_rows(items: pl.DataFrame, texts: TextMap | None, width: int, seed: int, length: float = 1.0) -> np.ndarray:
    """What the rows of items are before anything is learned, float32 [n, k]: by their texts, or drawn where `texts` is
    None.

    A row is that of its item whatever others there are. Items whose text says nothing get drawn rows, and a warning
    counts them.
    """
    if texts is None:
        return length * drawn_rows(items["item"].to_list(), width, seed)
    rows = texts.rows(items)
    empty = ~rows.any(axis=1)
    if empty.any():
        warnings.warn(
            f"{int(empty.sum())} of {len(rows)} items have no text, or none that the embedding knows a word of: their "
            "rows are drawn",
            stacklevel=2,
        )
        rows[empty] = length * drawn_rows(items["item"].filter(pl.Series(empty)).to_list(), rows.shape[1], seed)
    return rows


def drawn_rows(items: Sequence[str], width: int, seed: int) -> np.ndarray:
    """Normal rows of mean squared length 1 from the seed and each item's id alone, float32 [n, width]."""
    rows = np.empty((len(items), width), dtype=np.float32)
    for row, item in zip(rows, items, strict=True):
        of_item = int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], "big")
        row[:] = np.random.default_rng([seed, of_item]).standard_normal(width) / width**0.5
    return rows
