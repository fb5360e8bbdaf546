"""Each user's chronological events, cut block by block into context, training targets, validation and test.

Leave-one-out inside a block: the last event of a user with enough events there (`Stream.min_events`) is the test
target, the one before it the validation target, all others are training targets; a user with fewer is learned from and
not tested. Everything from earlier blocks, their targets included, is context.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cladapt.data.schema import Stream
from cladapt.errors import DataError

Target = Literal["valid", "test"]
FROM_END = {"valid": 2, "test": 1}  # place of a target, counted from the end of the user's events


@dataclass(frozen=True)
class BlockSplit:
    """Users active in one block, their events up to and including it, and the leave-one-out split."""

    block: int
    user: np.ndarray  # int32 [n], integer users, ascending
    events: np.ndarray  # int32 [E], integer items, user after user, each in time order
    offsets: np.ndarray  # int64 [n + 1], user i owns events[offsets[i]:offsets[i + 1]]
    start: np.ndarray  # int64 [n], index into events of the user's first event in this block
    held_out: np.ndarray  # bool [n], the user has a validation and a test target

    @property
    def train_stop(self) -> np.ndarray:
        """Index into events where the user's training part ends, int64 [n]."""
        return self.offsets[1:] - FROM_END["valid"] * self.held_out

    @property
    def test_users(self) -> np.ndarray:
        """Rows of the users with held-out targets, int64 [n_test]."""
        return np.flatnonzero(self.held_out)

    @property
    def n_test(self) -> int:
        return int(self.held_out.sum())

    def history(self, i: int, before: Target) -> np.ndarray:
        """Items of user row `i` before that target, earlier blocks included, int32."""
        if not self.held_out[i]:
            count = self.offsets[i + 1] - self.start[i]
            raise DataError(
                f"user row {i} of block {self.block} has no {before} target: its {count} events there are too few",
                "ask for `test_users` only",
            )
        return self.events[self.offsets[i] : self.offsets[i + 1] - FROM_END[before]]

    def training(self, i: int) -> tuple[np.ndarray, int]:
        """(items, first_target): the items before the held-out ones; items[first_target:] are this block's targets."""
        return self.events[self.offsets[i] : self.train_stop[i]], int(self.start[i] - self.offsets[i])

    def targets(self, which: Target) -> np.ndarray:
        """The held-out item of each user in `test_users`, int32 [n_test]."""
        return self.events[self.offsets[1:][self.held_out] - FROM_END[which]]


@dataclass(frozen=True)
class TrainingLog:
    """Training events of several blocks, sorted by user, then time."""

    user: np.ndarray  # int32 [n]
    item: np.ndarray  # int32 [n]
    block: np.ndarray  # int32 [n]


def split_block(stream: Stream, block: int) -> BlockSplit:
    """Leave-one-out split of `block`; `DataError` when the stream has no such block."""
    _check_block(stream, block)
    keys, first_key = _keys(stream)
    first = np.searchsorted(keys, first_key)
    start = np.searchsorted(keys, first_key + block)
    stop = np.searchsorted(keys, first_key + block, side="right")
    active = start < stop
    offsets = np.concatenate([[0], np.cumsum((stop - first)[active])])
    count = (stop - start)[active]
    return BlockSplit(
        block=block,
        user=np.flatnonzero(active).astype(np.int32),
        events=stream.item_index[active[stream.user_index] & (stream.block <= block)],
        offsets=offsets,
        start=offsets[1:] - count,
        held_out=count >= stream.min_events,
    )


def training_sequences(stream: Stream, upto: int) -> TrainingLog:
    """The training parts of blocks 1..`upto`: every event but the held-out ones of its own block."""
    _check_block(stream, upto)
    keys, _ = _keys(stream)
    stop = np.searchsorted(keys, keys, side="right")
    count = stop - np.searchsorted(keys, keys)
    held_out = (count >= stream.min_events) & (np.arange(len(keys)) >= stop - FROM_END["valid"])
    kept = ~held_out & (stream.block <= upto)
    return TrainingLog(stream.user_index[kept], stream.item_index[kept], stream.block[kept])


def user_kinds(stream: Stream, block: int) -> np.ndarray:
    """Kind of each user of `split_block(stream, block)`, str [n].

    `new`: no event before this block; `returning`: active in the block just before; `dormant`: seen only before that.
    """
    _check_block(stream, block)
    keys, first_key = _keys(stream)
    first, previous, start, stop = (
        np.searchsorted(keys, first_key + offset) for offset in (0, block - 1, block, block + 1)
    )
    kinds = np.select([first == start, previous < start], ["new", "returning"], "dormant")
    return kinds[start < stop]


def _keys(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """(user, block) of each row as one ascending integer, int64 [n]; each user's value for block 0, int64 [users]."""
    width = stream.n_blocks + 1
    keys = stream.user_index.astype(np.int64) * width + stream.block
    if (decreasing := keys[1:] < keys[:-1]).any():
        raise DataError(
            f"interaction row {int(decreasing.argmax()) + 1} comes before its predecessor in user or block",
            "sort the interactions by user and position, with blocks that never decrease within a user",
        )
    return keys, np.arange(len(stream.users), dtype=np.int64) * width


def _check_block(stream: Stream, block: int) -> None:
    if not 1 <= block <= stream.n_blocks:
        raise DataError(f"the stream has no block {block}", f"choose one of 1..{stream.n_blocks}")
