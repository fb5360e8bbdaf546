"""Every branch of the linear's kernels by item, on tiles so small that short runs have many of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in triton")
from cladapt_kernels import reference
from cladapt_kernels.lora import by_item, gemm, routes, skinny
from cladapt_kernels.lora.items import ItemFactors, item_linear
from cladapt_kernels.lora.runs import Runs

SEED, SCALE = 2**40 + 7, 0.5
R, WIDE_SIDE, OTHER_SIDE = 5, 37, 24
ITEM = torch.tensor([3] * 17 + [0] + [4] * 35 + [3] * 16 + [1] * 2 + [3])
"""Item 3 has runs of two tiles, of one and of one row; no row is of items 2 and 5."""
ITEMS = 6
Poison = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.usefixtures("observer", "outputs", "small")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    product = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4}
    factors = {"BLOCK_M": 16, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}
    for module, name, value in (
        (gemm, "EXACT", product), (gemm, "GROUP", 2), (skinny, "EXACT", factors), (skinny, "BLOCK_FOLD", 32),
        (by_item, "BLOCK_M", 16),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def runs(device: torch.device) -> Runs:
    return Runs.of(ITEM.to(device), ITEMS)


def drawn(device: torch.device, *sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, sizes)))
    return [torch.randn(size, generator=generator).to(device) for size in sizes]


def kept(x: Tensor, p: float) -> Tensor:
    """keep * x in float64."""
    seed = torch.tensor([SEED], device=x.device)
    return x.double() * (reference.keep_mask(seed, *x.shape, p).double() if p else 1.0)


def close(found: Tensor, truth: Tensor, atol: float = 1e-5) -> None:
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=atol)


def by_rows(narrow: Tensor, factor: Tensor, own: Tensor, kappa: Tensor) -> Tensor:
    """narrow (factor + kappa_i own_i) of each row, of its item i, in float64."""
    rows = [row @ (factor + kappa[i] * own[i]).double() for row, i in zip(narrow.double(), ITEM, strict=True)]
    return torch.stack(rows)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("k", "n"), [(WIDE_SIDE, OTHER_SIDE), (OTHER_SIDE, WIDE_SIDE)])
def test_factors_by_item(
    k: int, n: int, p: float, runs: Runs, device: torch.device, guarded: Callable[..., Tensor], poisoned: Poison
) -> None:
    ds, x, s, dy = drawn(device, (len(ITEM), R), (len(ITEM), k), (len(ITEM), R), (len(ITEM), n))
    da, db = (guarded(shape, torch.float32, device) for shape in ((R, k), (n, R)))
    seed = torch.tensor([SEED], device=device)
    given = ds, poisoned(x), s, poisoned(dy), SCALE, da, db, *runs.sorted_by_item, p, seed
    gradients, squares = by_item.factors(*given)
    truth = torch.zeros(ITEMS, R, k + n, dtype=torch.float64, device=device)
    for row, item in enumerate(ITEM.tolist()):
        truth[item, :, :k] += ds[row].double()[:, None] * kept(x, p)[row]
        truth[item, :, k:] += SCALE * s[row].double()[:, None] * dy[row].double()
    close(gradients, truth)
    close(squares, truth.square().sum((1, 2)), 1e-3)
    close(da, truth.sum(0)[:, :k])
    close(db, truth.sum(0)[:, k:].T)


def test_the_workspace_of_many_items_has_more_than_2_to_the_31_entries(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda":
        pytest.skip("on a GPU such a workspace takes 8 GiB")
    from triton.runtime.interpreter import InterpreterBuilder

    places: list[int] = []

    def store(builder: object, place: Any, *_: object) -> None:
        if place.data.size > 1:  # no squared norm
            places.append(int(place.data.flat[0]))

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)  # nothing is written, and none is held
    k, n, items = 8, 2**30, 3
    x, ds = drawn(device, (items, k), (items, 1))
    sums, bounds = torch.zeros(1), torch.tensor([[0, 1], [1, 2], [2, 3]], dtype=torch.int32)
    by_item._factors_by_item[(1, items)](
        ds, x, ds, x, sums, torch.zeros(items), bounds, torch.arange(items + 1, dtype=torch.int32), None, k, n, 1,
        *x.stride(), *x.stride(), 1.0, 0, BLOCK_M=16, BLOCK_C=16, BLOCK_R=16, DROPOUT=False,
    )  # fmt: skip
    assert places == [sums.data_ptr() + 4 * item * (k + n) for item in range(items)]


def perturbation(device: torch.device, width: int, poisoned: Poison) -> tuple[Tensor, Tensor, Tensor]:
    """U [r, width], G by item [items, r, width] inside NaN, kappa."""
    factor, flat = drawn(device, (R, width), (ITEMS * R, width))
    kappa = torch.linspace(-0.5, 2.0, ITEMS, device=device)
    return poisoned(factor), poisoned(flat).unflatten(0, (ITEMS, R)), kappa


@pytest.mark.parametrize(("p", "scale"), [(0.0, 1.0), (0.3, 0.5)])
def test_shrink_by_item(p: float, scale: float, runs: Runs, device: torch.device, poisoned: Poison) -> None:
    k = 150  # two or five blocks of columns
    (x,) = drawn(device, (len(ITEM), k))
    a, own, kappa = perturbation(device, k, poisoned)
    seed = torch.tensor([SEED], device=device)
    found = by_item.shrink(poisoned(x), a, own, kappa, runs.tiles, scale, p, seed)
    close(found, scale * by_rows(kept(x, p), a.T, own.mT, kappa), 1e-4)


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize(("p", "biased"), [(0.0, True), (0.3, False)])
def test_seeded_by_item_in_any_order_of_tiles(
    p: float, biased: bool, group: int, runs: Runs, device: torch.device, poisoned: Poison,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gemm, "GROUP", group)
    m, k, n = len(ITEM), WIDE_SIDE, 25  # nine tiles by two, three steps
    x, w, s, bias = drawn(device, (m, k), (n, k), (m, R), (n,))
    u, own, kappa = perturbation(device, n, poisoned)
    seed, beside = torch.tensor([SEED], device=device), bias if biased else None
    found = by_item.seeded(poisoned(x), poisoned(w).T, s, u, own, kappa, runs.tiles, SCALE, beside, p, seed)
    low = kept(SCALE * by_rows(s, u, own, kappa), p)
    close(found, low + x.double() @ w.double().T + (bias.double() if biased else 0.0), 2e-5)


@pytest.mark.parametrize(("r", "expected"), [(64, "SQUARE"), (65, "HIGH")])
def test_a_high_rank_has_tiles_of_fewer_columns(
    r: int, expected: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(1, 8, dtype=torch.float16, device=device)
    assert by_item._seeded_tile(x, r) is getattr(gemm if expected == "SQUARE" else by_item, expected)
    assert by_item._seeded_tile(x.float(), r) is gemm.EXACT


@pytest.mark.parametrize("kernel", ["shrink", "seeded"])
def test_factors_of_an_item_lie_beyond_2_to_the_31_entries(
    kernel: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda":
        pytest.skip("on a GPU such a buffer takes 8 GiB")
    from triton.runtime.interpreter import InterpreterBuilder

    ordinary, far, places = InterpreterBuilder.create_masked_load, torch.zeros(1), set[int]()
    (x,) = drawn(device, (16, 16))

    def load(builder: Any, place: Any, mask: Any, other: Any, *rest: Any) -> Any:
        """What is far is not held, and read as what lies outside of it."""
        first = int(place.data.flat[0])
        if place.data.size == 1 or first == x.data_ptr():
            return ordinary(builder, place, mask, other, *rest)
        places.add(first - far.data_ptr())
        return other

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    table, kappa, out = torch.tensor([[0, 16, 2]], dtype=torch.int32), torch.ones(3), torch.zeros(16, 16)
    sizes, last = {"BLOCK_M": 16, "BLOCK_K": 16, "BLOCK_R": 16, "DROPOUT": False}, (1.0, 0)
    strides = (2**30, 16, 1)  # the third item begins at 2^31
    if kernel == "shrink":
        by_item._shrink_by_item[(1,)](
            x, x, far, kappa, table, out, None, 16, 16, *x.stride(), *x.stride(), *strides, *last, **sizes
        )
    else:
        by_item._seeded_by_item[(1,)](
            x, x, x, x, far, kappa, table, None, out, None, 1, 16, 16, 16,
            *x.stride(), *x.stride(), *x.stride(), *strides, *last, **sizes, BLOCK_N=16, GROUP=1, BIAS=False,
        )  # fmt: skip
    assert places == {4 * 2**31}


PLAIN, BY_ITEM = {"_shrink", "_seeded"}, {"_shrink_by_item", "_seeded_by_item"}
ORDINARY, KEPT = {"_partial", "_fold"}, {"_factors_by_item", "_fold"}


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize(
    ("shortest", "frozen", "p", "expected"),
    [
        pytest.param(1, False, 0.3, (PLAIN, PLAIN | KEPT, BY_ITEM, BY_ITEM | ORDINARY), id="long runs"),
        pytest.param(99, False, 0.0, (PLAIN, PLAIN, set(), ORDINARY), id="short runs"),
        pytest.param(1, True, 0.0, (PLAIN, PLAIN | KEPT, set(), ORDINARY), id="frozen factors"),
    ],
)
def test_both_passes_run_by_the_kernels_of_the_route_and_agree_with_plain_torch(
    shortest: int, frozen: bool, p: float, expected: tuple[set[str], ...], device: torch.device,
    launches: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    half, m, k, n = (torch.bfloat16 if device.type == "cuda" else torch.float16), len(ITEM), 32, 48
    monkeypatch.setattr("cladapt_kernels.lora.runs.SHORTEST", shortest)
    x, weight, dy, bias = (t.to(half) for t in drawn(device, (m, k), (n, k), (m, n), (n,)))
    a, b, *beside = drawn(device, (R, k), (n, R), (2, k), (n, 2))
    history, seed = (beside[0], beside[1]) if frozen else None, torch.tensor([SEED], device=device)

    def both_passes(dtype: torch.dtype) -> tuple[list[set[str]], list[Tensor]]:
        """The kernels of each half pass; Y, dX, dA, dB of the second pass, squares and gradients by item."""
        kept, taken, found = ItemFactors(Runs.of(ITEM.to(device), ITEMS)), [], list[Tensor]()
        for _ in range(2):
            leaves = [t.to(own).requires_grad_() for t, own in ((x, dtype), (a, a.dtype), (b, b.dtype))]
            y = item_linear(leaves[0], weight.to(dtype), bias.to(dtype), *leaves[1:], SCALE, kept, p, seed, history)
            taken.append(launches())
            found = [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]
            taken.append(launches())
            kept.kappa = torch.linspace(0.0, 0.01, ITEMS, device=device)
        return taken, [*found, kept.squares(), kept.whole()]

    names, found = both_passes(half)
    assert tuple(names) == expected
    monkeypatch.setattr(routes, "FEWEST_ROWS", 10**9)
    routes._route.cache_clear()
    names, truth = both_passes(torch.float64)
    assert set().union(*names) <= {"_mask"}
    for name, ours, right in zip(("y", "dx", "da", "db", "squares", "gradients"), found, truth, strict=True):
        assert (ours.double() - right).norm() <= 4e-3 * right.norm(), name


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("recording", [True, False])
def test_a_layer_that_runs_twice_adds_and_one_that_does_not_record_keeps_nothing(
    recording: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cladapt_kernels.lora.runs.SHORTEST", 1)
    m, k, n = len(ITEM), 32, 16
    x, weight, dy = (t.half() for t in drawn(device, (m, k), (n, k), (m, n)))
    leaves = [t.requires_grad_() for t in drawn(device, (R, k), (n, R))]
    kept = ItemFactors(Runs.of(ITEM.to(device), ITEMS))
    grads = []
    for given in (x, 2 * x):
        kept.recording = recording or given is x
        y = item_linear(given, weight, None, *leaves, SCALE, kept)
        grads.append(torch.autograd.grad(y, leaves, dy))
    whole = kept.whole().sum(0)
    factor = 1.0 + 2.0 * recording  # both gradients are linear in x
    torch.testing.assert_close(whole[:, :k], factor * grads[0][0], rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(whole[:, k:].T, factor * grads[0][1], rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(grads[1][0], 2 * grads[0][0], rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(kept.squares(), kept.whole().double().square().sum((1, 2)), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("dispatched")
def test_both_passes_are_launched_on_the_device_of_their_tensors(
    device: torch.device, launched_inside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cladapt_kernels.lora.runs.SHORTEST", 1)
    x, weight, dy, a, b = drawn(device, (len(ITEM), 32), (16, 32), (len(ITEM), 16), (R, 32), (16, R))
    leaves = [x.half().requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    kept, seed = ItemFactors(Runs.of(ITEM.to(device), ITEMS)), torch.tensor([SEED], device=device)
    for _ in range(2):
        y = item_linear(leaves[0], weight.half(), None, *leaves[1:], SCALE, kept, 0.3, seed)
        torch.autograd.grad(y, leaves, dy.half())
        kept.kappa = torch.linspace(0.0, 0.01, ITEMS, device=device)
    assert {*launched_inside} >= PLAIN | KEPT | BY_ITEM | ORDINARY
