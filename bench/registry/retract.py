"""The batched retraction against what takes its place elsewhere: a projection onto the complement of F, then SVD or QR.

All providers take the same steps D of the same factors X, with F [n, k]. The released code of EBLoRA projects twice,
before and after its tangent map. Ours gathers the factors from where they lie and puts them back; the others have them
stacked. The model of bytes on a GPU has everything come from memory once for each pass, in float32: points and values
twice, values written once, F twice.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cladapt_kernels import reference
from cladapt_kernels.retract import Stiefel
from cladapt_kernels.timing import Entry, Providers, Work

TESTS = ("tests/kernels/test_retract.py", "tests/kernels/test_retract_triton.py")
OURS, GRADIENT = "Stiefel", "Stiefel, the gradient's tangent"
SVD, SVD_ONCE, QR = "projections, SVD", "one projection, SVD", "projections, QR"
CHOLESKY = "projections, Cholesky"


def _factors(count: int, n: int, r: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Orthonormal X [count, n, r] and F [count, n, k] with F^T X = 0, and steps D of spectral norm about 0.2."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(count, n, r + k, generator=generator))[0].to(device)
    d = torch.randn(count, n, r, generator=generator).to(device) * (0.2 / (n**0.5 + r**0.5))
    return basis[..., :r].contiguous(), d, basis[..., r:].contiguous() if k else None


def _stepped(x: Tensor, d: Tensor, f: Tensor | None, again: bool) -> Tensor:
    """Y, its second projection where the released code has one."""
    y = x + reference.tangent(x, d, f, "canonical")
    return y - f @ (f.mT @ y) if again and f is not None else y


def _polar(y: Tensor) -> Tensor:
    u, _, w = torch.linalg.svd(y, full_matrices=False)
    return u @ w


def _cholesky(y: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(y.mT @ y)
    return torch.linalg.solve_triangular(factor, y.mT, upper=False).mT


def _retract(count: int, n: int, r: int, k: int, device: torch.device) -> Providers:
    x, d, f = _factors(count, n, r, k, device)
    points, values = list(x.unbind()), list(torch.empty_like(x).unbind())
    stiefel = Stiefel(points, None if f is None else list(f.unbind()), kernel=device.type == "cuda")
    gradients = [step.clone() for step in d]

    def ours() -> None:
        stiefel.remember(points)
        torch._foreach_copy_(values, points)
        torch._foreach_add_(values, gradients)
        stiefel.retract_(values)

    def plain(root: Callable[[Tensor], object], again: bool) -> Callable[[], object]:
        return lambda: root(_stepped(x, d, f, again))

    return {
        SVD: plain(_polar, True),
        SVD_ONCE: plain(_polar, False),
        QR: plain(torch.linalg.qr, True),
        CHOLESKY: plain(_cholesky, True),
        OURS: ours,
        GRADIENT: lambda: stiefel.tangent_(points, gradients),
    }


def _entry(count: int, n: int, r: int, k: int) -> Entry:
    factor, protected = 4 * count * n * r, 4 * count * n * k
    floor = Work(bytes=5 * factor + 2 * protected)
    shape = f"{count} factors of {n} x {r}, k = {k}"
    return Entry("retract", shape, TESTS, partial(_retract, count, n, r, k), floor, {OURS: floor})


ENTRIES = (_entry(224, 1024, 16, 64), _entry(224, 1024, 16, 0), _entry(340, 1024, 16, 64))
