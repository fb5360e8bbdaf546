"""Many small steps on Stiefel manifolds at once: orthonormal factors [n, r] stay so, and orthogonal to F [n, k].

    S = X^T D,  Q = D^T D,  C = F^T (X + D),  G = X^T X              one pass over D, X and F
    K = I - sym S (or I - S^T),  M = K^T (G K + S) + S^T K + Q - C^T C = Y^T Y,  R = M^{-1/2}
    X <- [D, X, F] [R; K R; -C R]                                    one pass more, while they lie in the cache

Y = X + tangent(D) is never made. After a tangent step M = I + Xi^T Xi is well conditioned, so R needs a few coupled
Newton-Schulz iterations, whose number follows from a bound of the step, and no SVD. G is not taken for I, nor F^T X
for 0: what rounding takes in one step, the next gives back. `qr` has the inverse of Cholesky's factor instead of R.
Products are in the factors' precision, r x r algebra in float64. A multiplier m of the step scales S, C and Q (twice).

In float32 orthogonality, F^T X and the distance to the exact polar factor are within 1e-6 for steps of spectral norm
to 1, drift over thousands of steps included; beyond, an error of eps t^2 is what any product Y^T Y costs. EBLoRA (arXiv
2602.00722) takes an SVD for the same; the algebra is our own.
"""

from typing import Protocol, get_args

import torch
from torch import Tensor

from cladapt_kernels.retract.options import MOST_ITERATIONS, Factors, Gauge, Kind, Subspaces

CHUNK_BYTES = 8 << 20  # factors, steps and F that are worked on together: they stay in the cache between the passes
HIGHEST_KERNEL_RANK = 64


class _Part(Protocol):
    """Factors that one implementation moves; what its methods do `Stiefel` says."""

    def remember(self, xs: Factors) -> None: ...
    def tangent_(self, xs: Factors, gs: Factors) -> None: ...
    def retract_(self, xs: Factors, multiplier: float) -> None: ...


class Stiefel:
    """Orthonormal factors that move together: tangents of their gradients, retractions of their steps.

    Args:
        xs: tall [n, r], float32 or float64, any strides (of a LoRA A [r, n] the view A.mT). Shapes may all differ; what
            is given later must have the same, its addresses may change.
        fs: orthonormal [n, k] or None for each, with F^T X = 0.
        kind: the tangent map, see `reference.tangent`.
        gauge: the orthonormal matrix at a step's end, see `reference.retract`.
        kernel: take Triton for float32 and ranks to 64, torch for the rest.

    Raises:
        ValueError: factors or subspaces that do not fit.
    """

    def __init__(
        self,
        xs: Factors,
        fs: Subspaces | None = None,
        kind: Kind = "symmetric",
        gauge: Gauge = "polar",
        kernel: bool = False,
    ) -> None:
        fs = [None] * len(xs) if fs is None else fs
        _check(xs, fs, kind, gauge)
        self._shapes = [x.shape for x in xs]
        self._known = False
        alike: dict[tuple[object, ...], list[int]] = {}
        for i, (x, f) in enumerate(zip(xs, fs, strict=True)):
            if kernel and x.dtype == torch.float32 and x.shape[1] <= HIGHEST_KERNEL_RANK:
                key: tuple[object, ...] = ("kernel", x.device)
            else:
                key = (x.shape, 0 if f is None else f.shape[1], _lies_down(x), x.dtype, x.device)
            alike.setdefault(key, []).append(i)
        self._parts: list[tuple[list[int], _Part]] = []
        for key, own in alike.items():
            members, subspaces = [xs[i] for i in own], [fs[i] for i in own]
            self._parts.append((own, _part(key[0] == "kernel", members, subspaces, kind, gauge)))

    @torch.no_grad()
    def remember(self, xs: Factors) -> None:
        """Take xs as the points that the next step leaves from."""
        self._match("factors", xs)
        for own, part in self._parts:
            part.remember([xs[i] for i in own])
        self._known = True

    @torch.no_grad()
    def tangent_(self, xs: Factors, gs: Factors) -> None:
        """gs <- `reference.tangent` of gs at xs, in place; the next step leaves from xs."""
        self._match("factors", xs)
        self._match("gradients", gs)
        for own, part in self._parts:
            part.tangent_([xs[i] for i in own], [gs[i] for i in own])
        self._known = True

    @torch.no_grad()
    def retract_(self, xs: Factors, multiplier: float = 1.0) -> None:
        """xs <- `reference.retract` of multiplier (xs - points) from the points, in place.

        `RuntimeError` where no point is known: each step needs its own.
        """
        if not self._known:
            raise RuntimeError("retract_ does not know where the step began: call tangent_ or remember before it")
        self._match("factors", xs)
        for own, part in self._parts:
            part.retract_([xs[i] for i in own], float(multiplier))
        self._known = False

    def _match(self, name: str, tensors: Factors) -> None:
        if len(tensors) != len(self._shapes):
            raise ValueError(f"{len(tensors)} {name} for {len(self._shapes)} factors")
        for i, (tensor, shape) in enumerate(zip(tensors, self._shapes, strict=True)):
            if tensor.shape != shape:
                raise ValueError(f"{name}[{i}] is {tuple(tensor.shape)}, expected {tuple(shape)}")


def retract(
    xs: Factors,
    ds: Factors,
    fs: Subspaces | None = None,
    kind: Kind = "symmetric",
    gauge: Gauge = "polar",
    multiplier: float = 1.0,
) -> list[Tensor]:
    """`reference.retract` of every factor X [n, r] by multiplier times its step D [n, r]; `Stiefel` says what fits."""
    stiefel = Stiefel(xs, fs, kind, gauge)
    stiefel._match("steps", ds)
    stiefel.remember(xs)
    moved = [x + d for x, d in zip(xs, ds, strict=True)]
    stiefel.retract_(moved, multiplier)
    return moved


def tangent(xs: Factors, ds: Factors, fs: Subspaces | None = None, kind: Kind = "symmetric") -> list[Tensor]:
    """`reference.tangent` of every direction D [n, r] at its factor X [n, r]."""
    stiefel, found = Stiefel(xs, fs, kind), [d.clone() for d in ds]
    stiefel.tangent_(xs, found)
    return found


def _check(xs: Factors, fs: Subspaces, kind: str, gauge: str) -> None:
    if len(xs) != len(fs):
        raise ValueError(f"{len(fs)} protected subspaces for {len(xs)} factors")
    if kind not in get_args(Kind) or gauge not in get_args(Gauge):
        raise ValueError(f"kind {kind!r}, gauge {gauge!r}: expected one of {get_args(Kind)}, of {get_args(Gauge)}")
    for i, (x, f) in enumerate(zip(xs, fs, strict=True)):
        if x.dim() != 2 or x.shape[0] < x.shape[1]:
            raise ValueError(f"factor {i} is {tuple(x.shape)}, expected [n, r] with n >= r")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"factor {i} is {x.dtype}: halves cannot hold orthonormal columns, keep float32")
        if f is not None and (f.dim() != 2 or f.shape[0] != x.shape[0] or f.shape[1] + x.shape[1] > x.shape[0]):
            raise ValueError(f"protected subspace {i} is {tuple(f.shape)}, expected [{x.shape[0]}, k] with room for x")


def _part(kernel: bool, xs: Factors, fs: Subspaces, kind: Kind, gauge: Gauge) -> _Part:
    if kernel:
        from cladapt_kernels.retract.kernels import FusedStiefel

        return FusedStiefel(xs, fs, kind, gauge)
    return _Stack(xs, fs, kind, gauge)


def _lies_down(x: Tensor) -> bool:
    """Whether the columns are what is contiguous, as in a view A.mT."""
    return x.stride(0) == 1


class _Stack:
    """Factors of one shape and storage order as stacks [B, n, r], with F [B, n, k]; all memory is made once."""

    def __init__(self, xs: Factors, fs: Subspaces, kind: Kind, gauge: Gauge) -> None:
        self.kind, self.gauge, like, (n, r) = kind, gauge, xs[0], xs[0].shape
        lies, count = _lies_down(like), len(xs)
        stacks = [like.new_zeros(count, r, n).mT if lies else like.new_zeros(count, n, r) for _ in range(3)]
        self._x, self._d, self._y = stacks
        self._points, self._steps, self._moved = (list(stack.unbind()) for stack in stacks)
        subspaces = [f.to(like) for f in fs if f is not None]
        self._f = torch.stack(subspaces) if subspaces and subspaces[0].shape[1] else None
        self._eye = torch.eye(r, dtype=torch.float64, device=like.device)
        # more than a share of the cache pays where there is none to speak of
        each = like.element_size() * n * (3 * r + (0 if self._f is None else self._f.shape[2]))
        size = max(1, CHUNK_BYTES // each) if like.device.type == "cpu" else count
        self._chunks = [slice(i, i + size) for i in range(0, count, size)]

    def remember(self, xs: Factors) -> None:
        torch._foreach_copy_(self._points, list(xs))

    def tangent_(self, xs: Factors, gs: Factors) -> None:
        self.remember(xs)
        torch._foreach_copy_(self._steps, list(gs))
        for chunk in self._chunks:
            x, d = self._x[chunk], self._d[chunk]
            turn = _rotation(torch.bmm(x.mT, d), self.kind)
            if self._f is not None:
                f = self._f[chunk]
                d.baddbmm_(f, torch.bmm(f.mT, d), alpha=-1)
            d.baddbmm_(x, turn, alpha=-1)
        torch._foreach_copy_(list(gs), self._steps)

    def retract_(self, xs: Factors, multiplier: float) -> None:
        torch._foreach_copy_(self._moved, list(xs))
        for chunk in self._chunks:
            x, d, y = self._x[chunk], self._d[chunk], self._y[chunk]
            torch.sub(y, x, out=d)
            if multiplier != 1.0:
                torch.add(x, d, alpha=multiplier, out=y)
            f = None if self._f is None else self._f[chunk]
            along_x, along_d, along_f = self._weights(x, d, None if f is None else torch.bmm(f.mT, y), multiplier)
            # y is X + multiplier D: what is added to it is small and rounds less
            y.baddbmm_(x, along_x).baddbmm_(d, along_d)
            if f is not None:
                y.baddbmm_(f, along_f, alpha=-1)
        torch._foreach_copy_(list(xs), self._moved)

    def _weights(self, x: Tensor, d: Tensor, c: Tensor | None, multiplier: float) -> tuple[Tensor, Tensor, Tensor]:
        """K R - I, multiplier (R - I) and C R [B, ., r] for C = F^T (X + multiplier D)."""
        gram, s, q = (torch.bmm(a.mT, b).double() for a, b in ((x, x), (x, d), (d, d)))
        s, q = s * multiplier, q * multiplier**2
        c = x.new_zeros(len(x), 0, x.shape[2], dtype=torch.float64) if c is None else c.double()
        k = self._eye - _rotation(s, self.kind)
        m = q.baddbmm_(c.mT, c, alpha=-1).baddbmm_(k.mT, torch.baddbmm(s, gram, k)).baddbmm_(s.mT, k)
        root = inverse_root(m, torch.finfo(x.dtype).eps) if self.gauge == "polar" else _inverse_factor(m)
        parts = (k @ root - self._eye, multiplier * (root - self._eye), c @ root)
        return tuple(part.to(x.dtype) for part in parts)  # type: ignore[return-value]


def _rotation(s: Tensor, kind: Kind) -> Tensor:
    """What the tangent map takes off along X: sym(S), or S^T of the canonical one."""
    return s.mT if kind == "canonical" else 0.5 * (s + s.mT)


def _inverse_factor(m: Tensor) -> Tensor:
    """L^{-T} of M = L L^T, so that Y L^{-T} is the Q of Y."""
    factor = torch.linalg.cholesky(m)
    identity = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m)
    return torch.linalg.solve_triangular(factor, identity, upper=False).mT


def inverse_root(m: Tensor, precision: float) -> Tensor:
    """M^{-1/2} of [B, r, r] with eigenvalues from 1 upwards, up to rounding, by coupled Newton-Schulz iterations.

    A = M / c, c the middle of the bounds [1, ||M||_inf];  Y = A, Z = I;  T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z.
    By eigenvalues where the rounding of M, precision ||M||_inf, might leave one near 0: the iterations would diverge.
    """
    bound = m.abs().sum(-1).amax(-1).clamp_(min=1.0)  # [B], of the largest eigenvalue
    centre = (0.5 * (1.0 + bound))[:, None, None]
    y, identity = m / centre, torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    largest = bound.max().item()
    if precision * largest > 0.01:
        values, vectors = torch.linalg.eigh(m)
        return (vectors * values.clamp_(min=1.0).rsqrt()[:, None, :]) @ vectors.mT
    z = t = torch.sub(1.5 * identity, y, alpha=0.5)
    for _ in range(iterations((largest - 1.0) / (largest + 1.0), precision) - 1):
        y = y @ t
        t = torch.baddbmm(identity, z, y, beta=1.5, alpha=-0.5)
        z = t @ z
    return z * centre.rsqrt()


def iterations(error: float, precision: float) -> int:
    """Newton-Schulz iterations from ||I - A|| = error to below precision: e <- (3 e^2 + e^3) / 4 each."""
    count = 0
    # what one iteration leaves of an error is of second order
    while error > 0.1 * precision and count < MOST_ITERATIONS:
        error = 0.75 * error**2 + 0.25 * error**3
        count += 1
    return count
