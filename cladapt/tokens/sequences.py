"""Histories as sequences of items, as sequential models read them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cladapt.sequential import BackboneConfig

PAD, START, MASK = -1, -2, -3
"""What stands in a sequence beside items: padding behind it, its beginning, and an item that is hidden."""


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


def padded(rows: Sequence[np.ndarray]) -> Tensor:
    """Sequences of any lengths as int64 [n, longest], PAD behind each."""
    found = torch.full((len(rows), max(map(len, rows))), PAD)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = torch.from_numpy(row)
    return found
