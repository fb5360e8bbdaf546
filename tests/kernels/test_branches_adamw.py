"""Every branch of the optimiser's kernels on chunks of sixteen entries: many to a tensor, several folds to a group."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in triton")
import triton
import triton.language as tl

from cladapt_kernels import reference
from cladapt_kernels.optim import Term, adamw, fused_step
from cladapt_kernels.optim.fused_step import FusedStep

ODD, EVEN = (21, 20, 33), (20, 20, 36)  # two chunks, two and three; five are one group: the last fold is not full
GROUPS, STRENGTH, CLIP = (0, 1, 0), 20.0, 0.5
LR, BETAS, EPS, DECAY = 0.05, (0.8, 0.95), 1e-3, 0.3
Make = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("observer")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_step, "BLOCK", 16)
    monkeypatch.setattr(fused_step, "FOLD", 2)


class World:
    """Parameters near their anchors, moments of earlier steps, and the term."""

    def __init__(self, kind: str, sizes: Sequence[int], device: torch.device, make: Make) -> None:
        self.sizes, self.device, self.make = sizes, device, make
        self.generator = torch.Generator().manual_seed(3)
        self.anchors, self.fisher = self.drawn(1.0), [t.abs_() for t in self.drawn(1.0)]
        self.values = [v.add_(a) for v, a in zip(self.drawn(0.4), self.anchors, strict=True)]
        self.first, self.second = self.drawn(0.1), [t.abs_() for t in self.drawn(0.1)]
        self.taus = torch.tensor([0.9, 1.7], device=device) if kind == "scaled" else None
        self.kind = "kl" if kind in ("scaled", "literal") else kind
        self.term = None if kind == "none" else Term(
            self.kind, STRENGTH, self.anchors, self.taus, self.fisher if kind == "fisher" else None, GROUPS
        )  # fmt: skip
        self.count = torch.zeros((), device=device)

    def drawn(self, size: float) -> list[Tensor]:
        made = [self.make((n,), torch.float32, self.device) for n in self.sizes]
        return [t.copy_(size * torch.randn(t.shape, generator=self.generator)) for t in made]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        order = sorted(range(len(tensors)), key=lambda t: GROUPS[t])
        return torch.cat([tensors[t] for t in order]).double()

    def penalty(self) -> tuple[Tensor, Tensor]:
        """R of each group and its gradient, in float64."""
        lengths = torch.tensor([self.sizes[0] + self.sizes[2], self.sizes[1]], device=self.device)
        taus = None if self.taus is None else self.taus.double()
        value, anchor = self.flat(self.values), self.flat(self.anchors)
        return reference.proximal(self.kind, value, anchor, lengths, taus, self.flat(self.fisher))


def close(found: Tensor, truth: Tensor, rtol: float = 1e-5) -> None:
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), truth, rtol=rtol, atol=rtol * truth.abs().max().item())


def check(world: World, copies: list[Tensor] | None, rtol: float) -> None:
    """Two steps and what is measured before each; the truth of one starts where the last one ended."""
    fused = FusedStep(world.values, world.term, copies)
    fused.refresh(world.count)
    clip = torch.tensor(CLIP, device=world.device)
    for step in (1, 2):
        grads = world.drawn(0.1)  # at new addresses
        task, pull = world.flat(grads), torch.zeros((), dtype=torch.float64, device=world.device)
        if world.term is not None:
            penalty, pull = world.penalty()
            pull = STRENGTH * pull
            close(fused.value(world.count), penalty, rtol)
            away = world.flat(world.values) - world.flat(world.anchors)
            sums = [(x * y).sum() for x, y in (
                (task + pull, task + pull), (task, task), (pull, pull), (task, pull), (away, away)
            )]  # fmt: skip
            close(fused.measure(grads, world.count), torch.stack(sums), rtol)
            added = [g.clone() for g in grads]
            fused.add([added[0], None, added[2]], world.count)
            assert torch.equal(added[1], grads[1])
            fused.add([None, added[1], None], world.count)
            close(world.flat(added), task + pull, rtol)
            close(fused.measure(added, world.count, included=True), torch.stack(sums), max(rtol, 1e-4))
        state = (world.flat(world.values), CLIP * (task + pull), world.flat(world.first), world.flat(world.second))
        truth = reference.adamw(*state, step, LR, BETAS, EPS, DECAY)
        world.count += 1
        fused.step(grads, world.first, world.second, world.count, LR, BETAS, EPS, DECAY, clip)
        for found, exact in zip((world.values, world.first, world.second), truth, strict=True):
            close(world.flat(found), exact, rtol)
        for copy, value in zip(copies or (), world.values, strict=False):
            assert torch.equal(copy, value.to(copy.dtype))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("none", ODD), ("none", EVEN), ("scaled", ODD), ("literal", EVEN), ("l2", ODD), ("l2", EVEN), ("fisher", ODD)],
)
def test_steps_and_figures_are_those_of_float64(
    kind: str, sizes: tuple[int, ...], device: torch.device, guarded: Make
) -> None:
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    copies = [guarded((n,), half, device) for n in sizes] if kind in ("none", "l2") else None
    check(World(kind, sizes, device, guarded), copies, 1e-5)


def test_statistics_are_taken_anew_before_any_step(device: torch.device, guarded: Make) -> None:
    world = World("scaled", ODD, device, guarded)
    fused = FusedStep(world.values, world.term, None)
    for step in range(5):
        fused.refresh(world.count)
        close(fused.value(world.count), world.penalty()[0], 3e-4 if step > 2 else 1e-5)
        for value in world.values:  # changed by another hand than the step's
            value *= 1.1
        world.values[step % 3][step] += 60.0 if step == 2 else 0.0
        world.count += 1


def test_where_entries_leap(device: torch.device, guarded: Make) -> None:
    world = World("scaled", ODD, device, guarded)
    world.values[0][2] += 60.0  # two of one group, in different folds, of which neither has all the weight
    world.values[2][30] += 59.5
    world.values[1][18] += 90.0
    check(world, None, 3e-4)


def test_tensors_that_start_off_sixteen_bytes(device: torch.device, guarded: Make) -> None:
    def shifted(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return guarded((shape[0] + 1,), dtype, device)[1:]

    check(World("l2", EVEN, device, shifted), None, 1e-5)


def test_bf16_copies_are_written(device: torch.device, guarded: Make) -> None:
    world = World("none", EVEN, device, guarded)
    copies = [guarded((n,), torch.bfloat16, device).zero_() for n in EVEN]
    fused = FusedStep(world.values, None, copies)
    world.count += 1
    fused.step(world.drawn(0.1), world.first, world.second, world.count, LR, BETAS, EPS, DECAY)
    for copy, value in zip(copies, world.values, strict=True):  # the interpreter does not round to the nearest
        assert ((copy.float() - value).abs() <= 2**-7 * value.abs()).all()


@triton.jit
def _exp_of(x, found, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(found + i, adamw._exp(tl.load(x + i)))


def test_exp_keeps_its_digits(device: torch.device) -> None:
    x = torch.cat([torch.linspace(-87.0, 87.0, 2000), torch.linspace(-1.0, 1.0, 48)]).to(device)
    found = torch.zeros(2048, device=device)
    _exp_of[(1,)](x, found, SIZE=2048)
    truth = x.double().exp()
    assert ((found.double() - truth).abs() <= 2.5 * torch.finfo(torch.float32).eps * truth).all()


@triton.jit
def _parts_of(d, parts, centres, ranges, KIND: tl.constexpr):
    value, zero = tl.load(d + tl.program_id(0) + tl.arange(0, 1)), tl.zeros((1,), tl.float32)
    adamw._write_parts(
        parts, centres, ranges, 0, value, zero, zero, zero, 1.0 / 16.0, value == value, 1.0, 0.0, KIND
    )  # fmt: skip


def test_the_statistics_of_an_entry_keep_their_digits(device: torch.device) -> None:
    d = torch.cat([torch.linspace(-0.4999, 0.4999, 40), torch.tensor([-0.95, -0.5, 0.5, 0.95, 2.0])]).to(device)
    parts, centres = torch.zeros(len(d), 4, device=device), torch.zeros(1, device=device)
    ranges = torch.tensor([0, len(d)], dtype=torch.int32, device=device)
    _parts_of[(len(d),)](d, parts, centres, ranges, KIND="kl")
    exact = d.double()
    second = torch.tensor([math.fsum(x**i / math.factorial(i) for i in range(2, 25)) for x in exact.tolist()])
    truth = torch.stack([exact, second.to(exact), exact * exact.expm1(), torch.zeros_like(exact)], 1) / 16.0
    error = (parts.double() - truth).abs()
    near = exact.abs() < 0.5
    assert (error[near] <= 3e-7 * truth[near].abs()).all()
    assert (error[~near] <= 2e-6 * truth[~near].abs()).all()


@triton.jit
def _entries(chunks, sizes, found, BLOCK: tl.constexpr):
    _, _, i, own = adamw._chunk(chunks, sizes, BLOCK, False)
    tl.store(found + tl.arange(0, BLOCK), tl.where(own, i, -1))


def test_a_tensor_may_have_more_than_2_to_the_31_entries(device: torch.device) -> None:
    size = 2**32 + 3
    chunks, sizes = torch.tensor([0, 2**28, 0], dtype=torch.int32, device=device), torch.tensor([size], device=device)
    found = torch.zeros(16, dtype=torch.int64, device=device)
    _entries[(1,)](chunks, sizes, found, BLOCK=16)
    assert found.tolist() == [2**32, 2**32 + 1, 2**32 + 2] + [-1] * 13
