"""Item-wise SAM in the loop: the gradient of its objective by finite differences, controls, frequencies."""

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cladapt.config import AdapterConfig, MethodConfig
from cladapt.errors import ConfigError
from cladapt.methods import Context, Sharpness, available, build, conflicts
from cladapt.methods._sharpness import Groups
from cladapt.methods.eisam import Eisam, EisamConfig, item_weights
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter, lora_layers
from cladapt.model.items import ItemPasses
from cladapt.model.load import Base, new_model, trie_softmax
from cladapt.model.packed import PackedLoss
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import PackedFeed
from cladapt.train.sharpness import Reuse, grouped, two_passes
from cladapt.train.targets import PackedTargets

COUNTS = torch.tensor([0, 1, 4, 4, 16, 100])


def test_weights_of_a_family_have_mean_one_over_events_and_fall_with_frequency() -> None:
    for family in ("power", "focal", "max_focal", "uniform"):
        weights = item_weights(COUNTS, family, 0.5, 0, 1e9)
        assert float((weights * COUNTS).sum() / COUNTS.sum()) == pytest.approx(1.0)
        assert (weights.diff() <= 0).all()
    power = item_weights(COUNTS, "power", 0.5, 0, 1e9)
    assert float(power[2] / power[5]) == pytest.approx(5.0)  # (4 / 100)^-.5
    assert power[0] == power[1]
    focal = item_weights(COUNTS, "focal", 2.0, 0, 1e9)
    assert float(focal[5] / focal[4]) == pytest.approx((25 / 109) ** 2)  # 125 events in all
    assert item_weights(COUNTS, "max_focal", 1.0, 0, 1e9)[5] == 0
    assert item_weights(COUNTS, "tail", 0.5, 4, 1e9).tolist() == [1, 1, 1, 1, 0, 0]
    assert float(item_weights(COUNTS, "power", 0.5, 0, 1.5).max()) == 1.5
    steep = item_weights(torch.tensor([1, 20, 500, 3000]), "power", 50.0, 0, 1e9)
    assert steep.tolist() == pytest.approx([3521.0, 0, 0, 0])  # the rarest has all of the mean over 3,521 events


class Case:
    """A tiny adapted LM in float64 and documents of one target each, the form in which items do not meet, or two."""

    def __init__(self, row_tokens: int = 24, targets: int = 1) -> None:
        sids = SidTable(tuple("abcdef"), np.array([[k // 2, k % 2] for k in range(6)]), (3, 2))
        base = Base(*new_model("tiny", sids, seed=0), sids, {})
        self.tokens, levels = base.item_tokens().numpy(), sids.levels
        config = AdapterConfig(rank=2, dropout=0.0, targets=("q_proj", "down_proj", "lm_head"))
        adapted = create_adapter(base, config, 0, by_item=True).double()
        generator = torch.Generator().manual_seed(1)
        self.parameters = adapter_parameters(adapted)
        with torch.no_grad():
            for p in self.parameters.values():
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        self.loss = PackedLoss(adapted_lm(adapted), trie_softmax(base, Trie.build(sids.codes))).double().eval()
        rows = np.random.default_rng(0).integers(6, size=(7, 3))
        rows[4:6, 2] = rows[0, 2]  # a target thrice
        documents = [
            Document(np.r_[base.bos(), self.tokens[row].ravel()], np.arange(1 + 3 * levels) > (3 - targets) * levels)
            for row in rows
        ]
        self.target, self.model = torch.from_numpy(rows[:, 2]), adapted
        self.targets = PackedTargets(self.tokens, np.bincount(rows[:, 2], minlength=6))
        (self.batch,) = PackedFeed(documents, documents, 512, row_tokens).sample(1.0)

    def run(self, policy: Sharpness) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients and losses by the two passes; `rise` is what the second adds."""
        groups = grouped(policy, self.targets, self.batch)
        passes = ItemPasses(groups.of, len(groups.weight), policy.layers)
        self.rows = []

        def one(shares: Tensor, first: bool, kept: Tensor | None) -> Tensor:
            given = self.batch if passes.rows is None else tuple(t[passes.rows] for t in self.batch)
            self.rows.append(len(given[0]))
            losses = self.loss(*given, passes)
            if kept is not None:
                self.gradient((kept.double()[passes.of_losses] * losses).sum(), retain_graph=True)
            with nullcontext() if kept is None else passes.unrecorded():
                (shares.double()[passes.of_losses] * losses).sum().backward()
            return losses.detach()

        for p in self.parameters.values():
            p.grad = None
        losses, self.rise = two_passes(policy, groups, self.loss, passes, one, lambda tensor: tensor)
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}, losses

    def each(self, key: Tensor | None = None) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """Every item, or value of `key` [R, S], and the sum of its losses at the parameters as they are, plain."""
        items, owner = (self.targets.owner(self.batch) if key is None else key).unique(return_inverse=True)
        passes = ItemPasses(owner, len(items))
        for index, item in enumerate(items.tolist()):
            yield item, lambda index=index: self.loss(*self.batch, passes)[passes.of_losses == index].sum()  # type: ignore[misc]

    def gradient(self, loss: Tensor, **options: bool) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss, [*self.parameters.values()], **options)
        return dict(zip(self.parameters, grads, strict=True))


WEIGHTS = [0.2, 1.0, 1.7, 0.0, 0.9, 1.0]


def by_loop(case: Case, policy: Sharpness, only: str = "") -> dict[str, Tensor]:
    """The gradient of J group by group: the parameters themselves (those of names with `only`) are moved, a pass each.

    Documents hold one target, so that a sample has its item's weight.
    """
    key = case.targets.sample(case.batch) if policy.groups == "sample" else None
    owner = case.targets.owner(case.batch)
    item_of = dict(zip((owner if key is None else key).flatten().tolist(), owner.flatten().tolist(), strict=True))
    own = {group: case.gradient(loss()) for group, loss in case.each(key)}
    if policy.groups == "batch":
        total = {n: sum(policy.weight[item_of[i]].double() * g[n] for i, g in own.items()) for n in case.parameters}
        direction = dict.fromkeys(own, total)
    else:
        direction = own
    found = {name: torch.zeros_like(p) for name, p in case.parameters.items()}
    case.rise = torch.zeros((), dtype=torch.float64)
    for group, loss in case.each(key):
        moving = {n: g for n, g in direction[group].items() if only in n}
        norm = torch.stack([g.square().sum() for g in moving.values()]).sum().sqrt()
        step = {n: policy.radius[item_of[group]].double() * g / norm for n, g in moving.items()} if norm else {}
        with torch.no_grad():
            for name, change in step.items():
                case.parameters[name] += change
        above = loss()
        moved = case.gradient(above)
        with torch.no_grad():
            for name, change in step.items():
                case.parameters[name] -= change
        weight = policy.weight[item_of[group]].double()
        case.rise += weight * (above - loss()).detach()
        for name in found:
            found[name] += (1 - weight) * own[group][name] + weight * moved[name]
    return found


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for name, expected in truth.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("groups", ["item", "sample", "batch"])
@pytest.mark.parametrize("weight", [[0.5] * 6, [1.0] * 6, WEIGHTS], ids=["half", "whole", "by item"])
def test_two_passes_are_a_loop_over_groups_whose_parameters_are_moved(groups: Groups, weight: list[float]) -> None:
    case = Case()
    radius = torch.full((6,), 0.2) if groups == "batch" else torch.linspace(0.1, 0.3, 6)
    policy = Sharpness(torch.tensor(weight), radius, groups=groups)
    truth, rise = by_loop(case, policy), case.rise
    found, losses = case.run(policy)
    assert_close(found, truth)
    assert float(case.rise) == pytest.approx(float(rise), abs=1e-5)  # losses are float32
    assert rise > 1e-3
    plain = case.gradient(sum(loss() for _, loss in case.each()))  # type: ignore[arg-type]
    assert max(float((truth[n] - plain[n]).abs().max()) for n in truth) > 1e-3
    torch.testing.assert_close(losses.sum(), sum(loss() for _, loss in case.each()))  # type: ignore[arg-type]


class Moved:
    """The adapted layers by their definition: every group has factors of its own, leaves, for all its tokens."""

    def __init__(self, case: Case, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.steps = groups, dict[str, tuple[Tensor, Tensor]]()
        for name, layer in lora_layers(case.model).items():
            monkeypatch.setattr(layer, "_by_item", partial(self.product, name))

    def product(self, name: str, passes: ItemPasses, picked: bool, x: Tensor, *given: Any) -> Tensor:
        weight, _, down, up, scale, *_ = given
        if name not in self.steps:
            zeros = (torch.zeros(self.count, *side.shape, dtype=x.dtype, requires_grad=True) for side in (down, up))
            self.steps[name] = tuple(zeros)  # type: ignore[assignment]
        owner = passes.of_losses if picked else passes.owner.flatten()
        a, b = (side + step[owner] for side, step in zip((down, up), self.steps[name], strict=True))
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ weight.T + scale * torch.einsum("tnr,trk,tk->tn", b, a, rows)
        return y.view(*x.shape[:-1], -1)


def by_definition(
    case: Case, policy: Sharpness, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """The gradient of J, what perturbing adds, and every layer's steps, each layer computed token by token."""
    groups = grouped(policy, case.targets, case.batch)
    weight, passes = groups.weight.double(), ItemPasses(groups.of, len(groups.weight))
    with monkeypatch.context() as patch:
        moved = Moved(case, len(weight), patch)
        with passes.inside(case.model):
            losses = case.loss(*case.batch, passes)
            share = weight[passes.of_losses]
            leaves = [leaf for pair in moved.steps.values() for leaf in pair]
            plain = case.gradient(((1 - share) * losses).sum(), retain_graph=True)
            directions = torch.autograd.grad(((share if policy.groups == "batch" else 1.0) * losses).sum(), leaves)
            if policy.groups == "batch":
                directions = tuple(d.sum(0, keepdim=True).expand_as(d) for d in directions)
            norm = torch.stack([d.flatten(1).square().sum(1) for d in directions]).sum(0).sqrt()
            kappa = groups.radius.double() / norm.clamp_min(1e-300) * (1.0 if policy.groups == "batch" else weight != 0)
            with torch.no_grad():
                for leaf, d in zip(leaves, directions, strict=True):
                    leaf += kappa.view(-1, 1, 1) * d
            above = (share * case.loss(*case.batch, passes)).sum()
            again = case.gradient(above)
    return {n: plain[n] + again[n] for n in plain}, (above - (share * losses).sum()).detach(), leaves


@pytest.mark.parametrize(
    "weight", [[0.5] * 6, WEIGHTS, [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]], ids=["half", "by item", "tail"]
)
@pytest.mark.parametrize("groups", ["item", "sample", "batch"])
def test_histories_of_several_targets_move_as_their_groups_say(
    groups: Groups, weight: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(targets=2)
    radius = torch.full((6,), 0.2) if groups == "batch" else torch.linspace(0.1, 0.3, 6)
    policy = Sharpness(torch.tensor(weight), radius, groups=groups)
    assert grouped(policy, case.targets, case.batch).mixed == (groups != "sample" and len(set(weight)) > 1)
    truth, rise, steps = by_definition(case, policy, monkeypatch)
    assert max(float(step.detach().abs().max()) for step in steps) > 0.01
    found, losses = case.run(policy)
    assert_close(found, truth)
    assert float(case.rise) == pytest.approx(float(rise), rel=1e-6, abs=1e-5)
    assert len(losses) == 2 * 2 * 7  # levels, targets and documents


def test_the_last_layers_alone_are_perturbed() -> None:
    case = Case()
    policy = Sharpness(torch.tensor(WEIGHTS), torch.full((6,), 0.2), layers=1)
    last = max(int(number[1]) for name in case.parameters if (number := re.search(r"layers\.(\d+)", name)))
    moving = [n for n in case.parameters if f"layers.{last}." in n or "lm_head" in n]  # the head is behind the layers
    assert 0 < len(moving) < len(case.parameters)
    case.parameters = {f"moving {n}" if n in moving else n: p for n, p in case.parameters.items()}
    assert_close(case.run(policy)[0], by_loop(case, policy, only="moving"))


def test_groups_of_the_largest_weights_are_perturbed_and_rows_without_them_left_out() -> None:
    case = Case(row_tokens=8)
    weight = torch.tensor(WEIGHTS)
    policy = Sharpness(weight, torch.full((6,), 0.2), share=0.4)
    counts = torch.bincount(case.target, minlength=6)
    kept, held = [], 0
    for item in sorted(case.target.unique().tolist(), key=lambda i: -WEIGHTS[i]):
        if held < 0.4 * 7:
            kept.append(item)
            held += int(counts[item])
    alone = replace(policy, weight=torch.where(torch.isin(torch.arange(6), torch.tensor(kept)), weight, 0.0), share=1.0)
    found, losses = case.run(policy)
    rise = case.rise
    assert_close(found, by_loop(case, alone))
    assert float(rise) == pytest.approx(float(case.rise), abs=1e-5)
    assert case.rows == [7, int(torch.isin(case.target, torch.tensor(kept)).sum())]
    assert case.rows[1] < 7
    torch.testing.assert_close(losses.sum(), sum(loss() for _, loss in case.each()))  # type: ignore[arg-type]


def test_where_nothing_has_weight_the_gradient_is_the_plain_one() -> None:
    case = Case()
    found, _ = case.run(Sharpness(torch.zeros(6), torch.ones(6)))
    assert_close(found, case.gradient(sum(loss() for _, loss in case.each())))  # type: ignore[arg-type]


def test_between_two_passes_what_they_changed_is_used_again_at_the_gradients_length() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("a", "b")
    parameters = {n: torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)) for n in names}

    def drawn() -> dict[str, Tensor]:
        return {n: torch.randn(3, 2, generator=generator, dtype=torch.float64) for n in names}

    def set_grads(values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            parameters[name].grad = value.clone()

    reuse, half, rest, whole, later = Reuse(3), drawn(), drawn(), drawn(), drawn()
    assert [reuse.due(step) for step in (0, 1)] == [True, True]  # nothing is there to use again
    reuse.add_plain(half)
    reuse.add_plain(rest)
    set_grads(whole)
    reuse.keep(parameters, lambda tensor: tensor)
    assert [reuse.due(step) for step in (1, 2, 3, 4)] == [False, False, True, False]
    set_grads(later)
    reuse.apply(parameters)
    for name in names:
        plain, change = half[name] + rest[name], whole[name] - half[name] - rest[name]
        across = change - (change * plain).sum() / plain.norm() ** 2 * plain
        expected = later[name] + later[name].norm() / plain.norm() * across
        torch.testing.assert_close(parameters[name].grad, expected)


def test_the_gradient_is_that_of_the_objective_by_finite_differences() -> None:
    case, step = Case(), 1e-2  # losses are float32
    policy = Sharpness(torch.tensor(WEIGHTS), torch.full((6,), 0.3))
    own = {item: case.gradient(loss()) for item, loss in case.each()}
    eps = {
        item: {
            n: 0.3 * g / torch.stack([v.square().sum() for v in grads.values()]).sum().sqrt() for n, g in grads.items()
        }
        for item, grads in own.items()
    }

    def objective() -> float:
        total = 0.0
        for item, loss in case.each():
            weight = float(policy.weight[item])
            here = float(loss())
            for name, p in case.parameters.items():
                p += eps[item][name]
            total += (1 - weight) * here + weight * float(loss())
            for name, p in case.parameters.items():
                p -= eps[item][name]
        return total

    found, _ = case.run(policy)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(2):
            line = {
                n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in case.parameters.items()
            }
            size = torch.stack([d.square().sum() for d in line.values()]).sum().sqrt()
            line = {n: d / size for n, d in line.items()}
            values = []
            for sign in (1, -1):
                for name, p in case.parameters.items():
                    p += sign * step * line[name]
                values.append(objective())
                for name, p in case.parameters.items():
                    p -= sign * step * line[name]
            slope = (values[0] - values[1]) / (2 * step)
            assert sum(float((found[n] * d).sum()) for n, d in line.items()) == pytest.approx(slope, rel=1e-3)


def test_weights_alone_need_no_second_pass() -> None:
    case = Case()
    weight = torch.tensor(WEIGHTS)
    found, _ = case.run(Sharpness(weight, torch.ones(6), perturbed=False))
    truth = case.gradient(sum(weight[item].double() * loss() for item, loss in case.each()))  # type: ignore[arg-type]
    for name, expected in truth.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-9)


def test_a_token_works_for_the_next_target_of_its_document() -> None:
    tokens = np.array([[1, 2], [1, 3], [4, 5]])
    targets = PackedTargets(tokens, np.array([3, 2, 1]))
    row = torch.tensor([[9, 1, 2, 1, 3, 4, 5, 9, 1, 2, 0]])
    document = torch.tensor([[1] * 7 + [2] * 3 + [0]])
    loss = torch.zeros_like(row, dtype=torch.bool)
    loss[0, 3:7] = loss[0, 8:10] = True
    owner = targets.owner((row, document, torch.zeros_like(row), loss))
    #        9  1  2  1  3  4  5   9  1  2  -
    assert owner.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0]]
    batch = (row, document, torch.zeros_like(row), loss)
    assert targets.of_losses(batch, owner).tolist() == [1, 1, 2, 2, 0, 0]
    assert targets.sample(batch).tolist() == [[0] * 7 + [1] * 3 + [2]]
    assert targets.frequency.tolist() == [3, 2, 1]
    assert PackedTargets(np.array([[1, 2], [1, 2]]), np.array([3, 4])).frequency.tolist() == [7, 0]


@pytest.mark.parametrize("name", [name for name, method in available().items() if method.parameters == "weights"])
def test_a_method_that_learns_whole_weights_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"eisam perturbs the factors of an adapter, .* learns whole weights"):
        build(MethodConfig(name=f"{name}+eisam"))


def test_a_method_that_trains_nothing_is_not_composed() -> None:
    with pytest.raises(ConfigError, match=r"frozen leaves nothing to train \(use frozen alone\)"):
        build(MethodConfig(name="frozen+eisam"))


def test_two_methods_that_weigh_the_losses_are_refused() -> None:
    ((what, hint),) = conflicts({"eisam": Eisam(EisamConfig()), "again": Eisam(EisamConfig())})
    assert (what, hint) == ("eisam and again would each weigh the losses", "use one of them")


def test_a_head_that_computes_the_whole_vocabulary_is_refused() -> None:
    passes = ItemPasses(torch.zeros(2, 8, dtype=torch.int64), 1)
    with pytest.raises(ConfigError, match=r"a layer sees 5 of 16 tokens: the adapted head, over the whole vocabulary"):
        passes.factors(torch.nn.Linear(1, 1), 5, picked=False)


def test_more_layers_than_the_base_has_are_refused() -> None:
    parameters = Case().parameters
    Eisam(EisamConfig(layers=2)).check(Context(parameters))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"eisam: layers=3, the base has 2 adapted ones \(use 1 to 2, or 0 for all"):
        Eisam(EisamConfig(layers=3)).check(Context(parameters))  # type: ignore[arg-type]


def test_weights_alone_refuse_what_describes_a_perturbation() -> None:
    with pytest.raises(ConfigError, match=r"does not read groups, strength: leave it out"):
        build(MethodConfig(name="eisam", options={"perturb": False, "groups": "item", "strength": 1.0}))
    build(MethodConfig(name="eisam", options={"perturb": False, "groups": "sample"}))  # the default


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({"weights": "uniform", "exponent": 3.0}, "exponent"),
        ({"weights": "tail", "largest": 2.0}, "largest"),
        ({"tail": 3}, "tail"),
    ],
)
def test_what_the_weights_do_not_read_is_refused(options: dict[str, Any], unread: str) -> None:
    with pytest.raises(ConfigError, match=f"does not read {unread}: leave it out"):
        build(MethodConfig(name="eisam", options=options))


def test_a_tail_that_no_item_is_in_is_refused() -> None:
    with pytest.raises(ConfigError, match="tail"):
        build(MethodConfig(name="eisam", options={"weights": "tail", "tail": 0}))
