"""Where the vectors behind semantic IDs come from: texts, reduced or not, or what users have together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import polars as pl

from cladapt.config import TokensConfig
from cladapt.data.schema import Stream
from cladapt.embedding import COOCCURRENCE
from cladapt.errors import DataError
from cladapt.tokens import rec_pca
from cladapt.tokens.cooccurrence import Cooccurrence, item_graph
from cladapt.tokens.embed import NO_TEXT, Embedding, embed, fit_embedding, load_embedding, unit
from cladapt.tokens.rec_pca import Projection
from cladapt.tokens.spectral import GraphVectors

PROJECTION = "projection.safetensors"


class Vectors(Protocol):
    """A frozen map from items of a stream to vectors, kept in a folder; it was fitted on the first blocks."""

    @property
    def lacking(self) -> str:
        """What an item with a zero vector is without, in one word."""
        ...

    @property
    def lack(self) -> str:
        """The same as a sentence says it after "have"."""
        ...

    def vectors(self, stream: Stream, items: pl.DataFrame) -> np.ndarray:
        """Unit vectors of items of a stream, float32 [n, d]; zeros where nothing is known of an item."""
        ...

    def save(self, folder: Path) -> None:
        """Write what the map needs."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """Names of the files that `save` writes."""
        ...


def fit_vectors(stream: Stream, config: TokensConfig, through: int = 1) -> Vectors:
    """The map fitted on the items known at block `through`; where it takes a graph, that of the events up to it."""
    kind = GraphVectors if config.embedding == COOCCURRENCE else TextVectors
    return kind.fit(stream, config, through)


def load_vectors(folder: Path, config: TokensConfig) -> Vectors:
    """The map that was saved in `folder` for the same settings."""
    kind = GraphVectors if config.embedding == COOCCURRENCE else TextVectors
    return kind.load(folder, config)


@dataclass(frozen=True, eq=False)
class TextVectors:
    """An embedding of texts, and the projection that reduces it, if any."""

    embedding: Embedding
    projection: Projection | None = None
    lacking: ClassVar[str] = "text"
    lack: ClassVar[str] = "no text, or none that shares a word with block 1"

    @classmethod
    def fit(cls, stream: Stream, config: TokensConfig, through: int = 1) -> "TextVectors":
        items = stream.items.filter(pl.col("first_block") <= through)
        texts = items["text"].to_list()
        if not any(text.strip() for text in texts):
            raise DataError(
                f"IDs cannot be built from text: all {len(texts)} items known at block {through} have an empty text",
                NO_TEXT,
            )
        embedding = fit_embedding(texts, config.embedding, config.dimensions, config.seed)
        if config.reduce == "none":
            return cls(embedding)
        x = _by_block(items, lambda texts: embed(embedding, texts))
        return cls(embedding, fit_projection(stream, x, config, through))

    @property
    def files(self) -> Sequence[str]:
        return (*self.embedding.files, *([] if self.projection is None else [PROJECTION]))

    def vectors(self, stream: Stream, items: pl.DataFrame) -> np.ndarray:
        return _by_block(items, self._reduced)

    def unreduced(self, items: pl.DataFrame) -> np.ndarray:
        """Unit vectors of the texts themselves, float32 [n, D]."""
        return _by_block(items, lambda texts: embed(self.embedding, texts))

    def _reduced(self, texts: Sequence[str]) -> np.ndarray:
        x = embed(self.embedding, texts)
        return x if self.projection is None else unit(self.projection.apply(x))

    def save(self, folder: Path) -> None:
        self.embedding.save(folder)
        if self.projection is not None:
            self.projection.save(folder / PROJECTION)

    @classmethod
    def load(cls, folder: Path, config: TokensConfig) -> "TextVectors":
        projection = None if config.reduce == "none" else Projection.load(folder / PROJECTION)
        return cls(load_embedding(folder, config.embedding), projection)


def fit_projection(stream: Stream, x: np.ndarray, config: TokensConfig, through: int = 1) -> Projection:
    """The reduction that the settings ask for, of the embeddings x [n, D] of the items known at `through`, in order."""
    if config.reduce != "rec-pca":
        return rec_pca.fit(x, None, config.components, standardise=config.reduce == "whiten", seed=config.seed)
    counts = Cooccurrence.of(stream, through, config.window).counts
    graph = item_graph(counts, config.neighbours, config.weighting)
    return rec_pca.fit(
        x, graph, config.components, config.smoothness, config.whitening, config.balance, seed=config.seed
    )


def _by_block(items: pl.DataFrame, vectors_of: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """Block by block: what a model computes for a text may depend on the texts that are given with it."""
    groups = groupby(items.select("first_block", "text").iter_rows(), key=lambda row: row[0])
    return np.concatenate([vectors_of([text for _, text in rows]) for _, rows in groups])
