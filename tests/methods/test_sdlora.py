"""SD-LoRA: its magnitudes and what it saves against dense weights in float64, and what must stay as it was."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from cladapt.config import AdapterConfig, MethodConfig
from cladapt.errors import ConfigError
from cladapt.methods import Compose, Context, build
from cladapt.methods.sdlora import Sdlora
from cladapt.model.adapter import adapted_lm, adapter_parameters, adapter_tensors, create_adapter, lora_layers, quiet
from cladapt.model.anchors import is_up, module_of
from cladapt.model.history import HISTORY
from cladapt.model.load import Base, load_base, trie_softmax
from cladapt.model.packed import PackedLoss
from cladapt.model.saved import read_adapter, save_adapter
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import PackedFeed
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.sinks import MemorySink

SIDS = SidTable(tuple(f"i{k}" for k in range(12)), np.array([[k // 3, k % 3] for k in range(12)]), (4, 3))
ADAPTER = AdapterConfig(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "down_proj", "lm_head"))
SCALE = 2.0
PROBE = torch.tensor([[1, 4, 9, 5, 8, 6, 10, 7, 8]])


class Learner:
    """A base that adapts to blocks whose users go on by a step of the block's own."""

    def __init__(self, folder: Path, name: str = "sdlora", adapter: AdapterConfig = ADAPTER, **options: Any) -> None:
        self.base = load_base(folder)
        self.method = build(MethodConfig(name=name, options=options))
        members = dict(self.method.methods) if isinstance(self.method, Compose) else {"sdlora": self.method}
        assert isinstance(members["sdlora"], Sdlora)
        self.sdlora = members["sdlora"]
        self.model = create_adapter(self.base, adapter, 0, self.method.parameters)
        self.initial = {name: p.detach().clone() for name, p in adapter_parameters(self.model).items()}
        self.sink = MemorySink()
        self.own: list[dict[str, Tensor]] = []
        """The factors that each block left."""

    def fit(self, block: int, **changes: Any) -> Fit:
        return Fit(
            loss_of(adapted_lm(self.model), self.base),
            self.method,
            Context.of(self.model, block, self.initial),
            feed(self.base, block),
            FitSettings(**{"lr": 5e-3, "epochs": 3, "seed": 0, **changes}),
            self.sink,
        )

    def learn(self, *blocks: int, **changes: Any) -> None:
        for block in blocks:
            self.fit(block, **changes).run()
            self.own.append(adapter_tensors(self.model))

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model.eval()(PROBE).logits


def loss_of(lm: Any, base: Base) -> PackedLoss:
    return PackedLoss(lm, trie_softmax(base, Trie.build(SIDS.codes)))


def feed(base: Base, block: int) -> PackedFeed:
    tokens, bos = base.item_tokens().numpy(), base.bos()
    items = (np.random.default_rng(block).integers(12, size=(20, 1)) + block * np.arange(6)) % 12
    documents = [Document(np.r_[bos, tokens[row].ravel()], np.arange(13) > 2) for row in items]
    return PackedFeed(documents[:16], documents[16:], 64, 32)


def products(factors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A and B in float64."""
    return {
        module_of(name): (a.double(), factors[name.replace("lora_A", "lora_B")].double())
        for name, a in factors.items()
        if not is_up(name)
    }


def updates(
    earlier: list[dict[str, Tensor]], own: Mapping[str, Tensor], magnitudes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """s (sum_i a_i Bhat_i Ahat_i + B A) of every module, dense in float64, from what each block left."""
    found = {module: b @ a for module, (a, b) in products(own).items()}
    for i, factors in enumerate(earlier):
        for module, (a, b) in products(factors).items():
            found[module] = found[module] + magnitudes[module][i] * (b @ a) / (a.norm() * b.norm())
    return {module: SCALE * update for module, update in found.items()}


def magnitudes_of(method: Sdlora) -> dict[str, Tensor]:
    return {module: a.detach().double() for module, a in method.magnitudes.items()}


def test_gradients_of_the_magnitudes_are_those_of_the_dense_weights(folder: Path) -> None:
    learner = Learner(folder)
    learner.learn(1, 2)
    fit = learner.fit(3)
    fit.begin()
    with torch.no_grad():
        for name, p in fit.ctx.parameters.items():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    base = load_base(folder)
    plain = loss_of(base.model.double(), base).eval()
    weights = {m: base.model.get_submodule(m.removeprefix("base_model.model.")).weight for m in fit.ctx.weights}
    names = {id(p): name for name, p in plain.named_parameters()}
    batch = fit.feed.sample(1.0)[0]

    def dense(a: Mapping[str, Tensor]) -> Tensor:
        moved = updates(learner.own, adapter_tensors(learner.model), a)
        given = {names[id(w)]: w.detach() + moved[module] for module, w in weights.items()}
        found: Tensor = torch.func.functional_call(plain, given, tuple(batch)).sum()
        return found

    fit.module.eval()
    fit.module(*batch).sum().backward()
    exact = {module: a.requires_grad_() for module, a in magnitudes_of(learner.sdlora).items()}
    expected = dict(zip(exact, torch.autograd.grad(dense(exact), [*exact.values()]), strict=True))
    largest = max(g.abs().max() for g in expected.values())
    assert largest > 1e-2
    for module, a in learner.sdlora.magnitudes.items():
        assert a.shape == (2,)
        assert a.grad is not None
        torch.testing.assert_close(a.grad.double(), expected[module], rtol=1e-4, atol=1e-5 * largest.item())
    module = max(expected, key=lambda m: expected[m].abs().min().item())
    for i, slope in enumerate(expected[module].tolist()):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[i] = 0.02  # the loss itself is float32
        with torch.no_grad():
            up, down = (dense({**exact, module: exact[module] + sign * shift}) for sign in (1, -1))
        assert slope == pytest.approx(((up - down) / 0.04).item(), rel=0.01)


def test_what_is_saved_is_the_dense_sum_as_one_stock_adapter(folder: Path, tmp_path: Path) -> None:
    learner = Learner(folder)
    learner.learn(1, 2, 3)
    save_adapter(tmp_path / "a", learner.model, learner.base, {"block": 3})
    expected = updates(learner.own[:2], learner.own[2], magnitudes_of(learner.sdlora))
    saved = products(read_adapter(tmp_path / "a", learner.base))
    assert all(len(a) == 9 for a, _ in saved.values())
    for module, (a, b) in saved.items():
        torch.testing.assert_close(SCALE * b @ a, expected[module], rtol=1e-5, atol=1e-7)
    base = load_base(folder)
    with quiet():
        stock = PeftModel.from_pretrained(load_base(folder).model, str(tmp_path / "a")).eval()
    with torch.no_grad():
        for module, update in expected.items():
            linear = base.model.get_submodule(module.removeprefix("base_model.model."))
            linear.weight.add_(update)
        logits = base.model.eval()(PROBE).logits
        torch.testing.assert_close(stock(PROBE).logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learner.logits(), logits, rtol=1e-5, atol=1e-5)


def test_magnitudes_are_learned_and_directions_stay_bit_for_bit(folder: Path) -> None:
    learner = Learner(folder)
    learner.learn(1, 2)
    fit = learner.fit(3)
    fit.begin()
    before, frozen = magnitudes_of(learner.sdlora), dict(learner.sdlora.frozen)
    learner.learn(3)
    after = magnitudes_of(learner.sdlora)
    moved = torch.cat([after[module] - a for module, a in before.items()]).abs()
    assert moved.min() > 0
    assert moved.median() > 1e-2
    assert learner.sink.events[-2]["sdlora/magnitude"] == pytest.approx(
        torch.cat([*after.values()]).mean().item(), rel=0.1
    )
    learner.learn(4)
    for module, (a, b) in products(learner.own[0]).items():
        now = {f: learner.sdlora.frozen[f"{module}.lora_{f}.default.weight"] for f in "AB"}
        torch.testing.assert_close(now["A"][:3].double(), a / a.norm(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(now["B"][:, :3].double(), b / b.norm(), rtol=1e-6, atol=1e-8)
    for name, t in frozen.items():
        now = learner.sdlora.frozen[name]
        assert torch.equal(now[:, : t.shape[1]] if is_up(name) else now[: len(t)], t)
    for name, layer in lora_layers(learner.model).items():
        held = layer.lora_B[HISTORY].parametrizations.weight.original
        assert torch.equal(held, learner.sdlora.frozen[f"{name}.lora_B.default.weight"])


@pytest.mark.parametrize("blocks", [(1,), (1, 2)])
def test_a_block_begins_where_the_one_before_ended(blocks: tuple[int, ...], folder: Path) -> None:
    learner = Learner(folder)
    start = learner.logits()
    learner.learn(*blocks)
    before = learner.logits()
    assert (before - start).abs().max() > 0.1
    learner.fit(blocks[-1] + 1).begin()
    torch.testing.assert_close(learner.logits(), before, rtol=1e-5, atol=1e-5)
    for name, p in adapter_parameters(learner.model).items():
        if HISTORY not in name:
            assert torch.equal(p, learner.initial[name])


def test_a_block_begins_with_every_magnitude_at_the_number_that_is_asked_for(folder: Path) -> None:
    learner = Learner(folder, start=0.8)
    learner.learn(1, 2)
    learner.fit(3).begin()
    assert all(torch.equal(a, torch.full((2,), 0.8)) for a in learner.sdlora.magnitudes.values())


def test_a_magnitude_steps_by_adam_without_decay_and_counts_in_the_norm(folder: Path) -> None:
    learner = Learner(folder)
    learner.learn(1)
    fit = learner.fit(2, weight_decay=0.5, schedule="constant", warmup=0.0)
    fit.begin()
    before, norms = magnitudes_of(learner.sdlora), []
    step = fit.optimizer.step

    def watch() -> None:
        norms.append(torch.cat([p.grad.flatten() for p in fit.trained.values() if p.grad is not None]).norm().item())
        for p in learner.sdlora.magnitudes.values():
            assert p.grad is not None
            assert p.grad.abs().min() > 1e-5
        step()

    fit.optimizer.step = watch
    fit.step(fit.steps(0)[0], 0.5)
    assert fit.trained.keys() == {*fit.ctx.parameters, *(f"{module}.magnitudes" for module in before)}
    for module, a in magnitudes_of(learner.sdlora).items():  # Adam's first step is the rate, decay would add .0025 a
        torch.testing.assert_close((a - before[module]).abs(), torch.full_like(a, 5e-3), rtol=1e-2, atol=0)
    norm = learner.sink.events[-1]["grad_norm"]
    assert norms == [pytest.approx(min(norm, 1.0), rel=1e-4)]


def test_what_learns_beside_the_adapter_is_asked_for_once_and_until_the_block_ends(folder: Path) -> None:
    learner = Learner(folder)
    learner.learn(1)
    fit = learner.fit(2)
    groups = len(fit.optimizer.param_groups)
    fit.begin()
    first = dict(learner.sdlora.magnitudes)
    fit.begin()
    assert len(fit.optimizer.param_groups) == groups + 1
    last = list(learner.sdlora.magnitudes.values())
    assert [id(p) for p in fit.optimizer.param_groups[-1]["params"]] == [id(p) for p in last]
    assert not {id(p) for p in first.values()} & {id(p) for p in fit.trained.values()}
    assert all(p.requires_grad for p in last)
    fit.run()
    assert not any(p.requires_grad for p in learner.sdlora.magnitudes.values())
    assert adapter_parameters(learner.model).keys() == learner.initial.keys()


def test_factors_that_learned_nothing_have_no_direction_and_no_magnitude(folder: Path, tmp_path: Path) -> None:
    learner = Learner(folder, start="kept")
    learner.learn(1)
    idle = module_of(next(iter(learner.initial)))
    with torch.no_grad():
        next(p for name, p in adapter_parameters(learner.model).items() if is_up(name)).zero_()
    learner.learn(2)
    a, b = products(learner.sdlora.frozen)[idle]
    assert torch.equal(b, torch.zeros_like(b))
    assert a.norm().item() == pytest.approx(1.0)
    assert learner.sdlora.magnitudes[idle].tolist() == [0.0]  # without a direction it has no gradient
    learner.learn(3)
    save_adapter(tmp_path / "a", learner.model, learner.base, {"block": 3})
    assert all(bool(t.isfinite().all()) for t in learner.method.state_dict().values())


@pytest.mark.parametrize("name", ["peso+sdlora", "sdlora+peso"])
def test_a_proximal_term_in_the_step_leaves_the_magnitudes_to_the_task(name: str, folder: Path) -> None:
    found = {}
    for place in ("optimiser", "eager"):
        learner = Learner(folder, name, **{"peso.place": place, "peso.strength": 5.0})
        learner.learn(1, 2, epochs=1)
        found[place] = {**adapter_tensors(learner.model), **learner.sdlora.magnitudes}
        grown = torch.cat([*magnitudes_of(learner.sdlora).values()])
        kept = torch.stack([a.norm() * b.norm() for a, b in products(learner.own[0]).values()])
        assert (grown - kept).abs().min() > 1e-4
    for key, tensor in found["eager"].items():
        torch.testing.assert_close(found["optimiser"][key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("start", [-0.1, math.inf, math.nan, "fresh"])
def test_a_start_is_a_size_or_kept(start: Any) -> None:
    with pytest.raises(ConfigError, match=r"method\.options of sdlora.*start"):
        build(MethodConfig(name="sdlora", options={"start": start}))


def test_methods_that_cannot_share_its_history_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="sdlora and olora would each keep the earlier blocks"):
        build(MethodConfig(name="sdlora+olora"))
    with pytest.raises(ConfigError, match=r"ewc weighs entries .* sdlora puts others in their place"):
        build(MethodConfig(name="ewc+sdlora"))
    learner = Learner(folder, "full+sdlora")
    with pytest.raises(ConfigError, match="frozen factors beside an adapter whose modules differ in rank"):
        learner.fit(1).begin()
