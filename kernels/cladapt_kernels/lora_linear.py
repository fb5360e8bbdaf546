"""The LoRA linear: an autograd function in eager mode, the op `cladapt::lora_linear` wherever something traces.

    Y  = X W^T + bias + scale (keep * X) A^T B^T        S = (keep * X) A^T is kept for the backward pass
    dS = scale dY B,  dX = dY W + keep * (dS A),  dA = dS^T (keep * X),  dB = scale dY^T S

W and bias are frozen. The factors may have another dtype than X: they are cast where they are loaded, and their
gradients come in their own dtype straight from float32 sums. LoRA (arXiv 2106.09685), section 4.1.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cladapt_kernels import reference
from cladapt_kernels.routes import Gemm, Route, route, runs_kernels

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

    `scale` is alpha / r; 1 / (1 - p) is applied here. Under autocast x, weight and bias are cast, the factors are not.
    `ValueError` for shapes that do not fit, weights that are not frozen, and dropout without a seed.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(x, weight, bias, a, b, scale, p, seed)
    _check(x, weight, bias, a, b, p, seed)
    if _is_traced(x):
        rows = x.reshape(-1, x.shape[-1])
        y, _ = torch.ops.cladapt.lora_linear(rows, weight, bias, a, b, scale / (1.0 - p), p, seed)
        return y.view(*x.shape[:-1], weight.shape[0])
    return cast(Tensor, _LoraLinear.apply(x, weight, None, bias, a, b, scale / (1.0 - p), p, seed))


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
    """As `lora_linear` for a weight [N, K] that is kept quantised: made for each pass, never saved between them.

    Weight and bias are cast to the dtype of x, which under autocast is autocast's.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = _autocast(x)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear_dequantised(x, dequantise, bias, a, b, scale, p, seed)
    bias = None if bias is None else _as(bias, x.dtype)
    return cast(Tensor, _LoraLinear.apply(x, None, dequantise, bias, a, b, scale / (1.0 - p), p, seed))


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


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, p: float, seed: Tensor | None) -> None:
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
    ) -> Tensor:
        whole = weight
        if whole is None:
            whole = _as(cast(Callable[[], Tensor], dequantise)(), x.dtype)
            _check(x, whole, bias, a, b, p, seed)
        shape = x.shape
        rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        if torch.compiler.is_compiling():
            y, s = torch.ops.cladapt.lora_linear(rows, whole, bias, a, b, scale, p, seed)
        else:
            chosen = route(rows, shape[-1], whole.shape[0], a.shape[0], p)
            y, s = forward_by(chosen.forward, rows, whole, bias, a, b, scale, p, seed)
        need_a, need_b = ctx.needs_input_grad[4:6]
        ctx.save_for_backward(rows if need_a else None, weight, a, b, s if need_b else None, seed)
        ctx.scale, ctx.p, ctx.dequantise, ctx.shape = scale, p, dequantise, shape
        return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # what the decorator does costs as much as a product where no graph of the gradients is asked for
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, *grads)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b, s, seed = ctx.saved_tensors
    if weight is None:
        weight = _as(ctx.dequantise(), dy.dtype)
    shape = ctx.shape
    if len(shape) != 2:
        dy = dy.reshape(-1, dy.shape[-1])
    need_dx, _, _, _, need_da, need_db, _, _, _ = ctx.needs_input_grad
    dx, da, db = _gradients(dy, x, weight, a, b, s, ctx.scale, ctx.p, seed, need_dx, need_da, need_db)
    if dx is not None and len(shape) != 2:
        dx = dx.view(shape)
    return dx, None, None, None, da, db, None, None, None


_backward_once = once_differentiable(_backward)


def _gradients(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA and dB, None where not needed; what was cast in the forward pass is not cast again here."""
    if torch.is_autocast_enabled(dy.device.type):
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(dy, x, weight, a, b, s, scale, p, seed, need_dx, need_da, need_db)
    dy = dy.contiguous()
    if torch.compiler.is_compiling():
        needs = (need_dx, need_da, need_db)
        found = torch.ops.cladapt.lora_linear_backward(dy, x, weight, a, b, s, scale, p, seed, *needs)
        return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))  # type: ignore[return-value]
    chosen = route(dy, weight.shape[1], weight.shape[0], a.shape[0], p)
    return backward_by(chosen, dy, x, weight, a, b, s, scale, p, seed, need_dx, need_da, need_db)


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
        s = functional.linear(_dropped(x, p, seed), _as(a, x.dtype))
        return y.addmm_(s, _as(b, x.dtype).T, alpha=scale), s
    from cladapt_kernels import gemm, shrink
    from cladapt_kernels.tiles import on_device_of

    with on_device_of(x):
        if way == "strip":
            return gemm.strip(x, weight.T, a, b.T, scale, 1.0, bias, drop_x=p, seed=seed)
        s = shrink.shrink(x, a, 1.0, p, seed)
        product = gemm.described if way == "described" else gemm.seeded
        return product(x, weight.T, s, b.T, scale, bias), s


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA and dB by one route, None where not needed; x may be None without dA, s without dB."""
    dx, ds = None, None
    if need_dx or need_da:
        dx, ds = _input_gradient(chosen.dx, dy, weight, a, b, scale, p, seed, need_dx)
    if ds is not None and x is not None and s is not None and need_da and need_db and chosen.factors != "matmul":
        from cladapt_kernels import skinny
        from cladapt_kernels.tiles import on_device_of

        # a and b may be transposed views, the kernel writes row by row
        down, up = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, b))
        with on_device_of(x):
            (skinny.single if chosen.factors == "single" else skinny.skinny)(ds, x, s, dy, scale, down, up, p, seed)
        return dx, down, up
    da = db = None
    if need_da:
        da = _as(cast(Tensor, ds).T @ _dropped(cast(Tensor, x), p, seed), a.dtype)
    if need_db:
        db = _as(_scaled(scale, dy.T, cast(Tensor, s)), b.dtype)
    return dx, da, db


def _input_gradient(
    way: Gemm,
    dy: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """dX, None where not needed, and dS = scale dY B."""
    if way == "addmm":
        ds = _scaled(scale, dy, _as(b, dy.dtype))
        if not need_dx:
            return None, ds
        dx, down = dy @ weight, _as(a, dy.dtype)
        if p == 0:
            return dx.addmm_(ds, down), ds
        return dx.addcmul_(ds @ down, _keep(dx, p, seed)), ds
    from cladapt_kernels import gemm, shrink
    from cladapt_kernels.tiles import on_device_of

    with on_device_of(dy):
        if way == "strip" and need_dx:
            return gemm.strip(dy, weight, b.T, a, 1.0, scale, drop_y=p, seed=seed)
        ds = shrink.shrink(dy, b.T, scale)
        product = gemm.described if way == "described" else gemm.seeded
        return product(dy, weight, ds, a, p=p, seed=seed) if need_dx else None, ds


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
    from cladapt_kernels.mask import keep_mask

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
) -> tuple[Tensor, Tensor]:
    chosen = route(x, weight.shape[1], weight.shape[0], a.shape[0], p)
    return forward_by(chosen.forward, x, weight, bias, a, b, scale, p, seed)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """An empty tensor stands for what is not needed: an op cannot return None."""
    chosen = route(dy, weight.shape[1], weight.shape[0], a.shape[0], p)
    found = backward_by(chosen, dy, x, weight, a, b, s, scale, p, seed, need_dx, need_da, need_db)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in found)  # type: ignore[return-value]


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@_backward_op.register_fake
def _(
    dy: Tensor, x: Any, weight: Tensor, a: Tensor, b: Tensor, s: Any, scale: Any, p: Any, seed: Any, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((dy, (dy.shape[0], weight.shape[1])), (a, a.shape), (b, b.shape))
    found = (
        like.new_empty(shape) if need else dy.new_empty(0) for (like, shape), need in zip(shapes, needs, strict=True)
    )
    return tuple(found)  # type: ignore[return-value]


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
    needs = tuple(ctx.needs_input_grad[i] for i in (0, 3, 4))
    found = torch.ops.cladapt.lora_linear_backward(dy.contiguous(), x, weight, a, b, s, ctx.scale, ctx.p, seed, *needs)
    dx, da, db = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return dx, None, None, da, db, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)
