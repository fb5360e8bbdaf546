"""The LoRA linear against PEFT's arithmetic and the frozen linear; `ROUTES` times each implementation of its parts.

All providers have the same inputs, bf16 on a GPU. The model of bytes counts passes over X and Y beyond those of the two
frozen products (`PASSES`).
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from cladapt_kernels.lora import lora_linear
from cladapt_kernels.lora.linear import backward_by, forward_by
from cladapt_kernels.lora.routes import Factors, Gemm, Route, has_triton
from cladapt_kernels.timing import Call, Entry, Providers, Work

SCALE = 2.0
IN_A_ROW = 10
HALF = 2  # bytes of a bf16 entry
IMPLEMENTATIONS = {"forward": get_args(Gemm), "dx": get_args(Gemm), "factors": get_args(Factors)}
SKINNY_TESTS = ("tests/kernels/test_skinny.py",)
SHRINK_TESTS = ("tests/kernels/test_lora_linear.py",)
LORA_TESTS = (*SHRINK_TESTS, *SKINNY_TESTS)


class Size(NamedTuple):
    """A LoRA linear: tokens, inputs, outputs, rank."""

    m: int
    k: int
    n: int
    r: int

    def __str__(self) -> str:
        return f"{self.m} tokens, {self.k} to {self.n}, rank {self.r}"

    def passes(self, over_x: int, over_y: int) -> int:
        """Bytes of so many reads or writes of X [M, K] and of Y [M, N] in bf16."""
        return HALF * self.m * (over_x * self.k + over_y * self.n)


SIZES = (
    Size(8192, 1024, 1024, 16),
    Size(8192, 2048, 2048, 16),
    Size(8192, 4096, 4096, 16),
    Size(8192, 1024, 3072, 16),
)
SMALL = Size(512, 256, 256, 8)  # for a CPU
TINY = Size(16, 32, 32, 8)  # products that take no time, so that calling them is what is timed

# Passes over X and over Y beside the two frozen products, forward and backward together. PEFT writes the low-rank
# term, reads and writes it to scale it, reads both terms and writes their sum, and comes back the same way; in
# float32 every one of these moves twice the bytes, and X and Y are converted on the way. Unsloth's is not timed.
PASSES = {
    "frozen linear": (0, 0),
    "PEFT, bf16 adapter": (1 + 5, 6 + 4),
    "PEFT, fp32 adapter": (5 + 10, 14 + 14),
    "Unsloth, dY B and S computed twice": (1 + 4, 2 + 3),
    "addmm, matmul": (1 + 3, 2 + 2),
    "addmm, skinny": (1 + 3, 2 + 2),
    "seeded, matmul": (1 + 1, 2),
    "seeded, skinny": (1 + 1, 2),
    "strip, matmul": (1, 1),
    "strip, skinny": (1, 1),
    "described, skinny": (1 + 1, 2),
    "described, single": (1 + 1, 2),
}


class Layer(NamedTuple):
    """A frozen linear with its adapter, an input and a gradient of the output."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """Autograd's gradients of x, a and b."""
        return torch.autograd.grad(y, (self.x, self.a, self.b), self.dy)


def layer(size: Size, device: torch.device, factors: torch.dtype | None = None) -> Layer:
    """Random values, bf16 on a GPU and float32 elsewhere; the adapter in its own dtype if one is given."""
    m, k, n, r = size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    a, b = (normal(*shape, std=0.02, dtype=factors or dtype).requires_grad_() for shape in ((r, k), (n, r)))
    return Layer(normal(m, k).requires_grad_(), normal(n, k, std=k**-0.5), a, b, normal(m, n))


def peft(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What PEFT's `Linear.forward` does with one active adapter and no dropout."""
    y = functional.linear(x, weight)
    y = y + functional.linear(functional.linear(x.to(a.dtype), a), b) * SCALE
    return y.to(x.dtype)


def _trained(size: Size, device: torch.device) -> Providers:
    """Forward and backward of a whole layer, by everyone's arithmetic and by each implementation of ours."""
    on_gpu = device.type == "cuda"
    own = layer(size, device)
    x, weight, a, b, dy = (t.detach() for t in own)

    def frozen() -> None:
        functional.linear(x, weight)
        dy @ weight

    def by(impl: Gemm, factors: Factors) -> None:
        _, s = forward_by(impl, x, weight, None, a, b, SCALE)
        backward_by(Route(impl, impl, factors, ""), dy, x, weight, a, b, s, SCALE)

    def autograd(function: Callable[..., Tensor], own: Layer) -> None:
        own.backward(function(own.x, own.weight, own.a, own.b))

    adapter = "bf16" if on_gpu else "fp32"
    calls: dict[str, Call] = {"frozen linear": frozen, f"PEFT, {adapter} adapter": partial(autograd, peft, own)}
    if on_gpu:
        calls["PEFT, fp32 adapter"] = partial(autograd, peft, layer(size, device, torch.float32))
    calls["addmm, matmul"] = partial(by, "addmm", "matmul")  # Unsloth's products, none twice
    if on_gpu and has_triton():
        impls = itertools.product(get_args(Gemm), get_args(Factors))
        calls |= {f"{impl}, {by_}": partial(by, impl, by_) for impl, by_ in impls if f"{impl}, {by_}" in PASSES}
    ours = partial(autograd, lambda x, weight, a, b: lora_linear(x, weight, None, a, b, SCALE), own)
    return {**calls, "cladapt, as dispatched": ours}


def _called(size: Size, device: torch.device) -> Providers:
    """Forward and backward of a layer whose products take no time, `IN_A_ROW` of them."""
    own = layer(size, device)

    def run(function: Callable[..., Tensor]) -> None:
        for _ in range(IN_A_ROW):
            own.backward(function(own.x, own.weight, own.a, own.b))

    ours = partial(run, lambda x, weight, a, b: lora_linear(x, weight, None, a, b, SCALE))
    return {"PEFT": partial(run, peft), "cladapt, as dispatched": ours}


def _compiled(size: Size, device: torch.device) -> Providers:
    """PEFT's arithmetic as it is and as Inductor compiles it; the compilation takes longer than all else together."""
    own = layer(size, device)
    compiled = torch.compile(peft, dynamic=False)

    def run(function: Callable[..., Tensor]) -> None:
        own.backward(function(own.x, own.weight, own.a, own.b))

    return {"PEFT, bf16 adapter": partial(run, peft), "PEFT, bf16 adapter, torch.compile": partial(run, compiled)}


def _compiled_entry(size: Size) -> Entry:
    frozen = Work(4 * size.m * size.k * size.n)
    make = partial(_compiled, size)
    return Entry("lora_linear, compiled", str(size), LORA_TESTS, make, frozen, gpu_only=True)


def _part(size: Size, part: str, device: torch.device) -> Providers:
    """One part of a layer by each implementation, the rest of what is timed with it the same."""
    x, weight, a, b, dy = (t.detach() for t in layer(size, device))
    _, s = forward_by("addmm", x, weight, None, a, b, SCALE)

    def run(impl: str) -> None:
        if part == "forward":
            forward_by(impl, x, weight, None, a, b, SCALE)  # type: ignore[arg-type]
        elif part == "dx":
            backward_by(Route("addmm", impl, "skinny", ""), dy, x, weight, a, b, s, SCALE)  # type: ignore[arg-type]
        else:
            route = Route("addmm", "addmm", impl, "")  # type: ignore[arg-type]
            backward_by(route, dy, x, weight, a, b, s, SCALE, need_dx=False)

    return {impl: partial(run, impl) for impl in IMPLEMENTATIONS[part]}


def _skinny(size: Size, device: torch.device) -> Providers:
    from cladapt_kernels.lora.skinny import single, skinny

    x, _, a, b, dy = (t.detach() for t in layer(size, device, torch.float32))
    s, ds = x @ a.T.to(x.dtype), SCALE * (dy @ b.to(dy.dtype))
    da, db = torch.empty_like(a), torch.empty_like(b)
    return {
        "matmul": lambda: ((ds.T @ x).to(a.dtype), (SCALE * (dy.T @ s)).to(b.dtype)),
        "skinny": lambda: skinny(ds, x, s, dy, SCALE, da, db),
        "single": lambda: single(ds, x, s, dy, SCALE, da, db),
    }


def _shrink(size: Size, device: torch.device) -> Providers:
    from cladapt_kernels.lora.shrink import shrink

    x, _, a, _, _ = (t.detach() for t in layer(size, device))
    return {"matmul": lambda: x @ a.T, "shrink": lambda: shrink(x, a)}


def _lora_entry(size: Size) -> Entry:
    frozen = 4 * size.m * size.k * size.n
    work = {name: Work(frozen, size.passes(*passes)) for name, passes in PASSES.items()}
    return Entry("lora_linear", str(size), LORA_TESTS, partial(_trained, size), Work(frozen), work, gpu_only=True)


def _skinny_entry(size: Size) -> Entry:
    factors = 4 * size.r * (size.k + size.n)
    floor = Work(bytes=size.passes(1, 1) + 2 * HALF * size.m * size.r + factors)
    return Entry("skinny", str(size), SKINNY_TESTS, partial(_skinny, size), floor, gpu_only=True)


def _shrink_entry(size: Size) -> Entry:
    floor = Work(bytes=size.passes(1, 0) + HALF * size.r * (size.m + size.k))
    return Entry("shrink", str(size), SHRINK_TESTS, partial(_shrink, size), floor, gpu_only=True)


ENTRIES = tuple(map(_lora_entry, SIZES))
PARTS = (*map(_skinny_entry, SIZES), *map(_shrink_entry, SIZES[:3]))
"""Kernels by themselves."""
ON_CPU = Entry("lora_linear", str(SMALL), LORA_TESTS, partial(_trained, SMALL))
HOST = Entry("lora_linear, host", str(TINY), LORA_TESTS, partial(_called, TINY))
COMPILED = tuple(map(_compiled_entry, SIZES))
"""PEFT's arithmetic by Inductor, whose compilation takes longer than all else together."""
ROUTES = tuple(
    Entry(f"lora_linear {part}", str(size), LORA_TESTS, partial(_part, size, part), gpu_only=True)
    for size in SIZES
    for part in IMPLEMENTATIONS
)
