"""Blocks of interactions as sequences of items, to learn and to read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cladapt.data.histories import split_block, training_sequences
from cladapt.data.schema import Stream
from cladapt.model.sequence import MASK, PAD, START
from cladapt.sequential import BackboneConfig, SequentialTrainConfig
from cladapt.train.feeds import Batch, evenly
from cladapt.train.stream import Example, learned_documents, validation_documents


@dataclass(frozen=True, eq=False)
class Span:
    """A piece of a user's events, START before the first: places from `begin` on are targets, those before context."""

    events: np.ndarray  # int64 [n], items and maybe START
    begin: int

    def apart(self) -> "list[Span]":
        """A span for each target, which ends with it."""
        return [Span(self.events[: place + 1], place) for place in range(self.begin, len(self.events))]


@dataclass(frozen=True)
class SequenceForm:
    """How histories become sequences: `hidden` is the share of the targets that one pass hides, None for a causal one.

    A causal pass reads `window` events and tells at each place what comes next. A hiding one reads `window` places,
    of which those of its targets hold MASK.
    """

    window: int
    hidden: float | None = None

    @property
    def reach(self) -> int:
        """Events of a span: a causal pass does not read the last one."""
        return self.window + (self.hidden is None)

    def documents(self, items: np.ndarray, first_target: int) -> list[Span]:
        """Spans whose targets are items[first_target:], each once.

        A user with more events than a window has windows that overlap by half, so that a target has at least half a
        window before it.
        """
        events = np.concatenate([[START], items]).astype(np.int64)
        stop, first = len(events), first_target + 1
        spans = []
        while stop > first:
            start = max(0, stop - self.reach)
            begin = max(first, start + (max(1, self.reach // 2) if start else 1))
            spans.append(Span(events[start:stop], begin - start))
            stop = begin
        return spans[::-1]

    def read(self, history: np.ndarray) -> np.ndarray:
        """What a pass reads to tell what comes after a history, at its last place."""
        events = np.concatenate([[START], history]).astype(np.int64)
        if self.hidden is None:
            return events[-self.window :]
        return np.append(events[len(events) - min(len(events), self.window - 1) :], MASK)

    def rows(self, span: Span, order: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """(sequence, target) of the passes over a span; a target is PAD where a place has none.

        One causal pass, or passes that each hide a random part of the targets, none of them twice.
        """
        place = np.arange(span.begin, len(span.events))
        if self.hidden is None:
            target = np.full(len(span.events) - 1, PAD)
            target[place - 1] = span.events[place]
            return [(span.events[:-1], target)]
        found = []
        for part in np.array_split(order.permutation(place), min(len(place), round(1 / self.hidden))):
            sequence, target = span.events.copy(), np.full(len(span.events), PAD)
            sequence[part], target[part] = MASK, span.events[part]
            found.append((sequence, target))
        return found


def form_of_backbone(config: BackboneConfig, mask: float) -> SequenceForm:
    """How a backbone reads: BERT4Rec hides a share `mask` of the targets."""
    return SequenceForm(config.window, mask if config.backbone == "bert4rec" else None)


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


def padded(rows: Sequence[np.ndarray]) -> Tensor:
    """Sequences of any lengths as int64 [n, longest], PAD behind each."""
    found = torch.full((len(rows), max(map(len, rows))), PAD)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = torch.from_numpy(row)
    return found


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
