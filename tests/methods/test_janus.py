"""Janus-LoRA: what its steps leave alone, what it protects, and its margin loss, against dense algebra."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cladapt.config import AdapterConfig, MethodConfig
from cladapt.errors import ConfigError
from cladapt.methods import Context, build
from cladapt.methods.janus import margin_loss
from cladapt.model.adapter import create_adapter
from cladapt.model.anchors import factor_pairs
from cladapt.model.load import load_base

ADAPTER = AdapterConfig(rank=3, alpha=6.0, dropout=0.1, targets=("q_proj", "v_proj", "down_proj", "lm_head"))
Make = Callable[..., Any]


@pytest.fixture
def janus(make_learner: Make) -> Make:
    return partial(make_learner, "janus", ADAPTER)


@pytest.mark.parametrize(
    "options",
    [
        {"every": 1},
        {"every": 1, "memory": "sketch"},
        {"every": 1, "memory": "residual", "survive": 1},
        {"estimate": "after"},
    ],
)
def test_a_block_leaves_protected_inputs_alone(janus: Make, options: dict[str, Any]) -> None:
    learner = janus(energy=0.9, **options)
    before = learner.learn(2)
    held = learner.protected()
    assert held.keys() == before.keys()
    after = learner.learn(3)
    for module, v in held.items():
        change = after[module] - before[module]
        assert 0 < v.shape[1] <= len(v) - 3
        assert (change @ v).norm() <= 1e-6 * change.norm() * v.shape[1] ** 0.5, module
        assert change.norm() > 1e-3


@pytest.mark.parametrize("gauge", ["zero", "balanced", "sylvester"])
def test_exact_steps_of_an_evolving_adapter_leave_protected_inputs_alone(janus: Make, gauge: str) -> None:
    learner = janus(factors="evolving", form="exact", gauge=gauge, energy=0.3, every=1)
    before = learner.learn(2)
    held = learner.protected()
    assert any(v.shape[1] < 3 for v in held.values())  # else B is frozen
    after = learner.learn(3)
    for module, v in held.items():
        change = after[module] - before[module]
        assert (change @ v).norm() <= 1e-5 * change.norm().clamp_min(1e-3) * v.shape[1] ** 0.5, module
    assert max((after[m] - before[m]).norm() for m in held) > 1e-2


@torch.no_grad()
def violation(learner: Any, before: dict[str, Tensor]) -> float:
    """Mean share of what a block changed that protected inputs meet."""
    after, held = learner.products(), learner.protected()
    shares = [((after[m] - before[m]) @ v).norm() / (after[m] - before[m]).norm() for m, v in held.items()]
    return float(sum(shares) / len(shares))


def test_rectified_steps_violate_less_than_those_of_one_factor_and_these_less_than_none(janus: Make) -> None:
    found = []
    for rectify in ("composite", "factor", "none"):
        learner = janus(factors="evolving", form="least_squares", rectify=rectify, energy=0.9, every=1)
        before = learner.learn(2)
        held = learner.protected()
        learner.fit(3, epochs=1).run()
        learner.method.subspaces.directions = {
            learner.fit(9).ctx.inputs()[module]: v.float() for module, v in held.items()
        }
        found.append(violation(learner, before))
    assert found[0] < found[1] < found[2]


def test_with_fresh_factors_a_rectified_step_is_the_safe_update_itself(janus: Make) -> None:
    learner = janus(gauge="balanced", every=1)
    learner.learn(2)
    fit = learner.fit(3)
    fit.begin()
    fit.step(fit.steps(0)[0], 1.0)
    pairs = {m: (a.detach().clone(), b.detach().clone()) for m, (a, b) in factor_pairs(fit.ctx.parameters).items()}
    moved: dict[str, tuple[Tensor, Tensor]] = {}
    step = fit.optimizer.step

    def spied() -> None:
        step()
        moved.update(
            {m: (a.detach().clone(), b.detach().clone()) for m, (a, b) in factor_pairs(fit.ctx.parameters).items()}
        )

    fit.optimizer.step = spied
    fit.step(fit.steps(0)[1], 1.5)
    held = learner.protected()
    for module, (a, b) in factor_pairs(fit.ctx.parameters).items():
        (a0, b0), (a1, b1) = ([t.double() for t in pair] for pair in (pairs[module], moved[module]))
        v = held[module]
        safe = b0 @ (a1 - a0) + (b1 - b0) @ a0
        safe = safe - safe @ v @ v.mT
        step_of_both = b0 @ (a.detach().double() - a0) + (b.detach().double() - b0) @ a0
        torch.testing.assert_close(step_of_both, safe, rtol=0, atol=2e-6 * float(safe.norm()))


def test_without_protection_and_margin_an_evolving_adapter_is_fine_tuned(janus: Make) -> None:
    one, other = (janus(factors="evolving", form="least_squares", estimate="none", rectify="none") for _ in range(2))
    other.method = build(MethodConfig(name="finetune"))
    found, expected = one.learn(2, 3), other.learn(2, 3)
    assert all(torch.equal(found[module], expected[module]) for module in expected)


@pytest.mark.parametrize("options", [{}, {"memory": "sketch", "directions": 5}, {"memory": "residual", "survive": 2}])
def test_memory_is_bounded_by_what_the_docstring_says(janus: Make, options: dict[str, Any]) -> None:
    learner = janus(energy=0.99, every=1, **options)
    for block in (2, 3, 4):
        fit = learner.fit(block)
        fit.begin()
        for batch in fit.steps(0):
            fit.step(batch, 1.0)
        widths = {name: a.shape[1] for module, (a, _) in factor_pairs(fit.ctx.parameters).items()
                  for name in [fit.ctx.inputs()[module]]}  # fmt: skip
        state = learner.method.state_dict()
        for name, width in widths.items():
            running = state[f"running/{name}"].numel()
            assert running <= {"sketch": 2 * 5 * width}.get(options.get("memory", ""), (width + 1) * width)
            kept = [t for key, t in state.items() if key in (f"protected/{name}", f"complement/{name}")]
            assert sum(t.shape[1] for t in kept) <= width // 2
        learner.method.end_block(fit.ctx)


def observed_steps(learner: Any, steps: int) -> list[int]:
    """The steps of a block of so many that the method watches."""
    fit = learner.fit(2)
    fit.ctx.steps = steps
    found = []
    for fit.ctx.step in range(steps):
        if learner.method.watch(fit.ctx) is not None:
            found.append(fit.ctx.step)
    return found


def test_a_short_block_shows_four_steps_where_it_has_them(janus: Make) -> None:
    assert observed_steps(janus(), 64) == [*range(0, 64, 8)]
    assert observed_steps(janus(every=3), 64) == [*range(0, 64, 3)]
    assert observed_steps(janus(), 30) == [0, 8, 16, 24]
    assert observed_steps(janus(), 12) == [0, 3, 6, 9]
    assert observed_steps(janus(), 3) == [0, 1, 2]
    assert observed_steps(janus(estimate="after"), 12) == []


def test_a_block_too_short_for_a_residual_memory_is_said_to_be_unprotected(janus: Make) -> None:
    learner = janus(memory="residual", survive=9)
    with pytest.warns(UserWarning, match=r"protects nothing of block 2: .*survive=9 observed steps need, and \d+ of"):
        learner.fit(2, epochs=1).run()
    assert not learner.method.subspaces.directions


def test_modules_with_one_input_share_its_memory(janus: Make) -> None:
    learner = janus(every=1)
    learner.learn(2)
    names = learner.method.subspaces.directions.keys()
    assert not any("v_proj" in name for name in names)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "down_proj", "lm_head"}


@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.5])
def test_the_margin_loss_is_its_formula_and_its_gradient_is_right(margin: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    means = torch.nn.functional.normalize(torch.randn(4, 5, generator=generator, dtype=torch.float64), dim=1)
    label, classes = torch.tensor([0, 1, 2, 9, 9, 3, 0]), torch.tensor([0, 1, 3, 4])
    expected = 0.0
    for z, y in zip(features, label.tolist(), strict=True):
        cosines = [float(z @ mu / z.norm()) for mu, c in zip(means, classes.tolist(), strict=True) if c != y]
        expected += 0.3 * np.log1p(sum(np.exp((c - margin) / 0.3) for c in cosines))
    found = margin_loss(features, label, classes, means, margin, 0.3)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(
        lambda x: margin_loss(x, label, classes, means, margin, 0.3), features.requires_grad_()
    )
    assert margin_loss(features[:0], label[:0], classes, means, margin, 0.3).item() == 0.0


def test_prototypes_are_means_of_normalised_features_at_the_end_of_the_block(janus: Make) -> None:
    learner = janus(margin_weight=0.1, sample=1.0, every=1)
    learner.learn(2)
    fit = learner.fit(2)
    sums: dict[int, list[Tensor]] = {}
    for found in fit.ctx.look(1.0, None):
        for z, c in zip(found.features, found.label.tolist(), strict=True):
            sums.setdefault(c, []).append(z / z.norm())
    classes, means = learner.method.prototypes.of(torch.device("cpu"))
    assert classes.tolist() == sorted(sums)
    for c, mean in zip(classes.tolist(), means, strict=True):
        expected = torch.stack(sums[c]).double().mean(0)
        torch.testing.assert_close(mean.double(), expected / expected.norm(), rtol=0, atol=1e-6)
    learner.fit(3).run()
    events = [event for event in learner.sink.events if event["kind"] == "step" and event["block"] == 3]
    assert all(event["janus/margin"] > 0 for event in events)


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({"estimate": "after", "memory": "sketch", "every": 2}, "estimate=after does not read every, memory"),
        ({"directions": 8}, "memory=gram does not read directions"),
        ({"rectify": "factor", "gauge": "zero"}, "rectify=factor does not read gauge"),
        ({"margin": 0.2}, "margin_weight=0 does not read margin"),
        ({"estimate": "none"}, "estimate=none finds no inputs that rectify=composite could leave alone"),
        ({"estimate": "none", "rectify": "factor"}, "rectify=factor could leave alone: add rectify=none"),
    ],
)
def test_an_option_that_another_makes_idle_is_refused(options: dict[str, Any], unread: str) -> None:
    with pytest.raises(ConfigError, match=unread):
        build(MethodConfig(name="janus", options=options))


def test_an_invariant_form_of_an_evolving_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"form=invariant keeps A outside of V"):
        build(MethodConfig(name="janus", options={"factors": "evolving"}))


def test_other_parameters_than_plain_factors_are_refused(folder: Path) -> None:
    base = load_base(folder)
    method = build(MethodConfig(name="janus", options={"factors": "evolving", "form": "exact"}))
    model = create_adapter(base, ADAPTER, 0, "directions")
    with pytest.raises(ConfigError, match="janus rectifies steps of factors A and B"):
        method.check(Context.of(model, 2, {}))
