"""Item-wise SAM of a linear: gradients by item, the perturbed pass against the loop over items, in float64 and bf16."""

import pytest
import torch
from torch import Tensor

from cladapt_kernels import reference
from cladapt_kernels.lora.items import ItemFactors, item_linear, item_mask
from cladapt_kernels.lora.runs import Runs

ITEM = torch.tensor([2, 2, 2, 0, 0, 2, 1, 1, 1, 1, 1, 3])
"""Item 2 has two runs; no token is of item 4."""
ITEMS, K, N, R, SCALE = 5, 7, 6, 3, 0.5


def draw(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (len(ITEM), K), "weight": (N, K), "bias": (N,), "a": (R, K), "b": (N, R), "dy": (len(ITEM), N)}
    return {
        name: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for name, size in sizes.items()
    }


def plain(given: dict[str, Tensor], a: Tensor, b: Tensor, own: Tensor, p: float, seed: Tensor) -> Tensor:
    """Y of the tokens `own` with these factors, by the reference."""
    mask = item_mask(given["x"], p, seed)
    keep = None if mask is None else mask[own]
    return reference.lora_linear(given["x"][own], given["weight"], given["bias"], a, b, SCALE / (1 - p), keep)


def passes(given: dict[str, Tensor], kappa: Tensor, p: float, seed: Tensor) -> tuple[ItemFactors, dict[str, Tensor]]:
    """Both passes; gradients of sum(dy * y) in the second one, and its y."""
    factors = ItemFactors(Runs.of(ITEM, ITEMS))
    found: dict[str, Tensor] = {}
    for name in ("first", "second"):
        x, a, b = (given[n].clone().requires_grad_() for n in ("x", "a", "b"))
        y = item_linear(x, given["weight"], given["bias"], a, b, SCALE, factors, p, seed)
        (y * given["dy"]).sum().backward()
        found |= {f"{name} y": y.detach()} | {f"{name} d{n}": t.grad for n, t in zip("xab", (x, a, b), strict=True)}  # type: ignore[dict-item,misc]
        factors.kappa = kappa
    return factors, found


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_by_item_are_those_of_each_item_alone_and_their_sum_is_the_gradient(p: float) -> None:
    given, seed = draw(), torch.tensor([11])
    factors, found = passes(given, torch.zeros(ITEMS, dtype=torch.float64), p, seed)
    assert factors.gradients is not None
    for item in range(ITEMS):
        a, b = (given[n].clone().requires_grad_() for n in ("a", "b"))
        own = item == ITEM
        (plain(given, a, b, own, p, seed) * given["dy"][own]).sum().backward()
        by_item = factors.gradients[item].double()
        torch.testing.assert_close(by_item[:, :K], a.grad, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_item[:, K:].T, b.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(factors.squares(), factors.gradients.double().square().sum((1, 2)))
    x, a, b = (given[n].clone().requires_grad_() for n in ("x", "a", "b"))
    (plain({**given, "x": x}, a, b, torch.ones(len(ITEM), dtype=torch.bool), p, seed) * given["dy"]).sum().backward()
    for name, tensor in {"x": x, "a": a, "b": b}.items():
        torch.testing.assert_close(found[f"first d{name}"], tensor.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_perturbed_pass_is_a_pass_for_each_item_with_factors_of_its_own(p: float) -> None:
    given, seed, kappa = draw(), torch.tensor([11]), torch.linspace(0.05, 0.25, ITEMS, dtype=torch.float64)
    factors, found = passes(given, kappa, p, seed)
    assert factors.gradients is not None
    x, a, b = (given[n].clone().requires_grad_() for n in ("x", "a", "b"))
    loss = given["x"].new_zeros(())
    for item in range(ITEMS):
        own, step = item == ITEM, kappa[item] * factors.gradients[item].double()
        y = plain({**given, "x": x}, a + step[:, :K], b + step[:, K:].T, own, p, seed)
        torch.testing.assert_close(found["second y"][own], y, rtol=1e-9, atol=1e-9)
        loss = loss + (y * given["dy"][own]).sum()
    loss.backward()
    for name, tensor in {"x": x, "a": a, "b": b}.items():
        torch.testing.assert_close(found[f"second d{name}"], tensor.grad, rtol=1e-9, atol=1e-9)


def test_a_mask_keeps_its_share_and_depends_on_the_seed_alone() -> None:
    x = torch.empty(301, 203)
    first, again, other = (item_mask(x, 0.3, torch.tensor([seed])) for seed in (4, 4, 5))
    assert first is not None
    assert other is not None
    assert torch.equal(first, again)
    assert (first != other).double().mean() == pytest.approx(2 * 0.3 * 0.7, abs=0.01)
    assert first.double().mean() == pytest.approx(0.7, abs=0.01)
    assert first.double().mean(0).std() == pytest.approx((0.3 * 0.7 / 301) ** 0.5, rel=0.2)  # as of single draws
    assert item_mask(x, 0.0, None) is None
    assert int(item_mask(x, 1 - 1e-9, torch.tensor([4])).sum()) <= 1 + len(x.flatten()) // 2**12  # type: ignore[union-attr]


def test_kappa_zero_is_no_perturbation() -> None:
    _, found = passes(draw(), torch.zeros(ITEMS, dtype=torch.float64), 0.4, torch.tensor([5]))
    for name in ("y", "dx", "da", "db"):
        torch.testing.assert_close(found[f"second {name}"], found[f"first {name}"], rtol=1e-12, atol=1e-12)


def test_in_bf16_the_perturbation_survives_where_its_sum_with_the_factor_would_not() -> None:
    """A is 1e-2, E is 1e-5 an entry: X E has an error below one per cent, by way of bf16(A + E) more than half."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 512, generator=generator).bfloat16()
    a, step = (size * torch.randn(8, 512, generator=generator) for size in (1e-2, 1e-5))
    item = torch.zeros(64, dtype=torch.int64)
    factors = ItemFactors(Runs.of(item, 1))
    factors.gradients, factors.kappa = torch.cat([step, torch.zeros(8, 16)], 1)[None], torch.ones(1)
    (down, _), (piece,) = factors.steps(item[:1], 512, torch.bfloat16), factors.runs.pieces
    truth = x.double() @ step.double().T
    found = (piece.of(x) @ down.mT)[0].double()
    assert (found - truth).norm() / truth.norm() < 0.01
    rounded = x.double() @ ((a + step).bfloat16().double() - a.bfloat16().double()).T
    assert (rounded - truth).norm() / truth.norm() > 0.5


@pytest.mark.parametrize(
    ("offsets", "item", "items", "message"),
    [
        ([0, 3, 5], [0, 1, 2], 3, "not the bounds of 3 runs"),
        ([1, 3], [0], 1, "not the bounds of 1 runs"),
        ([0, 3, 3], [0, 1], 2, "not the bounds of 2 runs"),
        ([0, 3, 5], [0, 3], 3, "items from 0 to 3, expected 0 to 2"),
    ],
)
def test_runs_that_are_none_are_refused(offsets: list[int], item: list[int], items: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Runs(torch.tensor(offsets), torch.tensor(item), items)


def test_runs_of_other_tokens_are_refused() -> None:
    given, factors = draw(), ItemFactors(Runs.of(ITEM[1:], ITEMS))
    with pytest.raises(ValueError, match="x has 12 tokens, the runs have 11"):
        item_linear(*(given[n] for n in ("x", "weight", "bias", "a", "b")), SCALE, factors)


@pytest.mark.parametrize("p", [1.0, -0.1])
def test_dropout_that_keeps_nothing_is_refused(p: float) -> None:
    given, factors = draw(), ItemFactors(Runs.of(ITEM, ITEMS))
    with pytest.raises(ValueError, match=f"dropout p={p}, expected 0 <= p < 1"):
        item_linear(*(given[n] for n in ("x", "weight", "bias", "a", "b")), SCALE, factors, p, torch.zeros(1).long())


@pytest.mark.parametrize(
    "item",
    [[0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2], [1, 1, 0, 0, 1, 1], [3], [], [0] * 9 + [1, 2, 2, 3] + [1] * 5 + [0] * 2],
)
def test_every_token_is_in_one_place_of_one_piece(item: list[int]) -> None:
    runs = Runs.of(torch.tensor(item, dtype=torch.int64), 4)
    tokens, again = torch.randn(len(item), 5), torch.zeros(len(item), 5)
    for piece in runs.pieces:
        padded = piece.own(piece.of(tokens))
        piece.add(again, padded, 2.0)
        if piece.place is not None and piece.inside is not None:
            here = torch.tensor(item)[piece.place].view(len(piece.item), -1)
            assert (here == piece.item[:, None]).all()
    assert torch.equal(again, 2 * tokens)


def test_no_tokens_are_no_gradient_of_any_item() -> None:
    """As of a process that has no row of its own."""
    given = draw()
    a, b = (given[n].clone().requires_grad_() for n in ("a", "b"))
    factors = ItemFactors(Runs.of(ITEM[:0], ITEMS))
    for _ in range(2):
        y = item_linear(given["x"][:0], given["weight"], given["bias"], a, b, SCALE, factors)
        y.sum().backward()
        assert y.shape == (0, N)
        factors.kappa = torch.ones(ITEMS)
    assert not a.grad.any()
    assert not b.grad.any()
    assert factors.squares().tolist() == [0.0] * ITEMS


def test_kappa_needs_the_gradients_of_a_first_pass() -> None:
    given, factors = draw(), ItemFactors(Runs.of(ITEM, ITEMS))
    factors.kappa = torch.ones(ITEMS)
    with pytest.raises(RuntimeError, match="no gradients before the first backward pass"):
        item_linear(*(given[n] for n in ("x", "weight", "bias", "a", "b")), SCALE, factors)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_tiles_cover_every_token_once_and_have_one_run_each(rows: int) -> None:
    tiles = Runs.of(ITEM, ITEMS).tiles(rows)
    assert tiles.dtype == torch.int32
    assert [token for first, last, _ in tiles.tolist() for token in range(first, last)] == [*range(len(ITEM))]
    starts = [0, 3, 5, 6, 11]  # of the runs, by hand
    assert {*starts} <= {*tiles[:, 0].tolist()}
    for first, last, item in tiles.tolist():
        assert 0 < last - first <= rows
        assert ITEM[first:last].tolist() == [item] * (last - first)
        assert last in (*starts, len(ITEM)) or last - first == rows  # as long as they can be


def test_runs_by_item_are_all_runs_of_each() -> None:
    bounds, offsets = Runs.of(ITEM, ITEMS).sorted_by_item
    assert bounds.dtype == offsets.dtype == torch.int32
    assert bounds.tolist() == [[3, 5], [6, 11], [0, 3], [5, 6], [11, 12]]
    assert offsets.tolist() == [0, 1, 2, 4, 5, 5]


def test_squares_are_those_that_were_told_until_the_gradients_are_others() -> None:
    factors = ItemFactors(Runs.of(ITEM, ITEMS))
    gradients, known = torch.ones(ITEMS, R, K + N), torch.arange(5.0)
    factors.add_measured(gradients, known)
    assert torch.equal(factors.squares(), known.double())
    factors.gradients = 2 * gradients
    assert factors.squares().tolist() == [4.0 * R * (K + N)] * ITEMS
    factors.add_measured(gradients, known)
    assert factors.squares().tolist() == [9.0 * R * (K + N)] * ITEMS


def test_float64_stays_under_autocast_as_in_the_linear() -> None:
    given = draw()
    arguments = [given[n] for n in ("x", "weight", "bias", "a", "b")]
    plain = item_linear(*arguments, SCALE, ItemFactors(Runs.of(ITEM, ITEMS)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(item_linear(*arguments, SCALE, ItemFactors(Runs.of(ITEM, ITEMS))), plain)
