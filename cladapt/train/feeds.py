"""What a fit learns from: batches whose every target counts once, and the validation it is judged by.

A batch is a tuple of tensors with rows first; the last is bool and marks what counts. The fitted module takes them all
and gives a loss for each that does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cladapt.errors import ConfigError
from cladapt.tokens.prompts import Document, LeftOut, PackedRows, one_target_each, pack

if TYPE_CHECKING:
    from cladapt.train.targets import PackedTargets, Targets

Batch = tuple[Tensor, ...]


class Feed(Protocol):
    """Training and validation examples of one block."""

    unit: str
    """What `used` counts, in the plural."""

    @property
    def items(self) -> "Targets | None":
        """The items behind the targets, where they are known."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What the log and the adapter's `cladapt.json` say of how the examples were made."""

    def apart(self) -> "Feed":
        """The same targets, none of which shares an example with another."""

    def __len__(self) -> int:
        """Training examples."""

    @property
    def validation_targets(self) -> int:
        """Targets of a whole pass over the validation examples."""

    def epoch(self, seed: Sequence[int]) -> list[Batch]:
        """Micro-batches of one pass over the training examples, in an order that depends on `seed` alone."""

    def sample(self, share: float) -> list[Batch]:
        """Batches of an evenly spaced share of the training examples, at least one of them."""

    def singles(self, share: float, rows: int) -> Iterator[Batch]:
        """Those of `sample`, each in a row of its own, `rows` of them at a time."""

    def validation(self) -> Iterator[Batch]:
        """Batches of all validation examples."""

    def targets(self, batch: Batch) -> int:
        """Targets that count in a batch."""

    def used(self, batch: Batch) -> int:
        """Tokens or images of a batch, padding excluded."""


class PackedFeed:
    """Documents packed into rows: (tokens, document, position, loss), all [R, S]."""

    unit = "tokens"

    def __init__(
        self,
        documents: Sequence[Document],
        validation: Sequence[Document],
        batch_tokens: int,
        row_tokens: int,
        items: "PackedTargets | None" = None,
    ) -> None:
        self.documents, self.held_out, self.items = documents, validation, items
        self.row_tokens, self.per_batch = row_tokens, max(1, batch_tokens // row_tokens)

    @property
    def record(self) -> Mapping[str, Any]:
        """What a token budget has left out of the prompts to train on; empty where nothing was."""
        found = LeftOut.of(self.documents)
        return {"left_out": asdict(found)} if found.shortened else {}

    def apart(self) -> "PackedFeed":
        if self.items is None:
            raise ConfigError("targets that are no items cannot be set apart", "learn semantic IDs alone")
        each = [d for document in self.documents for d in one_target_each(document, self.items.levels)]
        return PackedFeed(each, self.held_out, self.row_tokens * self.per_batch, self.row_tokens, self.items)

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def validation_targets(self) -> int:
        return len(self.held_out)

    def epoch(self, seed: Sequence[int]) -> list[Batch]:
        return list(batches_of(pack(self.documents, self.row_tokens, np.random.default_rng(seed)), self.per_batch))

    def sample(self, share: float) -> list[Batch]:
        return list(batches_of(pack(evenly(self.documents, share), self.row_tokens, None), self.per_batch))

    def singles(self, share: float, rows: int) -> Iterator[Batch]:
        chosen = evenly(self.documents, share)
        for first in range(0, len(chosen), rows):
            apart = [pack([document], self.row_tokens, None) for document in chosen[first : first + rows]]
            yield from batches_of(PackedRows.stacked(apart), rows)

    def validation(self) -> Iterator[Batch]:
        return batches_of(pack(self.held_out, self.row_tokens, None), self.per_batch)

    def targets(self, batch: Batch) -> int:
        return int(batch[-1][:, 1:].sum())

    def used(self, batch: Batch) -> int:
        return int((batch[1] > 0).sum())


class MixedFeed(PackedFeed):
    """Documents of several tasks in the same rows; each epoch draws from every task anew, by its weight.

    `tasks`: pairs of documents and weight. A weight of 2.5 gives every document twice and a random half of them once
    more. Validation is the caller's, so that epochs are judged by one task alone.
    """

    def __init__(
        self,
        tasks: Sequence[tuple[Sequence[Document], float]],
        validation: Sequence[Document],
        batch_tokens: int,
        row_tokens: int,
    ) -> None:
        super().__init__([d for documents, _ in tasks for d in documents], validation, batch_tokens, row_tokens)
        self.tasks = tasks

    def epoch(self, seed: Sequence[int]) -> list[Batch]:
        order = np.random.default_rng(seed)
        drawn = [d for documents, weight in self.tasks for d in draw(documents, weight, order)]
        return list(batches_of(pack(drawn, self.row_tokens, order), self.per_batch))


def draw(examples: Sequence[Any], weight: float, order: np.random.Generator) -> list[Any]:
    """All examples as often as `weight` has whole ones, and a random part of them for the rest, never none of it."""
    whole, part = divmod(weight, 1.0)
    drawn = list(examples) * int(whole)
    if part and len(examples):
        count = max(1, round(part * len(examples)))
        drawn += [examples[i] for i in order.choice(len(examples), count, replace=False)]
    return drawn


def evenly(examples: Sequence[Any], share: float) -> Sequence[Any]:
    """Every n-th of the examples, so that about `share` of them are taken, and never none."""
    count = max(1, round(share * len(examples)))
    return [examples[i] for i in np.linspace(0, len(examples) - 1, count).round().astype(int)]


def batches_of(rows: PackedRows, per_batch: int) -> Iterator[Batch]:
    """Slices of `per_batch` rows, each cut to its longest row: (tokens, document, position, loss), all [R, S]."""
    for first in range(0, len(rows.tokens), per_batch):
        piece = slice(first, first + per_batch)
        used = int((rows.document[piece] > 0).sum(axis=1).max())
        arrays: tuple[Any, ...] = (rows.tokens, rows.document, rows.position, rows.loss)
        yield tuple(torch.from_numpy(a[piece, :used]) for a in arrays)


def shard(batch: Batch, rank: int, ranks: int) -> Batch:
    """Rows `rank, rank + ranks, …` of a batch; a rank without a row gets one that counts nothing."""
    if ranks == 1:
        return batch
    piece = tuple(t[rank::ranks] for t in batch)
    if len(piece[0]):
        return piece
    *rest, counted = (t[:1] for t in batch)
    return *rest, torch.zeros_like(counted)
