"""The batched rectification against loops over modules: least squares on the composite step, or pseudo-inverses.

All providers rectify the same steps of the same factors. Two loops make T = (B dA + dB A)(I - V V^T) [m, n] and solve
B X = T, then Y A = T - B X; the third has the factor-only form, as one would write it down. Ours adds steps, gathers
the factors from where they lie and puts them back. The model of bytes on a GPU has everything come from memory once for
each pass, in float32: points and values twice, values written once, V twice.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cladapt_kernels.rectify import Form, Gauge, Rectifier
from cladapt_kernels.timing import Entry, Providers, Work

TESTS = ("tests/kernels/test_rectify.py", "tests/kernels/test_rectify_triton.py")
LSTSQ, PINV, FACTORS = "loop, composite, lstsq", "loop, composite, pinv", "loop, factors, pinv"
LEAST, OURS = "Rectifier, least squares", "Rectifier, invariant"
EXACT, SYLVESTER = "Rectifier, exact", "Rectifier, invariant, Sylvester"
Module = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _modules(count: int, m: int, n: int, r: int, k: int, device: torch.device) -> list[Module]:
    """A with A V = 0, B, steps of a hundredth of them, V."""
    generator = torch.Generator().manual_seed(0)
    v = torch.linalg.qr(torch.randn(count, n, k, generator=generator))[0]
    a, b, da, db = (torch.randn(count, *shape, generator=generator) for shape in ((r, n), (m, r), (r, n), (m, r)))
    a = a - a @ v @ v.mT
    columns = (a, b, 0.01 * da, 0.01 * db, v)
    return list(zip(*(list(t.to(device).unbind()) for t in columns), strict=True))


def _composite(a: Tensor, b: Tensor, da: Tensor, db: Tensor, v: Tensor) -> Tensor:
    t = b @ da + db @ a
    return t - (t @ v) @ v.T


def _lstsq(a: Tensor, b: Tensor, da: Tensor, db: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    t = _composite(a, b, da, db, v)
    x = torch.linalg.lstsq(b, t).solution
    return x, torch.linalg.lstsq(a.T, (t - b @ x).T).solution.T


def _pinv(a: Tensor, b: Tensor, da: Tensor, db: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    t = _composite(a, b, da, db, v)
    x = torch.linalg.pinv(b) @ t
    return x, (t - b @ x) @ torch.linalg.pinv(a)


def _factors(a: Tensor, b: Tensor, da: Tensor, db: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    av, k = a @ v, torch.linalg.pinv(b) @ db
    x = da - (da @ v) @ v.T + k @ (a - av @ v.T)
    y = db - b @ k
    return x, y - y @ av @ (v.T @ torch.linalg.pinv(a))


def _rectify(count: int, m: int, n: int, r: int, k: int, device: torch.device) -> Providers:
    modules = _modules(count, m, n, r, k, device)
    downs, ups, down_steps, up_steps, vs = (list(column) for column in zip(*modules, strict=True))
    values = [torch.empty_like(factor) for factor in (*downs, *ups)]

    def ours(form: Form, gauge: Gauge = "zero") -> Callable[[], object]:
        rectifier = Rectifier(downs, ups, vs, form, gauge, kernel=device.type == "cuda")

        def step() -> list[tuple[Tensor, Tensor]]:
            rectifier.remember(downs, ups)
            torch._foreach_copy_(values, [*downs, *ups])
            torch._foreach_add_(values, [*down_steps, *up_steps])
            rectifier.rectify_(values[:count], values[count:])
            return list(zip(values[:count], values[count:], strict=True))

        return step

    return {
        LSTSQ: lambda: [_lstsq(*module) for module in modules],
        PINV: lambda: [_pinv(*module) for module in modules],
        FACTORS: lambda: [_factors(*module) for module in modules],
        LEAST: ours("least_squares"),
        OURS: ours("invariant"),
        EXACT: ours("exact"),
        SYLVESTER: ours("invariant", "sylvester"),
    }


def _entry(count: int, m: int, n: int, r: int, k: int) -> Entry:
    factors, protected = 4 * count * (m + n) * r, 4 * count * n * k
    floor = Work(bytes=5 * factors + 2 * protected)
    shape = f"{count} modules of {n} to {m}, rank {r}, k = {k}"
    return Entry("rectify", shape, TESTS, partial(_rectify, count, m, n, r, k), floor, {OURS: floor, LEAST: floor})


ENTRIES = (_entry(24, 768, 768, 10, 64), _entry(112, 1024, 1024, 16, 64), _entry(112, 256, 256, 16, 32))
