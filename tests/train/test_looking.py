"""What methods see of the passes of a fit, against passes made here, and what looking leaves as it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cladapt.config import AdapterConfig, MethodConfig
from cladapt.methods import Compose, Context, Method, build
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter
from cladapt.model.load import load_base, trie_softmax
from cladapt.model.observe import Outputs, See, outputs_of
from cladapt.model.packed import PackedLoss
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import PackedFeed
from cladapt.train.looking import Look
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.sinks import MemorySink
from cladapt.train.targets import PackedTargets

SIDS = SidTable(tuple(f"i{k}" for k in range(12)), np.array([[k // 3, k % 3] for k in range(12)]), (4, 3))
TARGETS = ("q_proj", "v_proj", "down_proj", "lm_head")


class Watcher(Method):
    """Sees every other step, and adds up what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, str]] = []
        self.grams: dict[str, Tensor] = {}

    def watch(self, ctx: Context) -> See | None:
        def see(name: str, rows: Tensor) -> None:
            self.calls.append((ctx.step, name))
            self.grams[name] = self.grams.get(name, torch.zeros(())) + rows.double().mT @ rows.double()

        return see if ctx.step % 2 == 0 else None


def fit_of(folder: Path, method: Method, dropout: float = 0.0, **changes: Any) -> Fit:
    """A block for an adapter that has left its start."""
    base = load_base(folder)
    config = AdapterConfig(rank=2, dropout=dropout, targets=TARGETS)
    model = create_adapter(base, config, 0, method.parameters, by_item=method.flattens)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    tokens, rng = base.item_tokens().numpy(), np.random.default_rng(0)
    lengths = rng.integers(2, 7, size=20)
    rows = [rng.integers(12, size=n) for n in lengths]
    documents = [Document(np.r_[base.bos(), tokens[r].ravel()], np.arange(1 + 2 * len(r)) > 2) for r in rows]
    items = PackedTargets(tokens, np.bincount(np.concatenate(rows), minlength=12))
    return Fit(
        PackedLoss(adapted_lm(model), trie_softmax(base, Trie.build(SIDS.codes))),
        method,
        Context.of(model, 2, {}),
        PackedFeed(documents[:16], documents[16:], 32, 16, items),
        FitSettings(**{"lr": 1e-3, "epochs": 2, "seed": 0, "accumulation": 2, **changes}),
        MemorySink(),
    )


def eisam(**options: Any) -> Method:
    far = {} if "perturb" in options else {"warmup": 0.0, "radius": 0.5}
    return build(MethodConfig(name="eisam", options={**far, **options}))


def grams_of(fit: Fit, batches: Any) -> dict[str, Tensor]:
    """What passes over these micro-batches show, made one by one with the parameters as they are."""
    found: dict[str, Tensor] = {}

    def see(name: str, rows: Tensor) -> None:
        found[name] = found.get(name, torch.zeros(())) + rows.double().mT @ rows.double()

    fit.module.eval()
    for batch in batches:
        with torch.no_grad(), fit.look.during(see):
            fit.module(*batch)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("second", [None, {}, {"groups": "item"}, {"refresh": 2}, {"perturb": False}])
def test_a_step_shows_each_input_of_each_micro_batch_once(
    folder: Path, second: dict[str, Any] | None, checkpointing: bool
) -> None:
    watcher = Watcher()
    method = watcher if second is None else Compose([("watcher", watcher), ("eisam", eisam(**second))])
    fit = fit_of(folder, method, checkpointing=checkpointing)
    fit.begin()
    steps = fit.steps(0)
    expected = grams_of(fit, steps[0])  # dropout is 0
    assert len(steps[0]) == 2
    assert len(expected) == 5  # in both layers that of q and v and that of down, and the head's
    fit.step(steps[0], 1.0)
    assert sorted(watcher.calls) == sorted([(0, name) for name in expected] * len(steps[0]))
    for name, gram in expected.items():
        torch.testing.assert_close(watcher.grams[name], gram, rtol=1e-4, atol=1e-4)
    fit.step(steps[1], 1.2)  # nobody watches
    assert {step for step, _ in watcher.calls} == {0}
    fit.step(steps[2], 1.4)
    assert [step for step, _ in watcher.calls].count(2) == len(expected) * len(steps[2])


def test_inputs_are_known_before_any_pass_and_cost_one_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fit_of(folder, Method())
    sizes = []
    forward = PackedLoss.forward
    monkeypatch.setattr(PackedLoss, "forward", lambda self, *b: sizes.append(b[0].numel()) or forward(self, *b))
    found = fit.ctx.inputs()
    assert {module.rpartition(".")[2]: name.rpartition(".")[2] for module, name in found.items()} == {
        "q_proj": "q_proj",
        "v_proj": "q_proj",
        "down_proj": "down_proj",
        "lm_head": "lm_head",
    }
    assert {module.split(".lora_")[0] for module in fit.ctx.parameters} == found.keys()
    assert fit.ctx.inputs() is found
    assert len(sizes) == 1
    assert sizes[0] <= 32


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_look_over_a_share_is_a_pass_over_evenly_spaced_examples_without_dropout(folder: Path, share: float) -> None:
    fit = fit_of(folder, Method(), dropout=0.5)
    batches = fit.feed.sample(share)
    expected = grams_of(fit, batches)
    outputs = [outputs_of(fit.look.loss, *batch) for batch in batches]
    fit.module.train()
    grams: dict[str, Tensor] = {}

    def see(name: str, rows: Tensor) -> None:
        grams[name] = grams.get(name, torch.zeros(())) + rows.double().mT @ rows.double()

    state = torch.get_rng_state()
    found = list(fit.ctx.look(share, see))
    assert torch.equal(torch.get_rng_state(), state)
    assert fit.module.training
    assert grams.keys() == expected.keys()
    assert all(torch.equal(grams[name], gram) for name, gram in expected.items())
    for one, other in zip(found, outputs, strict=True):
        assert torch.equal(one.hidden, other.hidden)
        assert torch.equal(one.scores, other.scores)
        assert not one.scores.requires_grad


class Two(Method):
    """Takes the outputs of a micro-batch, and those under other values, into a term."""

    needs_outputs = True

    def __init__(self, others: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.others = others
        self.found: list[tuple[Outputs, Outputs]] = []

    def loss_terms(self, ctx: Context, batch: Any, out: Tensor) -> dict[str, Tensor]:
        own = ctx.outputs()
        if self.others is not None:
            other = ctx.outputs_with(self.others, batch)
            assert ctx.outputs() is own
            self.found.append((own, other))
        return {"two/term": own.scores.square().mean() + own.features.square().mean()}


@pytest.mark.parametrize("second", [False, True])
def test_outputs_under_other_values_leave_the_pass_at_hand_and_its_gradient(folder: Path, second: bool) -> None:
    values: dict[str, Tensor] = {}
    norms = []
    for method in (Two(None), Two(values)):
        fit = fit_of(folder, Compose([("two", method), ("eisam", eisam())]) if second else method)
        if method.others is not None:
            values |= {name: torch.full_like(p, 0.1) for name, p in fit.ctx.parameters.items()}
        fit.begin()
        steps = fit.steps(0)
        fit.step(steps[0], 1.0)
        norms.append(next(event["grad_norm"] for event in fit.sink.events if event["kind"] == "step"))
        start = fit_of(folder, Method())
    assert norms[0] == norms[1]
    assert len(method.found) == len(steps[0])
    for (own, other), batch in zip(method.found, steps[0], strict=True):
        plain = outputs_of(start.look.loss, *batch)
        torch.testing.assert_close(own.scores, plain.scores, rtol=1e-5, atol=1e-5)
        assert own.scores.requires_grad
        assert not other.scores.requires_grad
        with torch.no_grad():
            for name, p in start.ctx.parameters.items():
                p.data, values[name] = values[name], p.data
            torch.testing.assert_close(other.scores, outputs_of(start.look.loss, *batch).scores, rtol=1e-5, atol=1e-5)
            for name, p in start.ctx.parameters.items():
                p.data, values[name] = values[name], p.data
        assert torch.equal(own.choice, other.choice)


def test_another_loss_can_be_looked_at_with_examples_of_its_own(folder: Path) -> None:
    fit, other = fit_of(folder, Method()), fit_of(folder, Method())
    feed = PackedFeed(other.feed.documents[:3], [], 64, 16)  # type: ignore[attr-defined]
    there = fit.look.at(fit.look.loss, feed)
    assert (fit.look.examples, there.examples) == (16, 3)
    assert there.total is fit.look.total
    found, expected = list(there.over(1.0)), [outputs_of(other.look.loss, *batch) for batch in feed.sample(1.0)]
    for one, plain in zip(found, expected, strict=True):
        assert torch.equal(one.hidden, plain.hidden)


def test_what_was_not_asked_for_is_told(folder: Path) -> None:
    fit = fit_of(folder, Method())
    fit.begin()
    fit.step(fit.steps(0)[0], 1.0)
    with pytest.raises(RuntimeError, match="the last forward pass kept no outputs: set needs_outputs"):
        fit.ctx.outputs()
    plain: Any = None
    look = Look(nn.Linear(2, 2), {}, plain, plain, plain, plain)
    with pytest.raises(TypeError, match="Linear keeps no outputs: make it an Observable"):
        look.watch  # noqa: B018
