"""Item texts to vectors: TF-IDF reduced by a truncated SVD, or a sentence-transformers model.

Only the items known at block 1 shape the TF-IDF space, so that an item's vector never depends on later arrivals.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from cladapt.errors import DataError, EnvironmentProblem

# shorter vectors are rounding noise of the projection of a unit vector, and normalising would blow them up
_NOTHING = 1e-6
_REMEDY = (
    "import with texts (`cladapt data import … --text COL` or `--items TABLE`), or take the IDs of an index with "
    '`cladapt tokens build --index FILE`, FILE being {"item": ["<a_1>", "<b_7>"], …}'
)


def embed(texts: Sequence[str], fit: np.ndarray, method: str, dimensions: int, seed: int) -> np.ndarray:
    """Unit vectors of `texts`, float32 [n, d]; rows without a usable text are zero and counted in a warning.

    `fit` (bool mask or indices) marks the items known at block 1. `method` is `tfidf` (1-2 grams, sublinear,
    `dimensions` of a truncated SVD) or the path or name of a sentence-transformers model, whose dimensions are kept.
    """
    if not any(text.strip() for text in texts):
        raise DataError(f"IDs cannot be built from text: all {len(texts)} items have an empty text", _REMEDY)
    vectors = _tfidf(texts, fit, dimensions, seed) if method == "tfidf" else _sentence_transformer(texts, method)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    empty = norm[:, 0] <= _NOTHING
    if empty.any():
        warnings.warn(
            f"{int(empty.sum())} of {len(texts)} items have no text, or none that shares a word with block 1: "
            "they get a zero vector",
            stacklevel=2,
        )
    return np.where(empty[:, None], 0.0, vectors / np.where(empty[:, None], 1.0, norm)).astype(np.float32)


def _tfidf(texts: Sequence[str], fit: np.ndarray, dimensions: int, seed: int) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits

    known = [texts[i] for i in np.arange(len(texts))[fit]]
    # the default pattern drops one-character words, and with them the 2 of "Part 2"
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1, token_pattern=r"(?u)\b\w+\b")
    try:
        weights = vectorizer.fit_transform(known)
    except ValueError as error:
        raise DataError(
            f"IDs cannot be built from text: none of the {len(known)} items known at block 1 has a word", _REMEDY
        ) from error
    weights = weights[weights.getnnz(axis=1) > 0]
    kept = min(dimensions, *weights.shape)
    if kept < dimensions:
        warnings.warn(
            f"the embedding has {kept} dimensions instead of {dimensions}: block 1 has {weights.shape[0]} items with "
            f"text and {weights.shape[1]} distinct terms",
            stacklevel=3,
        )
    everything = vectorizer.transform(texts)
    if kept == weights.shape[1]:
        return everything.toarray()
    with threadpool_limits(1):
        svd = TruncatedSVD(kept, random_state=seed).fit(weights)
    return svd.transform(everything)


def _sentence_transformer(texts: Sequence[str], name: str) -> np.ndarray:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise EnvironmentProblem(
            f"tokens.embedding={name!r} needs the package sentence-transformers",
            "pip install cladapt[embed], or use tokens.embedding=tfidf",
        ) from error
    try:
        model = SentenceTransformer(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"cannot load the sentence-transformers model {name!r}: {reason}",
            "give a local model directory, or a hub name that this machine can reach",
        ) from error
    vectors = model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False).astype(np.float64)
    vectors[[not text.strip() for text in texts]] = 0.0
    return vectors
