"""Estimates of a block's inputs against the whole stream of rows, in one process and in two."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cladapt import ranks
from cladapt.methods import Context
from cladapt.methods._estimate import Estimate, Gram, Residual, Sketch, protect
from cladapt.methods._subspace import Subspaces

WIDTH, MOST = 24, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(random(n, k, seed=seed).double())[0].float()


STREAMS = {
    "random": random(150, WIDTH),
    "decaying": random(150, WIDTH) * torch.logspace(0, -2, WIDTH),
    "five directions and noise": random(150, 5) @ random(5, WIDTH, seed=1) + 0.01 * random(150, WIDTH, seed=2),
    "six directions, three at a time": torch.cat([random(75, 3) @ random(3, WIDTH, seed=s) for s in (1, 2)]),
    "padding": random(150, WIDTH) * (torch.arange(150) % 3 == 0)[:, None],
    "nothing": torch.zeros(20, WIDTH),
}
every_stream = pytest.mark.parametrize("name", STREAMS)


def whole(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


def step(estimate: Estimate, *rows: Tensor) -> None:
    """One step of micro-batches in one process."""
    for each in rows:
        estimate.add("x", each)
    estimate.take_in(whole)


def step_of_all(estimates: list[Any], shares: list[list[Tensor]], patch: pytest.MonkeyPatch) -> None:
    """One step in which every process has micro-batches, and an estimate, of its own."""
    patch.setattr(ranks, "ranks", lambda: len(estimates))
    for estimate, rows in zip(estimates, shares, strict=True):
        for each in rows:
            estimate.add("x", each)
    given: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        given.append(tensor.clone())
        return tensor

    for of, total in ((copy.deepcopy(estimates), record), (estimates, lambda _: torch.stack(given).sum(0))):
        for rank, estimate in enumerate(of):
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            estimate.take_in(total)


def check_bound(found: Tensor, rows: Tensor) -> None:
    """||C - W W^T||_2 <= ||X - X_k||_F^2 / (l - k) for every k below l, and C - W W^T is positive."""
    x = rows.double()
    values = torch.linalg.eigvalsh(x.mT @ x - found @ found.mT)
    rounding = 1e-5 * float(x.square().sum())
    assert values.min() >= -rounding
    tail = torch.linalg.svdvals(x).square().flip(0).cumsum(0).flip(0)  # ||X - X_k||_F^2 by k
    for k in range(MOST):
        assert values.max() <= tail[k] / (MOST - k) + rounding, k


@pytest.mark.parametrize("size", [1, 7, 150])
@every_stream
def test_a_gram_is_the_sum_of_outer_products(name: str, size: int) -> None:
    estimate, rows = Gram(), STREAMS[name]
    micro_batches = rows.split(size)
    step(estimate, *micro_batches[::2])
    step(estimate, *micro_batches[1::2])
    expected = rows.double().mT @ rows.double()
    torch.testing.assert_close(estimate.kept["x"].double(), expected, rtol=1e-5, atol=1e-4)
    w = estimate.weighted("x")
    torch.testing.assert_close(w @ w.mT, estimate.kept["x"].double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1, 5, 8, 9, 16, 17, 150])
@pytest.mark.parametrize("per_step", [1, 3])
@every_stream
def test_a_sketch_keeps_the_bound_of_frequent_directions_however_rows_are_split(
    name: str, per_step: int, size: int
) -> None:
    estimate, rows = Sketch(MOST), STREAMS[name]
    micro_batches = rows.split(size)
    for first in range(0, len(micro_batches), per_step):
        step(estimate, *micro_batches[first : first + per_step])
        assert len(estimate.kept["x"]) <= 2 * MOST
    check_bound(estimate.weighted("x"), rows)


def test_a_sketch_of_no_more_rows_than_directions_is_exact() -> None:
    estimate, rows = Sketch(MOST), random(MOST, WIDTH)
    for each in rows.split(3):
        step(estimate, each)
    w = estimate.weighted("x")
    torch.testing.assert_close(w @ w.mT, rows.double().mT @ rows.double(), rtol=1e-5, atol=1e-5)


@every_stream
def test_sketches_of_two_processes_are_one_within_the_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both, rows = [Sketch(MOST), Sketch(MOST)], STREAMS[name]
    for first in rows.split(40):
        step_of_all(both, [list(first[0::2].split(9)), [first[1::2]]], monkeypatch)
    assert torch.equal(both[0].kept["x"], both[1].kept["x"])
    check_bound(both[0].weighted("x"), rows)


def test_a_process_without_rows_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = STREAMS["random"][:5]
    alone = Sketch(MOST)
    step(alone, rows)
    both = [Sketch(MOST), Sketch(MOST)]
    step_of_all(both, [[rows], [rows[:0]]], monkeypatch)
    for each in both:
        w = each.weighted("x")
        torch.testing.assert_close(w @ w.mT, alone.weighted("x") @ alone.weighted("x").mT, rtol=1e-5, atol=1e-5)


def test_grams_of_two_processes_are_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    both, rows = [Gram(), Gram()], STREAMS["random"]
    for _ in range(2):
        step_of_all(both, [[rows[:20], rows[20:50]], [rows[50:]]], monkeypatch)
    for each in both:
        torch.testing.assert_close(each.kept["x"].double(), 2 * rows.double().mT @ rows.double(), rtol=1e-5, atol=1e-4)


def needing(*directions: Tensor) -> Tensor:
    """A step's rows that need the directions."""
    return torch.stack([size * d for size, d in zip((4.0, 3.0, 2.0), directions, strict=False)])


def test_a_direction_is_collected_when_it_was_needed_in_steps_one_after_the_other_and_noise_is_not() -> None:
    d, *noise = basis(WIDTH, 20).mT
    estimate = Residual(MOST, 0.95, 3, {})
    for number, needed in enumerate([True, True, False, True, True]):
        step(estimate, needing(*[d] * needed, noise[number]))
        assert estimate.weighted("x").shape == (WIDTH, 0), number
    step(estimate, needing(d, noise[5]))
    found = estimate.weighted("x")
    torch.testing.assert_close(found @ found.mT, torch.outer(d, d).double(), rtol=0, atol=1e-6)
    for each in noise[6:]:  # it is held by now, and noise is new each time
        step(estimate, needing(d, each))
    assert torch.equal(estimate.weighted("x"), found)
    assert estimate.kept["x"].shape == (WIDTH + 1, 2)


def test_a_direction_that_turns_slowly_stays_on_trial_and_one_that_jumps_does_not() -> None:
    one, other = basis(WIDTH, 2).mT

    def turned(angle: float) -> Tensor:
        angle = torch.deg2rad(torch.tensor(angle))
        return needing(torch.cos(angle) * one + torch.sin(angle) * other)

    for angles, collected in (((0.0, 40.0, 40.0), 1), ((0.0, 50.0, 0.0), 0)):
        estimate = Residual(MOST, 0.95, 3, {})
        for angle in angles:
            step(estimate, turned(angle))
        assert estimate.weighted("x").shape[1] == collected


def test_one_step_is_enough_where_it_has_to_survive_one() -> None:
    estimate, directions = Residual(MOST, 0.9999, 1, {}), basis(WIDTH, 3)
    step(estimate, needing(*directions.mT))
    found = estimate.weighted("x")
    torch.testing.assert_close(found @ found.mT, (directions @ directions.mT).double(), rtol=0, atol=1e-6)


def test_what_is_protected_is_not_needed() -> None:
    v = basis(WIDTH, 6)
    estimate = Residual(MOST, 0.9, 1, {"x": v[:, :4]})
    step(estimate, random(20, 4) @ v[:, :4].mT)
    assert estimate.weighted("x").shape == (WIDTH, 0)
    step(estimate, random(20, 6) @ v.mT)
    found = estimate.weighted("x")
    assert found.shape[1] > 0
    assert (v[:, :4].double().mT @ found).abs().max() < 1e-6
    assert (found - v.double() @ (v.double().mT @ found)).abs().max() < 1e-6


@pytest.mark.parametrize("survive", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_there_are_never_more_columns_than_inputs(width: int, survive: int) -> None:
    estimate = Residual(MOST, 1.0, survive, {})
    for seed in range(12):
        step(estimate, random(1 + seed % 5, width, seed=seed))
        kept = estimate.kept["x"]
        assert kept.shape[0] == width + 1
        assert kept.shape[1] <= width
        torch.testing.assert_close(kept[:-1].mT @ kept[:-1], torch.eye(kept.shape[1]), rtol=0, atol=1e-5)


def test_directions_that_are_in_part_on_trial_are_not_taken_for_new_ones_together() -> None:
    estimate, first = Residual(MOST, 1.0, 5, {}), torch.tensor([1.0, 1.1, 0.9])
    step(estimate, first[None])
    # each axis is outside of it by more than half, all three together span but two directions more
    step(estimate, torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    *directions, ages = estimate.kept["x"]
    trial = torch.stack(directions)
    assert ages.tolist() == [2.0, 1.0]
    torch.testing.assert_close(trial.mT @ trial, torch.eye(2))
    torch.testing.assert_close((trial[:, 0] @ first).abs(), first.norm())
    rest = torch.tensor([1.0, 0.0, 0.0]) - first[0] / first.square().sum() * first
    torch.testing.assert_close((trial[:, 1] @ rest).abs(), rest.norm())


def test_residuals_do_not_hang_on_micro_batches_or_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    directions = basis(WIDTH, 3)
    steps = [torch.cat([needing(*directions.mT), 0.01 * random(3, WIDTH, seed=seed)]) for seed in range(3)]
    one, split = (Residual(MOST, 0.99, 2, {}) for _ in range(2))
    for rows in steps:
        step(one, rows)
        step(split, *rows.split(1))
    both = [Residual(MOST, 0.99, 2, {}), Residual(MOST, 0.99, 2, {})]
    for rows in steps:
        step_of_all(both, [[rows[0::2]], [rows[1::2]]], monkeypatch)
    assert torch.equal(both[0].kept["x"], both[1].kept["x"])
    expected = one.weighted("x") @ one.weighted("x").mT
    torch.testing.assert_close(expected, (directions @ directions.mT).double(), rtol=0, atol=1e-2)
    for each in (split, both[0]):
        torch.testing.assert_close(each.weighted("x") @ each.weighted("x").mT, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [Gram, lambda: Sketch(MOST), lambda: Residual(MOST, 0.9, 2, {})])
def test_what_is_kept_is_the_state_and_a_block_begins_with_nothing(make: Callable[[], Estimate]) -> None:
    first, second = make(), make()
    first.take_in(whole)
    assert first.names == []
    for seed in range(3):
        step(first, random(30, WIDTH, seed=seed))
    second.load_state_dict({**first.state_dict(), "protected/x": torch.ones(1)})
    assert second.names == ["x"]
    for each in (first, second):
        step(each, random(30, WIDTH, seed=9))
    assert torch.equal(first.kept["x"], second.kept["x"])
    assert all(t.dtype == torch.float32 for t in first.state_dict().values())
    first.clear()
    assert first.state_dict() == {}
    step(first, random(3, WIDTH))
    fresh = make()
    step(fresh, random(3, WIDTH))
    assert torch.equal(first.kept["x"], fresh.kept["x"])


def context() -> Context:
    """q and k see one input, o another; they have ranks 2, 3 and 4."""
    shapes = {"q": 2, "k": 3, "o": 4}
    parameters = {
        f"{module}.lora_{factor}.default.weight": nn.Parameter(torch.zeros(shape))
        for module, rank in shapes.items()
        for factor, shape in (("A", (rank, WIDTH)), ("B", (5, rank)))
    }
    return Context(parameters, inputs=lambda: {"q": "q", "k": "q", "o": "o"})


def test_as_many_directions_stay_free_as_the_largest_rank_of_an_inputs_layers() -> None:
    estimate, subspaces = Gram(), Subspaces()
    for name in ("q", "o"):
        estimate.add(name, random(60, WIDTH))
    estimate.take_in(whole)
    protect(subspaces, estimate, context(), 1.0)
    assert {name: v.shape[1] for name, v in subspaces.directions.items()} == {"q": WIDTH - 3, "o": WIDTH - 4}


def test_a_share_of_the_energy_is_protected_but_of_collected_directions_all() -> None:
    directions = basis(WIDTH, 6)
    for estimate, expected in ((Sketch(MOST), 3), (Residual(MOST, 1.0, 1, {}), 6)):
        estimate.add("q", directions.mT)
        estimate.take_in(whole)
        subspaces = Subspaces()
        protect(subspaces, estimate, context(), 0.5)
        assert subspaces.directions["q"].shape == (WIDTH, expected)
