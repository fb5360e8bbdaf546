"""LwF: its term against torch's own divergence, and its teacher against the model that the block before left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cladapt.config import AdapterConfig, MethodConfig, VitConfig
from cladapt.errors import ConfigError
from cladapt.methods import Compose, Context, build
from cladapt.methods.lwf import Lwf, distillation
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter
from cladapt.model.load import load_base, new_model, save_base, trie_softmax
from cladapt.model.observe import outputs_of
from cladapt.model.packed import PackedLoss
from cladapt.model.saved import load_adapter, save_adapter
from cladapt.model.vit import ClassLoss, load_vision_base, new_vit, save_vision_base
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import Batch, PackedFeed
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.sinks import MemorySink

SIDS = SidTable(tuple(f"i{k}" for k in range(12)), np.array([[k // 3, k % 3] for k in range(12)]), (4, 3))


@pytest.fixture(scope="module", params=["recommend", "classify"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, in a folder with the name of its workload."""
    path = tmp_path_factory.mktemp("base") / request.param
    if request.param == "recommend":
        save_base(path, *new_model("tiny", SIDS, seed=0), SIDS, {"fitted_block": 1})
    else:
        model = new_vit(VitConfig(hidden=32, layers=1, patch=4), 8, 1, 6)
        save_vision_base(path, model, "six", {"fitted_block": 0, "stream": ""})
    return path


class Images:
    """Noise of a block's two classes, each around an image of its own."""

    unit, items, record, validation_targets = "images", None, {}, 0

    def __init__(self, block: int) -> None:
        generator = torch.Generator().manual_seed(block)
        self.label = torch.arange(12) % 2 + 2 * (block - 1)
        self.pixels = torch.randn(2, 1, 8, 8, generator=generator)[torch.arange(12) % 2]
        self.pixels = self.pixels + 0.3 * torch.randn(12, 1, 8, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.label)

    def epoch(self, seed: Any) -> list[Batch]:
        return [(self.pixels[i : i + 4], self.label[i : i + 4], torch.ones(4, dtype=torch.bool)) for i in (0, 4, 8)]

    def sample(self, share: float) -> list[Batch]:
        return self.epoch(0)

    def targets(self, batch: Batch) -> int:
        return int(batch[-1].sum())

    used = targets


class Learner:
    """A base that adapts to one block after the other, without dropout."""

    def __init__(self, folder: Path, name: str = "lwf", **options: Any) -> None:
        self.folder = folder
        self.base = (load_base if folder.name == "recommend" else load_vision_base)(folder)
        self.method = build(MethodConfig(name=name, options=options))
        config = AdapterConfig(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj"))
        self.model = create_adapter(self.base, config, 0, self.method.parameters)
        self.initial = {name: p.detach().clone() for name, p in adapter_parameters(self.model).items()}
        for p in self.base.extra_parameters.values():
            p.requires_grad_(True)
        self.sink = MemorySink()

    def loss_and_feed(self, lm: Any, block: int) -> tuple[Any, Any]:
        if self.folder.name == "classify":
            classes = np.arange(6)
            return ClassLoss(lm, classes[classes // 2 == block - 1], classes[classes // 2 < block - 1]), Images(block)
        tokens, bos = self.base.item_tokens().numpy(), self.base.bos()
        items = (np.random.default_rng(block).integers(12, size=(12, 1)) + block * np.arange(6)) % 12
        documents = [Document(np.r_[bos, tokens[row].ravel()], np.arange(13) > 2) for row in items]
        softmax = trie_softmax(self.base, Trie.build(SIDS.codes))
        return PackedLoss(lm, softmax), PackedFeed(documents, [], 64, 32)

    def fit(self, block: int, **changes: Any) -> Fit:
        loss, feed = self.loss_and_feed(adapted_lm(self.model), block)
        ctx = replace(Context.of(self.model, block, self.initial), extra_parameters=self.base.extra_parameters)
        settings = FitSettings(**{"lr": 2e-2, "epochs": 2, "seed": 0, "keep": "last", "warmup": 0.0, **changes})
        return Fit(loss, self.method, ctx, feed, settings, self.sink)

    def terms(self, block: int) -> list[float]:
        return [
            next(value for key, value in event.items() if key.endswith("lwf/term"))
            for event in self.sink.events
            if event["kind"] == "step" and event["block"] == block and any("lwf/" in key for key in event)
        ]

    def saved(self, path: Path, block: int) -> Any:
        """The loss of a block over the model as it stands, which goes through a file into a base of its own."""
        save_adapter(path, self.model, self.base, {"block": block})
        own = Learner(self.folder)
        lm = adapted_lm(load_adapter(own.base, path))
        return own.loss_and_feed(lm, block + 1)[0].eval()


def expected_term(student: Any, teacher: Any, batch: Batch, temperature: float) -> float:
    """T^2 times the divergence over choices, one at a time, for each target."""
    ours, theirs = (outputs_of(loss, *batch) for loss in (student, teacher))
    each = [
        F.kl_div(
            (ours.scores[ours.choice == i] / temperature).double().log_softmax(0),
            (theirs.scores[ours.choice == i] / temperature).double().log_softmax(0),
            reduction="sum",
            log_target=True,
        )
        for i in range(int(ours.choice.max()) + 1)
    ]
    targets = batch[-1][:, 1:] if batch[-1].dim() == 2 else batch[-1]
    return temperature**2 * float(sum(each)) / int(targets.sum())


def scores(sizes: list[int], seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits of choices between so many things, and the choice of each."""
    choice = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(choice), generator=generator, dtype=torch.float64), choice


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sizes", [[3, 1, 5, 2], [1], [4, 4]])
def test_the_term_is_the_divergence_over_choices_of_any_size(sizes: list[int], temperature: float) -> None:
    (ours, choice), (theirs, _) = scores(sizes, 0), scores(sizes, 1)
    each = [
        F.kl_div(
            (ours[choice == i] / temperature).log_softmax(0),
            (theirs[choice == i] / temperature).softmax(0),
            reduction="sum",
        )
        for i in range(len(sizes))
    ]
    found = distillation(ours, theirs, choice, temperature)
    torch.testing.assert_close(found, temperature**2 * torch.stack(each).sum())
    assert distillation(theirs, theirs, choice, temperature).item() == 0.0
    shifted = distillation(ours + 1e4 * (choice + 1), theirs - 1e4, choice, temperature)  # a softmax is blind to it
    torch.testing.assert_close(shifted, found, rtol=1e-6, atol=1e-9)


def test_its_gradient_is_right_and_the_target_has_none() -> None:
    (ours, choice), (theirs, _) = scores([3, 1, 5, 2], 0), scores([3, 1, 5, 2], 1)
    ours.requires_grad_()
    theirs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distillation(x, theirs.detach(), choice, 2.0), ours)
    distillation(ours, theirs, choice, 2.0).backward()
    assert theirs.grad is None
    assert ours.grad is not None
    only = (choice == 1).nonzero()[0, 0]
    assert ours.grad[only] == 0.0


def test_without_a_choice_there_is_nothing_to_keep_and_a_graph_all_the_same() -> None:
    empty = torch.zeros(0, requires_grad=True)
    found = distillation(empty, torch.zeros(0), torch.zeros(0, dtype=torch.int64), 2.0)
    assert found.item() == 0.0
    found.backward()


def test_logits_far_apart_stay_finite() -> None:
    (ours, choice), (theirs, _) = scores([3, 4], 0, 1e4), scores([3, 4], 1, 1e4)
    found = distillation(ours.float().requires_grad_(), theirs.float(), choice, 2.0)
    assert found.isfinite()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_teacher_is_the_model_that_the_block_before_left(folder: Path, tmp_path: Path, temperature: float) -> None:
    learner = Learner(folder, strength=0.7, temperature=temperature)
    for block in (1, 2):
        learner.fit(block).run()
    teacher = learner.saved(tmp_path / "before", 2)
    fit = learner.fit(3)
    fit.begin()
    expected = []
    for (batch,) in fit.steps(0):
        expected.append(0.7 * expected_term(fit.look.loss, teacher, batch, temperature))
        fit.step([batch], 0.5)
    assert expected[0] == pytest.approx(0.0, abs=1e-9)  # the block begins with the model before it
    assert min(expected[1:]) > 1e-4
    assert learner.terms(3) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [("lwf", {"strength": 0.7}), ("janus", {"margin_weight": 0.7, "every": 1, "energy": 0.5})],
)
def test_a_step_has_one_gradient_however_it_is_cut(name: str, options: dict[str, Any], folder: Path) -> None:
    learner = Learner(folder, name, **options)
    for block in (1, 2):
        learner.fit(block).run()
    fit = learner.fit(3)
    fit.begin()
    noise = torch.Generator().manual_seed(1)  # away from the model before the block, where the term is 0
    values = {n: p.detach() + 0.05 * torch.randn(p.shape, generator=noise) for n, p in fit.trained.items()}
    (whole, *_), *_ = fit.steps(0)
    ragged = tuple(t.clone() for t in whole)
    ragged[-1][0] = False  # an example of which nothing counts
    gradients = []
    fit.optimizer.step = lambda: gradients.append(
        {n: p.grad.clone() for n, p in fit.trained.items() if p.grad is not None}
    )
    for cut in ([len(ragged[0])], [1, len(ragged[0]) - 1]):
        for parameter, value in zip(fit.trained.values(), values.values(), strict=True):
            parameter.data.copy_(value)
        fit.step([tuple(parts) for parts in zip(*(t.split(cut) for t in ragged), strict=True)], 0.5)
    assert gradients[0].keys() == gradients[1].keys()
    terms = [event for event in learner.sink.events if event["kind"] == "step"][-2:]
    assert all(value > 1e-4 for event in terms for key, value in event.items() if "/term" in key or "/margin" in key)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-7)


def test_the_first_block_has_no_term_and_strength_0_asks_for_nothing(folder: Path) -> None:
    learner = Learner(folder)
    learner.fit(1).run()
    assert learner.terms(1) == []
    idle = build(MethodConfig(name="lwf", options={"strength": 0.0}))
    assert not idle.needs_outputs
    assert idle.loss_terms(Context({}, block=2), None, torch.ones(())) == {}


def test_what_is_distilled_is_kept_better(folder: Path, tmp_path: Path) -> None:
    """The divergence from the model before the block, with the term and without."""
    found = []
    for strength in (0.0, 10.0):
        learner = Learner(folder, strength=strength)
        for block in (1, 2):
            learner.fit(block).run()
        teacher = learner.saved(tmp_path / str(strength), 2)
        fit = learner.fit(3)
        fit.run()
        found.append(sum(expected_term(fit.look.loss, teacher, batch, 2.0) for (batch,) in fit.steps(0)))
    assert found[1] < 0.5 * found[0]


@pytest.mark.parametrize("name", ["olora", "eblora", "inflora", "janus", "sdlora"])
def test_beside_a_history_that_comes_first_the_teacher_is_the_model_before_the_block(
    name: str, folder: Path, tmp_path: Path
) -> None:
    learner = Learner(folder, f"{name}+lwf")
    for block in (1, 2):
        learner.fit(block).run()
    teacher = learner.saved(tmp_path / "before", 2)
    fit = learner.fit(3)
    fit.begin()
    expected = []
    for (batch,) in fit.steps(0):
        expected.append(expected_term(fit.look.loss, teacher, batch, 2.0))
        fit.step([batch], 0.5)
    assert expected[0] == pytest.approx(0.0, abs=1e-8)
    assert max(expected[1:]) > 1e-4
    assert learner.terms(3) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("lwf+olora", "olora begins a block with other factors, when lwf has taken those", "write olora+lwf"),
        ("lwf+eblora", "eblora begins a block with other factors", "write eblora+lwf"),
        ("lwf+inflora", "inflora begins a block with other factors", "write inflora+lwf"),
        ("lwf+janus", "janus begins a block with other factors", "write janus+lwf"),
        ("peso+lwf+eblora+eisam", "eblora begins a block with other factors", "write peso+eblora+eisam+lwf"),
        ("retrain+lwf", "retrain begins a block with another model than the one before it", "use one of them"),
        ("lwf+retrain", "retrain begins a block with another model than the one before it", "use one of them"),
        ("cumulative+lwf", "cumulative begins a block with another model", "use one of them"),
        ("lsat+lwf", "lsat begins a block with another model", "use one of them"),
    ],
)
def test_what_would_be_distilled_from_another_model_is_refused(name: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(MethodConfig(name=name))
    assert caught.value.message.startswith(f"method.name={name!r}: {message}")
    assert caught.value.hint == hint


def test_what_keeps_the_model_is_allowed_in_any_order() -> None:
    evolving = {"janus.factors": "evolving", "janus.form": "least_squares"}
    for name, options in (("lwf+janus", evolving), ("lwf+peso", {}), ("interpolate+lwf", {}), ("lwf+svdeq", {})):
        assert isinstance(build(MethodConfig(name=name, options=options)), Compose)
    with pytest.raises(ConfigError, match="sdlora begins a block with another model"):
        build(MethodConfig(name="sdlora+lwf", options={"sdlora.start": 0.8}))


def test_the_state_is_all_that_learns_as_it_was(folder: Path) -> None:
    learner = Learner(folder)
    assert isinstance(learner.method, Lwf)
    learner.fit(1).run()
    fit = learner.fit(2)
    assert learner.method.state_bytes(fit.ctx.parameters) > 0
    fit.begin()
    before = {name: p.detach().clone() for name, p in fit.trained.items()}
    for step in fit.steps(0):
        fit.step(step, 0.5)
    state = learner.method.state_dict()
    assert state.keys() == fit.trained.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert learner.method.state_bytes(fit.ctx.parameters) == 4 * sum(t.numel() for t in state.values())


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"temperature": 0.0}, {"temperature": 1e-6}])
def test_settings_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"method.options of lwf: 1 mistake: {next(iter(options))}"):
        build(MethodConfig(name="lwf", options=options))
