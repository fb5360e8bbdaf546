"""Retraction of many factors at once, against the polar factor of an SVD in float64."""

import math
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from cladapt_kernels import reference
from cladapt_kernels.retract import Gauge, Kind, Stiefel
from cladapt_kernels.retract.stiefel import inverse_root, iterations, retract, tangent

SHAPES = [(40, 1, 3), (40, 5, 0), (64, 8, 16), (64, 8, 16), (300, 33, 20), (48, 16, 32), (7, 7, 0)]  # n, r, k


def factors(
    step: float, dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, int, int]] = SHAPES
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Orthonormal X and F with F^T X = 0, and steps of spectral norm about `step`."""
    generator = torch.Generator().manual_seed(0)
    xs, ds, fs = [], [], []
    for n, r, k in shapes:
        basis = torch.linalg.qr(torch.randn(n, r + k, generator=generator, dtype=torch.float64))[0]
        d = torch.randn(n, r, generator=generator, dtype=torch.float64)
        xs.append(basis[:, :r].contiguous().to(dtype))
        fs.append(basis[:, r:].contiguous().to(dtype) if k else None)
        ds.append((step * d / torch.linalg.matrix_norm(d, 2)).to(dtype))
    return xs, ds, fs


def exact(xs: list[Tensor], ds: list[Tensor], fs: list[Tensor | None], kind: Kind, gauge: Gauge) -> list[Tensor]:
    wide = zip(xs, ds, fs, strict=True)
    return [
        reference.retract(x.double(), d.double(), None if f is None else f.double(), kind, gauge) for x, d, f in wide
    ]


@pytest.mark.parametrize(("step", "limit"), [(1e-6, 1e-6), (0.02, 1e-6), (0.3, 1e-6), (1.0, 1e-6), (2.5, 4e-6)])
@pytest.mark.parametrize("gauge", get_args(Gauge))
@pytest.mark.parametrize("kind", get_args(Kind))
def test_it_is_the_polar_factor_and_orthonormal(kind: Kind, gauge: Gauge, step: float, limit: float) -> None:
    xs, ds, fs = factors(step)
    for x, f, truth in zip(retract(xs, ds, fs, kind, gauge), fs, exact(xs, ds, fs, kind, gauge), strict=True):
        assert x.dtype == torch.float32
        assert (x.double() - truth).abs().max() <= limit
        assert (x.double().mT @ x.double() - torch.eye(x.shape[1])).abs().max() <= limit
        if f is not None:
            assert (f.double().mT @ x.double()).abs().max() <= limit


def test_transposed_storage_and_the_class_give_the_same() -> None:
    xs, ds, fs = factors(0.2)
    stored = [x.mT.contiguous() for x in xs]
    expected = retract(xs, ds, fs)
    stiefel = Stiefel([a.mT for a in stored], fs)
    with pytest.raises(RuntimeError, match="does not know where the step began"):
        stiefel.retract_([a.mT for a in stored])
    grads = [d.mT.contiguous() for d in ds]
    stiefel.tangent_([a.mT for a in stored], [g.mT for g in grads])
    for g, t in zip(grads, tangent(xs, ds, fs), strict=True):
        torch.testing.assert_close(g.mT, t, rtol=0, atol=1e-6)
    for a, d in zip(stored, ds, strict=True):
        a.add_(d.mT)
    stiefel.retract_([a.mT for a in stored])
    for a, x in zip(stored, expected, strict=True):
        torch.testing.assert_close(a.mT, x, rtol=0, atol=1e-6)


def test_in_float64_the_algebra_is_exact() -> None:
    for step in (0.1, 5.0):  # the second is beyond Newton-Schulz
        xs, ds, fs = factors(step, torch.float64)
        for x, truth in zip(retract(xs, ds, fs), exact(xs, ds, fs, "symmetric", "polar"), strict=True):
            torch.testing.assert_close(x, truth, rtol=0, atol=1e-12)


def test_the_multiplier_lengthens_the_step() -> None:
    xs, ds, fs = factors(0.05, torch.float64)
    for one, two in zip(retract(xs, ds, fs, multiplier=4.0), retract(xs, [4 * d for d in ds], fs), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_tangents_are_those_of_the_definition_and_the_symmetric_map_is_a_projection(kind: Kind) -> None:
    xs, ds, fs = factors(0.5, torch.float64)
    once = tangent(xs, ds, fs, kind)
    for x, d, f, found in zip(xs, ds, fs, once, strict=True):
        torch.testing.assert_close(found, reference.tangent(x, d, f, kind), rtol=0, atol=1e-13)
        if f is not None:
            assert (f.mT @ found).abs().max() < 1e-13
    twice = tangent(xs, once, fs, kind)
    same = all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(once, twice, strict=True))
    assert same == (kind == "symmetric")  # the canonical one doubles rotations


def test_nothing_drifts_over_four_thousand_steps() -> None:
    xs, _, fs = factors(0.0, shapes=[(96, 8, 12)] * 2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4000):
        xs = retract(xs, [0.003 * torch.randn(x.shape, generator=generator) for x in xs], fs)
    for x, f in zip(xs, fs, strict=True):
        assert f is not None
        assert (x.double().mT @ x.double() - torch.eye(8)).abs().max() <= 1e-6
        assert (f.double().mT @ x.double()).abs().max() <= 1e-6


@pytest.mark.parametrize(("error", "count"), [(0.0, 0), (1e-8, 0), (1e-5, 1), (0.5, 5), (0.8, 7)])
def test_as_many_iterations_as_the_recursion_needs(error: float, count: int) -> None:
    assert abs(iterations(error, torch.finfo(torch.float32).eps) - count) <= 1
    x = torch.tensor(1.0 - error, dtype=torch.float64)
    m = torch.stack([torch.diag(torch.stack([torch.ones_like(x), 1 / x]))])
    root = inverse_root(m.float(), torch.finfo(torch.float32).eps)[0].diagonal().double()
    torch.testing.assert_close(root, m[0].diagonal().rsqrt(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("largest", [1e3, 1e6, 1e9])
def test_beyond_what_iterations_can_hold_eigenvalues_take_over(largest: float) -> None:
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    values = torch.logspace(0, math.log10(largest), 5, dtype=torch.float64)
    m = (basis * values) @ basis.T
    least = m - 1.5 * torch.outer(basis[:, 0], basis[:, 0])  # rounding took more than there was: -0.5 stands for 1
    precision = torch.finfo(torch.float32).eps
    expected = (basis * values.rsqrt()) @ basis.T
    torch.testing.assert_close(inverse_root(m[None], precision)[0], expected, rtol=0, atol=1e-6)
    if precision * largest > 0.01:
        torch.testing.assert_close(inverse_root(least[None], precision)[0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("step", [1e5, 1e7])
def test_a_step_beyond_any_sane_length_stays_finite(step: float) -> None:
    xs, ds, fs = factors(step)
    assert all(bool(x.isfinite().all()) for x in retract(xs, ds, fs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ds": []}, "0 steps for 1 factors"),
        ({"fs": []}, "0 protected subspaces for 1 factors"),
        (
            {"xs": [torch.zeros(3, 5)], "ds": [torch.zeros(3, 5)]},
            r"factor 0 is \(3, 5\), expected \[n, r\] with n >= r",
        ),
        ({"xs": [torch.zeros(8, 2, dtype=torch.bfloat16)]}, "factor 0 is torch.bfloat16: halves cannot hold"),
        ({"ds": [torch.zeros(8, 3)]}, r"steps\[0\] is \(8, 3\), expected \(8, 2\)"),
        ({"fs": [torch.zeros(7, 3)]}, r"protected subspace 0 is \(7, 3\), expected \[8, k\]"),
        ({"fs": [torch.zeros(8, 7)]}, "with room for x"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, list[Tensor]], message: str) -> None:
    given = {"xs": [torch.eye(8)[:, :2]], "ds": [torch.zeros(8, 2)], "fs": [None]}
    with pytest.raises(ValueError, match=message):
        retract(**{**given, **change})  # type: ignore[arg-type]
