"""Recommenders that only count, for every table: what a model must beat before its machinery matters.

They rank items, not semantic IDs, so their rows have share 1 and no log-likelihood.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import polars as pl
from scipy import sparse

from cladapt.data.histories import Target, TrainingLog, split_block, training_sequences, user_kinds
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.eval.metrics import ROWS

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


MODELS: dict[str, type[CountsModel]] = {
    "popularity": Popularity,
    "block popularity": BlockPopularity,
    "markov": Markov,
}


def rank_targets(
    scores: np.ndarray, target: np.ndarray, catalogue: np.ndarray, seen: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Place of each target, from 0, among the allowed items; equal scores go by item index. int64 [users].

    `scores` [users, items], `target` int [users], `catalogue` bool [items], `seen` the items a user must not be given;
    -1 where the target itself is not allowed.
    """
    users = np.arange(len(target))
    allowed = np.broadcast_to(catalogue, scores.shape).copy()
    if seen is not None:
        user = np.repeat(users, [len(items) for items in seen])
        allowed[user, np.concatenate([np.empty(0, np.int64), *seen]).astype(np.int64)] = False
    own = scores[users, target][:, None]
    earlier = np.arange(scores.shape[1]) < target[:, None]
    ahead = (scores > own) | ((scores == own) & earlier)
    return np.where(allowed[users, target], (ahead & allowed).sum(axis=1), -1)


def evaluate_counts(
    stream: Stream,
    model_name: str,
    model_block: int,
    block: int,
    exclude_seen: bool = True,
    beams: int = 20,
    targets: Target = "test",
) -> pl.DataFrame:
    """Rows (schema ROWS) of a model counted on the training parts of blocks 1..`model_block`, tested on `block`."""
    if model_name not in MODELS:
        raise ConfigError(f"no counts-only model {model_name!r}", f"choose from {', '.join(MODELS)}")
    model = MODELS[model_name]().fit(training_sequences(stream, model_block), stream.n_items)
    split = split_block(stream, block)
    if not split.n_test:
        raise DataError(f"block {block} has no test user", "lower blocks.min_events, or merge blocks")
    target = split.targets(targets)
    histories = [split.history(int(i), before=targets) for i in split.test_users]
    catalogue = np.zeros(stream.n_items, dtype=bool)
    catalogue[stream.catalogue(block)] = True
    ranks = []
    for first in range(0, split.n_test, _BATCH):
        batch = slice(first, first + _BATCH)
        seen = histories[batch] if exclude_seen else None
        ranks.append(rank_targets(model.scores(histories[batch]), target[batch], catalogue, seen))
    rank = pl.Series(np.concatenate(ranks), dtype=pl.Int32)
    frequency = np.bincount(training_sequences(stream, block).item, minlength=stream.n_items)
    columns = {
        "model_block": [model_block] * len(target),
        "block": [block] * len(target),
        "user": [stream.users[u] for u in split.user[split.held_out]],
        "item": stream.items["item"].gather(target),
        "rank": rank.set((rank < 0) | (rank >= beams), None),
        "share": [1] * len(target),
        "log_likelihood": [None] * len(target),
        "frequency": frequency[target],
        "user_kind": user_kinds(stream, block)[split.held_out].tolist(),
        "new_item": stream.items["first_block"].gather(target) == block,
    }
    return pl.DataFrame(columns, schema_overrides=ROWS)


def _check(log: TrainingLog, n_items: int) -> None:
    if not len(log.item):
        raise DataError("the training log is empty, there is nothing to count", "choose a later block")
    if int(log.item.max()) >= n_items:
        raise DataError(f"item {int(log.item.max())} is outside the {n_items} items", "pass the stream's n_items")
