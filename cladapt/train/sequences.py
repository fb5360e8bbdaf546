"""Blocks of interactions as sequences of items, to learn and to read."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cladapt.data.histories import split_block, training_sequences
from cladapt.data.schema import Stream
from cladapt.sequential import SequentialTrainConfig
from cladapt.tokens.sequences import PAD, SequenceForm, Span, padded
from cladapt.train.feeds import Batch, evenly
from cladapt.train.stream import Example, learned_documents, validation_documents


class SequenceTargets:
    """Of sequences: a place works for the next target of its row, those after the last target for that one.

    `frequency` int64 [items].
    """

    def __init__(self, frequency: np.ndarray) -> None:
        self.frequency = torch.from_numpy(frequency.astype(np.int64))

    def owner(self, batch: Batch) -> Tensor:
        _, target, counted = batch
        place = torch.arange(target.shape[1]).expand_as(target)
        nearest = torch.where(counted, place, target.shape[1]).flip(1).cummin(1).values.flip(1)
        before = torch.where(counted, place, -1).cummax(1).values
        return target.gather(1, torch.where(nearest < target.shape[1], nearest, before).clamp_min(0))

    def sample(self, batch: Batch) -> Tensor:
        return torch.arange(len(batch[0]))[:, None].expand_as(batch[0])

    def of_losses(self, batch: Batch, of_tokens: Tensor) -> Tensor:
        return of_tokens[batch[2]]


class SequenceFeed:
    """Sequences of items: (sequence [B, L], target [B, L], counted [B, L])."""

    unit = "events"
    record: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(
        self,
        spans: Sequence[Span],
        validation: Sequence[Span],
        form: SequenceForm,
        per_batch: int,
        items: SequenceTargets,
    ) -> None:
        self.spans, self.held_out, self.form, self.per_batch, self.items = spans, validation, form, per_batch, items

    def apart(self) -> "SequenceFeed":
        each = [single for span in self.spans for single in span.apart()]
        return SequenceFeed(each, self.held_out, self.form, self.per_batch, self.items)

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def validation_targets(self) -> int:
        return len(self.held_out)

    def epoch(self, seed: Sequence[int]) -> list[Batch]:
        order = np.random.default_rng(seed)
        rows = [row for span in self.spans for row in self.form.rows(span, order)]
        return list(_batches([rows[i] for i in order.permutation(len(rows))], self.per_batch))

    def sample(self, share: float) -> list[Batch]:
        return list(_batches(self._once(share), self.per_batch))

    def singles(self, share: float, rows: int) -> Iterator[Batch]:
        return _batches(self._once(share), rows)

    def _once(self, share: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """One pass over each of an evenly spaced share of the spans."""
        order = np.random.default_rng(0)
        return [self.form.rows(span, order)[0] for span in evenly(self.spans, share)]

    def validation(self) -> Iterator[Batch]:
        order = np.random.default_rng(0)
        return _batches([row for span in self.held_out for row in self.form.rows(span, order)], self.per_batch)

    def targets(self, batch: Batch) -> int:
        return int(batch[-1].sum())

    def used(self, batch: Batch) -> int:
        return int((batch[0] != PAD).sum())


def _batches(rows: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> Iterator[Batch]:
    """`count` rows at a time, padded behind to the longest."""
    for first in range(0, len(rows), count):
        piece = rows[first : first + count]
        sequence, target = (padded([row[i] for row in piece]) for i in range(2))
        yield sequence, target.clamp_min(0), target != PAD


def make_sequence_feed(
    stream: Stream,
    blocks: Sequence[int],
    form: SequenceForm,
    config: SequentialTrainConfig,
    again: Sequence[Example] = (),
) -> SequenceFeed:
    """What is learned of `blocks` and `again`, judged by the validation events of the last of them."""
    validation = validation_documents(split_block(stream, blocks[-1]), form)
    spans = learned_documents(stream, blocks, form, config, again)
    frequency = np.bincount(training_sequences(stream, blocks[-1]).item, minlength=stream.n_items)
    return SequenceFeed(spans, validation, form, config.batch_sequences, SequenceTargets(frequency))


def first_row(stream: Stream, blocks: Sequence[int], rows: Literal["new", "all", "none"]) -> int:
    """The first row of an item table that learns with `blocks`: of the items that came with them, or of all."""
    if rows == "new":
        return len(stream.known(blocks[0] - 1))
    return 0 if rows == "all" else len(stream.known(blocks[-1]))
