"""Biases of blocks against the whole likelihood, minimised another way in float64, and against what is known."""

import numpy as np
import pytest
import torch

from cladapt.errors import DataError
from cladapt.eval.biases import fit_biases

BLOCK_OF_CLASS = np.array([1, 1, 1, 2, 2, 3, 3, 3, 3])


def images(seed: int, count: int = 60, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that favour the class, moved by chance for each block; the classes; their blocks."""
    rng = np.random.default_rng(seed)
    label = np.concatenate([[0, 3, 5], rng.integers(len(BLOCK_OF_CLASS), size=count - 3)])
    logits = rng.normal(size=(count, len(BLOCK_OF_CLASS))) + 2.0 * np.eye(len(BLOCK_OF_CLASS))[label]
    return logits + (spread * rng.normal(size=3))[BLOCK_OF_CLASS - 1], label, BLOCK_OF_CLASS[label]


def loss(logits: np.ndarray, label: np.ndarray, biases: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of labels over all classes."""
    biased = torch.from_numpy(logits).double() + biases[torch.from_numpy(BLOCK_OF_CLASS - 1)]
    return torch.nn.functional.cross_entropy(biased, torch.from_numpy(label))


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_biases_maximise_the_likelihood_over_all_classes(spread: float) -> None:
    logits, label, block = images(0, spread=spread)
    free = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    stop = {"tolerance_grad": 1e-12, "tolerance_change": 0.0}
    solver = torch.optim.LBFGS([free], lr=1.0, max_iter=500, line_search_fn="strong_wolfe", **stop)

    def closure() -> torch.Tensor:
        solver.zero_grad()
        found = loss(logits, label, free)
        found.backward()
        return found

    solver.step(closure)
    expected = (free - free.mean()).detach().numpy()
    found = fit_biases(logits, BLOCK_OF_CLASS, block)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert abs(found.sum()) < 1e-9
    np.testing.assert_array_equal(found, fit_biases(logits, BLOCK_OF_CLASS, block))


def test_no_step_aside_is_likelier() -> None:
    logits, label, block = images(1)
    found = torch.from_numpy(fit_biases(logits, BLOCK_OF_CLASS, block))
    best = loss(logits, label, found)
    for step in torch.eye(3, dtype=torch.float64):
        for size in (-1e-3, 1e-3):
            assert loss(logits, label, found + size * step) > best


def test_a_bias_undoes_what_was_added_to_a_block() -> None:
    logits, _, block = images(2)
    added = np.array([0.0, 4.0, -2.5])
    before = fit_biases(logits, BLOCK_OF_CLASS, block)
    after = fit_biases(logits + added[BLOCK_OF_CLASS - 1], BLOCK_OF_CLASS, block)
    np.testing.assert_allclose(after, before - (added - added.mean()), rtol=0, atol=1e-6)


def test_logits_that_say_nothing_give_the_shares_of_the_blocks() -> None:
    block = np.array([1] * 6 + [2] * 3 + [3])
    found = fit_biases(np.zeros((10, 9)), BLOCK_OF_CLASS, block)
    expected = np.log(np.array([0.6, 0.3, 0.1]) / np.array([3, 2, 4]))  # share over classes of the block
    np.testing.assert_allclose(found, expected - expected.mean(), rtol=0, atol=1e-7)


def test_logits_of_any_size_and_blocks_told_apart_without_fail_have_a_solution() -> None:
    logits, _, block = images(3, spread=1e4)
    assert np.isfinite(fit_biases(1e3 * logits, BLOCK_OF_CLASS, block)).all()
    sure = 50.0 * (block[:, None] == BLOCK_OF_CLASS)
    biased = sure + fit_biases(sure, BLOCK_OF_CLASS, block)[BLOCK_OF_CLASS - 1]
    np.testing.assert_array_equal(BLOCK_OF_CLASS[biased.argmax(1)], block)
    np.testing.assert_array_equal(fit_biases(np.ones((2, 3)), np.ones(3, dtype=int), np.ones(2, dtype=int)), [0.0])


def test_what_gives_no_estimate_is_told() -> None:
    logits, _, block = images(4)
    with pytest.raises(DataError, match=r"block 2 has no validation image among .*: its bias has no estimate"):
        fit_biases(logits[block != 2], BLOCK_OF_CLASS, block[block != 2])
    logits[5, 3] = np.nan
    with pytest.raises(DataError, match="a logit of a validation image is not finite"):
        fit_biases(logits, BLOCK_OF_CLASS, block)
