"""What the tests of methods share."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cladapt.model.observe import Outputs

OutputsAt = Callable[[Mapping[str, Tensor]], dict[str, Any]]


@pytest.fixture
def outputs_at() -> OutputsAt:
    """Members of a context whose model is made up: its logits, four choices of three, and its two features of four
    numbers are linear in the values of its parameters."""

    def outputs(values: Mapping[str, Tensor]) -> Outputs:
        flat = torch.cat([value.flatten() for value in values.values()])
        maps = torch.randn(20, len(flat), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = maps.to(flat) @ flat
        features = found[12:].view(2, 4)
        return Outputs(features, features, torch.tensor([0, 1]), found[:12], torch.arange(12) // 3, 5)

    def members(values: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"outputs": lambda: outputs(values), "outputs_with": lambda others, batch: outputs(others)}

    return members
