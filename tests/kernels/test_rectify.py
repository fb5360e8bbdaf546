"""Rectification of many LoRA steps at once, against dense least squares in float64."""

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from cladapt_kernels import reference
from cladapt_kernels.rectify import Form, Gauge, Rectifier, rectify
from cladapt_kernels.retract.stiefel import tangent

DENSE = [(7, 9, 3, 2), (7, 9, 3, 4), (6, 5, 1, 3), (5, 8, 4, 0), (9, 6, 3, 3)]  # m, n, r, k
# odd ranks and sides, two of one shape, and steps of which little (k = n - r) or nothing (k = n) may be taken
SHAPES = [(40, 30, 1, 3), (64, 48, 8, 16), (64, 48, 8, 16), (1000, 63, 5, 0), (70, 300, 33, 20), (20, 16, 5, 11)]
WHOLE = (12, 8, 3, 8)
Module = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def modules(
    shapes: Sequence[tuple[int, int, int, int]], form: Form, dtype: torch.dtype = torch.float64, size: float = 0.1
) -> list[Module]:
    """A, B, dA, dB and V of every module; A V = 0 where the form assumes it."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for m, n, r, k in shapes:
        a, b, da, db, v = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((r, n), (m, r), (r, n), (m, r), (n, k))
        )
        v = torch.linalg.qr(v)[0]
        if form == "invariant":
            a = a - a @ v @ v.T if k < n else 0 * a
        found.append(tuple(t.to(dtype) for t in (a, b, size * da, size * db, v)))
    return found  # type: ignore[return-value]


def rectified(given: Sequence[Module], form: Form, gauge: Gauge, damping: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    a, b, da, db, v = (list(column) for column in zip(*given, strict=True))
    return list(zip(*rectify(a, b, da, db, v, form, gauge, damping), strict=True))


def safe(module: Module) -> Tensor:
    """T, the step of B A that may be taken."""
    a, b, da, db, v = module
    step = b @ da + db @ a
    return step - step @ v @ v.T


def allowed(module: Module, form: Form) -> Tensor:
    """A, of the form `exact` N A: the combinations of its rows that do not see the subspace."""
    a, v = module[0], module[4]
    return a - a @ v @ torch.linalg.pinv(a @ v, rtol=1e-5) @ a if form == "exact" else a


def dense(module: Module, constrained: bool) -> Tensor:
    """B X + Y A nearest to T over all X and Y, those with (B X + Y A) V = 0 where it is constrained."""
    a, b, _, _, v = module
    (r, n), m = a.shape, len(b)
    unknowns = torch.eye(r * (n + m), dtype=a.dtype)
    columns = [b @ u[: r * n].view(r, n) + u[r * n :].view(m, r) @ a for u in unknowns]
    free = unknowns
    if constrained and v.shape[1]:
        _, values, basis = torch.linalg.svd(torch.stack([(c @ v).flatten() for c in columns], 1))
        free = basis[int((values > 1e-9 * values.max()).sum()) :].T
    system = torch.stack([c.flatten() for c in columns], 1) @ free
    found = torch.linalg.lstsq(system, safe(module).flatten()[:, None], driver="gelsd").solution
    return (system @ found).view(m, n)


@pytest.mark.parametrize("gauge", get_args(Gauge))
@pytest.mark.parametrize("form", get_args(Form))
def test_the_update_is_the_dense_minimum_in_every_gauge(form: Form, gauge: Gauge) -> None:
    given = modules(DENSE, form)
    for module, (x, y) in zip(given, rectified(given, form, gauge), strict=True):
        a, b = module[:2]
        torch.testing.assert_close(b @ x + y @ a, dense(module, form == "exact"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gauge", get_args(Gauge))
@pytest.mark.parametrize("form", ["exact", "invariant"])
def test_protected_inputs_are_left_alone_the_second_order_included(
    form: Form, gauge: Gauge, dtype: torch.dtype
) -> None:
    given = modules([*SHAPES, WHOLE], form, dtype)
    for (a, b, da, db, v), (x, y) in zip(given, rectified(given, form, gauge, 1e-6), strict=True):
        a, b, da, db, v, x, y = (t.double() for t in (a, b, da, db, v, x, y))
        moved = (b + y) @ (a + x) - b @ a
        assert (moved @ v).norm() <= 1e-6 * ((b + db) @ (a + da) - b @ a).norm()
        if form == "invariant":
            assert ((a + x) @ v).norm() <= 1e-6 * (a + da).norm()


def test_least_squares_alone_does_not_leave_them_alone() -> None:
    given = modules([(60, 80, 6, 15)], "least_squares")
    ((a, b, _, _, v),), ((x, y),) = given, rectified(given, "least_squares", "zero")
    step = b @ x + y @ a
    assert 0.05 < (step @ v).norm() / step.norm() < 0.5


def test_where_a_sees_all_of_the_subspace_the_exact_form_freezes_the_columns_of_b() -> None:
    given = modules([(20, 30, 4, 6)], "exact")
    ((_, b, _, _, _),), ((x, y),) = given, rectified(given, "exact", "zero")
    assert y.abs().max() < 1e-12
    assert x.norm() > 0.1 * b.norm() / len(b)


@pytest.mark.parametrize("gauge", get_args(Gauge))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_where_a_v_is_rounding_all_forms_are_one(dtype: torch.dtype, gauge: Gauge) -> None:
    given = modules(SHAPES, "invariant", dtype)
    expected = rectified(given, "invariant", gauge)
    for form in ("least_squares", "exact"):
        for (x, y), (other_x, other_y) in zip(rectified(given, form, gauge), expected, strict=True):
            atol = 1e-11 if dtype == torch.float64 else 2e-5
            torch.testing.assert_close(x, other_x, rtol=0, atol=atol)
            torch.testing.assert_close(y, other_y, rtol=0, atol=atol)


@pytest.mark.parametrize("form", get_args(Form))
def test_gauges_are_those_of_their_definitions(form: Form) -> None:
    given = modules(DENSE, form)
    zero, balanced = (rectified(given, form, gauge) for gauge in ("zero", "balanced"))
    for module, (x, y), (half_x, half_y) in zip(given, zero, balanced, strict=True):
        b, down, t = module[1], allowed(module, form), safe(module)
        from_left, from_right = torch.linalg.pinv(b), torch.linalg.pinv(down, atol=1e-9)
        torch.testing.assert_close(x, from_left @ t, rtol=0, atol=1e-12)
        torch.testing.assert_close(y, (t - b @ from_left @ t) @ from_right, rtol=0, atol=1e-12)
        torch.testing.assert_close(half_x, from_left @ (t - 0.5 * t @ from_right @ down), rtol=0, atol=1e-12)
        torch.testing.assert_close(half_y, (t - 0.5 * b @ from_left @ t) @ from_right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", get_args(Form))
def test_no_gauge_has_less_norm_than_sylvester_s_nor_is_nearer_to_gradients(form: Form) -> None:
    given = modules(DENSE, form)
    generator = torch.Generator().manual_seed(1)
    for module, (x, y) in zip(given, rectified(given, form, "sylvester"), strict=True):
        b, down = module[1], allowed(module, form)
        towards = (b.T @ safe(module), safe(module) @ down.T)  # gradients by the factors, were T that by B A
        for scale in (0.0, 1.0, -3.0):
            best = (x - scale * towards[0]).norm() ** 2 + (y - scale * towards[1]).norm() ** 2
            for size in (1e-3, 1.0):
                z = size * torch.randn(len(down), len(down), generator=generator, dtype=b.dtype)
                z = z @ (down @ torch.linalg.pinv(module[0]))  # times N
                for turned in (z, -z):
                    other = (x + turned @ down, y - b @ turned)
                    away = sum((o - scale * t).norm() ** 2 for o, t in zip(other, towards, strict=True))
                    assert away >= best - 1e-12


@pytest.mark.parametrize("gauge", get_args(Gauge))
@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-11), (torch.float32, 3e-4)], ids=["fp64", "fp32"])
def test_many_modules_at_once_are_the_definition(dtype: torch.dtype, limit: float, form: Form, gauge: Gauge) -> None:
    given = modules([*SHAPES, WHOLE], form, dtype)
    for module, found in zip(given, rectified(given, form, gauge, 1e-3), strict=True):
        truth = reference.rectify(*(t.double() for t in module), form, gauge, 1e-3)
        for own, expected in zip(found, truth, strict=True):
            assert own.dtype == dtype
            torch.testing.assert_close(own.double(), expected, rtol=0, atol=limit * max(1.0, expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gauge", get_args(Gauge))
@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_the_first_step_of_a_fresh_adapter(damping: float, form: Form, gauge: Gauge, dtype: torch.dtype) -> None:
    given = [(a, 0 * b, da, db, v) for a, b, da, db, v in modules(SHAPES[:4], form, dtype)]
    for module, (x, y) in zip(given, rectified(given, form, gauge, damping), strict=True):
        a, _, da, db, v = module
        right = torch.eye(len(a), dtype=dtype)
        if form == "least_squares":
            right -= a @ v @ (a @ v).T @ torch.linalg.inv(a @ a.T)
        elif form == "exact":
            right = a @ torch.linalg.pinv(allowed(module, form), atol=1e-3)
        torch.testing.assert_close(x, da - da @ v @ v.T, rtol=0, atol=1e-5)
        torch.testing.assert_close(y, db @ right, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-5)


@pytest.mark.parametrize("gauge", get_args(Gauge))
@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("empty", ["a", "both", "steps", "half of b"])
def test_what_has_no_directions_stays_finite(empty: str, form: Form, gauge: Gauge) -> None:
    for dtype in (torch.float32, torch.float64):
        given = modules([(40, 30, 6, 4), (3, 30, 6, 4), (40, 3, 6, 1)], form, dtype)  # two of lower rank than r
        for a, b, da, db, _ in given:
            for t, part in ((a, ("a", "both")), (b, ("both",)), (da, ("steps",)), (db, ("steps",))):
                t *= float(empty not in part)
            if empty == "half of b":
                b[:, 3:] = b[:, :3]
        for module, (x, y) in zip(given, rectified(given, form, gauge, 1e-4), strict=True):
            assert x.isfinite().all()
            assert y.isfinite().all()
            if form == "invariant":  # damping turns the gauge alone
                a, b = module[:2]
                torch.testing.assert_close(b @ x + y @ a, safe(module), rtol=0, atol=1e-3)
            if empty == "steps":
                assert x.abs().max() < 1e-5 > y.abs().max()


def test_directions_that_rounding_alone_holds_apart_do_no_harm() -> None:
    for form in get_args(Form):
        for gauge in get_args(Gauge):
            ((a, b, da, db, v),) = modules([(3, 30, 8, 4)], form, torch.float32)  # B of rank 3
            a[4:] = a[:4]
            ((x, y),) = rectified([(a, b, da, db, v)], form, gauge, 1e-6)
            wide = (a.double(), b.double(), da.double(), db.double(), v.double())
            ((other_x, other_y),) = rectified([wide], form, gauge, 1e-6)
            assert x.norm() + y.norm() <= 1.02 * (other_x.norm() + other_y.norm())
            step = wide[1] @ other_x + other_y @ wide[0]
            assert (b @ x + y @ a - step).norm() <= 1e-5 * step.norm()


def test_damping_takes_of_optimality_what_it_is_of_a_direction_and_nothing_of_the_invariant_form() -> None:
    for form in get_args(Form):
        given = modules(DENSE, form)
        for damping in (1e-6, 1e-2):
            for module, (x, y) in zip(given, rectified(given, form, "zero", damping), strict=True):
                a, b, _, _, v = module
                off = (b @ x + y @ a - dense(module, form == "exact")).norm() / dense(module, form == "exact").norm()
                least = min(float(g.trace() / torch.linalg.eigvalsh(g)[0]) / len(a) for g in (b.T @ b, a @ a.T))
                assert off <= (1e-12 if form == "invariant" else 2 * damping * max(least, 1 / least) + 1e-12)
                if form == "exact" and v.shape[1]:
                    assert ((b @ x + y @ a) @ v).abs().max() < 1e-12


def test_of_orthonormal_factors_it_is_the_projections_of_the_tangent_map() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 14, generator=generator, dtype=torch.float64))[0]
    a, v, b = basis[:, :5].T, basis[:, 5:], torch.linalg.qr(torch.randn(30, 5, generator=generator).double())[0]
    da, db = (torch.randn(side, 5, generator=generator, dtype=torch.float64) for side in (40, 30))
    ((x,), (y,)) = rectify([a], [b], [da.T], [db], [v], damping=0.0)
    # at X = 0 the tangent map is the projection onto the complement of F
    (down, up) = tangent([0 * da, 0 * db], [da, db], [v, b])
    torch.testing.assert_close(y, up, rtol=0, atol=1e-14)
    torch.testing.assert_close(x, down.T + b.T @ db @ a, rtol=0, atol=1e-14)


def test_the_class_moves_what_lies_anywhere_by_what_the_function_gives() -> None:
    given = modules(SHAPES, "exact", torch.float32)
    a, b, da, db, v = (list(column) for column in zip(*given, strict=True))
    xs, ys = rectify(a, b, da, db, v, "exact", "balanced", 1e-3)
    rectifier = Rectifier(a, b, v, "exact", "balanced", 1e-3)
    with pytest.raises(RuntimeError, match="does not know where the step began"):
        rectifier.rectify_(a, b)
    downs = [p.T.clone(memory_format=torch.contiguous_format).T for p in a]  # another order of storage
    ups = [torch.stack([p, p], dim=2)[:, :, 0] for p in b]  # rows and columns apart
    for _ in range(2):
        for old, new in ((a, downs), (b, ups)):
            torch._foreach_copy_(new, old)
        rectifier.remember(downs, ups)
        torch._foreach_add_(downs, da)
        torch._foreach_add_(ups, db)
        rectifier.rectify_(downs, ups)
        for point, step, found in zip([*a, *b], [*xs, *ys], [*downs, *ups], strict=True):
            torch.testing.assert_close(found, point + step, rtol=0, atol=2e-5)
    with pytest.raises(RuntimeError, match="call remember before it"):
        rectifier.rectify_(downs, ups)


def test_two_runs_are_equal_bit_for_bit_and_groups_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    given = modules([*SHAPES, *SHAPES], "invariant", torch.float32)
    one, two = (rectified(given, "invariant", "sylvester", 1e-6) for _ in range(2))
    monkeypatch.setattr("cladapt_kernels.rectify.rectifier.CHUNK_BYTES", 1)
    alone = rectified(given, "invariant", "sylvester", 1e-6)
    for (x, y), (same_x, same_y), (near_x, near_y) in zip(one, two, alone, strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
        torch.testing.assert_close(x, near_x, rtol=0, atol=1e-4)
        torch.testing.assert_close(y, near_y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("gauge", get_args(Gauge))
def test_nothing_drifts_into_the_subspace_over_two_thousand_steps(gauge: Gauge) -> None:
    ((a, b, _, _, v),) = modules([(48, 64, 8, 12)], "invariant", torch.float32)
    b.zero_()
    generator = torch.Generator().manual_seed(1)
    rectifier = Rectifier([a], [b], [v], gauge=gauge)
    for _ in range(2000):
        rectifier.remember([a], [b])
        for factor in (a, b):  # elementwise scaled, as Adam's, and not in the complement of V
            factor += 1e-3 * torch.randn(factor.shape, generator=generator).sign()
        rectifier.rectify_([a], [b])
    assert (a.double() @ v.double()).norm() <= 1e-6 * a.norm()
    assert (b.double() @ (a.double() @ v.double())).norm() <= 1e-6 * (b @ a).norm()


@pytest.mark.parametrize(("gauge", "least", "most"), [("zero", 20, 200), ("balanced", 4, 20), ("sylvester", 1, 1.1)])
def test_from_a_fresh_adapter_the_first_gauges_blow_up_a_and_sylvester_s_does_not(
    gauge: Gauge, least: float, most: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.Parameter(torch.randn(8, 64, generator=generator) / 8)
    b = torch.nn.Parameter(torch.zeros(64, 8))
    target, before = 0.1 * torch.randn(64, 64, generator=generator), a.detach().norm()
    optimizer = torch.optim.Adam([a, b], lr=1e-3)
    rectifier = Rectifier([a.data], [b.data], gauge=gauge)
    for _ in range(20):
        x = torch.randn(64, 256, generator=generator)
        optimizer.zero_grad()
        (target @ x - b @ (a @ x)).square().mean().backward()
        rectifier.remember([a.data], [b.data])
        optimizer.step()
        rectifier.rectify_([a.data], [b.data])
    assert least * before <= a.detach().norm() <= most * before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ups": []}, "1 downs, 0 ups and 1 subspaces: expected one per module"),
        ({"subspaces": []}, "1 downs, 1 ups and 0 subspaces"),
        ({"down_steps": []}, "0 downs' steps for 1 modules"),
        ({"up_steps": [torch.zeros(6, 3)]}, r"ups' steps\[0\] is \(6, 3\), expected \(6, 2\)"),
        ({"ups": [torch.zeros(6, 3)]}, r"module 0 has A \(2, 8\), B \(6, 3\): expected \[r, n\] and \[m, r\]"),
        ({"downs": [torch.zeros(2, 8).bfloat16()]}, "A of torch.bfloat16 on cpu, B of torch.float32 on cpu: expected"),
        ({"subspaces": [torch.zeros(7, 3)]}, r"subspace 0 is \(7, 3\), expected \[8, k\] with orthonormal columns"),
        ({"subspaces": [torch.zeros(8, 9)]}, r"subspace 0 is \(8, 9\)"),
        ({"form": "ls"}, r"form 'ls', gauge 'zero': expected one of \('least_squares', 'exact', 'invariant'\)"),
        ({"gauge": "free"}, "form 'invariant', gauge 'free'"),
        ({"damping": -1.0}, r"damping -1.0: expected a share of the mean eigenvalue, such as 1e-6, 0 for none"),
        ({"damping": 0.0, "ups": [torch.ones(6, 2)]}, "damping=0 needs factors of full rank.*use 1e-6"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "downs": [torch.eye(8)[:2]],
        "ups": [torch.eye(6)[:, :2]],
        "down_steps": [torch.zeros(2, 8)],
        "up_steps": [torch.zeros(6, 2)],
        "subspaces": [torch.eye(8)[:, 5:]],
    }
    with pytest.raises(ValueError, match=message):
        rectify(**{**given, **change})  # type: ignore[arg-type]


def test_a_solver_that_does_not_converge_says_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("failed to converge")

    a, b = torch.full((2, 8), torch.nan), torch.eye(6)[:, :2]
    found = rectify([a], [b], [a], [b], form="least_squares", gauge="sylvester")
    assert not any(t.isfinite().all() for steps in found for t in steps)  # where it does, they stay visible
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(ValueError, match="factors, steps or subspaces hold values that are not finite"):
        rectify([a], [b], [a], [b], form="least_squares", gauge="sylvester")
