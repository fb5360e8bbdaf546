"""The checks themselves: they pass what is right and fail what is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


def test_one_unit_in_the_last_place_is_within_budget_and_a_wrong_value_is_not(
    within_budget: Callable[..., None],
) -> None:
    truth = torch.linspace(0.5, 1.0, 100, dtype=torch.float64)
    right = truth.half()
    within_budget("right", right, truth, right)
    within_budget("rounded once", torch.nextafter(right, right.new_tensor(2.0)), truth, right)
    wrong = right.clone()
    wrong[7] += 0.02
    with pytest.raises(AssertionError, match=r"y: largest error 0\.0\d+, budget 0\.00"):
        within_budget("y", wrong, truth, right)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.full((3,), float("nan")), "3 values that are not finite"),
        (torch.zeros(2), r"y is \(2,\), expected \(3,\)"),
        (torch.zeros(3, dtype=torch.float16), "y is torch.float16, expected torch.float32"),
        (torch.full((3,), 1.001), "mean square error|largest error"),
    ],
)
def test_what_is_no_result_is_told(within_budget: Callable[..., None], found: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        within_budget("y", found, torch.ones(3, dtype=torch.float64), torch.ones(3))


def test_poison_surrounds_the_values_and_nothing_else(poisoned: Callable[[torch.Tensor], torch.Tensor]) -> None:
    values = torch.arange(6.0).view(2, 3)
    view = poisoned(values)
    assert torch.equal(view, values)
    assert not view.is_contiguous()
    assert view.as_strided((2, 4), view.stride(), view.storage_offset())[:, 3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strides", [None, (1, 3), (8, 2)])
def test_a_guarded_view_starts_as_nan_and_may_be_written(
    guarded: Any, dtype: torch.dtype, strides: tuple[int, int] | None
) -> None:
    view = guarded((3, 4), dtype, torch.device("cpu"), strides)
    assert view.stride() == (strides or (4, 1))
    assert view.isnan().all()
    assert view.data_ptr() % 16 == 0
    view.fill_(1.0)
    guarded.check()


@pytest.mark.parametrize("place", [-1, 12, 4])
def test_what_is_written_around_a_guarded_view_is_told(guarded: Any, place: int) -> None:
    view = guarded((3, 4), torch.float32, torch.device("cpu"), (5, 1) if place == 4 else None)
    view.as_strided((1,), (1,), view.storage_offset() + place).fill_(0.0)
    with pytest.raises(AssertionError, match=f"buffer 0: 1 values were written outside the view, the first {place} "):
        guarded.check()


def test_poison_copied_from_one_buffer_to_another_is_told(guarded: Any) -> None:
    source, target = (guarded((8,), torch.float32, torch.device("cpu")) for _ in range(2))
    ends = [view.as_strided((9,), (1,), view.storage_offset()) for view in (source, target)]
    ends[1].copy_(ends[0])  # one element too many
    with pytest.raises(AssertionError, match="buffer 1: 1 values were written outside"):
        guarded.check()
