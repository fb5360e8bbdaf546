"""Recommenders that only count, for every table: what a model must beat before its machinery matters.

They rank items, not semantic IDs, so their rows have no place of an ID, no share and no log-likelihood. Equal scores
are ties, broken at random in expectation like those of items that share an ID.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import polars as pl
from scipy import sparse

from cladapt.data.histories import TrainingLog, training_sequences
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.eval.cases import Cases

_BATCH = 128


class CountsModel(Protocol):
    """A recommender fitted by counting."""

    def fit(self, log: TrainingLog, n_items: int) -> "CountsModel":
        """Count the training log (sorted by user, then time); returns itself."""
        ...

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Score of every item for each history (integer items, oldest first), float64 [users, items]."""
        ...


class Popularity:
    """Events of the item over the whole training log."""

    def fit(self, log: TrainingLog, n_items: int) -> "Popularity":
        _check(log, n_items)
        self.item_scores = np.bincount(log.item, minlength=n_items).astype(np.float64)
        return self

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        return np.broadcast_to(self.item_scores, (len(histories), len(self.item_scores)))


class BlockPopularity(Popularity):
    """Events of the item in the latest block of the log; equal counts go by the count over the whole log."""

    def fit(self, log: TrainingLog, n_items: int) -> "BlockPopularity":
        _check(log, n_items)
        overall = np.bincount(log.item, minlength=n_items)
        latest = np.bincount(log.item[log.block == log.block.max()], minlength=n_items)
        self.item_scores = latest + overall / (overall.max() + 1.0)
        return self


class Markov:
    """Three-step Markov chain: score(j) = sum over the last three items i of n(i -> j) / n(i -> any).

    n counts successions inside a user's training sequence. Block popularity, scaled below 1e-6, orders the rest.
    """

    STEPS = 3
    FILL = 1e-6

    def fit(self, log: TrainingLog, n_items: int) -> "Markov":
        popularity = BlockPopularity().fit(log, n_items).item_scores
        self.fill = self.FILL * popularity / (popularity.max() + 1.0)
        same = log.user[1:] == log.user[:-1]
        source, target = log.item[:-1][same], log.item[1:][same]
        out = np.bincount(source, minlength=n_items)
        # duplicates add up on conversion, so each succession brings its share of the row
        triples = (1.0 / out[source], (source, target))
        self.transitions = sparse.coo_array(triples, shape=(n_items, n_items)).tocsr()
        return self

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        recent = [history[-self.STEPS :] for history in histories]
        user = np.repeat(np.arange(len(recent)), [len(items) for items in recent])
        item = np.concatenate([np.empty(0, np.int64), *recent]).astype(np.int64)
        shape = (len(recent), len(self.fill))
        context = sparse.coo_array((np.ones(len(item)), (user, item)), shape=shape).tocsr()
        return (context @ self.transitions).toarray() + self.fill


class OwnHistory:
    """What a user takes again: the items of its history by how often, equal counts by the latest.

    Block popularity orders the rest, and all where seen items may not be recommended.
    """

    def fit(self, log: TrainingLog, n_items: int) -> "OwnHistory":
        popularity = BlockPopularity().fit(log, n_items).item_scores
        self.fill = popularity / (popularity.max() + 1.0)
        return self

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        scores = np.tile(self.fill, (len(histories), 1))
        for row, history in zip(scores, histories, strict=True):
            if len(history):
                items, from_end, count = np.unique(history[::-1], return_index=True, return_counts=True)
                row[items] = 1.0 + count - from_end / len(history)  # above every fill, and 1 for one more event
        return scores


MODELS: dict[str, type[CountsModel]] = {
    "popularity": Popularity,
    "block popularity": BlockPopularity,
    "markov": Markov,
    "own history": OwnHistory,
}


def rank_targets(
    scores: np.ndarray, target: np.ndarray, catalogue: np.ndarray, seen: Sequence[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(rank, ties) of each target among the allowed items: how many score better, and how many as it does, itself
    included; int64 [users], -1 where the target itself is not allowed.

    `scores` [users, items], `target` int [users], `catalogue` bool [items], `seen` the items a user must not be given.
    """
    users = np.arange(len(target))
    allowed = np.broadcast_to(catalogue, scores.shape).copy()
    if seen is not None:
        user = np.repeat(users, [len(items) for items in seen])
        allowed[user, np.concatenate([np.empty(0, np.int64), *seen]).astype(np.int64)] = False
    own, known = scores[users, target][:, None], allowed[users, target]
    rank, ties = ((here & allowed).sum(axis=1) for here in (scores > own, scores == own))
    return np.where(known, rank, -1), np.where(known, ties, -1)


def evaluate_counts(
    stream: Stream, model_name: str, model_block: int, cases: Cases, exclude_seen: bool = True, beams: int = 20
) -> pl.DataFrame:
    """Rows (schema ROWS) of a model counted on the training parts of blocks 1..`model_block`, tested on `cases`.

    Its lists hold `beams` items, as those of a model with so many beams hold at least.
    """
    if model_name not in MODELS:
        raise ConfigError(f"no counts-only model {model_name!r}", f"choose from {', '.join(MODELS)}")
    model = MODELS[model_name]().fit(training_sequences(stream, model_block), stream.n_items)
    catalogue = np.zeros(stream.n_items, dtype=bool)
    catalogue[cases.catalogue] = True
    parts = []
    for first in range(0, len(cases.target), _BATCH):
        batch = slice(first, first + _BATCH)
        histories = cases.histories[batch]
        seen = histories if exclude_seen else None
        parts.append(rank_targets(model.scores(histories), cases.target[batch], catalogue, seen))
    rank, ties = (np.concatenate(part) for part in zip(*parts, strict=True))
    return cases.rows(model_block, rank, ties, (rank >= 0) & (rank < beams))


def _check(log: TrainingLog, n_items: int) -> None:
    if not len(log.item):
        raise DataError("the training log is empty, there is nothing to count", "choose a later block")
    if int(log.item.max()) >= n_items:
        raise DataError(f"item {int(log.item.max())} is outside the {n_items} items", "pass the stream's n_items")
