"""Which item each token of a batch works for, and how often each item was learned from so far."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cladapt.errors import DataError
from cladapt.train.feeds import Batch


class Targets(Protocol):
    """What a feed says of the items behind its targets."""

    frequency: Tensor
    """Training events of each item in the stream so far, int64 [items]."""

    def owner(self, batch: Batch) -> Tensor:
        """The item whose loss a token, or all tokens of an image, work for: int64 [R, S] or [B]."""

    def sample(self, batch: Batch) -> Tensor:
        """The example of a token, numbered over the batch, or of an image: int64 [R, S] or [B]."""

    def of_losses(self, batch: Batch, of_tokens: Tensor) -> Tensor:
        """Of values [R, S] or [B] those of the tokens or images that a loss is computed from: [n]."""


class PackedTargets:
    """Of packed rows: a token works for the next target of its document, those after the last target for that one.

    `item_tokens` int64 [n, L]: the ID tokens of every item; items that share an ID count as the first of them.
    `frequency` int64 [n].
    """

    def __init__(self, item_tokens: np.ndarray, frequency: np.ndarray) -> None:
        self.levels = item_tokens.shape[1]
        self._first: dict[tuple[int, ...], int] = {}
        self.frequency = torch.zeros(len(item_tokens), dtype=torch.int64)
        for item, (tokens, count) in enumerate(zip(item_tokens.tolist(), frequency.tolist(), strict=True)):
            self.frequency[self._first.setdefault(tuple(tokens), item)] += count

    def owner(self, batch: Batch) -> Tensor:
        tokens, document, _, loss = batch
        marked = loss.clone()
        marked[:, 0] = False
        count = int(marked.sum())
        targets = tokens[marked][: count - count % self.levels].reshape(-1, self.levels).tolist()
        if count % self.levels or any(tuple(target) not in self._first for target in targets):
            raise DataError("a target is no item's whole ID", "learn semantic IDs alone: no words, no parts of an ID")
        items = [self._first[tuple(target)] for target in targets]
        found = torch.full_like(tokens, -1)
        found[marked] = torch.tensor(items, dtype=torch.int64).repeat_interleave(self.levels)
        place = torch.arange(tokens.shape[1]).expand_as(tokens)
        after = torch.full_like(tokens, tokens.shape[1])  # the next place from which a target's token is predicted
        after[:, :-1] = torch.where(marked[:, 1:], place[:, :-1], after[:, :-1])
        nearest = after.flip(1).cummin(1).values.flip(1)
        before = torch.where(after < tokens.shape[1], place, -1).cummax(1).values
        owner = torch.zeros_like(tokens)
        for source in (before, nearest):  # the next one decides where there is one
            known = (source >= 0) & (source < tokens.shape[1] - 1)
            source = source.clamp(0, max(0, tokens.shape[1] - 2))
            known &= document.gather(1, source) == document
            owner = torch.where(known & (document > 0), found.gather(1, source + 1), owner)
        return owner

    def sample(self, batch: Batch) -> Tensor:
        document = batch[1]
        begins = torch.ones_like(document)  # padding behind the documents is one more example
        begins[:, 1:] = document[:, 1:] != document[:, :-1]
        return begins.flatten().cumsum(0).view_as(document) - 1

    def of_losses(self, batch: Batch, of_tokens: Tensor) -> Tensor:
        return of_tokens[:, :-1][batch[3][:, 1:]]


class ImageTargets:
    """Of images: all tokens of an image work for its label. `label` int64 [n]: those of the training images."""

    def __init__(self, label: Tensor, classes: int) -> None:
        self.frequency = torch.bincount(label, minlength=classes)

    def owner(self, batch: Batch) -> Tensor:
        return batch[1]

    def sample(self, batch: Batch) -> Tensor:
        return torch.arange(len(batch[1]))

    def of_losses(self, batch: Batch, of_tokens: Tensor) -> Tensor:
        return of_tokens[batch[2]]
