"""The LoRA linear: an autograd function in eager mode, the op `cladapt::lora_linear` wherever something traces.

    Y  = X W^T + bias + scale (keep * X) A^T B^T        S = (keep * X) A^T is kept for the backward pass
    dS = scale dY B,  dX = dY W + keep * (dS A),  dA = dS^T (keep * X),  dB = scale dY^T S

W and bias are frozen. `frozen` factors F_A [R, K] and F_B [N, R] are R more ranks of the same products, without dropout
and without a gradient: Y += scale X F_A^T F_B^T. Factors may have another dtype than X: they are cast where they are
loaded, and gradients come in their own dtype straight from float32 sums. LoRA (arXiv 2106.09685), section 4.1.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cladapt_kernels import reference
from cladapt_kernels.lora.routes import Gemm, Route, route, runs_kernels
from cladapt_kernels.optim.proximal import Pulls

LIBRARY = "cladapt"
Frozen = tuple[Tensor, Tensor] | None
"""F_A [R, K] and F_B [N, R]."""


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    frozen: Frozen = None,
    pulls: Pulls = None,
) -> Tensor:
    """x W^T + bias + scale (keep * x) A^T B^T, differentiable in x, A and B.

    Args:
        x: [..., K]; under autocast it, weight and bias are cast, the factors are not.
        weight, bias: [N, K], [N]; frozen.
        a, b: [r, K], [N, r].
        scale: alpha / r; 1 / (1 - p) is applied here, to A and B alone.
        p, seed: dropout before A, drawn from `seed` int64 [1].
        frozen: F_A [R, K] and F_B [N, R], which see no dropout.
        pulls: what the backward pass adds to dA and dB (`Epilogue.of`), except where something traces.

    Returns:
        [..., N].

    Raises:
        ValueError: shapes that do not fit, weights or frozen factors that learn, dropout without a seed.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(x, weight, bias, a, b, scale, p, seed, frozen, pulls)
    _check(x, weight, bias, a, b, p, seed, frozen)
    if _is_traced(x):
        rows = x.reshape(-1, x.shape[-1])
        y, _ = torch.ops.cladapt.lora_linear(rows, weight, bias, a, b, scale / (1.0 - p), p, seed, *(frozen or ()))
        return y.view(*x.shape[:-1], weight.shape[0])
    return cast(Tensor, _LoraLinear.apply(x, weight, None, bias, a, b, scale / (1.0 - p), p, seed, frozen, pulls))


def lora_linear_dequantised(
    x: Tensor,
    dequantise: Callable[[], Tensor],
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    frozen: Frozen = None,
    pulls: Pulls = None,
) -> Tensor:
    """As `lora_linear` for a weight [N, K] that is kept quantised: made for each pass, never saved between them.

    `dequantise()` gives it; it and bias are cast to the dtype of x, which under autocast is autocast's.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = _autocast(x)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear_dequantised(x, dequantise, bias, a, b, scale, p, seed, frozen, pulls)
    bias = None if bias is None else _as(bias, x.dtype)
    return cast(Tensor, _LoraLinear.apply(x, None, dequantise, bias, a, b, scale / (1.0 - p), p, seed, frozen, pulls))


def _autocast(tensor: Tensor) -> Tensor:
    """In autocast's dtype; float64 stays, as in torch."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _is_traced(x: Tensor) -> bool:
    """Whether a compiler, an export, a dispatch mode or a tensor subclass looks on."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, p: float, seed: Tensor | None, frozen: Frozen
) -> None:
    n, k = weight.shape
    r = a.shape[0]
    if x.shape[-1] != k or a.shape != (r, k) or b.shape != (n, r) or (bias is not None and bias.shape != (n,)):
        shapes = {"x": (*x.shape[:-1], k), "a": (r, k), "b": (n, r), "bias": (n,)}
        for name, tensor in {"x": x, "a": a, "b": b, "bias": bias}.items():
            if tensor is not None and tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shapes[name]} for weight {(n, k)}")
    if r < 1:
        raise ValueError("rank 0: a and b are empty")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias must be frozen: they get no gradient here")
    if frozen is not None:
        ranks = len(frozen[0])
        for name, tensor, shape in zip(("frozen a", "frozen b"), frozen, ((ranks, k), (n, ranks)), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shape} for weight {(n, k)}")
            if tensor.requires_grad:
                raise ValueError(f"{name} requires a gradient, which frozen factors do not get")
    if p:
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout p={p}, expected 0 <= p < 1")
        if seed is None:
            raise ValueError(f"dropout p={p} without a seed")


class _LoraLinear(torch.autograd.Function):
    """Of a `weight`, or of one that `dequantise` makes for each pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        dequantise: Callable[[], Tensor] | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        p: float,
        seed: Tensor | None,
        frozen: Frozen,
        pulls: Pulls,
    ) -> Tensor:
        whole = weight
        if whole is None:
            whole = _as(cast(Callable[[], Tensor], dequantise)(), x.dtype)
            _check(x, whole, bias, a, b, p, seed, frozen)
        shape = x.shape
        rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        chosen = None
        if torch.compiler.is_compiling():
            y, s = torch.ops.cladapt.lora_linear(rows, whole, bias, a, b, scale, p, seed, *(frozen or ()))
        else:
            chosen = _route(rows, whole, a, p, frozen)
            y, s = forward_by(chosen.forward, rows, whole, bias, a, b, scale, p, seed, frozen)
        need_a, need_b = ctx.needs_input_grad[4:6]
        ctx.save_for_backward(rows if need_a else None, weight, a, b, s if need_b else None, seed)
        ctx.plan = shape, chosen, scale, p, dequantise, frozen, pulls
        return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # what the decorator does costs as much as a product where no graph of the gradients is asked for
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, *grads)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b, s, seed = ctx.saved_tensors
    shape, chosen, scale, p, dequantise, frozen, pulls = ctx.plan
    if weight is None:
        weight = _as(dequantise(), dy.dtype)
    if len(shape) != 2:
        dy = dy.reshape(-1, dy.shape[-1])
    need_dx, _, _, _, need_da, need_db, *_ = ctx.needs_input_grad
    dx, da, db = _gradients(
        chosen, dy, x, weight, a, b, s, scale, p, seed, need_dx, need_da, need_db, frozen, pulls
    )  # fmt: skip
    if dx is not None and len(shape) != 2:
        dx = dx.view(shape)
    return dx, None, None, None, da, db, None, None, None, None, None


_backward_once = once_differentiable(_backward)


def _gradients(
    chosen: Route | None,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    frozen: Frozen,
    pulls: Pulls,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA and dB, None where not needed, by the forward pass's route; what it cast is not cast again here."""
    if torch.is_autocast_enabled(dy.device.type):
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(chosen, dy, x, weight, a, b, s, scale, p, seed, need_dx, need_da, need_db, frozen, pulls)
    dy = dy.contiguous()
    if chosen is None:  # something traces
        needs = (need_dx, need_da, need_db)
        found = torch.ops.cladapt.lora_linear_backward(dy, x, weight, a, b, s, scale, p, seed, *needs, *(frozen or ()))
        return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))  # type: ignore[return-value]
    return backward_by(chosen, dy, x, weight, a, b, s, scale, p, seed, need_dx, need_da, need_db, frozen, pulls)


def _route(like: Tensor, weight: Tensor, a: Tensor, p: float, frozen: Frozen) -> Route:
    ranks = len(a) + (0 if frozen is None else len(frozen[0]))
    return route(like, weight.shape[1], weight.shape[0], ranks, p)


def forward_by(
    impl: Gemm,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    frozen: Frozen = None,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] and S [M, r] by one implementation, of x [M, K]; all give the same within their dtype's rounding.

    With frozen factors [(1 - p) X F_A^T, S] is multiplied by [F_B, B], and `strip`, which makes one S alone, is
    `seeded`.
    """
    if impl == "addmm":
        y = functional.linear(x, weight, bias)
        s = functional.linear(_dropped(x, p, seed), _as(a, x.dtype))
        if frozen is None:
            return y.addmm_(s, _as(b, x.dtype).T, alpha=scale), s
        low = torch.cat([_scaled(1.0 - p, x, _as(frozen[0], x.dtype).T), s], 1)
        return y.addmm_(low, _as(torch.cat([frozen[1], b], 1), x.dtype).T, alpha=scale), s
    from cladapt_kernels.lora import gemm, shrink
    from cladapt_kernels.tiles import on_device_of

    with on_device_of(x):
        if impl == "strip" and frozen is None:
            return gemm.strip(x, weight.T, a, b.T, scale, 1.0, bias, drop_x=p, seed=seed)
        s = shrink.shrink(x, a, 1.0, p, seed)
        product = gemm.described if impl == "described" else gemm.seeded
        if frozen is None:
            return product(x, weight.T, s, b.T, scale, bias), s
        low = torch.cat([shrink.shrink(x, frozen[0], 1.0 - p), s], 1)
        return product(x, weight.T, low, torch.cat([frozen[1], b], 1).T, scale, bias), s


def backward_by(
    chosen: Route,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
    need_da: bool = True,
    need_db: bool = True,
    frozen: Frozen = None,
    pulls: Pulls = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX [M, K], dA [r, K] and dB [N, r] of dY [M, N] by one route, None where not needed.

    x [M, K] may be None without dA, s [M, r] without dB.

    What `pulls` has waiting is in dA and dB, by the epilogue of `skinny` (`single` has none) or by torch.
    """
    dx, ds = None, None
    if need_dx or need_da:
        dx, ds = _input_gradient(chosen.dx, dy, weight, a, b, scale, p, seed, need_dx, frozen)
    if ds is not None and x is not None and s is not None and need_da and need_db and chosen.factors != "matmul":
        from cladapt_kernels.lora import skinny
        from cladapt_kernels.tiles import on_device_of

        # a and b may be transposed views, the kernel writes row by row
        down, up = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, b))
        first, second = pulls or (None, None)
        with on_device_of(x):
            if first is not None and first.waiting:
                skinny.skinny(ds, x, s, dy, scale, down, up, p, seed, proximal=skinny.proximal_of(first, second, b))
            elif chosen.factors == "single":
                skinny.single(ds, x, s, dy, scale, down, up, p, seed)
            else:
                skinny.skinny(ds, x, s, dy, scale, down, up, p, seed)
        return dx, down, up
    da = db = None
    if need_da:
        da = _as(cast(Tensor, ds).T @ _dropped(cast(Tensor, x), p, seed), a.dtype)
    if need_db:
        db = _as(_scaled(scale, dy.T, cast(Tensor, s)), b.dtype)
    for grad, pull in zip((da, db), pulls or (None, None), strict=True):
        if grad is not None and pull is not None and pull.waiting:
            pull.waiting = False
            grad.add_(pull.gradient())
    return dx, da, db


def _input_gradient(
    impl: Gemm,
    dy: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
    frozen: Frozen,
) -> tuple[Tensor | None, Tensor]:
    """dX, None where not needed, and dS = scale dY B.

    With frozen factors dX += scale (1 - p) dY F_B F_A: as more ranks of the one product, or, where dropout masks this,
    by one more pass over dX.
    """
    if impl == "strip" and need_dx and frozen is None:
        from cladapt_kernels.lora import gemm
        from cladapt_kernels.tiles import on_device_of

        with on_device_of(dy):
            return gemm.strip(dy, weight, b.T, a, 1.0, scale, drop_y=p, seed=seed)
    ds = _down(impl, dy, b, scale)
    if not need_dx:
        return None, ds
    if frozen is None:
        return _up(impl, dy, weight, ds, a, p, seed), ds
    low = _down(impl, dy, frozen[1], scale * (1.0 - p))
    if p == 0:
        return _up(impl, dy, weight, torch.cat([low, ds], 1), torch.cat([frozen[0], a]), p, seed), ds
    return _up(impl, dy, weight, ds, a, p, seed).addmm_(low, _as(frozen[0], dy.dtype)), ds


def _down(impl: Gemm, dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale dY B."""
    if impl == "addmm":
        return _scaled(scale, dy, _as(b, dy.dtype))
    from cladapt_kernels.lora import shrink
    from cladapt_kernels.tiles import on_device_of

    with on_device_of(dy):
        return shrink.shrink(dy, b.T, scale)


def _up(impl: Gemm, dy: Tensor, weight: Tensor, ds: Tensor, a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """dY W + keep * (dS A)."""
    if impl == "addmm":
        dx, down = dy @ weight, _as(a, dy.dtype)
        if p == 0:
            return dx.addmm_(ds, down)
        return dx.addcmul_(ds @ down, _keep(dx, p, seed))
    from cladapt_kernels.lora import gemm
    from cladapt_kernels.tiles import on_device_of

    with on_device_of(dy):
        product = gemm.described if impl == "described" else gemm.seeded
        return product(dy, weight, ds, a, p=p, seed=seed)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _scaled(scale: float, left: Tensor, right: Tensor) -> Tensor:
    """scale left @ right in one call: with beta = 0 torch never reads the sum that it adds to."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def _keep(like: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """The mask of X, which has the shape of `like`, in its dtype."""
    if seed is None:
        raise ValueError(f"dropout p={p} without a seed")
    rows, columns = like.shape
    if not runs_kernels(like.device):
        return reference.keep_mask(seed, rows, columns, p).to(like.dtype)
    from cladapt_kernels.lora.mask import keep_mask

    return keep_mask(seed, rows, columns, p, like.dtype)


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x if p == 0 else x * _keep(x, p, seed)


@torch.library.custom_op(f"{LIBRARY}::lora_linear", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    frozen_a: Tensor | None = None,
    frozen_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    frozen = _pair(frozen_a, frozen_b)
    chosen = _route(x, weight, a, p, frozen)
    return forward_by(chosen.forward, x, weight, bias, a, b, scale, p, seed, frozen)


@torch.library.custom_op(f"{LIBRARY}::lora_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    frozen_a: Tensor | None = None,
    frozen_b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """An empty tensor stands for what is not needed: an op cannot return None."""
    frozen = _pair(frozen_a, frozen_b)
    chosen = _route(dy, weight, a, p, frozen)
    found = backward_by(chosen, dy, x, weight, a, b, s, scale, p, seed, need_dx, need_da, need_db, frozen)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in found)  # type: ignore[return-value]


def _pair(frozen_a: Tensor | None, frozen_b: Tensor | None) -> Frozen:
    return None if frozen_a is None or frozen_b is None else (frozen_a, frozen_b)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@_backward_op.register_fake
def _(
    dy: Tensor, x: Any, weight: Tensor, a: Tensor, b: Tensor, s: Any, scale: Any, p: Any, seed: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((dy, (dy.shape[0], weight.shape[1])), (a, a.shape), (b, b.shape))
    found = (
        like.new_empty(shape) if need else dy.new_empty(0) for (like, shape), need in zip(shapes, rest[:3], strict=True)
    )
    return tuple(found)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, scale, p, seed, *frozen = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.scale, ctx.p = scale, p
    ctx.save_for_backward(x, weight, a, b, output[1], seed, *frozen)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, weight, a, b, s, seed, *frozen = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[i] for i in (0, 3, 4))
    found = torch.ops.cladapt.lora_linear_backward(
        dy.contiguous(), x, weight, a, b, s, ctx.scale, ctx.p, seed, *needs, *frozen
    )
    dx, da, db = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return dx, None, None, da, db, None, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)
