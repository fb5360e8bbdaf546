"""Class means against plain means over features, in one process and in two."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cladapt.artifacts import read_tensors, write_tensors
from cladapt.methods import Context
from cladapt.methods._prototypes import Prototypes
from cladapt.model.observe import Outputs

CPU = torch.device("cpu")


def features(label: list[int], seed: int) -> Outputs:
    """A pass over features of these classes, of six."""
    x = torch.randn(len(label), 5, generator=torch.Generator().manual_seed(seed))
    return Outputs(x, x, torch.tensor(label, dtype=torch.int64), x[:0, 0], torch.zeros(0, dtype=torch.int64), 6)


def context(*passes: Outputs, total: Any = lambda tensor: tensor) -> Context:
    def look(share: float, see: Any) -> Iterator[Outputs]:
        assert (share, see) == (0.5, None)
        return iter(passes)

    return Context({}, look=look, total=total)


def mean_of(passes: list[Outputs], c: int) -> Tensor:
    rows = [x / x.norm() for each in passes for x, y in zip(each.features.double(), each.label, strict=True) if y == c]
    mean = torch.stack(rows).mean(0)
    return mean / mean.norm()


def test_means_are_of_normalised_features_and_a_later_block_takes_the_place_of_an_earlier() -> None:
    prototypes = Prototypes()
    first, second = [features([4, 1, 4], 0), features([1, 1], 1)], [features([4, 0], 2), features([], 3)]
    for passes in (first, second):
        prototypes.learn(context(*passes), 0.5)
    classes, means = prototypes.of(CPU)
    assert classes.tolist() == [0, 1, 4]
    assert len(prototypes) == 3
    for c, passes, mean in zip((0, 1, 4), (second, first, second), means.double(), strict=True):
        torch.testing.assert_close(mean, mean_of(passes, c), rtol=0, atol=1e-6)


def test_sums_and_counts_of_all_processes_are_one_mean() -> None:
    own, other = [features([2, 3], 0)], [features([2, 2, 5], 1)]
    given: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        given.append(tensor)
        return tensor

    Prototypes().learn(context(*other, total=record), 0.5)
    prototypes = Prototypes()
    prototypes.learn(context(*own, total=lambda tensor: tensor + given[0]), 0.5)
    classes, means = prototypes.of(CPU)
    assert classes.tolist() == [2, 3, 5]
    for c, mean in zip((2, 3, 5), means.double(), strict=True):
        torch.testing.assert_close(mean, mean_of([*own, *other], c), rtol=0, atol=1e-6)


def test_the_state_goes_through_a_file_and_nothing_is_learned_from_nothing(tmp_path: Path) -> None:
    prototypes, again = Prototypes(), Prototypes()
    prototypes.learn(context(), 0.5)
    prototypes.learn(context(features([], 0)), 0.5)
    assert prototypes.state_dict() == {}
    prototypes.learn(context(features([5, 2, 2], 0)), 0.5)
    write_tensors(tmp_path / "state.safetensors", prototypes.state_dict())
    again.load_state_dict({**read_tensors(tmp_path / "state.safetensors"), "frozen": torch.ones(2)})
    for one, other in zip(prototypes.of(CPU), again.of(CPU), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    again.load_state_dict({})
    assert len(again) == 0
