"""The truths themselves, against autograd in float64 and against closed forms."""

import pytest
import torch

from cladapt_kernels import reference

LENGTHS = torch.tensor([1, 5, 33, 1000])


def vectors(dtype: torch.dtype, spread: float = 0.02, step: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    anchor = spread * torch.randn(int(LENGTHS.sum()), generator=generator, dtype=torch.float64)
    value = anchor + step * torch.randn(anchor.shape, generator=generator, dtype=torch.float64)
    return value.to(dtype), anchor.to(dtype)


def brute_force_kl(value: torch.Tensor, anchor: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    groups = zip(value.split(LENGTHS.tolist()), anchor.split(LENGTHS.tolist()), tau, strict=True)
    return torch.stack(
        [((v / t).softmax(0) * ((v / t).log_softmax(0) - (a / t).log_softmax(0))).sum() for v, a, t in groups]
    )


def kl(value: torch.Tensor, anchor: torch.Tensor, inverse_tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = reference.group_softmax(anchor * inverse_tau.repeat_interleave(LENGTHS), LENGTHS)
    return reference.proximal_kl(value, anchor, p, LENGTHS, inverse_tau)


@pytest.mark.parametrize("tau", [1.0, 0.02])
@pytest.mark.parametrize("step", [1e-3, 0.1])
def test_kl_and_its_closed_form_gradient_equal_autograd_in_float64(tau: float, step: float) -> None:
    value, anchor = vectors(torch.float64, step=step)
    taus = torch.full((4,), tau, dtype=torch.float64)
    value.requires_grad_()
    truth = brute_force_kl(value, anchor, taus)
    truth.sum().backward()
    penalty, grad = kl(value.detach(), anchor, 1 / taus)
    torch.testing.assert_close(penalty, truth.detach(), rtol=1e-8, atol=1e-18)
    torch.testing.assert_close(grad, value.grad, rtol=1e-8, atol=1e-18)


def test_long_groups_give_what_short_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    value, anchor = vectors(torch.float64)
    inverse_tau = torch.tensor([1.0, 3.0, 50.0, 7.0], dtype=torch.float64)
    together = kl(value, anchor, inverse_tau)
    monkeypatch.setattr(reference, "LONG_GROUP", 1)
    apart = kl(value, anchor, inverse_tau)
    torch.testing.assert_close(apart[0], together[0], rtol=1e-10, atol=1e-18)
    torch.testing.assert_close(apart[1], together[1], rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("long_group", [1, reference.LONG_GROUP])
def test_float32_keeps_the_digits_that_a_difference_of_logs_loses(
    long_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "LONG_GROUP", long_group)
    value, anchor = vectors(torch.float32)
    ones = torch.ones(4)
    truth = brute_force_kl(value.double(), anchor.double(), ones.double())
    penalty, _ = kl(value, anchor, ones)
    naive = brute_force_kl(value, anchor, ones)
    error = ((penalty - truth).abs() / truth.clamp_min(1e-30))[1:]
    assert error.max() < 1e-3
    assert ((naive - truth).abs() / truth.clamp_min(1e-30))[1:].max() > 10 * error.max()


@pytest.mark.parametrize("far", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("long_group", [1, reference.LONG_GROUP])
def test_an_entry_far_from_its_anchor_does_not_overflow_float32(
    far: float, long_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "LONG_GROUP", long_group)
    value, anchor = vectors(torch.float32)
    tau = 0.02
    value[LENGTHS.cumsum(0) - 1] += far * tau
    exact = value.double().requires_grad_()
    truth = brute_force_kl(exact, anchor.double(), torch.full((4,), tau, dtype=torch.float64))
    truth.sum().backward()
    penalty, grad = kl(value, anchor, torch.full((4,), 1 / tau))
    torch.testing.assert_close(penalty.double(), truth.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-4, atol=1e-4 / tau)


@pytest.mark.parametrize("far", [0.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_give_penalty_and_gradient_of_each_group_alone(dtype: torch.dtype, far: float) -> None:
    value, anchor = vectors(dtype)
    taus = torch.tensor([1.0, 0.05, 0.03, 0.02], dtype=dtype)
    ends = LENGTHS.cumsum(0) - 1
    value[ends] += far * taus
    exact = value.double().requires_grad_()
    truth = brute_force_kl(exact, anchor.double(), taus.double())
    truth.sum().backward()
    anchor_p = reference.group_softmax(anchor / taus.repeat_interleave(LENGTHS), LENGTHS)
    weight = torch.tensor(3.0, dtype=dtype)
    rows = reference.proximal_statistics(value, anchor, anchor_p, LENGTHS, 1 / taus, weight)
    *_, log_mean, mean = rows.unbind(1)
    near = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close((mean - log_mean).double(), truth.detach(), **near)
    parts = zip(value.split(LENGTHS.tolist()), anchor.split(LENGTHS.tolist()), rows, strict=True)
    grad = torch.cat([reference.proximal_gradient("kl", *part) for part in parts])
    rounding = 3.0 / taus.min().item() * (4.0 + 10.0 * far) * torch.finfo(dtype).eps  # of d, as large as `far`
    torch.testing.assert_close(grad.double(), 3.0 * exact.grad, rtol=near["rtol"], atol=rounding)


def test_the_gradient_of_l2_is_the_difference_times_its_weight() -> None:
    value, anchor = vectors(torch.float64)
    row = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(reference.proximal_gradient("l2", value, anchor, row), 3.0 * (value - anchor))


def test_a_constant_shift_of_a_group_is_free() -> None:
    _, anchor = vectors(torch.float64)
    penalty, grad = kl(anchor + 0.7, anchor, torch.ones(4, dtype=torch.float64))
    assert penalty.abs().max() < 1e-15
    assert grad.abs().max() < 1e-15


def test_small_steps_follow_half_the_weighted_variance() -> None:
    value, anchor = vectors(torch.float64, step=1e-5)
    penalty, _ = kl(value, anchor, torch.ones(4, dtype=torch.float64))
    expected = []
    for v, a in zip(value.split(LENGTHS.tolist()), anchor.split(LENGTHS.tolist()), strict=True):
        p, d = a.softmax(0), v - a
        expected.append(0.5 * ((p * d * d).sum() - (p * d).sum() ** 2))
    torch.testing.assert_close(penalty, torch.stack(expected), rtol=1e-4, atol=1e-22)


def test_l2_is_half_the_squared_distance_with_the_difference_as_gradient() -> None:
    value, anchor = vectors(torch.float64)
    penalty, grad = reference.proximal_l2(value, anchor, LENGTHS)
    torch.testing.assert_close(penalty.sum(), 0.5 * (value - anchor).norm() ** 2)
    torch.testing.assert_close(grad, value - anchor)


def test_group_softmax_equals_softmax_of_each_group_even_for_large_values() -> None:
    values = torch.tensor([1000.0, 1001.0, -5.0, 0.0, 5.0])
    lengths = torch.tensor([2, 3])
    expected = torch.cat([values[:2].softmax(0), values[2:].softmax(0)])
    torch.testing.assert_close(reference.group_softmax(values, lengths), expected)
