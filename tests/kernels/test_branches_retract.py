"""Every branch of tangents and retractions on chunks of a few rows, ranks of a few columns and both orders."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in triton")
import triton
import triton.language as tl

from cladapt_kernels import factors, reference
from cladapt_kernels.retract import Gauge, Kind, Stiefel, kernels
from cladapt_kernels.retract.stiefel import iterations

ON_GPU = torch.cuda.is_available()
NARROW = ((7, 5, 2, False), (21, 3, 9, True), (9, 6, 0, False))  # n, r, k and whether columns lie together
EVEN = ((8, 4, 4, False), (20, 8, 4, True))
WIDE = ((52, 17, 33, True), (35, 9, 3, False))
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
    monkeypatch.setitem(kernels.TILES, 8, ({"ROWS": 4}, {}, {"ROWS": 4}))


class World:
    """Orthonormal points, subspaces orthogonal to them, and a step of spectral norm `size` from each point."""

    def __init__(self, shapes: tuple[tuple[int, int, int, bool], ...], size: float, device: torch.device, make: Make):
        generator = torch.Generator().manual_seed(0)

        def laid(values: Tensor, columns: bool, gap: int) -> Tensor:
            n, r = values.shape
            strides = (1, n + gap) if columns else (r + gap, 1)
            return make((n, r), torch.float32, device, strides).copy_(values)

        self.points, self.moved, self.fs, self.gradients = [], [], [], []
        for n, r, k, columns in shapes:
            basis = torch.linalg.qr(torch.randn(n, r + k, generator=generator, dtype=torch.float64))[0]
            # not orthonormal to the last digit, as after many steps
            turned = torch.eye(r, dtype=torch.float64) + 3e-5 * torch.randn(r, r, generator=generator)
            point = basis[:, :r] @ turned
            step = torch.randn(n, r, generator=generator, dtype=torch.float64)
            gap = (-n if columns else -r) % 4 + 4  # so that strides are multiples of 4
            self.points.append(laid(point, columns, gap))
            self.moved.append(laid(point + size * step / torch.linalg.matrix_norm(step, 2), columns, gap))
            self.gradients.append(laid(step, not columns, 4 + (-r if columns else -n) % 4))
            f = make((n, k), torch.float32, device) if k else None
            self.fs.append(None if f is None else f.copy_(basis[:, r:]))

    def f(self, i: int) -> Tensor | None:
        f = self.fs[i]
        return None if f is None else f.double()


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


def retracted(world: World, kind: Kind, gauge: Gauge, multiplier: float, limit: float) -> None:
    stiefel = Stiefel(world.moved, world.fs, kind, gauge, kernel=True)
    stiefel.remember(world.points)
    before = [x.double() for x in world.moved]
    points = [x.double() for x in world.points]
    stiefel.retract_(world.moved, multiplier)
    for i, (x, after, found) in enumerate(zip(points, before, world.moved, strict=True)):
        truth = reference.retract(x, multiplier * (after - x), world.f(i), kind, gauge)
        assert (found.double() - truth).abs().max() <= limit
        inner = found.double().mT @ found.double()
        assert (inner - torch.eye(len(inner), device=inner.device)).abs().max() <= 1e-6


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("kind", "gauge", "multiplier", "shapes"),
    [
        ("symmetric", "polar", 2.0, NARROW),
        ("canonical", "polar", 0.5, EVEN),
        ("canonical", "qr", 2.0, NARROW),
    ],
)
def test_retractions_are_those_of_float64(
    kind: Kind, gauge: Gauge, multiplier: float, shapes: tuple[tuple[int, int, int, bool], ...], device: torch.device,
    guarded: Make,
) -> None:  # fmt: skip
    retracted(World(shapes, 0.4, device, guarded), kind, gauge, multiplier, 1e-6)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("start", "gap"), [(1, 0), (0, 1)])
def test_factors_that_lie_off_sixteen_bytes(start: int, gap: int, device: torch.device, guarded: Make) -> None:
    world = World(EVEN[:1], 0.4, device, shifted(guarded, start, gap))
    retracted(world, "symmetric", "qr", 1.0, 1e-6)


@pytest.mark.parametrize(("gauge", "size"), [("polar", 0.3), ("qr", 0.3)])
def test_retractions_of_ranks_that_are_multiplied_by_way_of_memory(
    gauge: Gauge, size: float, device: torch.device, guarded: Make
) -> None:
    retracted(World(WIDE, size, device, guarded), "symmetric", gauge, 1.0, 1e-6)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [1e-3, 4.0])
def test_short_and_long_steps(size: float, device: torch.device, guarded: Make) -> None:
    retracted(World(NARROW[:1], size, device, guarded), "symmetric", "polar", 1.0, 1e-6 * max(1.0, size))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["symmetric", "canonical"])
def test_tangents_are_those_of_float64(kind: Kind, device: torch.device, guarded: Make) -> None:
    world = World(NARROW, 0.4, device, guarded)
    fused = Stiefel(world.points, world.fs, kind, kernel=True)
    before = [g.double() for g in world.gradients]
    fused.tangent_(world.points, world.gradients)
    ((_, part),) = fused._parts
    for i, (x, d, found) in enumerate(zip(world.points, before, world.gradients, strict=True)):
        truth = reference.tangent(x.double(), d, world.f(i), kind)
        assert (found.double() - truth).abs().max() <= 2e-6 * d.abs().max()
        assert torch.equal(part._points[i], x)


def test_a_kernel_that_multiplies_by_way_of_memory_reads_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[int] = []

    class Noted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **options: stages.append(options.get("num_stages", 0))

    for name in ("_products", "apply", "_weights"):
        monkeypatch.setattr(kernels, name, Noted() if name == "_weights" else {(1,): lambda *_, **__: None})
    for rank in (17, 33, 64):  # above 16, `product` goes by way of memory
        x = torch.eye(80)[:, :rank].contiguous()
        Stiefel([x], [None], kernel=True).tangent_([x], [x.clone()])
    assert stages == [1, 1, 1]


@triton.jit
def _root(excess, found, RANK: tl.constexpr):
    place = tl.arange(0, RANK)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    eye = (tl.arange(0, RANK)[:, None] == tl.arange(0, RANK)[None, :]).to(tl.float32)
    tl.store(found + place, kernels._inverse_root(tl.load(excess + place), eye, found, RANK, RANK, 40))


@pytest.mark.parametrize("excess", [0.0, 1e-4, 0.1, 2.0, 30.0, 1e6])
def test_an_inverse_root_takes_as_many_iterations_as_its_bound_asks_for(
    excess: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = 16
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(0)).double())[0]
    values = torch.linspace(0, excess, rank, dtype=torch.float64)
    given = ((basis * values) @ basis.T).float()
    products = 0

    def counted(*args: object) -> object:
        nonlocal products
        products += 1
        return ordinary(*args)

    if not ON_GPU:
        ordinary = kernels.product
        monkeypatch.setattr(kernels, "product", counted)
    found = torch.empty(rank, rank, device=device)
    _root[(1,)](given.to(device), found, RANK=rank)
    truth = (basis * ((1 + values).rsqrt() - 1)) @ basis.T
    # the last step gives E its own digits, where those of I + E end
    torch.testing.assert_close(
        found.double().cpu(), truth, rtol=0, atol=(1e-3 if excess > 1e3 else 4e-6) * float(truth.abs().max())
    )
    if not ON_GPU:  # three products each, and three of the last step of Newton
        bound = (torch.eye(rank) + given).abs().sum(1).max().item()
        assert products == 3 * iterations((bound - 1) / (bound + 1), 1e-7) + 3
