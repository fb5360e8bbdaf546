"""The peak of a call is that of the tensors it holds at once."""

import pytest
import torch

from cladapt.pipeline.memory import peak_bytes

MILLION = 4 * 1000 * 1000


def test_what_is_freed_makes_room() -> None:
    def call() -> None:
        a = torch.ones(1000, 1000)
        b = a * 2
        del a
        c = b + 1
        del b
        c + 1

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(2 * MILLION, rel=1e-4)


def test_the_backward_pass_counts_and_what_was_there_before_does_not() -> None:
    weight = torch.ones(1000, 1000, requires_grad=True)
    x = torch.ones(1000, 1000)

    def call() -> None:
        (x @ weight).sigmoid().sum().backward()

    # the sigmoid is kept, and its gradient and the weight's are made
    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(3 * MILLION, rel=0.34)
    assert weight.grad is not None
