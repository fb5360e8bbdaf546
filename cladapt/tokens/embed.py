"""Item texts to vectors: TF-IDF reduced by a truncated SVD, or a pretrained model.

Fitted on the items known at block 1 alone and then frozen: an item's vector never depends on later arrivals, and what
was saved gives the bits that were given when the IDs were built.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import polars as pl

from cladapt.artifacts import read_parquet, read_tensors, write_parquet, write_tensors
from cladapt.errors import DataError
from cladapt.tokens.language import EMBEDDING, TextModel

TERMS = "terms.parquet"
# shorter vectors are rounding noise of the projection of a unit vector, and normalising would blow them up
_NOTHING = 1e-6
_RESTORE = "restore this file: it belongs to the IDs of the stream"
NO_TEXT = (
    "import with texts (`cladapt data import … --text COL` or `--items TABLE`), or build IDs from what users have "
    "together, `cladapt tokens build --embedding cooccurrence`, or take those of an index, `--index FILE`, FILE being "
    '{"item": ["<a_1>", "<b_7>"], …}'
)


class Embedding(Protocol):
    """A frozen map from texts to vectors, kept in a folder."""

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of any length, float64 [n, d]; a text without a known word gives zeros."""
        ...

    def save(self, folder: Path) -> None:
        """Write what the map needs."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """Names of the files that `save` writes."""
        ...


def fit_embedding(texts: Sequence[str], method: str, dimensions: int, seed: int) -> Embedding:
    """The map for the items known at block 1, whose texts these are.

    `method` is `tfidf` (1-2 grams, sublinear, `dimensions` of a truncated SVD), the path or name of a
    sentence-transformers model, or the path of a causal LM; of a model all dimensions are kept.
    """
    return Tfidf.fit(texts, dimensions, seed) if method == "tfidf" else TextModel.fit(method)


def load_embedding(folder: Path, method: str) -> Embedding:
    """The map that was saved in `folder` for the same `method`."""
    return Tfidf.load(folder) if method == "tfidf" else TextModel.load(folder, method)


def embed(embedding: Embedding, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of `texts`, float32 [n, d]; zero where a text has nothing that the embedding knows."""
    return unit(embedding.vectors(texts))


def unit(vectors: np.ndarray, least: float = _NOTHING) -> np.ndarray:
    """Rows of `vectors` [n, d] at length 1, float32; those that are no longer than `least` become zero."""
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    empty = norm <= least
    return np.where(empty, 0.0, vectors / np.where(empty, 1.0, norm)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Tfidf:
    """TF-IDF of the terms of block 1, projected on the leading right singular vectors of its items.

    `idf` float64 [terms]; `components` float64 [d, terms], None where every term is a dimension of its own.
    """

    terms: tuple[str, ...]
    idf: np.ndarray
    components: np.ndarray | None
    files: ClassVar[Sequence[str]] = (TERMS, EMBEDDING)

    @classmethod
    def fit(cls, texts: Sequence[str], dimensions: int, seed: int) -> "Tfidf":
        from sklearn.decomposition import TruncatedSVD
        from threadpoolctl import threadpool_limits

        vectorizer = _vectorizer()
        try:
            weights = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise DataError(
                f"IDs cannot be built from text: none of the {len(texts)} items known at block 1 has a word", NO_TEXT
            ) from error
        weights = weights[weights.getnnz(axis=1) > 0]
        kept = min(dimensions, *weights.shape)
        if kept < dimensions:
            warnings.warn(
                f"the embedding has {kept} dimensions instead of {dimensions}: block 1 has {weights.shape[0]} items "
                f"with text and {weights.shape[1]} distinct terms",
                stacklevel=3,
            )
        terms, idf = tuple(vectorizer.get_feature_names_out().tolist()), vectorizer.idf_
        if kept == weights.shape[1]:
            return cls(terms, idf, None)
        with threadpool_limits(1):
            svd = TruncatedSVD(kept, random_state=seed).fit(weights)
        return cls(terms, idf, np.ascontiguousarray(svd.components_))

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        vectorizer = _vectorizer({term: column for column, term in enumerate(self.terms)})
        vectorizer.idf_ = self.idf
        weights = vectorizer.transform(texts)
        return weights.toarray() if self.components is None else weights @ self.components.T

    def save(self, folder: Path) -> None:
        import torch

        kept = {"idf": self.idf} | ({} if self.components is None else {"components": self.components})
        write_parquet(folder / TERMS, pl.DataFrame({"term": self.terms}, schema={"term": pl.String()}))
        write_tensors(folder / EMBEDDING, {name: torch.from_numpy(values) for name, values in kept.items()})

    @classmethod
    def load(cls, folder: Path) -> "Tfidf":
        terms = tuple(read_parquet(folder / TERMS, {"term": pl.String()})["term"])
        tensors = {name: t.numpy() for name, t in read_tensors(folder / EMBEDDING).items()}
        idf, components = tensors.get("idf"), tensors.get("components")
        fits = idf is not None and idf.shape == (len(terms),)
        if not fits or idf is None or (components is not None and components.shape[1:] != idf.shape):
            shapes = {name: list(values.shape) for name, values in tensors.items()}
            raise DataError(
                f"{folder / EMBEDDING}: tensors {shapes} do not fit the {len(terms)} terms of {TERMS}", _RESTORE
            )
        return cls(terms, idf, components)


def _vectorizer(vocabulary: dict[str, int] | None = None) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    # the default pattern drops one-character words, and with them the 2 of "Part 2"
    pattern = r"(?u)\b\w+\b"
    return TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=1, token_pattern=pattern, vocabulary=vocabulary
    )
