"""Tokens in runs of one item each, and how products by item take them: by tiles of one run, or in pieces by length."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

SHORTEST = 128
"""Rows of a run, in the mean, from which kernels by item run: their tiles end with the runs, shorter ones leave more
than a third of such a tile empty. By rule, timed on no GPU."""
NARROWEST, LARGEST = 0.5, 0.5
"""Of a piece, by matrix products: the shortest run over the longest, and the most tokens over all. By rule."""


@dataclass(frozen=True)
class Runs:
    """Runs of tokens: run t is rows offsets[t] to offsets[t + 1] of X, all of item[t].

    `offsets` int64 [T + 1] from 0 to M; `item` int64 [T], below `items`. An item may have several runs.
    `ValueError` where these are no runs.
    """

    offsets: Tensor
    item: Tensor
    items: int
    _tiles: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.item) + 1 or int(self.offsets[0]) or not bool((self.offsets.diff() > 0).all()):
            raise ValueError(f"offsets {tuple(self.offsets.tolist())} are not the bounds of {len(self.item)} runs")
        if len(self.item) and not 0 <= int(self.item.min()) <= int(self.item.max()) < self.items:
            raise ValueError(
                f"items from {int(self.item.min())} to {int(self.item.max())}, expected 0 to {self.items - 1}"
            )

    @classmethod
    def of(cls, item: Tensor, items: int) -> "Runs":
        """The runs of tokens of items int64 [M]."""
        starts = torch.ones(len(item), dtype=torch.bool, device=item.device)
        starts[1:] = item[1:] != item[:-1]
        first = starts.nonzero()[:, 0]
        return cls(torch.cat([first, first.new_tensor([len(item)])]), item[first], items)

    @cached_property
    def rows(self) -> int:
        """M, the tokens of all runs."""
        return int(self.offsets[-1])

    @property
    def are_long(self) -> bool:
        """Whether the runs have `SHORTEST` rows in the mean."""
        return self.rows >= SHORTEST * max(1, len(self.item))

    @cached_property
    def in_order(self) -> bool:
        """Whether every item has one run and they come in order: what is by run is by item."""
        return torch.equal(self.item, torch.arange(self.items, device=self.item.device))

    def tiles(self, rows: int) -> Tensor:
        """Tiles of at most `rows` rows of one run: first row, one beyond the last, item; int32 [tiles, 3]."""
        if rows not in self._tiles:
            count = (self.offsets.diff() + rows - 1) // rows
            run = torch.arange(len(count), device=count.device).repeat_interleave(count)
            within = torch.arange(len(run), device=run.device) - (count.cumsum(0) - count)[run]
            first = self.offsets[run] + rows * within
            last = torch.minimum(first + rows, self.offsets[run + 1])
            self._tiles[rows] = torch.stack([first, last, self.item[run]], 1).int()
        return self._tiles[rows]

    @cached_property
    def sorted_by_item(self) -> tuple[Tensor, Tensor]:
        """First row of each run and one beyond its last, in the order of the items: int32 [T, 2].

        Those of item i are the ones from offsets[i] to offsets[i + 1], the second: int32 [items + 1].
        """
        item, order = self.item.sort(stable=True)
        bounds = torch.stack([self.offsets[:-1], self.offsets[1:]], 1)[order].int()
        every = torch.arange(self.items + 1, device=item.device)
        return bounds, torch.searchsorted(item, every, out_int32=True)

    @cached_property
    def pieces(self) -> "list[Piece]":
        """All runs, in pieces of runs of nearly one length."""
        length = self.offsets.diff()
        longest, shortest = (int(length.max()), int(length.min())) if len(length) else (0, 0)
        if longest == shortest:
            return [Piece(self.item, longest, None, None)] if longest else []
        order = length.argsort(descending=True, stable=True)
        found, first, lengths = [], 0, length[order].tolist()
        for end in range(1, len(lengths) + 1):
            first_length = lengths[first]
            fits = end < len(lengths) and lengths[end] >= NARROWEST * first_length
            if not fits or (end - first + 1) * first_length > self.rows * LARGEST:
                found.append(self._piece(order[first:end], first_length))
                first = end
        return found

    def _piece(self, runs: Tensor, longest: int) -> "Piece":
        step = torch.arange(longest, device=runs.device)
        inside = step < self.offsets.diff()[runs, None]
        place = torch.where(inside, self.offsets[runs, None] + step, self.offsets[runs, None])
        return Piece(self.item[runs], longest, place.flatten(), inside[..., None])


@dataclass(frozen=True)
class Piece:
    """Runs, whose tokens lie side by side as [t, l, C], l the longest of them: behind a shorter one is its first again.

    `place` int64 [t l]: the token at each place, None where the runs are all that there are and of one length.
    `inside` bool [t, l, 1]: whether a place has a token of its own.
    """

    item: Tensor
    longest: int
    place: Tensor | None
    inside: Tensor | None

    def of(self, tokens: Tensor) -> Tensor:
        """[M, C] -> [t, l, C]."""
        found = tokens if self.place is None else tokens.index_select(0, self.place)
        return found.view(len(self.item), self.longest, tokens.shape[1])

    def own(self, padded: Tensor) -> Tensor:
        """[t, l, C] with zeros behind each run."""
        return padded if self.inside is None else padded * self.inside.to(padded.dtype)

    def add(self, tokens: Tensor, padded: Tensor, scale: float = 1.0) -> None:
        """tokens [M, C] += scale padded [t, l, C], which has zeros behind each run."""
        rows = padded.reshape(-1, tokens.shape[1])
        if self.place is None:
            tokens.add_(rows, alpha=scale)
        else:
            tokens.index_add_(0, self.place, rows, alpha=scale)
