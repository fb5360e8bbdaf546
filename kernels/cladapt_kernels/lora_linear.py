"""The LoRA linear as one op: autograd, autocast and tracing see `cladapt::lora_linear`, the route is a detail inside.

    Y  = X W^T + bias + scale (keep * X) A^T B^T        S = (keep * X) A^T is kept for the backward pass
    dS = scale dY B,  dX = dY W + keep * (dS A),  dA = dS^T (keep * X),  dB = scale dY^T S

W and bias are frozen. The factors may have another dtype than X: they are cast where they are loaded, and their
gradients come in their own dtype straight from float32 sums. LoRA (arXiv 2106.09685), section 4.1.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from cladapt_kernels.reference import keep_mask
from cladapt_kernels.routes import Factors, Gemm, Route, route

LIBRARY = "cladapt"


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x [..., K], weight [N, K], bias [N], a [r, K], b [N, r] -> [..., N]; dropout `p` before A, from `seed` int64 [1].

    `scale` is alpha / r; 1 / (1 - p) is applied here. `ValueError` for shapes that do not fit, weights that are not
    frozen, and dropout without a seed.
    """
    _check(x, weight, bias, a, b, p, seed)
    rows = x.reshape(-1, x.shape[-1])
    y, _ = torch.ops.cladapt.lora_linear(rows, weight, bias, a, b, scale / (1.0 - p), p, seed)
    return y.view(*x.shape[:-1], weight.shape[0])


def lora_linear_dequantised(
    x: Tensor,
    dequantise: Callable[[], Tensor],
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """As `lora_linear` for a weight [N, K] that is kept quantised: made for each pass, never saved between them."""
    rows = x.reshape(-1, x.shape[-1])
    y = _Dequantised.apply(rows, a, b, bias, scale / (1.0 - p), p, seed, dequantise)
    return cast(Tensor, y).view(*x.shape[:-1], b.shape[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, p: float, seed: Tensor | None) -> None:
    (n, k), r = weight.shape, a.shape[0]
    shapes = {"x": (*x.shape[:-1], k), "a": (r, k), "b": (n, r), "bias": (n,)}
    for name, tensor in {"x": x, "a": a, "b": b, "bias": bias}.items():
        if tensor is not None and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shapes[name]} beside weight {(n, k)}")
    if r < 1:
        raise ValueError("rank 0: a and b are empty")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias must be frozen: they get no gradient here")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout p={p}, expected 0 <= p < 1")
    if p > 0 and seed is None:
        raise ValueError(f"dropout p={p} without a seed")


@torch.library.custom_op(f"{LIBRARY}::lora_linear", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    chosen = route(x, weight.shape[0], a.shape[0], p)
    return forward_by(chosen.forward, x, weight, bias, a, b, scale, p, seed)


def forward_by(
    way: Gemm,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Y and S by one way; all ways give the same within their dtype's rounding."""
    if way == "addmm":
        y = functional.linear(x, weight, bias)
        s = _dropped(x, p, seed) @ a.T.to(x.dtype)
        return y.addmm_(s, b.T.to(x.dtype), alpha=scale), s
    from cladapt_kernels import gemm, shrink

    if way == "strip":
        return gemm.strip(x, weight.T, a, b.T, scale, 1.0, bias, drop_x=p, seed=seed)
    s = shrink.shrink(x, a, 1.0, p, seed)
    return gemm.seeded(x, weight.T, s, b.T, scale, bias), s


@torch.library.custom_op(f"{LIBRARY}::lora_linear_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = route(x, weight.shape[0], a.shape[0], p)
    return backward_by(chosen, dy, x, weight, a, b, s, scale, p, seed, need_dx)


def backward_by(
    chosen: Route,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX (empty when not needed), dA and dB by one route."""
    dx, ds = _input_gradient(chosen.dx, dy, x, weight, a, b, scale, p, seed, need_dx)
    return dx, *_factor_gradients(chosen.factors, ds, x, s, dy, a, b, scale, p, seed)


def _input_gradient(
    way: Gemm,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """dX and dS = scale dY B."""
    nothing = x.new_empty(0)
    if way == "addmm":
        ds = scale * (dy @ b.to(dy.dtype))
        if not need_dx:
            return nothing, ds
        dx = dy @ weight
        if p == 0:
            return dx.addmm_(ds, a.to(dy.dtype)), ds
        return dx.addcmul_(ds @ a.to(dy.dtype), _keep(x, p, seed).to(dy.dtype)), ds
    from cladapt_kernels import gemm, shrink

    if way == "strip" and need_dx:
        return gemm.strip(dy, weight, b.T, a, 1.0, scale, drop_y=p, seed=seed)
    ds = shrink.shrink(dy, b.T, scale)
    return gemm.seeded(dy, weight, ds, a, p=p, seed=seed) if need_dx else nothing, ds


def _factor_gradients(
    way: Factors,
    ds: Tensor,
    x: Tensor,
    s: Tensor,
    dy: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if way == "matmul":
        return (ds.T @ _dropped(x, p, seed)).to(a.dtype), (scale * (dy.T @ s)).to(b.dtype)
    from cladapt_kernels.skinny import skinny

    da, db = torch.empty_like(a), torch.empty_like(b)
    skinny(ds, x, s, dy, scale, da, db, p, seed)
    return da, db


def _keep(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if seed is None:
        raise ValueError(f"dropout p={p} without a seed")
    return keep_mask(seed, x.shape[0], x.shape[1], p)


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x if p == 0 else x * _keep(x, p, seed)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: Tensor, scale: Any, p: Any, seed: Any, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape) if need_dx else x.new_empty(0)), torch.empty_like(a), torch.empty_like(b)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, scale, p, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.scale, ctx.p = scale, p
    ctx.save_for_backward(x, weight, a, b, output[1], seed)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    x, weight, a, b, s, seed = ctx.saved_tensors
    need_dx = ctx.needs_input_grad[0]
    dx, da, db = torch.ops.cladapt.lora_linear_backward(
        dy.contiguous(), x, weight, a, b, s, ctx.scale, ctx.p, seed, need_dx
    )
    return dx if need_dx else None, None, None, da, db, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scale: float,
        p: float,
        seed: Tensor | None,
        dequantise: Callable[[], Tensor],
    ) -> Tensor:
        weight = dequantise()
        _check(x, weight, bias, a, b, p, seed)
        y, s = torch.ops.cladapt.lora_linear(x, weight, bias, a, b, scale, p, seed)
        ctx.scale, ctx.p, ctx.dequantise = scale, p, dequantise
        ctx.save_for_backward(x, a, b, s, seed)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, a, b, s, seed = ctx.saved_tensors
        need_dx = ctx.needs_input_grad[0]
        dx, da, db = torch.ops.cladapt.lora_linear_backward(
            dy.contiguous(), x, ctx.dequantise(), a, b, s, ctx.scale, ctx.p, seed, need_dx
        )
        return dx if need_dx else None, da, db, None, None, None, None, None


def _under_autocast(device: str, keys: torch._C.DispatchKeySet) -> Any:
    """X, W and bias in autocast's dtype, the factors as they are: they are cast where they are loaded."""

    def below(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            wide = (None if t is None else t.to(dtype) for t in (x, weight, bias))
            return torch.ops.cladapt.lora_linear(*wide, *rest)

    return below


_AUTOCAST = torch.library.Library(LIBRARY, "FRAGMENT")
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
    _AUTOCAST.impl("lora_linear", _under_autocast(_device, _keys), _key)
