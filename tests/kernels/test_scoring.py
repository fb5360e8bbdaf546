"""Scores against an item table in chunks, against the whole matrix in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cladapt_kernels import scoring
from cladapt_kernels.scoring import item_cross_entropy, item_places, item_top_k


@pytest.fixture(autouse=True, params=[7, 1 << 22], ids=["chunks", "whole"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests with chunks of a row or two, and with one chunk."""
    monkeypatch.setattr(scoring, "CHUNK", request.param)


def drawn(n: int = 3, m: int = 11, d: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(size, d, generator=generator, dtype=dtype) for size in (n, m))
    return hidden, table * torch.logspace(-2, 2, m, dtype=dtype)[:, None], torch.randint(m, (n,), generator=generator)


def dense(hidden: Tensor, table: Tensor, normalise: bool) -> Tensor:
    return hidden @ (F.normalize(table, dim=1) if normalise else table).T


@pytest.mark.parametrize("normalise", [False, True])
def test_losses_and_gradients_are_those_of_the_whole_matrix(normalise: bool) -> None:
    hidden, table, target = drawn()
    hidden, table = hidden.requires_grad_(), table.requires_grad_()
    weight = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    found = item_cross_entropy(hidden, table, target, normalise)
    wanted = F.cross_entropy(dense(hidden, table, normalise), target, reduction="none")
    torch.testing.assert_close(found, wanted)
    ours, theirs = (torch.autograd.grad((loss * weight).sum(), [hidden, table]) for loss in (found, wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("normalise", [False, True])
def test_gradients_are_those_of_finite_differences(normalise: bool) -> None:
    hidden, table, target = drawn(n=2, m=4, d=3)
    table = F.normalize(table, dim=1) * torch.tensor([[0.5], [1.0], [2.0], [3.0]])
    inputs = (hidden.requires_grad_(), table.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, e: item_cross_entropy(h, e, target, normalise), inputs)


def test_a_row_of_zeros_scores_zero_and_learns_nothing() -> None:
    hidden, table, target = drawn()
    table[4] = 0.0
    table.requires_grad_()
    found = item_cross_entropy(hidden, table, target, True)
    torch.testing.assert_close(found, F.cross_entropy(dense(hidden, table, True), target, reduction="none"))
    found.sum().backward()
    assert table.grad is not None
    assert not table.grad[4].any()
    assert table.grad.isfinite().all()


def test_half_precision_is_scored_in_float32_inside_autocast_too() -> None:
    hidden, table, target = drawn(dtype=torch.float32)
    half = hidden.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = item_cross_entropy(half, table, target)
    torch.testing.assert_close(found, F.cross_entropy(half.detach().float() @ table.T, target, reduction="none"))
    found.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("normalise", [False, True])
def test_places_count_what_is_better_and_what_is_equal(normalise: bool) -> None:
    hidden, table, target = drawn(n=6)
    hidden, table = (8 * hidden).round(), (8 * table).round()  # whose products are exact, in whatever order
    table[3] = table[8]  # items that no vector tells apart
    target[0], target[1] = 3, 8
    left_out = (torch.tensor([0, 2, 2]), torch.tensor([8, (int(target[2]) + 1) % 11, (int(target[2]) + 5) % 11]))
    rank, ties, likelihood = item_places(hidden, table, target, normalise, left_out)
    logits = dense(hidden, table, normalise)
    torch.testing.assert_close(likelihood, logits.log_softmax(1).gather(1, target[:, None])[:, 0])
    for row, item in enumerate(target.tolist()):
        out = {j for i, j in zip(*(t.tolist() for t in left_out), strict=True) if i == row}
        others = [logits[row, j].item() for j in range(11) if j not in out]
        assert rank[row] == sum(score > logits[row, item] + 1e-12 for score in others)
        assert ties[row] == sum(abs(score - logits[row, item]) <= 1e-12 for score in others)
    assert ties.tolist()[:2] == [1, 2]  # the other of the first user's pair is left out


def test_the_best_rows_are_those_of_the_whole_matrix() -> None:
    hidden, table, _ = drawn(n=4)
    left_out = (torch.tensor([1, 1, 3]), torch.tensor([0, 5, 2]))
    logits = dense(hidden, table, True)
    logits[left_out] = -torch.inf
    score, row = item_top_k(hidden, table, 4, True, left_out)
    wanted = logits.topk(4)
    torch.testing.assert_close(score, wanted.values)
    assert torch.equal(row, wanted.indices)
    score, _ = item_top_k(hidden, table[:3], 4)
    assert torch.isinf(score[:, 3]).all()  # fewer rows than asked for


def test_nothing_to_score_is_no_loss() -> None:
    hidden, table, _ = drawn()
    assert item_cross_entropy(hidden[:0], table, torch.zeros(0, dtype=torch.int64)).shape == (0,)
