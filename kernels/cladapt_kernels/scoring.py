"""Scores of vectors against every row of an item table, a chunk of the table at a time.

    logits = h @ (r * E).T        h [n, d], E [m, d], r_j = 1 / |E_j| with `normalise`, else 1

No tensor of [n, m] is made: beside its inputs and results a pass holds CHUNK logits, r [m] and one number per vector.
Computed in float32 whatever the autocast, in float64 for float64. A row of zeros has no direction: its logit is 0, and
it learns nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 22
"""Logits that exist at once: 16 MiB in float32."""
_TINY = 1e-12
Pairs = tuple[Tensor, Tensor]
"""Entries of [n, m]: rows int64 [e] and columns int64 [e]."""


def item_cross_entropy(hidden: Tensor, table: Tensor, target: Tensor, normalise: bool = False) -> Tensor:
    """Negative log-likelihood of a row of the table for each vector, with gradients for vectors and table.

        if normalise: table = F.normalize(table, dim=1)
        return F.cross_entropy(hidden @ table.T, target, reduction="none")

    The log-sum-exp is taken online over chunks, and the backward pass computes each chunk's logits again: it keeps r
    and the log-sum-exp. With p the softmax less one at the target, times the gradient of the loss, and e = r E:
    dh = p e and dE_j = r_j (I - e_j e_j^T) (p^T h)_j. Milakov and Gimelshein (arXiv 1805.02867) for the online sum.

    Args:
        hidden: [n, d].
        table: [m, d].
        target: int64 [n], below m.
        normalise: whether rows of the table count by their direction alone.

    Returns:
        [n], float32 or float64.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, table = _wide(hidden, table)
        loss: Tensor = _CrossEntropy.apply(hidden, table, target, _inverse_norms(table, normalise))
        return loss


@torch.no_grad()
def item_places(
    hidden: Tensor, table: Tensor, target: Tensor, normalise: bool = False, left_out: Pairs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """How many rows of the table score better than each target, and how many as it does, itself included.

        own = logits.gather(1, target[:, None])
        return (logits > own).sum(1), (logits == own).sum(1), logits.log_softmax(1).gather(1, target[:, None])[:, 0]

    `left_out`: entries that are counted by neither, though the log-likelihood has them; the target must not be one.
    Returns int64 [n], int64 [n] and the log-likelihoods [n].
    """
    hidden, table = _wide(hidden, table)
    inverse = _inverse_norms(table, normalise)
    total, own = _online(hidden, table, target, inverse)
    better, equal = torch.zeros_like(target), torch.zeros_like(target)
    for piece, logits in _listed(hidden, table, inverse, left_out):
        logits[_inside(target, piece)] = own[_inside(target, piece)[0]]  # the same to the last bit on every device
        better += (logits > own[:, None]).sum(1)
        equal += (logits == own[:, None]).sum(1)
    return better, equal, own - total


@torch.no_grad()
def item_top_k(
    hidden: Tensor, table: Tensor, k: int, normalise: bool = False, left_out: Pairs | None = None
) -> tuple[Tensor, Tensor]:
    """The k best rows of the table for each vector: logits [n, k] in descending order and int64 [n, k].

        logits[left_out] = -inf; return logits.topk(k)

    Entries of -inf stand where fewer than k rows are left.
    """
    hidden, table = _wide(hidden, table)
    best = hidden.new_full((len(hidden), k), -torch.inf)
    rows = torch.zeros(len(hidden), k, dtype=torch.int64, device=hidden.device)
    for piece, logits in _listed(hidden, table, _inverse_norms(table, normalise), left_out):
        columns = torch.arange(piece.start, piece.stop, device=rows.device).expand(len(rows), -1)
        best, place = torch.cat([best, logits], 1).topk(k)
        rows = torch.cat([rows, columns], 1).gather(1, place)
    return best, rows


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, target: Tensor, inverse: Tensor | None) -> Tensor:
        total, own = _online(hidden, table, target, inverse)
        ctx.save_for_backward(hidden, table, target, inverse, total)
        return total - own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, table, target, inverse, total = ctx.saved_tensors
        to_hidden = torch.zeros_like(hidden)
        to_table = torch.empty_like(table) if ctx.needs_input_grad[1] else None
        for piece, share in _chunks(hidden, table, inverse):
            share.sub_(total[:, None]).exp_()
            share[_inside(target, piece)] -= 1.0
            share.mul_(grad[:, None])
            rows = table[piece] if inverse is None else table[piece] * inverse[piece, None]
            to_hidden.addmm_(share, rows)
            if to_table is not None:
                along = share.T @ hidden
                if inverse is not None:
                    along = inverse[piece, None] * (along - rows * (rows * along).sum(1, keepdim=True))
                to_table[piece] = along
        return to_hidden, to_table, None, None


def _wide(hidden: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, table.dtype), torch.float32)
    return hidden.to(dtype), table.to(dtype)


def _inverse_norms(table: Tensor, normalise: bool) -> Tensor | None:
    if not normalise:
        return None
    norm = table.detach().norm(dim=1)
    return torch.where(norm > _TINY, 1.0 / norm.clamp_min(_TINY), 0.0)


def _chunks(hidden: Tensor, table: Tensor, inverse: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the table and their logits [n, slice]."""
    size = max(1, CHUNK // max(1, len(hidden)))
    for first in range(0, len(table), size):
        piece = slice(first, min(first + size, len(table)))
        logits = hidden @ table[piece].T
        yield piece, logits if inverse is None else logits.mul_(inverse[piece])


def _listed(
    hidden: Tensor, table: Tensor, inverse: Tensor | None, left_out: Pairs | None
) -> Iterator[tuple[slice, Tensor]]:
    """`_chunks` with -inf at the entries that are left out."""
    for piece, logits in _chunks(hidden, table, inverse):
        if left_out is not None:
            row, column = left_out
            here = (column >= piece.start) & (column < piece.stop)
            logits[row[here], column[here] - piece.start] = -torch.inf
        yield piece, logits


def _inside(target: Tensor, piece: slice) -> Pairs:
    """The targets inside a slice, as entries of its logits."""
    row = ((target >= piece.start) & (target < piece.stop)).nonzero()[:, 0]
    return row, target[row] - piece.start


def _online(hidden: Tensor, table: Tensor, target: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    """log sum exp of all logits of each vector, and the logit of its target: [n], [n]."""
    total = hidden.new_full((len(hidden),), -torch.inf)
    own = torch.zeros_like(total)
    for piece, logits in _chunks(hidden, table, inverse):
        total = torch.logaddexp(total, logits.logsumexp(1))
        row, column = _inside(target, piece)
        own[row] = logits[row, column]
    return total, own
