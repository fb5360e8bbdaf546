"""Who is tested on what: users, their histories, their targets, and the items that could be recommended to them.

Two kinds. Held-out events: each tested user's last event of a block (or the one before, for validation), after all
that came before it, over the catalogue at the end of that block. First events: each active user's first event of a
block, after the blocks before it and over their catalogue, which is what a model served during that block meets.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from cladapt.data.histories import Target, TrainingLog, split_block, training_sequences, user_kinds
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.eval.metrics import ROWS


@dataclass(frozen=True)
class Cases:
    """The tested users of a block; row i of every field is the same user."""

    block: int
    histories: list[np.ndarray]  # integer items, oldest first
    target: np.ndarray  # int [n], integer items
    catalogue: np.ndarray  # int64, integer items that could be recommended, ascending
    allowed: np.ndarray  # bool [n]: the target may be recommended
    frame: pl.DataFrame  # the columns of `metrics.ROWS` that depend on no model

    @property
    def users(self) -> list[str]:
        """User ids."""
        return self.frame["user"].to_list()

    def rows(
        self,
        model_block: int,
        rank: np.ndarray,
        ties: np.ndarray,
        listed: np.ndarray,
        log_likelihood: pl.Expr | None = None,
    ) -> pl.DataFrame:
        """Rows (schema `metrics.ROWS`) of a model without IDs: int [n] twice, null outside of `listed`, bool [n]."""
        place = pl.when(pl.Series(listed))
        return self.frame.with_columns(
            model_block=pl.lit(model_block, pl.Int32),
            rank=place.then(pl.Series(rank, dtype=pl.Int32)),
            ties=place.then(pl.Series(ties, dtype=pl.Int32)),
            id_rank=pl.lit(None, pl.Int32),
            share=pl.lit(None, pl.Int32),
            log_likelihood=pl.lit(None, pl.Float64) if log_likelihood is None else log_likelihood,
        ).select(list(ROWS))


def held_out_cases(
    stream: Stream, block: int, which: Target, exclude_seen: bool, max_users: int = 0, seed: int = 0
) -> Cases:
    """The held-out events of a block; `max_users` draws a sample of its users by `seed`, 0 takes all.

    `DataError` when nobody is tested there.
    """
    split = split_block(stream, block)
    rows = _sample(split.test_users, max_users, seed, block)
    if not len(rows):
        raise DataError(f"block {block} has no test user", "lower blocks.min_events, or merge blocks")
    target = split.events[split.offsets[1:][rows] - (2 if which == "valid" else 1)]
    histories = [split.history(int(i), before=which) for i in rows]
    return _cases(
        stream, block, block, split.user[rows], histories, target, user_kinds(stream, block)[rows], exclude_seen
    )


def first_event_cases(stream: Stream, block: int, exclude_seen: bool, max_users: int = 0, seed: int = 0) -> Cases:
    """The first events of all users of a block, for a model that ends at the block before it (`block` >= 2)."""
    split = split_block(stream, block)
    rows = _sample(np.arange(len(split.user)), max_users, seed, block)
    target = split.events[split.start[rows]]
    histories = [split.events[split.offsets[i] : split.start[i]] for i in rows]
    kinds = user_kinds(stream, block)[rows]
    return _cases(stream, block, block - 1, split.user[rows], histories, target, kinds, exclude_seen)


def _sample(rows: np.ndarray, max_users: int, seed: int, block: int) -> np.ndarray:
    if not 0 < max_users < len(rows):
        return rows
    return rows[np.sort(np.random.default_rng([seed, block]).choice(len(rows), max_users, replace=False))]


def _cases(
    stream: Stream,
    block: int,
    known: int,
    user: np.ndarray,
    histories: list[np.ndarray],
    target: np.ndarray,
    kinds: np.ndarray,
    exclude_seen: bool,
) -> Cases:
    """`known`: the last block whose training part and catalogue count."""
    log = training_sequences(stream, known)
    catalogue = stream.catalogue(known)
    seen = np.array([exclude_seen and t in h for h, t in zip(histories, target.tolist(), strict=True)], dtype=bool)
    allowed = np.isin(target, catalogue) & ~seen
    frame = pl.DataFrame(
        {
            "block": pl.Series([block] * len(target), dtype=pl.Int32),
            "user": [stream.users[u] for u in user],
            "item": stream.items["item"].gather(target),
            "allowed": allowed,
            "frequency": pl.Series(np.bincount(log.item, minlength=stream.n_items)[target], dtype=pl.Int32),
            "user_kind": kinds.tolist(),
            "new_item": stream.items["first_block"].gather(target) == block,
            "one_hop": _one_hop(log, histories, target, stream.n_items),
        }
    )
    return Cases(block, histories, target, catalogue, allowed, frame)


def _one_hop(log: TrainingLog, histories: list[np.ndarray], target: np.ndarray, n_items: int) -> np.ndarray:
    """Whether the target followed the last item of the history somewhere in the training log: bool [n]."""
    same = log.user[1:] == log.user[:-1]
    steps = np.unique(log.item[:-1][same].astype(np.int64) * n_items + log.item[1:][same])
    last = np.array([history[-1] if len(history) else -1 for history in histories], dtype=np.int64)
    return (last >= 0) & np.isin(last * n_items + target, steps)
