"""The launches of rectifications: against float64 and float32 torch, neighbours, orders, addresses."""

from collections.abc import Callable, Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in triton")

from cladapt_kernels import factors, reference
from cladapt_kernels.rectify import Form, Gauge, Rectifier, kernels

# m, n, r, k; every other factor is stored as its transpose
NARROW = ((7, 9, 1, 0), (63, 7, 5, 2), (1, 130, 5, 64), (300, 63, 16, 3), (20, 16, 5, 11), (3, 6, 8, 2), (1, 300, 1, 3))
WIDE = ((63, 130, 33, 3), (130, 63, 16, 0), (40, 130, 33, 70), (1000, 1, 1, 0))
FORMS: list[tuple[Form, Gauge]] = [(form, gauge) for form in get_args(Form) for gauge in get_args(Gauge)]
Make = Callable[..., Tensor]


class World:
    """Factors in both orders, the subspaces they keep out of, and steps."""

    def __init__(self, shapes: Sequence[tuple[int, int, int, int]], form: Form, device: torch.device, make: Make):
        generator, self._make, self._device = torch.Generator().manual_seed(0), make, device
        self.points: list[list[Tensor]] = [[], []]
        self.steps: list[list[Tensor]] = [[], []]
        self.vs: list[Tensor | None] = []
        for m, n, r, k in shapes:
            a, b, da, db, v = (
                torch.randn(*shape, generator=generator, dtype=torch.float64)
                for shape in ((r, n), (m, r), (r, n), (m, r), (n, k))
            )
            v = torch.linalg.qr(v)[0]
            a = a - a @ v @ v.T if form == "invariant" else a
            for own, factor in zip((*self.points, *self.steps), (a, b, 0.1 * da, 0.1 * db), strict=True):
                own.append(factor.float().to(device))
            kept = make((n, k), torch.float32, device) if k else None
            self.vs.append(None if kept is None else kept.copy_(v))

    def laid(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies with NaN around them, every other one of contiguous columns."""
        made = []
        for i, t in enumerate(tensors):
            rows, columns = t.shape
            # one longer than they need be: what lies between must stay as it was
            strides = (1, rows + 1) if i % 2 else (columns + 3, 1)
            made.append(self._make((rows, columns), torch.float32, self._device, strides).copy_(t))
        return made

    def moved(self) -> tuple[list[Tensor], list[Tensor]]:
        first, second = (
            self.laid([x + d for x, d in zip(xs, ds, strict=True)])
            for xs, ds in zip(self.points, self.steps, strict=True)
        )
        return first, second

    def truth(self, form: Form, gauge: Gauge, damping: float) -> list[list[Tensor]]:
        """A + X, then B + Y, in float64."""
        found: list[list[Tensor]] = [[], []]
        for a, b, down, up, v in zip(*self.points, *self.moved(), self.vs, strict=True):
            a, b, wide = a.double(), b.double(), None if v is None else v.double()
            steps = reference.rectify(a, b, down.double() - a, up.double() - b, wide, form, gauge, damping)
            for own, point, step in zip(found, (a, b), steps, strict=True):
                own.append(point + step)
        return found

    def rectified(self, kernel: bool, form: Form, gauge: Gauge, damping: float) -> tuple[list[Tensor], list[Tensor]]:
        moved = self.moved()
        rectifier = Rectifier(*moved, self.vs, form, gauge, damping, kernel)
        rectifier.remember(self.laid(self.points[0]), self.laid(self.points[1]))
        rectifier.rectify_(*moved)
        return moved


def launched(rectifier: Rectifier) -> kernels.FusedRectifier:
    ((_, part),) = rectifier._parts
    assert isinstance(part, kernels.FusedRectifier)
    return part


@pytest.mark.parametrize(
    ("form", "gauge", "shapes"),
    [
        *((form, gauge, NARROW) for form, gauge in FORMS),
        *((form, gauge, WIDE) for form, gauge in (FORMS[1], FORMS[5], FORMS[6])),
    ],
)
def test_rectified_steps_are_as_near_float64_as_torch_s_and_touch_nothing_else(
    form: Form, gauge: Gauge, shapes: Sequence[tuple[int, int, int, int]], device: torch.device, guarded: Make,
    within_budget: Callable[..., None],
) -> None:  # fmt: skip
    world = World(shapes, form, device, guarded)
    exact = world.truth(form, gauge, 1e-2)
    both = [world.rectified(kernel, form, gauge, 1e-2) for kernel in (True, False)]
    for name, ours, theirs, truths in zip("AB", *both, exact, strict=True):
        for i, (own, other, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
            # inverses amplify sums of another order, and some BLAS sum more exactly than others
            within_budget(f"{name} of module {i}", own, truth, other, size=truth.abs().max(), times=3.0)
    for a, b, old_a, old_b, v in zip(*both[0], *world.points, world.vs, strict=True):
        if v is None or form == "least_squares":
            continue
        a, b, old_a, old_b, v = (t.double() for t in (a, b, old_a, old_b, v))
        assert ((b @ a - old_b @ old_a) @ v).norm() <= 1e-6 * old_b.norm() * old_a.norm()
        if form == "invariant":
            assert (a @ v).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize(("form", "gauge"), FORMS)
def test_a_fresh_adapter_and_one_of_zeros_alone_stay_finite(
    form: Form, gauge: Gauge, device: torch.device, guarded: Make
) -> None:
    world = World(((40, 30, 5, 3), (40, 30, 5, 3)), form, device, guarded)
    world.points[1] = [0 * b for b in world.points[1]]
    world.points[0][1] *= 0
    for damping in (1e-6, 0.0) if (form, gauge) == ("invariant", "zero") else (1e-6,):
        (a, empty), (b, _) = world.rectified(True, form, gauge, damping)
        (da, other), _ = world.steps
        for found, point, step, v in ((a, world.points[0][0], da, world.vs[0]), (empty, 0 * other, other, world.vs[1])):
            assert v is not None
            torch.testing.assert_close(found, point + step - step @ v @ v.T, rtol=0, atol=1e-6)
        expected = world.truth(form, gauge, 1e-6)[1][0]
        torch.testing.assert_close(b.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gauge", ["balanced", "sylvester"])
def test_two_runs_are_equal_bit_for_bit_and_chunks_are_only_another_order(
    gauge: Gauge, device: torch.device, guarded: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World([(300, 130, 5, 20)], "least_squares", device, guarded)
    runs = [world.rectified(True, "least_squares", gauge, 1e-6) for _ in range(2)]
    monkeypatch.setattr(factors, "CHUNK_ROWS", 64)
    near = world.rectified(True, "least_squares", gauge, 1e-6)
    for (one,), (two,), (other,) in zip(*runs, near, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(other, one, rtol=0, atol=2e-6)


def test_modules_do_not_depend_on_their_neighbours(device: torch.device, guarded: Make) -> None:
    for form, gauge in (FORMS[1], FORMS[5]):
        together, alone = (World(NARROW[:4], form, device, guarded) for _ in range(2))
        a, b = together.rectified(True, form, gauge, 1e-2)
        for own in (*alone.points, *alone.steps, alone.vs):
            del own[:3]
        (one,), (two,) = alone.rectified(True, form, gauge, 1e-2)
        torch.testing.assert_close(one, a[3], rtol=0, atol=1e-6)
        torch.testing.assert_close(two, b[3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_subspaces_of_another_dtype_are_those_values_in_float32(
    dtype: torch.dtype, device: torch.device, guarded: Make
) -> None:
    world = World(((40, 63, 5, 3),), "least_squares", device, guarded)
    given = [None if v is None else v.to(dtype) for v in world.vs]
    world.vs = [None if v is None else v.float() for v in given]
    expected = world.rectified(True, "least_squares", "zero", 1e-6)
    world.vs = list(given)
    for (found,), (other,) in zip(world.rectified(True, "least_squares", "zero", 1e-6), expected, strict=True):
        assert torch.equal(found, other)


def test_tables_are_made_anew_only_where_an_address_changed(device: torch.device, guarded: Make) -> None:
    world = World([(40, 30, 5, 3)], "invariant", device, guarded)
    moved = world.moved()
    rectifier = Rectifier(*moved, world.vs, kernel=True)
    tables = []
    for downs, ups in (moved, moved, world.moved()):
        rectifier.remember(*world.points)
        rectifier.rectify_(downs, ups)
        tables.append(launched(rectifier)._tables[False][1])
    assert tables[0] is tables[1]
    assert tables[1] is not tables[2]
    torch.testing.assert_close(ups[0], world.rectified(False, "invariant", "zero", 1e-6)[1][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", [True, False])
def test_writes_are_seen_by_autograd(kernel: bool, device: torch.device) -> None:
    a, b = torch.eye(8, device=device)[:2].contiguous(), torch.eye(6, device=device)[:, :2].contiguous()
    rectifier = Rectifier([a], [b], kernel=kernel)
    rectifier.remember([a], [b])
    before = a._version, b._version
    rectifier.rectify_([a], [b])
    assert a._version > before[0]
    assert b._version > before[1]


def test_float64_and_high_ranks_go_torch_s_way(device: torch.device) -> None:
    wide, narrow = torch.eye(70, device=device), torch.eye(4, device=device)
    double = narrow.double()
    rectifier = Rectifier([wide, double[:2], narrow[:2]], [wide, double[:, :2], narrow[:, :2]], kernel=True)
    kinds = {own[0]: type(part) for own, part in rectifier._parts}
    assert [kinds[i] is kernels.FusedRectifier for i in range(3)] == [False, False, True]


def test_factors_that_do_not_fit_are_told(device: torch.device) -> None:
    a, b = torch.eye(8, device=device)[:2], torch.eye(8, device=device)[:, :2]
    rectifier = Rectifier([a, a], [b, b], kernel=True)
    rectifier.remember([a, a], [b, b])
    apart = torch.zeros(8, 16, device=device)[:, :4:2]
    with pytest.raises(ValueError, match=r"B of module 1 is torch.float32 of strides \(16, 2\), expected float32, one"):
        rectifier.rectify_([a, a], [b, apart])
    with pytest.raises(ValueError, match=r"A\^T of module 0 is torch.float32 of strides \(2, 16\)"):
        rectifier.rectify_([torch.zeros(2, 16, device=device)[:, ::2], a], [b, b])
    singular = Rectifier([a], [0 * b + 1], gauge="sylvester", damping=0.0, kernel=True)
    singular.remember([a], [0 * b + 1])
    with pytest.raises(ValueError, match="damping=0 needs factors of full rank"):
        singular.rectify_([a], [0 * b + 1])


def test_rectifications_are_launched_on_the_device_of_their_tensors(
    device: torch.device, guarded: Make, launched_inside: list[str]
) -> None:
    world = World(((7, 9, 5, 2),), "invariant", device, guarded)
    world.rectified(True, "invariant", "zero", 1e-6)
    assert launched_inside == ["_products", "_weights", "apply"]
    world.rectified(True, "invariant", "sylvester", 1e-6)
    assert launched_inside[3:] == ["_products", "_sums", "_weights", "apply"]
