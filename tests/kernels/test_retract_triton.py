"""The launches of tangents and retractions: against float64 and float32 torch, neighbours, orders, addresses."""

from collections.abc import Callable, Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in triton")

from cladapt_kernels import factors, reference
from cladapt_kernels.retract import Gauge, Kind, Stiefel, kernels

# n, r, k; every other one is stored as its transpose
NARROW = ((7, 1, 0), (7, 5, 2), (63, 16, 3), (130, 5, 64), (300, 16, 64), (300, 1, 3))
WIDE = ((63, 33, 3), (130, 16, 0), (130, 33, 70))
Make = Callable[..., Tensor]


class World:
    """Orthonormal factors in both orders, the subspaces they keep out of, and a step of spectral norm `size` each."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], size: float, device: torch.device, make: Make) -> None:
        generator, self._make, self._device = torch.Generator().manual_seed(0), make, device
        self.points: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.fs: list[Tensor | None] = []
        for n, r, k in shapes:
            basis = torch.linalg.qr(torch.randn(n, r + k, generator=generator, dtype=torch.float64))[0]
            d = torch.randn(n, r, generator=generator, dtype=torch.float64)
            self.points.append(basis[:, :r].float().to(device))
            self.steps.append((size * d / torch.linalg.matrix_norm(d, 2)).float().to(device))
            f = make((n, k), torch.float32, device) if k else None
            self.fs.append(None if f is None else f.copy_(basis[:, r:]))

    def laid(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies with NaN around them, every other one of contiguous columns."""
        made = []
        for i, t in enumerate(tensors):
            n, r = t.shape
            # one longer than they need be: what lies between must stay as it was
            strides = (1, n + 1) if i % 2 else (r + 3, 1)
            made.append(self._make((n, r), torch.float32, self._device, strides).copy_(t))
        return made

    def moved(self) -> list[Tensor]:
        return self.laid([x + d for x, d in zip(self.points, self.steps, strict=True)])

    def truth(self, moved: Sequence[Tensor], kind: Kind, gauge: Gauge, multiplier: float) -> list[Tensor]:
        found = []
        for x, after, f in zip(self.points, moved, self.fs, strict=True):
            step, wide = multiplier * (after.double() - x.double()), None if f is None else f.double()
            found.append(reference.retract(x.double(), step, wide, kind, gauge))
        return found

    def retracted(self, kernel: bool, kind: Kind = "symmetric", gauge: Gauge = "polar", m: float = 1.0) -> list[Tensor]:
        moved = self.moved()
        stiefel = Stiefel(moved, self.fs, kind, gauge, kernel)
        stiefel.remember(self.laid(self.points))
        stiefel.retract_(moved, m)
        return moved


def launched(stiefel: Stiefel) -> kernels.FusedStiefel:
    ((_, part),) = stiefel._parts
    assert isinstance(part, kernels.FusedStiefel)
    return part


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_subspaces_of_another_dtype_are_those_values_in_float32(
    dtype: torch.dtype, device: torch.device, guarded: Make
) -> None:
    world = World(((63, 16, 3), (7, 5, 2)), 0.3, device, guarded)
    given = [None if f is None else f.to(dtype) for f in world.fs]
    world.fs = [None if f is None else f.float() for f in given]
    expected = world.retracted(kernel=True)
    world.fs = list(given)
    for found, other in zip(world.retracted(kernel=True), expected, strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize("shapes", [NARROW, WIDE])
@pytest.mark.parametrize("gauge", get_args(Gauge))
@pytest.mark.parametrize("kind", get_args(Kind))
def test_retractions_are_as_near_float64_as_torch_s_and_touch_nothing_else(
    kind: Kind, gauge: Gauge, shapes: Sequence[tuple[int, int, int]], device: torch.device, guarded: Make,
    within_budget: Callable[..., None],
) -> None:  # fmt: skip
    world = World(shapes, 0.3, device, guarded)
    exact = world.truth(world.moved(), kind, gauge, 2.0)
    both = (world.retracted(kernel, kind, gauge, 2.0) for kernel in (True, False))
    for i, (ours, theirs, truth) in enumerate(zip(*both, exact, strict=True)):
        within_budget(f"factor {i}", ours, truth, theirs, size=torch.ones(()))
        inner = ours.double().mT @ ours.double()
        assert (inner - torch.eye(len(inner), device=device)).abs().max() <= 1e-6
        f = world.fs[i]
        assert f is None or (f.double().mT @ ours.double()).abs().max() <= 1e-6


@pytest.mark.parametrize(("size", "limit"), [(1e-6, 5e-7), (1.0, 1e-6), (8.0, 1e-5)])
def test_iterations_follow_the_step_s_length(size: float, limit: float, device: torch.device, guarded: Make) -> None:
    world = World([(40, 5, 3), (40, 8, 0)], size, device, guarded)
    exact = world.truth(world.moved(), "symmetric", "polar", 1.0)
    for ours, truth in zip(world.retracted(True), exact, strict=True):
        assert (ours.double() - truth).abs().max() <= limit


@pytest.mark.parametrize("shapes", [NARROW, WIDE])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_tangents_are_those_of_the_definition_and_the_step_leaves_from_their_point(
    kind: Kind, shapes: Sequence[tuple[int, int, int]], device: torch.device, guarded: Make,
    within_budget: Callable[..., None],
) -> None:  # fmt: skip
    world = World(shapes, 0.3, device, guarded)
    ours, theirs = world.laid(world.steps), world.laid(world.steps)
    xs = world.laid(world.points)
    fused = Stiefel(xs, world.fs, kind, kernel=True)
    fused.tangent_(xs, ours)
    Stiefel(xs, world.fs, kind).tangent_(xs, theirs)
    for i, (x, d, f) in enumerate(zip(world.points, world.steps, world.fs, strict=True)):
        truth = reference.tangent(x.double(), d.double(), None if f is None else f.double(), kind)
        within_budget(f"tangent {i}", ours[i], truth, theirs[i], size=d.abs().max())
        assert torch.equal(xs[i], x)
        assert torch.equal(launched(fused)._points[i], x)


def test_two_runs_are_equal_bit_for_bit_and_chunks_are_only_another_order(
    device: torch.device, guarded: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World([(300, 5, 20)], 0.3, device, guarded)
    (one,), (two,) = world.retracted(True), world.retracted(True)
    assert torch.equal(one, two)
    monkeypatch.setattr(factors, "CHUNK_ROWS", 64)
    torch.testing.assert_close(world.retracted(True)[0], one, rtol=0, atol=3e-7)


def test_tables_are_made_anew_only_where_an_address_changed(device: torch.device, guarded: Make) -> None:
    world = World([(40, 5, 3)], 0.1, device, guarded)
    moved = world.moved()
    stiefel = Stiefel(moved, world.fs, kernel=True)
    tables = []
    for xs in (moved, moved, world.moved()):
        stiefel.remember(world.points)
        stiefel.retract_(xs)
        tables.append(launched(stiefel)._tables[False][1])
    assert tables[0] is tables[1]
    assert tables[1] is not tables[2]
    torch.testing.assert_close(xs[0], world.retracted(False)[0], rtol=0, atol=1e-6)


def test_writes_are_seen_by_autograd(device: torch.device) -> None:
    world = World(
        [(40, 5, 0)], 0.1, device, lambda shape, dtype, device, strides=None: torch.empty(shape, device=device)
    )
    moved = world.moved()
    stiefel = Stiefel(moved, kernel=True)
    stiefel.remember(world.points)
    before = moved[0]._version
    stiefel.retract_(moved)
    assert moved[0]._version > before


def test_float64_and_high_ranks_go_torch_s_way(device: torch.device) -> None:
    wide, double = torch.eye(70, device=device), torch.eye(4, dtype=torch.float64, device=device)[:, :2]
    stiefel = Stiefel([wide, double, torch.eye(4, device=device)[:, :2]], kernel=True)
    kinds = {own[0]: type(part) for own, part in stiefel._parts}
    assert [kinds[i] is kernels.FusedStiefel for i in range(3)] == [False, False, True]


def test_a_factor_without_a_contiguous_side_is_told(device: torch.device) -> None:
    x = torch.eye(8, device=device)[:, :2]
    stiefel = Stiefel([x], kernel=True)
    stiefel.remember([x])
    with pytest.raises(ValueError, match=r"factor 0 is torch.float32 of strides \(16, 2\), expected float32, one side"):
        stiefel.retract_([torch.zeros(8, 16, device=device)[:, :4:2]])


def test_retractions_are_launched_on_the_device_of_their_tensors(
    device: torch.device, guarded: Make, launched_inside: list[str]
) -> None:
    World(((7, 5, 2),), 0.3, device, guarded).retracted(kernel=True)
    assert launched_inside == ["_products", "_weights", "apply"]
