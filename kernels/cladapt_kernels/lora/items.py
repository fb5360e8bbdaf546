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

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cladapt_kernels.lora.linear import Frozen, _as, _dropped, _input_gradient, _keep, _route, _scaled, forward_by
from cladapt_kernels.lora.routes import Gemm, Route

SHORTEST = 128
"""Rows of a run, in the mean, from which kernels by item run: their tiles end with the runs, shorter ones leave more
than a third of such a tile empty. By rule, timed on no GPU."""


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
        self._measured: tuple[Tensor, Tensor] | None = None

    def squares(self) -> Tensor:
        """Squared norm of each item's gradient: float64 [items]."""
        found = self.whole()
        if self._measured is not None and self._measured[0] is found:
            return self._measured[1].double()
        return found.flatten(1).square().sum(1, dtype=torch.float64)

    def add(self, by_run: Tensor) -> None:
        """Add G_A,t and G_B,t^T [T, r, K + N] of runs; a layer that runs twice has the sum of both."""
        if not self.recording:
            return
        self._measured = None
        by_run = by_run.to(torch.promote_types(by_run.dtype, torch.float32))
        if self.gradients is None and self.runs.in_order:
            self.gradients = by_run
            return
        if self.gradients is None:
            self.gradients = by_run.new_zeros(self.runs.items, *by_run.shape[1:])
        self.gradients.index_add_(0, self.runs.item, by_run)

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

    def steps(self, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kappa G_A [T, r, K] and kappa G_B^T [T, r, N] of every run in `dtype`."""
        found, kappa = self._both()
        kappa = kappa[:, None, None]
        if not self.runs.in_order:
            found, kappa = (tensor.index_select(0, self.runs.item) for tensor in (found, kappa))
        own = (kappa * found).to(dtype)
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

    def has_kernels(self, impl: Gemm) -> bool:
        """Whether the second pass is by kernels where the first is by `impl`; they have no frozen factors."""
        return impl != "addmm" and self.frozen is None and self.factors.runs.are_long


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
        impl = layer.route(x).forward
        ctx.perturbed = factors.kappa is not None
        if ctx.perturbed and layer.has_kernels(impl):
            y, s = _perturbed_by_kernels(layer, x, bias)
        else:
            y, s = forward_by(impl, x, weight, bias, a, b, scale, p, seed, frozen)
            if ctx.perturbed:
                y, s = _perturbed(layer, x, y, s)
        ctx.save_for_backward(x, weight, a, b, s, seed)
        ctx.scale, ctx.p, ctx.factors, ctx.frozen = scale, p, factors, frozen
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, s, seed = ctx.saved_tensors
        layer = _Layer(weight, a, b, ctx.scale, ctx.factors, ctx.p, seed, ctx.frozen)
        chosen, dy, need_dx = layer.route(dy), dy.contiguous(), ctx.needs_input_grad[0]
        if ctx.perturbed and layer.has_kernels(chosen.dx):
            dx, ds = _input_gradient_by_kernels(layer, dy, need_dx)
        else:
            dx, ds = _input_gradient(chosen.dx, dy, weight, a, b, ctx.scale, ctx.p, seed, need_dx, ctx.frozen)
            if ctx.perturbed:
                dx, ds = _perturbed_input_gradient(layer, dy, dx, ds)
        if chosen.factors != "matmul" and (ctx.perturbed or ctx.factors.runs.are_long):
            da, db = _gradients_by_kernels(layer, ds, x, s, dy, ctx.factors.recording and not ctx.perturbed)
        elif ctx.perturbed:
            da, db = ds.T @ _dropped(x, ctx.p, seed), _scaled(ctx.scale, dy.T, s)
        else:
            da, db = _gradients(layer, ds, x, s, dy)
        return dx, None, None, _as(da, a.dtype), _as(db, b.dtype), None, None, None, None, None


def _perturbed(layer: _Layer, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Y and H of the second pass, from those of the first."""
    runs, (down, up) = layer.factors.runs, layer.factors.steps(x.shape[1], x.dtype)
    moved = runs.flat(runs.padded(_dropped(x, layer.p, layer.seed)) @ down.mT)
    s = s + moved
    y.addmm_(moved, _as(layer.b, x.dtype).T, alpha=layer.scale)
    return y.add_(runs.flat(runs.padded(s) @ up), alpha=layer.scale), s


def _perturbed_by_kernels(layer: _Layer, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Y and H of the second pass."""
    from cladapt_kernels.lora import by_item
    from cladapt_kernels.tiles import on_device_of

    table, (down, up, kappa) = layer.factors.runs.tiles, layer.factors.directions(x.shape[1])
    with on_device_of(x):
        s = by_item.shrink(x, layer.a, down, kappa, table, 1.0, layer.p, layer.seed)
        return by_item.seeded(x, layer.weight.T, s, layer.b.T, up, kappa, table, layer.scale, bias), s


def _perturbed_input_gradient(layer: _Layer, dy: Tensor, dx: Tensor | None, ds: Tensor) -> tuple[Tensor | None, Tensor]:
    """dX of the second pass, None where not needed, and D, from those of the first."""
    runs, (down, up) = layer.factors.runs, layer.factors.steps(layer.weight.shape[1], dy.dtype)
    moved = layer.scale * runs.flat(runs.padded(dy) @ up.mT)
    ds = ds + moved
    if dx is not None:
        low = runs.flat(runs.padded(ds) @ down).addmm_(moved, _as(layer.a, dy.dtype))
        dx.add_(low if layer.p == 0 else low * _keep(dx, layer.p, layer.seed))
    return dx, ds


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


def _gradients(layer: _Layer, ds: Tensor, x: Tensor, s: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dA and dB, whose parts by item are kept."""
    runs, k = layer.factors.runs, x.shape[1]
    left, right = (runs.padded(narrow, zeros=True).mT for narrow in (ds, layer.scale * s))
    by_run = torch.cat([left @ runs.padded(_dropped(x, layer.p, layer.seed)), right @ runs.padded(dy)], 2)
    layer.factors.add(by_run)
    total = by_run.sum(0, dtype=torch.promote_types(by_run.dtype, torch.float32))
    return total[:, :k], total[:, k:].T


def _gradients_by_kernels(
    layer: _Layer, ds: Tensor, x: Tensor, s: Tensor, dy: Tensor, keeps: bool
) -> tuple[Tensor, Tensor]:
    """dA and dB, whose parts by item are kept where `keeps`."""
    from cladapt_kernels.lora import by_item, skinny
    from cladapt_kernels.tiles import on_device_of

    da, db = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (layer.a, layer.b))
    given = ds, x, s, dy, layer.scale, da, db
    with on_device_of(x):
        if keeps:
            kept = by_item.factors(*given, *layer.factors.runs.sorted_by_item, layer.p, layer.seed)
            layer.factors.add_measured(*kept)
        else:
            skinny.skinny(*given, layer.p, layer.seed)
    return da, db
