"""EBLoRA: its start and its subspace against dense algebra, and what must hold after learning."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cladapt.config import AdapterConfig
from cladapt.errors import ConfigError
from cladapt.methods._subspace import grow_subspace
from cladapt.methods.eblora import leading_directions
from cladapt.model.adapter import adapter_parameters, adapter_tensors
from cladapt.model.anchors import is_up, scales
from cladapt.model.load import load_base
from cladapt.model.saved import load_adapter, read_adapter, save_adapter

ADAPTER = AdapterConfig(rank=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"))
SCALE = 2.0
Make = Callable[..., Any]


@pytest.fixture
def eblora(make_learner: Make) -> Make:
    return partial(make_learner, "eblora", ADAPTER)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(random(n, k, seed=seed))[0].float()


def updates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """alpha / r B A of every module, in float64."""
    return {
        name.split(".lora_A")[0]: SCALE * tensors[name.replace("lora_A", "lora_B")].double() @ a.double()
        for name, a in tensors.items()
        if not is_up(name)
    }


@pytest.mark.parametrize("options", [{}, {"tangent": "canonical", "step_multiplier": "released", "gradients": "base"}])
def test_all_singular_values_of_a_blocks_update_are_equal_and_protected_directions_untouched(
    eblora: Make, options: dict[str, Any]
) -> None:
    learner = eblora(**options)
    learner.learn(2)
    protected = dict(learner.method.subspaces.directions)
    assert protected.keys() == updates(adapter_tensors(learner.model)).keys()
    learner.learn(3)
    sizes = {module: p.item() for module, p in scales(adapter_parameters(learner.model)).items()}
    for module, update in updates(adapter_tensors(learner.model)).items():
        values = torch.linalg.svdvals(update)[:4]
        expected = torch.full((4,), SCALE * abs(sizes[module]), dtype=torch.float64)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)
        assert values[0] > 1e-3
        f = protected[module].double()
        torch.testing.assert_close(f.mT @ f, torch.eye(f.shape[1], dtype=torch.float64), rtol=0, atol=1e-6)
        assert (update @ f).abs().max() <= 1e-5 * values[0]


def test_earlier_blocks_stay_in_the_model_and_are_saved_as_one_adapter(
    eblora: Make, folder: Path, tmp_path: Path
) -> None:
    learner = eblora()
    learner.learn(2)
    first = adapter_tensors(learner.model)
    learner.learn(3)
    second = adapter_tensors(learner.model)
    save_adapter(tmp_path / "a", learner.model, learner.base, {"block": 3})
    saved = updates(read_adapter(tmp_path / "a", learner.base))
    for module, update in updates(first).items():
        torch.testing.assert_close(saved[module], update + updates(second)[module], rtol=1e-6, atol=1e-8)
    probe = torch.tensor([[1, 4, 9, 5, 8, 6, 10, 7, 8]])
    with torch.no_grad():
        here = learner.model.eval()(probe).logits
        again = load_adapter(load_base(folder), tmp_path / "a")(probe).logits
    torch.testing.assert_close(again, here, rtol=1e-5, atol=1e-5)


def test_a_block_starts_from_the_gradient_and_changes_nothing_yet(eblora: Make) -> None:
    learner = eblora(sample=1.0)
    fit = learner.fit(2)
    probe = torch.tensor([[1, 4, 9, 5]])
    with torch.no_grad():
        before = learner.model.eval()(probe).logits
    torch.manual_seed(0)
    learner.method.begin_block(fit.ctx)
    with torch.no_grad():
        assert torch.equal(learner.model.eval()(probe).logits, before)
    gradients = fit.ctx.mean_gradient(fit.ctx.weights, 1.0)
    for name, a in fit.ctx.parameters.items():
        if ".lora_A." in name:
            gradient = gradients[name.split(".lora_A")[0]].double()
            top = torch.linalg.svd(gradient)[2][:4]
            # the same subspace: the projections agree
            torch.testing.assert_close(a.double().mT @ a.double(), top.mT @ top, rtol=0, atol=1e-3)
    assert all(s.item() == 0.0 for s in scales(fit.ctx.parameters).values())


def test_the_mean_gradient_is_that_of_the_loss_and_of_the_bare_model_where_asked(eblora: Make) -> None:
    learner = eblora()
    learner.learn(2)
    fit = learner.fit(3)
    weight = next(iter(fit.ctx.weights.values()))
    batches = fit.feed.sample(1.0)
    found = fit.ctx.mean_gradient(fit.ctx.weights, 1.0)
    assert not weight.requires_grad
    weight.requires_grad_(True)
    loss = sum(fit.module(*batch).sum() for batch in batches) / sum(map(fit.feed.targets, batches))
    (expected,) = torch.autograd.grad(loss, weight)
    weight.requires_grad_(False)
    torch.testing.assert_close(next(iter(found.values())), expected, rtol=1e-4, atol=1e-7)
    with fit.ctx.base_alone():
        bare = fit.ctx.mean_gradient(fit.ctx.weights, 1.0)
    plain = eblora().fit(3)
    for name, gradient in plain.ctx.mean_gradient(plain.ctx.weights, 1.0).items():
        torch.testing.assert_close(bare[name], gradient, rtol=1e-4, atol=1e-7)
    assert all(p.requires_grad for p in fit.ctx.parameters.values())


def test_directions_are_those_of_the_dense_decomposition_outside_the_protected_space() -> None:
    u, v = basis(30, 6, seed=2).double(), basis(50, 6, seed=3).double()
    gradient = u @ torch.diag(torch.tensor([9.0, 7, 5, 3, 2, 1], dtype=torch.float64)) @ v.mT
    protected = v[:, :2].float()
    torch.manual_seed(0)
    left, right = leading_directions(gradient, protected, 3)
    for found, expected in ((left, v[:, 2:5]), (right, u[:, 2:5])):
        torch.testing.assert_close(found @ found.mT, expected @ expected.mT, rtol=0, atol=1e-6)
    assert (protected.double().mT @ left).abs().max() < 1e-14


def test_left_and_right_directions_are_pairs_whose_sign_rounding_cannot_turn() -> None:
    # <G, U V^T> is the sum of the singular values; a token that never occurs has a row of zeros, here the first
    gradient = random(20, 16) * torch.logspace(0, -2, 16, dtype=torch.float64)
    gradient[0] = 0.0
    values = torch.linalg.svdvals(gradient)[:3]
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        noise = 1e-9 * random(20, 16, seed=seed)
        noise[0] = 0.0
        left, right = leading_directions(gradient + noise, None, 3)
        torch.testing.assert_close((right.mT @ gradient @ left).diagonal(), values, rtol=1e-5, atol=0)
        found.append((left, right))
    for left, right in found[1:]:
        torch.testing.assert_close(left, found[0][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(right, found[0][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank_of_gradient", [0, 1, 2])
def test_missing_directions_are_orthonormal_and_unprotected(rank_of_gradient: int) -> None:
    gradient = random(20, rank_of_gradient) @ random(rank_of_gradient, 16, seed=5)
    protected = basis(16, 10)
    torch.manual_seed(0)
    left, right = leading_directions(gradient.float(), protected, 5)
    for vectors in (left, right):
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (protected.double().mT @ left).abs().max() < 1e-12


def test_the_subspace_leaves_room_for_the_next_blocks_directions() -> None:
    grown = grow_subspace(None, random(32, 12).mT, 1.0, rank=4)
    assert grown is not None
    left, _ = leading_directions(random(32, 12, seed=9), grown, 4)
    assert (grown.double().mT @ left).abs().max() < 1e-6


def test_the_start_of_the_scale_runs_over_the_modules(eblora: Make) -> None:
    learner = eblora(start=0.002, start_slope=0.006)
    fit = learner.fit(2)
    learner.method.begin_block(fit.ctx)
    found = [s.item() for s in scales(fit.ctx.parameters).values()]
    assert found == pytest.approx(np.linspace(-0.002, -0.008, len(found)).tolist())


def test_the_released_multiplier_is_that_of_the_released_code(eblora: Make) -> None:
    distances = {}
    for multiplier in (math.sqrt(4096 / 4), "released"):
        learner = eblora(step_multiplier=multiplier)
        learner.learn(2)
        distances[multiplier] = adapter_tensors(learner.model)
    one, two = distances.values()
    assert all(torch.equal(t, two[name]) for name, t in one.items())


def test_a_rank_without_room_for_orthonormal_factors_is_refused(make_learner: Make) -> None:
    learner = make_learner("eblora", AdapterConfig(rank=65, targets=("q_proj",)))
    with pytest.raises(ConfigError, match=r"adapter\.rank=65 exceeds .*q_proj of 64 inputs and 64 outputs") as caught:
        learner.method.check(learner.fit(2).ctx)
    assert "a rank of at most 64" in caught.value.hint


def test_the_log_has_scale_and_protected_share(eblora: Make) -> None:
    learner = eblora()
    learner.learn(2, 3)
    steps = [e for e in learner.sink.events if e["kind"] == "step"]
    assert all(e["eblora/scale"] > 0 for e in steps)
    shares = {e["block"]: e["eblora/protected"] for e in steps}
    assert shares[2] == 0.0
    assert 0.0 < shares[3] <= 60 / 64
