"""The LoRA linear for item-wise sharpness-aware training: gradients of the factors by item, then a perturbed pass.

Tokens lie in runs of one item each. With K = keep * X of the tokens of item i, and dY not averaged over anything:

    first pass    Y = X W^T + bias + scale K A^T B^T;  G_A,i = dS^T K,  G_B,i = scale dY^T S, whose sums are dA and dB
    second pass   Y = X W^T + bias + scale H (B + E_B,i)^T,  H = K (A + E_A,i)^T,  E_i = kappa_i (G_A,i, G_B,i)
                  dA = D^T K,  dB = scale dY^T H,  D = scale dY (B + E_B,i)
                  dX = dY W + keep * (D (A + E_A,i))

A + E is never formed: in 16 bits a perturbation is below the factors' own rounding, so each product has its two terms.
Both passes draw the same mask. Re-derived: the paper of item-wise SAM for recommenders was not available; gradients by
item as by-products of the factors' gradient follow arXiv 2411.00999, products by segment arXiv 2310.18547.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from cladapt_kernels.lora.linear import Frozen, _as, _dropped, _input_gradient, _keep, _route, _scaled, forward_by


@dataclass(frozen=True)
class Runs:
    """Runs of tokens: run t is rows offsets[t] to offsets[t + 1] of X, all of item[t].

    `offsets` int64 [T + 1] from 0 to M; `item` int64 [T], below `items`. An item may have several runs.
    `ValueError` where these are no runs.
    """

    offsets: Tensor
    item: Tensor
    items: int

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

    @cached_property
    def in_order(self) -> bool:
        """Whether every item has one run and they come in order: what is by run is by item."""
        return torch.equal(self.item, torch.arange(self.items, device=self.item.device))

    def padded(self, tokens: Tensor, zeros: bool = False) -> Tensor:
        """[M, C] -> [T, L, C], L the longest run; behind shorter ones are `zeros`, or tokens of another run."""
        shape = (len(self.item), self._longest, tokens.shape[1])
        if self._alike:
            return tokens.view(shape)
        place, inside, _ = self._places
        found = tokens.index_select(0, place).view(shape)
        return found * inside[..., None].to(found.dtype) if zeros else found

    def flat(self, padded: Tensor) -> Tensor:
        """[T, L, C] -> [M, C], what `padded` undoes."""
        rows = padded.reshape(-1, padded.shape[2])
        return rows if self._alike else rows.index_select(0, self._places[2])

    @cached_property
    def _longest(self) -> int:
        return int(self.offsets.diff().max()) if len(self.item) else 0

    @cached_property
    def _alike(self) -> bool:
        """Whether all runs are of one length."""
        return self.rows == len(self.item) * self._longest

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """The token at each padded place [T L], which places are of their run [T, L], and each token's place [M]."""
        length = self.offsets.diff()
        step = torch.arange(self._longest, device=length.device)
        inside = step < length[:, None]
        place = torch.where(inside, self.offsets[:-1, None] + step, 0)
        return place.flatten(), inside, inside.flatten().nonzero()[:, 0]


class ItemFactors:
    """What one layer keeps of a step: the gradient of its factors by item, and how far the second pass goes along it.

    `gradients` float32 [items, r, K + N]: G_A,i and G_B,i^T side by side; None before the first backward pass.
    `kappa` float32 [items]: None in the first pass.
    `recording`: whether backward passes add to the gradients.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.gradients: Tensor | None = None
        self.kappa: Tensor | None = None
        self.recording = True

    def squares(self) -> Tensor:
        """Squared norm of each item's gradient: float64 [items]."""
        return self.whole().flatten(1).square().sum(1, dtype=torch.float64)

    def add(self, by_run: Tensor) -> None:
        """Add G_A,t and G_B,t^T [T, r, K + N] of runs; a layer that runs twice has the sum of both."""
        if not self.recording:
            return
        by_run = by_run.to(torch.promote_types(by_run.dtype, torch.float32))
        if self.gradients is None and self.runs.in_order:
            self.gradients = by_run
            return
        if self.gradients is None:
            self.gradients = by_run.new_zeros(self.runs.items, *by_run.shape[1:])
        self.gradients.index_add_(0, self.runs.item, by_run)

    def steps(self, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kappa G_A [T, r, K] and kappa G_B^T [T, r, N] of every run in `dtype`."""
        found = self.whole()
        if self.kappa is None:
            raise RuntimeError("kappa is set between the passes")
        kappa = self.kappa[:, None, None]
        if not self.runs.in_order:
            found, kappa = (tensor.index_select(0, self.runs.item) for tensor in (found, kappa))
        own = (kappa * found).to(dtype)
        return own[..., :k], own[..., k:]

    def whole(self) -> Tensor:
        """`gradients`; `RuntimeError` before the first backward pass."""
        if self.gradients is None:
            raise RuntimeError("there are no gradients before the first backward pass")
        return self.gradients


def item_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    factors: ItemFactors,
    p: float = 0.0,
    seed: Tensor | None = None,
    frozen: Frozen = None,
) -> Tensor:
    """`lora_linear` whose backward pass fills `factors`, or, where their kappa is set, perturbed by them.

    Args:
        x: [..., K], whose rows in order are the tokens of `factors.runs`.
        weight, bias: [N, K], [N]; frozen.
        a, b: [r, K], [N, r].
        scale: alpha / r; 1 / (1 - p) is applied here.
        p, seed: dropout before A, drawn from `seed` int64 [1]; the same seed in both passes is the same mask.
        frozen: F_A [R, K] and F_B [N, R], not perturbed.

    Returns:
        [..., N].

    Raises:
        ValueError: runs of more or fewer tokens than x has.
        RuntimeError: kappa without gradients.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return item_linear(x, weight, bias, a, b, scale, factors, p, seed, frozen)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) != factors.runs.rows:
        raise ValueError(f"x has {len(rows)} tokens, the runs have {factors.runs.rows}")
    y = cast(Tensor, _ItemLinear.apply(rows, weight, bias, a, b, scale / (1.0 - p), factors, p, seed, frozen))
    return y.view(*x.shape[:-1], y.shape[1])


class _ItemLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        factors: ItemFactors,
        p: float,
        seed: Tensor | None,
        frozen: Frozen,
    ) -> Tensor:
        chosen = _route(x, weight, a, p, frozen)
        y, s = forward_by(chosen.forward, x, weight, bias, a, b, scale, p, seed, frozen)
        ctx.perturbed = factors.kappa is not None
        if ctx.perturbed:
            down, up = factors.steps(x.shape[1], x.dtype)
            runs = factors.runs
            moved = runs.flat(runs.padded(_dropped(x, p, seed)) @ down.mT)
            s = s + moved
            y.addmm_(moved, _as(b, x.dtype).T, alpha=scale)
            y.add_(runs.flat(runs.padded(s) @ up), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, s, seed)
        ctx.scale, ctx.p, ctx.factors, ctx.frozen = scale, p, factors, frozen
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, s, seed = ctx.saved_tensors
        factors, runs, p, scale = ctx.factors, ctx.factors.runs, ctx.p, ctx.scale
        chosen = _route(dy, weight, a, p, ctx.frozen)
        dy = dy.contiguous()
        dx, ds = _input_gradient(chosen.dx, dy, weight, a, b, scale, p, seed, ctx.needs_input_grad[0], ctx.frozen)
        dropped = _dropped(x, p, seed)
        if not ctx.perturbed:
            left, right = (runs.padded(narrow, zeros=True).mT for narrow in (ds, scale * s))
            by_run = torch.cat([left @ runs.padded(dropped), right @ runs.padded(dy)], 2)
            factors.add(by_run)
            total = by_run.sum(0, dtype=torch.promote_types(by_run.dtype, torch.float32))
            da, db = total[:, : x.shape[1]], total[:, x.shape[1] :].T
            return dx, None, None, _as(da, a.dtype), _as(db, b.dtype), None, None, None, None, None
        down, up = factors.steps(x.shape[1], x.dtype)
        moved = scale * runs.flat(runs.padded(dy) @ up.mT)
        ds = ds + moved
        if dx is not None:
            low = runs.flat(runs.padded(ds) @ down).addmm_(moved, _as(a, x.dtype))
            dx.add_(low if p == 0 else low * _keep(dx, p, seed))
        da, db = _as(ds.T @ dropped, a.dtype), _as(_scaled(scale, dy.T, s), b.dtype)
        return dx, None, None, da, db, None, None, None, None, None
