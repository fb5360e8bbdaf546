"""InfLoRA: where its A comes from, that it stays, and what its blocks leave alone, against dense float64 algebra."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cladapt.config import AdapterConfig, MethodConfig
from cladapt.errors import ConfigError
from cladapt.methods import Context, build
from cladapt.model.adapter import adapter_parameters, create_adapter, lora_layers
from cladapt.model.anchors import factor_pairs, is_up
from cladapt.model.load import load_base

ADAPTER = AdapterConfig(rank=3, alpha=6.0, dropout=0.1, targets=("q_proj", "v_proj", "down_proj", "lm_head"))
Make = Callable[..., Any]


@pytest.fixture
def inflora(make_learner: Make) -> Make:
    return partial(make_learner, "inflora", ADAPTER)


@torch.no_grad()
def grams(learner: Any, block: int) -> dict[str, Tensor]:
    """C of every module over a block's training documents, token by token, as the model stands."""
    found: dict[str, Tensor] = {}

    def hook(name: str, at: slice) -> Any:
        def before(_: nn.Module, given: tuple[Tensor]) -> None:
            for x in given[0][0, at].double():
                found[name] = found.get(name, torch.zeros(())) + torch.outer(x, x)

        return before

    learner.model.eval()
    handles = [
        # the head's inputs are those of the losses; of two codes after (i, j) both have alternatives
        layer.base_layer.register_forward_pre_hook(hook(name, slice(2, -1) if "head" in name else slice(None)))
        for name, layer in lora_layers(learner.model).items()
    ]
    for document in learner.documents(block)[:16]:
        learner.model(torch.from_numpy(document.tokens)[None])
    for handle in handles:
        handle.remove()
    return found


def leading(gram: Tensor, k: int) -> Tensor:
    """The projector onto the k leading eigenvectors, float64."""
    vectors = torch.linalg.eigh(gram)[1][:, -k:]
    return vectors @ vectors.mT


def test_a_block_spans_the_leading_inputs_outside_of_those_before(inflora: Make) -> None:
    learner = inflora(sample=1.0, energy=0.5)
    for block in (2, 3):
        expected, held = {}, learner.protected()
        assert held.keys() == (lora_layers(learner.model).keys() if block == 3 else set())
        for module, gram in grams(learner, block).items():
            rest = torch.eye(len(gram), dtype=torch.float64)
            if module in held:
                rest -= held[module] @ held[module].mT
            expected[module] = leading(rest @ gram @ rest, 3)
        fit = learner.fit(block)
        fit.begin()
        for module, (down, up) in factor_pairs(fit.ctx.parameters).items():
            a = down.detach().double()
            torch.testing.assert_close(a @ a.mT, torch.eye(3, dtype=torch.float64) / 3.0, rtol=0, atol=1e-6)
            torch.testing.assert_close(3.0 * a.mT @ a, expected[module], rtol=0, atol=1e-4)
            assert not up.any()
        fit.run()


def test_what_is_protected_after_a_block_holds_the_energy_of_its_inputs(inflora: Make) -> None:
    learner = inflora(sample=1.0, energy=0.9)
    learner.learn(2)
    for module, gram in grams(learner, 2).items():
        v = learner.protected()[module]
        held = [float((v[:, :k].mT @ gram @ v[:, :k]).trace() / gram.trace()) for k in (v.shape[1] - 1, v.shape[1])]
        assert held[0] < 0.9 <= held[1] + 1e-5


def test_a_block_leaves_protected_inputs_alone_with_decay_and_dropout(inflora: Make) -> None:
    learner = inflora(energy=0.9)
    before = learner.learn(2)
    held = learner.protected()
    after = learner.learn(3)
    for module, v in held.items():
        change = after[module] - before[module]
        assert change.norm() > 1e-3
        assert (change @ v).norm() <= 1e-6 * change.norm() * v.shape[1] ** 0.5, module


def test_a_never_changes_within_a_block_and_b_does(inflora: Make) -> None:
    learner = inflora()
    learner.learn(2)
    fit = learner.fit(3, weight_decay=0.5)
    fit.begin()
    start = {name: p.detach().clone() for name, p in fit.ctx.parameters.items()}
    for step in fit.steps(0):
        fit.step(step, 1.0)
        for name, p in fit.ctx.parameters.items():
            assert torch.equal(p, start[name]) != is_up(name)


def test_layers_with_one_input_have_one_covariance_and_one_memory(inflora: Make) -> None:
    learner = inflora()
    learner.learn(2)
    known = learner.method.subspaces.directions
    assert {name.rpartition(".")[2] for name in known} == {"q_proj", "down_proj", "lm_head"}
    pairs = factor_pairs(adapter_parameters(learner.model))
    for module, (down, _) in pairs.items():
        if module.endswith("v_proj"):
            assert torch.equal(down, pairs[module.replace("v_proj", "q_proj")][0])


def test_the_energy_rises_over_the_blocks_before_and_rank_directions_stay_free(inflora: Make) -> None:
    learner = inflora(energy=0.3, energy_blocks=2)
    sizes = []
    for block in (1, 2, 3):
        learner.learn(block)
        sizes.append({name: v.shape[1] for name, v in learner.method.subspaces.directions.items()})
    assert all(sizes[0][name] < sizes[1][name] < sizes[2][name] for name in sizes[0])
    for name, size in sizes[2].items():
        # the first layer is given eight tokens, a beginning and seven codes: all of that is protected by now
        assert size == 8 if "layers.0.self_attn" in name else 8 < size <= (192 if "down" in name else 64) - 3
    steps = [event for event in learner.sink.events if event["kind"] == "step" and event["block"] == 3]
    by_module = [sizes[1][name] / (192 if "down" in name else 64) for name in learner.fit(9).ctx.inputs().values()]
    assert steps[-1]["inflora/protected"] == pytest.approx(sum(by_module) / len(by_module))


@pytest.mark.parametrize("name", ["inflora", "janus", "inflora+lwf"])
def test_a_rank_that_exceeds_a_layers_inputs_is_refused(name: str, make_learner: Make) -> None:
    learner = make_learner(name, AdapterConfig(rank=65, targets=("q_proj",)))
    with pytest.raises(ConfigError, match=r"^adapter\.rank=65 exceeds .*q_proj of 64 inputs") as caught:
        learner.method.check(learner.fit(2).ctx)
    assert caught.value.hint == "its directions are to be orthonormal: use a rank of at most 64, or other targets"


@pytest.mark.parametrize("learns", ["directions", "weights"])
def test_other_parameters_than_plain_factors_are_refused(folder: Path, learns: Any) -> None:
    model = create_adapter(load_base(folder), ADAPTER, 0, learns)
    with pytest.raises(ConfigError, match="inflora learns B on a fixed A, another method has its own parameters"):
        build(MethodConfig(name="inflora")).check(Context.of(model, 2, {}))
