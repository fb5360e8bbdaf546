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
from typing import Any, cast

import torch
from torch import Tensor

from cladapt_kernels.lora.linear import Frozen, _as, _dropped, _input_gradient, _keep, _route, _scaled, forward_by


@dataclass(frozen=True)
class Runs:
    """Runs of tokens: run t is rows offsets[t] to offsets[t + 1] of X, all of item[t].

    `offsets` int64 [T + 1] from 0 to M; `item` int64 [T], below `items`. An item may have several runs.
    """

    offsets: Tensor
    item: Tensor
    items: int

    @classmethod
    def of(cls, item: Tensor, items: int) -> "Runs":
        """The runs of tokens of items int64 [M]."""
        starts = torch.ones(len(item), dtype=torch.bool, device=item.device)
        starts[1:] = item[1:] != item[:-1]
        first = starts.nonzero()[:, 0]
        return cls(torch.cat([first, first.new_tensor([len(item)])]), item[first], items)

    def check(self, rows: int) -> None:
        """`ValueError` where these are no runs of `rows` tokens."""
        whole = (int(self.offsets[0]), int(self.offsets[-1])) == (0, rows) and bool((self.offsets.diff() > 0).all())
        if len(self.offsets) != len(self.item) + 1 or (rows and not whole):
            raise ValueError(f"offsets {tuple(self.offsets.tolist())} are not the bounds of runs of {rows} tokens")
        if len(self.item) and not 0 <= int(self.item.min()) <= int(self.item.max()) < self.items:
            raise ValueError(
                f"items from {int(self.item.min())} to {int(self.item.max())}, expected 0 to {self.items - 1}"
            )

    def padded(self, tokens: Tensor) -> Tensor:
        """[M, C] -> [T, L, C], zeros behind each run, L the longest."""
        place, inside = self._places()
        return tokens[place] * inside[..., None].to(tokens.dtype)

    def flat(self, padded: Tensor) -> Tensor:
        """[T, L, C] -> [M, C], what `padded` undoes."""
        return padded[self._places()[1]]

    def _places(self) -> tuple[Tensor, Tensor]:
        length = self.offsets.diff()
        step = torch.arange(int(length.max()), device=length.device)
        inside = step < length[:, None]
        return torch.where(inside, self.offsets[:-1, None] + step, 0), inside


class ItemFactors:
    """What one layer keeps of a step: the gradient of its factors by item, and how far the second pass goes along it.

    `gradients` float32 [items, r, K + N]: G_A,i and G_B,i^T side by side; None before the first backward pass.
    `kappa` float32 [items]: None in the first pass.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.gradients: Tensor | None = None
        self.kappa: Tensor | None = None

    def squares(self) -> Tensor:
        """Squared norm of each item's gradient: float64 [items]."""
        return self.whole().double().square().sum((1, 2))

    def add(self, down: Tensor, up: Tensor) -> None:
        """Add G_A,t [T, r, K] and G_B,t^T [T, r, N] of runs; a layer that runs twice has the sum of both."""
        by_run = torch.cat([down, up], 2)
        by_run = by_run.to(torch.promote_types(by_run.dtype, torch.float32))
        if self.gradients is None:
            self.gradients = by_run.new_zeros(self.runs.items, *by_run.shape[1:])
        self.gradients.index_add_(0, self.runs.item, by_run)

    def of_runs(self, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """G_A [T, r, K] and G_B^T [T, r, N] of every run in `dtype`, and kappa [M, 1] of every token."""
        found = self.whole()
        if self.kappa is None:
            raise RuntimeError("kappa is set between the passes")
        own = found.index_select(0, self.runs.item).to(dtype)
        kappa = self.kappa.index_select(0, self.runs.item).repeat_interleave(self.runs.offsets.diff())
        return own[..., :k], own[..., k:], kappa[:, None]

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
        ValueError: runs that are not those of x's rows.
        RuntimeError: kappa without gradients.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return item_linear(x, weight, bias, a, b, scale, factors, p, seed, frozen)
    rows = x.reshape(-1, x.shape[-1])
    factors.runs.check(len(rows))
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
            down, up, kappa = factors.of_runs(x.shape[1], x.dtype)
            runs = factors.runs
            moved = kappa.to(x.dtype) * runs.flat(runs.padded(_dropped(x, p, seed)) @ down.mT)
            s = s + moved
            y.addmm_(moved, _as(b, x.dtype).T, alpha=scale)
            y.add_(kappa.to(x.dtype) * runs.flat(runs.padded(s) @ up), alpha=scale)
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
            wide, left = runs.padded(dropped), runs.padded(ds)
            down, up = left.mT @ wide, scale * (runs.padded(s).mT @ runs.padded(dy))
            factors.add(down, up)
            da, db = _total(down), _total(up).T
            return dx, None, None, _as(da, a.dtype), _as(db, b.dtype), None, None, None, None, None
        down, up, kappa = factors.of_runs(x.shape[1], x.dtype)
        kappa = kappa.to(x.dtype)
        moved = scale * kappa * runs.flat(runs.padded(dy) @ up.mT)
        ds = ds + moved
        if dx is not None:
            low = moved @ _as(a, x.dtype) + kappa * runs.flat(runs.padded(ds) @ down)
            dx.add_(low if p == 0 else low * _keep(dx, p, seed))
        da, db = _as(ds.T @ dropped, a.dtype), _as(_scaled(scale, dy.T, s), b.dtype)
        return dx, None, None, da, db, None, None, None, None, None


def _total(by_run: Tensor) -> Tensor:
    return by_run.sum(0, dtype=torch.promote_types(by_run.dtype, torch.float32))
