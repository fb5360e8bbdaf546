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

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from cladapt_kernels.lora.linear import (
    Frozen,
    _as,
    _autocast,
    _dropped,
    _input_gradient,
    _keep,
    _route,
    _scaled,
    forward_by,
)
from cladapt_kernels.lora.routes import Gemm, Route, runs_kernels
from cladapt_kernels.lora.runs import Runs


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
        self._measured: tuple[Tensor, Tensor] | None = None

    def squares(self) -> Tensor:
        """Squared norm of each item's gradient: float64 [items]."""
        found = self.whole()
        if self._measured is not None and self._measured[0] is found:
            return self._measured[1].double()
        return found.flatten(1).double().square().sum(1)

    def add(self, item: Tensor, by_run: Tensor) -> None:
        """Add G_A,t and G_B,t^T [T, r, K + N] of runs of items [T]; a layer that runs twice has the sum of both."""
        self._measured = None
        by_run = by_run.to(torch.promote_types(by_run.dtype, torch.float32))
        if self.gradients is None and item is self.runs.item and self.runs.in_order:
            self.gradients = by_run
            return
        if self.gradients is None:
            self.gradients = by_run.new_zeros(self.runs.items, *by_run.shape[1:])
        self.gradients.index_add_(0, item, by_run)

    def add_measured(self, by_item: Tensor, squares: Tensor) -> None:
        """Add G_A,i and G_B,i^T [items, r, K + N], whose squared norms [items] are known."""
        if self.gradients is None:
            self.gradients, self._measured = by_item, (by_item, squares)
        else:
            self.gradients, self._measured = self.gradients + by_item, None

    def directions(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """G_A [items, r, K], G_B^T [items, r, N] and kappa [items]."""
        found, kappa = self._both()
        return found[..., :k], found[..., k:], kappa

    def steps(self, item: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kappa G_A [T, r, K] and kappa G_B^T [T, r, N] of items [T] in `dtype`."""
        found, kappa = self._both()
        if item is not self.runs.item or not self.runs.in_order:
            found, kappa = found.index_select(0, item), kappa.index_select(0, item)
        own = (kappa[:, None, None] * found).to(dtype)
        return own[..., :k], own[..., k:]

    def whole(self) -> Tensor:
        """`gradients`; `RuntimeError` before the first backward pass."""
        if self.gradients is None:
            raise RuntimeError("there are no gradients before the first backward pass")
        return self.gradients

    def _both(self) -> tuple[Tensor, Tensor]:
        found = self.whole()
        if self.kappa is None:
            raise RuntimeError("kappa is set between the passes")
        return found, self.kappa


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
        ValueError: runs of more or fewer tokens than x has; p outside 0 <= p < 1.
        RuntimeError: kappa without gradients.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
        with torch.autocast(x.device.type, enabled=False):
            return item_linear(x, weight, bias, a, b, scale, factors, p, seed, frozen)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) != factors.runs.rows:
        raise ValueError(f"x has {len(rows)} tokens, the runs have {factors.runs.rows}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout p={p}, expected 0 <= p < 1")
    y = cast(Tensor, _ItemLinear.apply(rows, weight, bias, a, b, scale / (1.0 - p), factors, p, seed, frozen))
    return y.view(*x.shape[:-1], y.shape[1])


class _Layer(NamedTuple):
    """What x and dy of one layer are multiplied by."""

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float
    factors: ItemFactors
    p: float
    seed: Tensor | None
    frozen: Frozen

    def route(self, like: Tensor) -> Route:
        return _route(like, self.weight, self.a, self.p, self.frozen)

    def has_kernels(self, impl: Gemm, perturbed: bool) -> bool:
        """Whether a pass is by kernels where the route has `impl`; those of the second pass have no frozen factors."""
        return impl != "addmm" and not (perturbed and (self.frozen is not None or not self.factors.runs.are_long))


def item_mask(x: Tensor, p: float, seed: Tensor | None) -> Tensor | None:
    """Which entries of x [M, K] dropout keeps, bool [M, K]; None where it keeps all.

    That of the kernels where they run. Elsewhere drawn by torch's generator from the seed, 16 bits an entry: p is
    rounded to 2^-16, 1 - 2^-16 at most, and a draw takes a fifth of the time of `torch.nn.functional.dropout`.
    """
    if p == 0:
        return None
    if seed is None or runs_kernels(x.device):
        return _keep(x, p, seed).bool()
    generator = torch.Generator(x.device).manual_seed(int(seed))
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    return (bits >= min(round(p * 2**16), 2**16 - 1) - 2**15).view(x.shape)


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """keep * x; torch multiplies by numbers faster than it selects by a mask."""
    return x if keep is None else x * keep.view(torch.uint8).to(x.dtype)


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
        layer = _Layer(weight, a, b, scale, factors, p, seed, frozen)
        impl, keep = layer.route(x).forward, None
        ctx.perturbed = factors.kappa is not None
        if not layer.has_kernels(impl, ctx.perturbed):
            keep = item_mask(x, p, seed)
            whole, x = x, _kept(x, keep)
            y, s = _product(layer, whole, x, bias)
        elif ctx.perturbed:
            y, s = _perturbed_by_kernels(layer, x, bias)
        else:
            y, s = forward_by(impl, x, weight, bias, a, b, scale, p, seed, frozen)
        ctx.save_for_backward(x, keep, weight, a, b, s, seed)
        ctx.scale, ctx.p, ctx.factors, ctx.frozen = scale, p, factors, frozen
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, weight, a, b, s, seed = ctx.saved_tensors
        layer = _Layer(weight, a, b, ctx.scale, ctx.factors, ctx.p, seed, ctx.frozen)
        chosen, dy, need_dx = layer.route(dy), dy.contiguous(), ctx.needs_input_grad[0]
        if not layer.has_kernels(chosen.dx, ctx.perturbed):
            dx, ds = _product_gradient(layer, dy, need_dx, item_mask(x, ctx.p, seed) if keep is None else keep)
        elif ctx.perturbed:
            dx, ds = _input_gradient_by_kernels(layer, dy, need_dx)
        else:
            dx, ds = _input_gradient(chosen.dx, dy, weight, a, b, ctx.scale, ctx.p, seed, need_dx, ctx.frozen)
        p = 0.0 if keep is not None else ctx.p  # x is dropped where the mask is known
        records = ctx.factors.recording and not ctx.perturbed
        if chosen.factors != "matmul" and (not records or ctx.factors.runs.are_long):
            da, db = _gradients_by_kernels(layer, ds, x, s, dy, p, records)
        else:
            da, db = _gradients(layer, ds, _dropped(x, p, seed), s, dy, records)
        return dx, None, None, _as(da, a.dtype), _as(db, b.dtype), None, None, None, None, None


def _product(layer: _Layer, x: Tensor, dropped: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Y and S of the first pass, Y and H of the second, where keep * X is `dropped`."""
    factors, y = layer.factors, functional.linear(x, layer.weight, bias)
    s = functional.linear(dropped, _as(layer.a, x.dtype))
    for piece in () if factors.kappa is None else factors.runs.pieces:
        down, up = factors.steps(piece.item, x.shape[1], x.dtype)
        moved = piece.own(piece.of(dropped) @ down.mT)
        piece.add(s, moved)
        piece.add(y, piece.own(piece.of(s)) @ up, layer.scale)
    y.addmm_(s, _as(layer.b, x.dtype).T, alpha=layer.scale)
    if layer.frozen is not None:
        low, high = (_as(factor, x.dtype) for factor in layer.frozen)
        y.addmm_(functional.linear(x, low), high.T, alpha=layer.scale * (1.0 - layer.p))
    return y, s


def _product_gradient(layer: _Layer, dy: Tensor, need_dx: bool, keep: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """dX, None where not needed, and dS of the first pass or D of the second."""
    factors, k = layer.factors, layer.weight.shape[1]
    ds = _scaled(layer.scale, dy, _as(layer.b, dy.dtype))
    by_item = dy.new_zeros(len(dy), k) if need_dx and factors.kappa is not None else None
    for piece in () if factors.kappa is None else factors.runs.pieces:
        down, up = factors.steps(piece.item, k, dy.dtype)
        piece.add(ds, piece.own(piece.of(dy) @ up.mT), layer.scale)
        if by_item is not None:
            piece.add(by_item, piece.own(piece.of(ds)) @ down)
    if not need_dx:
        return None, ds
    a = _as(layer.a, dy.dtype)
    low = ds @ a if by_item is None else by_item.addmm_(ds, a)
    dx = torch.addmm(_kept(low, keep), dy, layer.weight)
    if layer.frozen is not None:
        below, above = (_as(factor, dy.dtype) for factor in layer.frozen)
        dx.addmm_(_scaled(layer.scale * (1.0 - layer.p), dy, above), below)
    return dx, ds


def _gradients(
    layer: _Layer, ds: Tensor, dropped: Tensor, s: Tensor, dy: Tensor, records: bool
) -> tuple[Tensor, Tensor]:
    """dA and dB, whose parts by item are kept where `records`."""
    if not records:
        return ds.T @ dropped, _scaled(layer.scale, dy.T, s)
    k, s = dropped.shape[1], layer.scale * s
    total = dy.new_zeros(ds.shape[1], k + dy.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
    for piece in layer.factors.runs.pieces:
        left, right = (piece.own(piece.of(narrow)).mT for narrow in (ds, s))
        by_run = torch.cat([left @ piece.of(dropped), right @ piece.of(dy)], 2)
        total += by_run.sum(0, dtype=total.dtype)
        layer.factors.add(piece.item, by_run)
    if layer.factors.gradients is None:  # no token, as of a process without a row
        layer.factors.gradients = total.expand(layer.factors.runs.items, *total.shape)
    return total[:, :k], total[:, k:].T


def _perturbed_by_kernels(layer: _Layer, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Y and H of the second pass."""
    from cladapt_kernels.lora import by_item
    from cladapt_kernels.tiles import on_device_of

    table, (down, up, kappa) = layer.factors.runs.tiles, layer.factors.directions(x.shape[1])
    with on_device_of(x):
        s = by_item.shrink(x, layer.a, down, kappa, table, 1.0, layer.p, layer.seed)
        return by_item.seeded(x, layer.weight.T, s, layer.b.T, up, kappa, table, layer.scale, bias), s


def _input_gradient_by_kernels(layer: _Layer, dy: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor]:
    """dX of the second pass, None where not needed, and D."""
    from cladapt_kernels.lora import by_item
    from cladapt_kernels.tiles import on_device_of

    table, (down, up, kappa) = layer.factors.runs.tiles, layer.factors.directions(layer.weight.shape[1])
    with on_device_of(dy):
        ds = by_item.shrink(dy, layer.b.T, up, kappa, table, layer.scale)
        if not need_dx:
            return None, ds
        return by_item.seeded(dy, layer.weight, ds, layer.a, down, kappa, table, p=layer.p, seed=layer.seed), ds


def _gradients_by_kernels(
    layer: _Layer, ds: Tensor, x: Tensor, s: Tensor, dy: Tensor, p: float, records: bool
) -> tuple[Tensor, Tensor]:
    """dA and dB, whose parts by item are kept where `records`; dropout `p` is what x still lacks."""
    from cladapt_kernels.lora import by_item, skinny
    from cladapt_kernels.tiles import on_device_of

    da, db = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (layer.a, layer.b))
    given = ds, x, s, dy, layer.scale, da, db
    with on_device_of(x):
        if records:
            kept = by_item.factors(*given, *layer.factors.runs.sorted_by_item, p, layer.seed)
            layer.factors.add_measured(*kept)
        else:
            skinny.skinny(*given, p, layer.seed)
    return da, db
