"""Flattening adapter factors into groups and back."""

import pytest
import torch
from torch import nn

from cladapt.errors import ConfigError
from cladapt.model.anchors import AdapterVector, factor_pairs

RANK = 3


def factors() -> dict[str, nn.Parameter]:
    shapes = {
        "q.lora_A.default.weight": (RANK, 5),
        "q.lora_B.default.weight": (7, RANK),
        "v.lora_A.default.weight": (RANK, 4),
        "v.lora_B.default.weight": (6, RANK),
    }
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


@pytest.mark.parametrize("grouping", ["factor", "module", "rank"])
def test_flatten_and_unflatten_are_inverse(grouping: str) -> None:
    parameters = factors()
    vector = AdapterVector(parameters, grouping)
    tensors = [p.detach() for p in parameters.values()]
    flat = vector.flatten(tensors)
    assert int(vector.lengths.sum()) == flat.numel() == sum(t.numel() for t in tensors)
    for back, tensor in zip(vector.unflatten(flat), tensors, strict=True):
        assert torch.equal(back, tensor)


def test_factor_groups_are_whole_factors() -> None:
    assert AdapterVector(factors(), "factor").lengths.tolist() == [15, 21, 12, 18]


def test_module_groups_join_both_factors() -> None:
    vector = AdapterVector(factors(), "module")
    assert vector.lengths.tolist() == [36, 30]
    assert vector.n_modules == 2


def test_rank_groups_are_the_rows_of_a_and_the_columns_of_b() -> None:
    parameters = factors()
    vector = AdapterVector(parameters, "rank")
    assert vector.lengths.tolist() == [5] * 3 + [7] * 3 + [4] * 3 + [6] * 3
    groups = vector.flatten([p.detach() for p in parameters.values()]).split(vector.lengths.tolist())
    assert torch.equal(groups[1], parameters["q.lora_A.default.weight"].detach()[1])
    assert torch.equal(groups[4], parameters["q.lora_B.default.weight"].detach()[:, 1])


def test_pairs_are_both_factors_of_a_module_and_leave_out_one_that_learns_a_single_one() -> None:
    parameters = factors()
    a, b = factor_pairs(parameters)["v"]
    assert a is parameters["v.lora_A.default.weight"]
    assert b is parameters["v.lora_B.default.weight"]
    directions = parameters | {"q.lora_B.default.parametrizations.weight.0.scale": nn.Parameter(torch.ones(1))}
    assert [*factor_pairs(directions)] == ["q", "v"]
    del directions["v.lora_A.default.weight"]
    assert [*factor_pairs(directions)] == ["q"]
    assert factor_pairs({}) == {}


def test_no_trainable_tensor_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no trainable tensors"):
        AdapterVector({}, "factor")
