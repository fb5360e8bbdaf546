"""The gradients of the factors beyond autograd's use: the same bits again, in one launch, the proximal term."""

import pytest
import torch
from torch import Tensor

from cladapt_kernels import reference

pytest.importorskip("triton", reason="the kernels are written in triton")
from cladapt_kernels.lora import skinny as module
from cladapt_kernels.lora.skinny import Proximal, counters, single, skinny

M, K, N, R, SCALE = 700, 90, 140, 5, 0.5
LENGTHS = torch.tensor([R * K, N * R])


@pytest.fixture
def inputs(device: torch.device) -> tuple[Tensor, ...]:
    """dS, X, S, dY, A, B."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((M, R), (M, K), (M, R), (M, N), (R, K), (N, R))
    return tuple(torch.randn(size, generator=generator).to(device) for size in sizes)


def truth(inputs: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    ds, x, s, dy = (t[rows].double() for t in inputs[:4])
    return ds.T @ x, SCALE * dy.T @ s


def empty(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return torch.full_like(inputs[4], float("nan")), torch.full_like(inputs[5], float("nan"))


def test_two_runs_are_equal_bit_for_bit(inputs: tuple[Tensor, ...]) -> None:
    first, second = empty(inputs), empty(inputs)
    for da, db in (first, second):
        skinny(*inputs[:4], SCALE, da, db)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("crowd", [1, 8])
def test_one_launch_gives_the_same_bit_for_bit_again_and_leaves_its_counters_zeros(
    crowd: int, inputs: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEWEST_ROWS", 32)
    monkeypatch.setattr(module, "CROWD", crowd)
    monkeypatch.setattr(module, "processors", lambda _: 8)  # one chunk, and seven
    rows, first, second = slice(200), empty(inputs), empty(inputs)
    for da, db in (first, second):
        single(*(t[rows] for t in inputs[:4]), SCALE, da, db)
        assert counters(da.device, 8).abs().max() == 0
    for found, again, exact in zip(first, second, truth(inputs, rows), strict=True):
        assert torch.equal(found, again)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tau", [1.0, 0.02])
@pytest.mark.parametrize("kind", ["kl", "l2"])
def test_the_proximal_gradient_is_added_as_the_reference_has_it(
    kind: str, tau: float, inputs: tuple[Tensor, ...], device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(1)
    anchor = [0.02 * torch.randn(t.shape, generator=generator).to(device) for t in inputs[4:]]
    value = [t + 1e-3 * torch.randn(t.shape, generator=generator).to(device) for t in anchor]
    lengths, inverse_tau, weight = LENGTHS.to(device), torch.full((2,), 1 / tau, device=device), 100.0
    flat_value, flat_anchor = (torch.cat([t.reshape(-1) for t in pair]) for pair in (value, anchor))
    anchor_p = reference.group_softmax(flat_anchor / tau, lengths)
    statistics = reference.proximal_statistics(
        flat_value, flat_anchor, anchor_p, lengths, inverse_tau, torch.tensor(weight, device=device)
    )
    if kind == "kl":
        exact = [t.double() for t in (flat_value, flat_anchor)]
        q = reference.group_softmax(exact[1] / tau, lengths)
        _, gradient = reference.proximal_kl(*exact, q, lengths, inverse_tau.double())
    else:
        _, gradient = reference.proximal_l2(flat_value.double(), flat_anchor.double(), lengths)
    zeros = [torch.zeros_like(t) for t in inputs[:4]]  # so that the term is seen alone
    da, db = empty(inputs)
    skinny(*zeros, SCALE, da, db, proximal=Proximal(kind, *value, *anchor, statistics))
    found = torch.cat([da.reshape(-1), db.reshape(-1)])
    torch.testing.assert_close(found.double(), weight * gradient, rtol=2e-3, atol=1e-4 * weight * gradient.abs().max())
