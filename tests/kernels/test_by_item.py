"""The kernels of the linear by item: gradients, squared norms and perturbed products, against a loop over the items."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from cladapt_kernels import reference
from cladapt_kernels.lora.runs import Runs

pytest.importorskip("triton", reason="the kernels are written in triton")
from cladapt_kernels.lora import by_item

SCALE = 0.5
RUNS = {  # rows and item of each run
    "a row": ([(1, 0)], 1),
    "shuffled": ([(63, 3), (1, 0), (70, 4), (64, 3), (1, 1), (65, 3)], 6),
    "long": ([(1000, 1)], 3),
    "none": ([], 2),
}
GIVEN = [  # runs, and K, N, r
    pytest.param(runs, shape, id=f"{runs}-{'-'.join(map(str, shape))}")
    for runs, shape in (
        ("shuffled", (70, 90, 5)),
        ("shuffled", (33, 17, 33)),
        ("a row", (64, 130, 8)),
        ("long", (16, 24, 8)),
        ("long", (16, 16, 1)),
        ("none", (24, 40, 4)),
    )
]
Check = Callable[..., None]
Poison = Callable[[Tensor], Tensor]


@dataclass
class Case:
    """Inputs of the three kernels; the item of each of M rows."""

    item: Tensor
    items: int
    x: Tensor
    dy: Tensor
    ds: Tensor
    s: Tensor
    w: Tensor
    a: Tensor
    own: Tensor
    kappa: Tensor
    seed: Tensor

    @classmethod
    def drawn(cls, runs: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> "Case":
        lengths, items = RUNS[runs]
        item = torch.tensor([i for rows, i in lengths for _ in range(rows)], dtype=torch.int64, device=device)
        (k, n, r), m = shape, len(item)
        generator = torch.Generator().manual_seed(m + k + n + r)

        def draw(*size: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, of)

        wide = [draw(m, side) for side in (k, n, r, r)]
        factors = [draw(r, k, of=torch.float32), draw(items, r, k, of=torch.float32)]
        kappa = torch.linspace(-1.0, 2.0, items, device=device)
        return cls(item, items, *wide, draw(k, n), *factors, kappa, torch.tensor([2**40 + 12345], device=device))

    def to(self, dtype: torch.dtype, change: Callable[[Tensor], Tensor] = lambda t: t) -> "Case":
        names = ("x", "dy", "ds", "s", "w", "a", "own", "kappa")
        return replace(self, **{name: change(getattr(self, name)).to(dtype) for name in names})

    def kept(self, p: float) -> Tensor:
        return self.x * reference.keep_mask(self.seed, *self.x.shape, p).to(self.x.dtype) if p else self.x

    def gradients(self, p: float) -> Tensor:
        """[items, r, K + N] in the dtype of x."""
        kept = self.kept(p)
        own = [self.item == item for item in range(self.items)]
        return torch.stack([torch.cat([self.ds[o].T @ kept[o], SCALE * self.s[o].T @ self.dy[o]], 1) for o in own])

    def moved(self, narrow: Tensor, factor: Tensor) -> Tensor:
        """kappa_i narrow factor_i of the rows of each item."""
        found = narrow.new_zeros(len(narrow), factor.shape[2])
        for item in range(self.items):
            found[self.item == item] = self.kappa[item] * (narrow[self.item == item] @ factor[item])
        return found

    def shrunk(self, p: float) -> Tensor:
        """[M, r]."""
        return SCALE * (self.kept(p) @ self.a.T + self.moved(self.kept(p), self.own.mT))

    def product(self, p: float) -> Tensor:
        """dY W^T and the low-rank term, masked: [M, K]."""
        low = SCALE * (self.s @ self.a + self.moved(self.s, self.own))
        mask = reference.keep_mask(self.seed, *low.shape, p).to(low.dtype) if p else 1.0
        return mask * low + self.dy @ self.w.T

    def judge(self, check: Check, name: str, found: Tensor, of: Callable[["Case"], Tensor]) -> None:
        """As near to float64 as torch is in the dtype of x."""
        truth, size = of(self.to(torch.float64)), of(self.to(torch.float64, torch.abs))
        check(name, found, truth, of(self.to(self.x.dtype)).to(found.dtype), size)


def factors(case: Case, p: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by item, their squared norms, dA, dB."""
    bounds, offsets = Runs.of(case.item, case.items).sorted_by_item
    (r, k), n = case.a.shape, case.dy.shape[1]
    da, db = (torch.full(shape, float("nan"), device=case.x.device) for shape in ((r, k), (n, r)))
    given = case.ds, case.x, case.s, case.dy, SCALE, da, db, bounds, offsets, p, case.seed
    return *by_item.factors(*given), da, db


def perturbed(case: Case) -> tuple[Tensor, Tensor, Callable[[int], Tensor]]:
    """G by item as part of a buffer, kappa, the table of tiles."""
    items, r, k = case.own.shape
    buffer = torch.full((items, r, k + 24), float("nan"), device=case.x.device)
    own = buffer[..., 8 : 8 + k].copy_(case.own)
    return own, case.kappa, Runs.of(case.item, case.items).tiles


@pytest.fixture(params=[0.0, 0.3])
def p(request: pytest.FixtureRequest) -> float:
    return float(request.param)


@pytest.mark.parametrize(("runs", "shape"), GIVEN)
def test_gradients_by_item_their_norms_and_their_sums(
    runs: str, shape: tuple[int, int, int], p: float, device: torch.device, dtypes: tuple[torch.dtype, ...],
    within_budget: Check, poisoned: Poison,
) -> None:  # fmt: skip
    k = shape[0]
    for dtype in dtypes:
        case = Case.drawn(runs, shape, dtype, device)
        gradients, squares, da, db = factors(replace(case, x=poisoned(case.x), dy=poisoned(case.dy)), p)
        case.judge(within_budget, "gradients", gradients, lambda c: c.gradients(p))
        case.judge(within_budget, "dA", da, lambda c: c.gradients(p).sum(0)[:, :k])
        case.judge(within_budget, "dB", db, lambda c: c.gradients(p).sum(0)[:, k:].T)
        torch.testing.assert_close(squares.double(), gradients.double().square().sum((1, 2)), rtol=1e-5, atol=0)
        for item in {*range(case.items)} - {*case.item.tolist()}:
            assert squares[item] == gradients[item].abs().max() == 0


@pytest.mark.parametrize(("runs", "shape"), GIVEN)
def test_a_wide_matrix_shrunk_by_factors_of_each_item(
    runs: str, shape: tuple[int, int, int], p: float, device: torch.device, dtypes: tuple[torch.dtype, ...],
    within_budget: Check, poisoned: Poison,
) -> None:  # fmt: skip
    for dtype in dtypes:
        case = Case.drawn(runs, shape, dtype, device)
        found = by_item.shrink(poisoned(case.x), poisoned(case.a), *perturbed(case), SCALE, p, case.seed)
        case.judge(within_budget, "S", found, lambda c: c.shrunk(p))


@pytest.mark.parametrize(("runs", "shape"), GIVEN)
def test_a_product_with_factors_of_each_item_in_its_low_rank_term(
    runs: str, shape: tuple[int, int, int], p: float, device: torch.device, dtypes: tuple[torch.dtype, ...],
    within_budget: Check, poisoned: Poison,
) -> None:  # fmt: skip
    for dtype in dtypes:
        case = Case.drawn(runs, shape, dtype, device)
        low = case.s, poisoned(case.a), *perturbed(case)
        found = by_item.seeded(poisoned(case.dy), poisoned(case.w).T, *low, SCALE, None, p, case.seed)
        case.judge(within_budget, "dX", found, lambda c: c.product(p))
        bias = case.w[:, 0].contiguous()
        found = by_item.seeded(poisoned(case.dy), poisoned(case.w).T, *low, SCALE, bias, p, case.seed)
        case.judge(within_budget, "Y", found, lambda c: c.product(p) + c.w[:, 0])


def test_two_runs_are_equal_bit_for_bit(device: torch.device) -> None:
    case = Case.drawn("shuffled", (70, 90, 5), torch.float32, device)
    for first, second in zip(factors(case), factors(case), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kernel", ["shrink", "seeded"])
def test_in_16_bits_the_perturbation_survives_where_its_sum_with_the_factor_would_not(
    kernel: str, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """A is 1e-2, E is 1e-5 an entry in bf16; rows whose product with A is zero are left with that with E."""
    half = dtypes[1]
    kappa = torch.tensor([1e-5 if half == torch.bfloat16 else 1e-6], device=device)
    generator = torch.Generator().manual_seed(1)
    sizes = ((64, 32), (8, 32), (1, 8, 64)) if kernel == "shrink" else ((64, 8), (8, 48), (1, 16, 48))
    narrow, factor, own = (torch.randn(*size, generator=generator).to(device) for size in sizes)
    pair = torch.tensor([1.0, -1.0], device=device)
    rows = (narrow[:, :, None] * pair).flatten(1).to(half)  # each column and its opposite, which meet equal factors
    factor = 1e-2 * factor.repeat_interleave(2, 1 if kernel == "shrink" else 0)
    table = Runs.of(torch.zeros(64, dtype=torch.int64, device=device), 1).tiles
    if kernel == "shrink":
        found, factor, step = by_item.shrink(rows, factor, own, kappa, table), factor.T, own[0].T
    else:
        nothing = torch.zeros(64, 16, dtype=half, device=device), torch.zeros(16, 48, dtype=half, device=device)
        found, step = by_item.seeded(*nothing, rows, factor, own, kappa, table), own[0]
    truth = rows.double() @ (kappa * step).double()
    assert (found.double() - truth).norm() / truth.norm() < 0.01
    rounded = rows.double() @ (factor + kappa * step).to(half).double()
    assert (rounded - truth).norm() / truth.norm() > 0.5
