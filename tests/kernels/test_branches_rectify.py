"""Every branch of rectifications on chunks of a few rows, ranks of a few columns and both orders."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in triton")
import triton
import triton.language as tl

from cladapt_kernels import factors, reference
from cladapt_kernels.rectify import Form, Gauge, Rectifier, kernels

ON_GPU = torch.cuda.is_available()
# m, n, r, k and whether the columns of A^T and of B lie together
NARROW = (
    (9, 21, 5, 9, True, False),
    (21, 8, 3, 2, False, True),
    (8, 9, 6, 0, True, False),
    (12, 20, 4, 11, True, True),
)
EVEN = ((8, 20, 4, 4, True, False), (20, 8, 8, 4, False, True))
WIDE = ((35, 52, 17, 33, True, False), (19, 20, 3, 5, False, False))
Shapes = tuple[tuple[int, int, int, int, bool, bool], ...]
Make = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("observer", "outputs")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of several tiles, ranks and subspaces of several blocks; a GPU multiplies nothing that small."""
    if ON_GPU:
        return
    monkeypatch.setattr(factors, "padded", lambda rank: 8)
    monkeypatch.setattr(factors, "CHUNK_ROWS", 8)
    monkeypatch.setattr(factors, "BLOCK_K", 4)
    monkeypatch.setitem(kernels.TILES, 8, ({"ROWS": 4}, {}, {}, {"ROWS": 4}))


class World:
    """Well-conditioned factors, one B small and one 0, subspaces that A sees unless the form forbids it, and steps."""

    def __init__(self, shapes: Shapes, form: Form, device: torch.device, make: Make) -> None:
        generator = torch.Generator().manual_seed(0)

        def laid(values: Tensor, columns: bool, gap: int) -> Tensor:
            n, r = values.shape
            strides = (1, n + gap) if columns else (r + gap, 1)
            return make((n, r), torch.float32, device, strides).copy_(values)

        def conditioned(n: int, r: int) -> Tensor:
            basis = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))[0]
            return basis * torch.linspace(0.5, 1.5, r, dtype=torch.float64)

        self.points: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.moved: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.vs: list[Tensor | None] = []
        for i, (m, n, r, k, down_columns, up_columns) in enumerate(shapes):
            v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
            a, b = conditioned(n, r), conditioned(m, r) * (1.0, 0.3, 0.0)[i % 3]
            if form == "invariant":
                a = a - 0.99 * v @ (v.T @ a)  # what is left is taken off
            for own, moved, point, columns in zip(
                self.points, self.moved, (a, b), (down_columns, up_columns), strict=True
            ):
                step = torch.randn(point.shape, generator=generator, dtype=torch.float64)
                gap = (-len(point) if columns else -r) % 4 + 4  # so that strides are multiples of 4
                own.append(laid(point, columns, gap))
                moved.append(laid(point + 0.4 * step / torch.linalg.matrix_norm(step, 2), columns, gap))
            kept = make((n, k), torch.float32, device) if k else None
            self.vs.append(None if kept is None else kept.copy_(v))
        for lists in (self.points, self.moved):  # of tall A^T
            lists[0][:] = [a.mT for a in lists[0]]


def shifted(make: Make, start: int, gap: int) -> Make:
    """Views that start off sixteen bytes, or whose rows do."""

    def made(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strides: tuple[int, ...] = ()) -> Tensor:
        n, r = shape
        if not strides:  # a subspace, which is copied
            return make(shape, dtype, device)
        whole = make((n * r * 4 + 64,), dtype, device)
        wide = tuple(stride if stride == 1 else stride + gap for stride in strides)
        return whole.as_strided(shape, wide, whole.storage_offset() + start)

    return made


def rectified(world: World, form: Form, gauge: Gauge, limit: float = 1.5e-6) -> None:
    rectifier = Rectifier(*world.points, world.vs, form, gauge, 0.05, kernel=True)
    rectifier.remember(*world.points)
    before = [[x.double() for x in own] for own in world.moved]
    rectifier.rectify_(*world.moved)
    for i, (a, b, v) in enumerate(zip(*world.points, world.vs, strict=True)):
        a, b = a.double(), b.double()
        wide = None if v is None else v.double()
        steps = reference.rectify(a, b, before[0][i] - a, before[1][i] - b, wide, form, gauge, 0.05)
        for point, step, found in zip((a, b), steps, (world.moved[0][i], world.moved[1][i]), strict=True):
            assert (found.double() - point - step).abs().max() <= limit, f"module {i}"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("form", "gauge", "shapes"),
    [
        ("least_squares", "balanced", NARROW),
        ("least_squares", "zero", EVEN),
        ("invariant", "zero", NARROW),
        ("invariant", "balanced", NARROW[:3]),
        ("exact", "zero", NARROW),
        ("exact", "sylvester", NARROW),
        ("least_squares", "sylvester", NARROW[:2]),
        ("invariant", "sylvester", EVEN),
    ],
)
def test_rectified_steps_are_those_of_float64(
    form: Form, gauge: Gauge, shapes: Shapes, device: torch.device, guarded: Make
) -> None:
    rectified(World(shapes, form, device, guarded), form, gauge)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("start", "gap"), [(1, 0), (0, 1)])
def test_factors_that_lie_off_sixteen_bytes(start: int, gap: int, device: torch.device, guarded: Make) -> None:
    rectified(World(EVEN[:1], "invariant", device, shifted(guarded, start, gap)), "invariant", "zero")


@pytest.mark.parametrize(
    ("form", "gauge"), [("least_squares", "balanced"), ("invariant", "balanced"), ("exact", "zero")]
)
def test_ranks_that_are_multiplied_by_way_of_memory(
    form: Form, gauge: Gauge, device: torch.device, guarded: Make
) -> None:
    rectified(World(WIDE if form != "invariant" else WIDE[:1], form, device, guarded), form, gauge, 2e-6)


@pytest.mark.usefixtures("small")
def test_columns_that_rounding_alone_holds_apart(device: torch.device, guarded: Make) -> None:
    world = World(EVEN[:1] * 6, "least_squares", device, guarded)
    for point, moved in zip(world.points[1], world.moved[1], strict=True):
        moved[:, 2:] += point[:, :2] - point[:, 2:]
        point[:, 2:] = point[:, :2]  # the last pivots of B^T B are rounding, of either sign
    before = [[x.double() for x in own] for own in world.moved]
    rectifier = Rectifier(*world.points, world.vs, "least_squares", "balanced", 1e-8, kernel=True)
    rectifier.remember(*world.points)
    rectifier.rectify_(*world.moved)
    for i, v in enumerate(world.vs):
        assert v is not None
        a, b = (own[i].double() for own in world.points)
        given = (a, b, before[0][i] - a, before[1][i] - b, v.double())
        expected_x, expected_y = reference.rectify(*given, "least_squares", "zero", 1e-8)
        x, y = (own[i].double() - point for own, point in zip(world.moved, (a, b), strict=True))
        assert x.norm() + y.norm() < 100
        torch.testing.assert_close(b @ x + y @ a, b @ expected_x + expected_y @ a, rtol=0, atol=1e-4)


def test_a_kernel_that_multiplies_by_way_of_memory_reads_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[int] = []

    class Noted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **options: stages.append(options.get("num_stages", 0))

    for name in ("_products", "_sums", "apply", "_weights"):
        monkeypatch.setattr(kernels, name, Noted() if name == "_weights" else Nothing())
    for rank in (17, 33, 64):  # above 16, `product` goes by way of memory
        a, b = torch.eye(80)[:rank], torch.eye(80)[:, :rank].contiguous()
        rectifier = Rectifier([a], [b], kernel=True)
        rectifier.remember([a], [b])
        rectifier.rectify_([a], [b])
    assert stages == [1, 1, 1]


class Nothing:
    """A kernel that is not launched."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


@triton.jit
def _inverted(m, found, r, least, RANK: tl.constexpr):
    place = tl.arange(0, RANK)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    eye = (tl.arange(0, RANK)[:, None] == tl.arange(0, RANK)[None, :]).to(tl.float32)
    tl.store(found + place, factors.inverse_factor(tl.load(m + place), eye, r, least, RANK))


@pytest.mark.parametrize("least", [0.0, 1e-3])
def test_a_pivot_that_rounding_took_is_the_least_there_can_be(least: float, device: torch.device) -> None:
    low = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.5, 0.0], [-1.0, 1.0, 0.25]], dtype=torch.float64)
    m = torch.eye(16)
    m[:3, :3] = low @ low.T
    if least:
        m[2, 2] -= 0.0625 + 1e-4  # what is left of the last pivot is below 0
        low[2, 2] = least**0.5
    found = torch.empty(16, 16, device=device)
    _inverted[(1,)](m.to(device), found, 3, least, RANK=16)
    expected = torch.eye(16, dtype=torch.float64)
    expected[:3, :3] = torch.linalg.inv(low).T
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)
