"""EWC: its term against autograd, its optimum in closed form, and F against gradients of examples one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cladapt import ops, ranks
from cladapt.config import AdapterConfig, MethodConfig
from cladapt.errors import ConfigError
from cladapt.methods import Context, build
from cladapt.methods.ewc import Ewc, EwcConfig
from cladapt.model.adapter import adapted_lm, create_adapter
from cladapt.model.load import load_base, new_model, save_base, trie_softmax
from cladapt.model.packed import PackedLoss
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import PackedFeed, shard
from cladapt.train.looking import Look
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.sinks import MemorySink

SIDS = SidTable(tuple(f"i{k}" for k in range(12)), np.array([[k // 3, k % 3] for k in range(12)]), (4, 3))
SHAPES = {"q.lora_A.default.weight": (4, 16), "q.lora_B.default.weight": (8, 4)}


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def squares(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: t.square() for name, t in drawn(seed, dtype).items()}


def context(block: int = 2, fisher: int = 1, dtype: torch.dtype = torch.float64, **more: Any) -> Context:
    parameters = {name: nn.Parameter(t) for name, t in drawn(0, dtype).items()}
    return Context(parameters, block=block, squared_gradient=lambda share: squares(fisher, dtype), **more)


def after_a_block(config: EwcConfig, ctx: Context | None = None) -> tuple[Ewc, Context]:
    """A method that has ended block 2, in block 3."""
    method, ctx = Ewc(config), ctx or context()
    method.begin_block(ctx)
    method.end_block(ctx)
    ctx.block = 3
    method.begin_block(ctx)
    return method, ctx


def moved(ctx: Context) -> None:
    with torch.no_grad():
        for p, step in zip(ctx.parameters.values(), drawn(7, torch.float64).values(), strict=True):
            p += 0.1 * step.to(p)


def test_edit_grads_adds_the_gradient_that_autograd_gives() -> None:
    method, ctx = after_a_block(EwcConfig(strength=3.0))
    anchors = {name: p.detach().clone() for name, p in ctx.parameters.items()}
    moved(ctx)
    task = drawn(5)
    for name, p in ctx.parameters.items():
        p.grad = task[name].clone()
    method.edit_grads(ctx)
    fisher = squares(1)
    term = sum(1.5 * (fisher[n] * (p - anchors[n]) ** 2).sum() for n, p in ctx.parameters.items())
    own = torch.autograd.grad(term, [*ctx.parameters.values()])
    for (name, p), o in zip(ctx.parameters.items(), own, strict=True):
        torch.testing.assert_close(p.grad, task[name] + o)
    flat_task, flat_own = (torch.cat([t.flatten() for t in each]) for each in (task.values(), own))
    assert ctx.log["ewc/term"] == pytest.approx(term.item())
    assert ctx.log["ewc/ratio"] == pytest.approx((flat_own.norm() / flat_task.norm()).item())
    cosine = torch.nn.functional.cosine_similarity(flat_task, flat_own, dim=0).item()
    assert ctx.log["ewc/cosine"] == pytest.approx(cosine)
    far = torch.cat([(p - anchors[n]).detach().flatten() for n, p in ctx.parameters.items()]).norm()
    assert ctx.log["ewc/distance"] == pytest.approx(far.item())


def test_the_optimum_on_a_quadratic_is_the_closed_form() -> None:
    # CE replaced by 1/2 (v-v*)' S (v-v*): the optimum is (S + strength F)^-1 (S v* + strength F a), entry by entry
    method, ctx = after_a_block(EwcConfig(strength=0.5))
    curvature, optimum, fisher = squares(2), drawn(3), squares(1)
    anchors = {name: p.detach().clone() for name, p in ctx.parameters.items()}
    with torch.no_grad():
        for _ in range(4000):
            for name, p in ctx.parameters.items():
                p.grad = (curvature[name] + 0.1) * (p - optimum[name])
            method.edit_grads(ctx)
            for p in ctx.parameters.values():
                p -= 0.1 * p.grad  # type: ignore[operator]
    for name, p in ctx.parameters.items():
        pull, own = 0.5 * fisher[name], curvature[name] + 0.1
        torch.testing.assert_close(p.detach(), (own * optimum[name] + pull * anchors[name]) / (own + pull))


@pytest.mark.parametrize("decay", [1.0, 0.25, 0.0])
def test_f_sums_over_blocks_with_decay_and_the_anchor_is_the_last(decay: float) -> None:
    method = Ewc(EwcConfig(decay=decay))
    for block, seed in ((2, 1), (3, 2), (4, 3)):
        ctx = context(block, seed)
        for p, t in zip(ctx.parameters.values(), drawn(10 + block).values(), strict=True):
            p.data.copy_(t)
        method.begin_block(ctx)
        method.end_block(ctx)
    method.begin_block(ctx)
    vector = method._vector
    assert vector is not None
    found = {"fisher": method.fisher, "anchor": method.anchor}
    for name, flat in found.items():
        assert flat is not None
        for entry, part in zip(SHAPES, vector.unflatten(flat), strict=True):
            fisher = decay**2 * squares(1)[entry] + decay * squares(2)[entry] + squares(3)[entry]
            torch.testing.assert_close(part, fisher if name == "fisher" else drawn(14)[entry])


def test_the_first_block_has_nothing_to_hold() -> None:
    method, ctx = Ewc(EwcConfig(strength=100.0)), context()
    method.begin_block(ctx)
    moved(ctx)
    for p in ctx.parameters.values():
        p.grad = torch.ones_like(p)
    method.edit_grads(ctx)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in ctx.parameters.values() if p.grad is not None)
    assert ctx.log.keys() == {"ewc/distance"}


def test_a_strength_of_zero_takes_no_pass() -> None:
    method, ctx = Ewc(EwcConfig(strength=0.0)), context()
    ctx.squared_gradient = lambda share: pytest.fail("a pass over the examples")
    method.begin_block(ctx)
    method.end_block(ctx)
    assert not method.state_dict()["fisher"].any()


def test_inside_the_optimiser_a_step_is_that_of_plain_torch() -> None:
    found: dict[str, list[Tensor]] = {}
    logs: dict[str, dict[str, float]] = {}
    for place in ("optimiser", "eager"):
        ctx = context(dtype=torch.float32)
        values = [*ctx.parameters.values()]
        ctx.optimizer = optimizer = ops.ProxAdamW(values, lr=0.1, weight_decay=0.0)
        method, _ = after_a_block(EwcConfig(strength=3.0, place=place), ctx)  # type: ignore[arg-type]
        assert (optimizer.term is not None) == (place == "optimiser")
        for step in range(3):
            for p, t in zip(values, drawn(20 + step, torch.float32).values(), strict=True):
                p.grad = t.clone()
            method.edit_grads(ctx)
            if place == "optimiser":
                ctx.figures = optimizer.measure(1.0)
            else:
                torch.nn.utils.clip_grad_norm_(values, 1.0)
            optimizer.step()
            method.after_step(ctx)
        found[place] = [p.detach().clone() for p in values]
        logs[place] = dict(ctx.log)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert logs["optimiser"] == pytest.approx(logs["eager"], rel=1e-4)


@pytest.mark.parametrize(
    ("after", "kernels", "inside"), [(False, True, True), (True, True, False), (False, False, False)]
)
def test_auto_keeps_the_order_of_methods(
    after: bool, kernels: bool, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "uses_kernel", lambda *_: kernels)
    ctx = context(dtype=torch.float32, edited_after=after)
    ctx.optimizer = optimizer = ops.ProxAdamW(ctx.parameters.values())
    after_a_block(EwcConfig(), ctx)
    assert (optimizer.term is not None) == inside


def test_a_place_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="place=optimiser: the trained parameters are not all float32") as caught:
        Ewc(EwcConfig(place="optimiser")).begin_block(context())
    assert caught.value.hint == "use place=auto"
    with pytest.raises(ConfigError, match="a method that comes after ewc edits gradients"):
        Ewc(EwcConfig(place="optimiser")).check(context(edited_after=True))


@pytest.mark.parametrize("name", ["ewc+retrain", "olora+ewc", "eblora+ewc", "svdeq+ewc"])
def test_factors_that_do_not_go_on_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="ewc weighs entries of the factors against those of another block"):
        build(MethodConfig(name=name))


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"strength=-1.*; decay=2.*; sample=0"):
        build(MethodConfig(name="ewc", options={"strength": -1, "decay": 2, "sample": 0}))


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A model with an adapter that has left its start, and documents of unequal length."""
    folder = tmp_path_factory.mktemp("base") / "base"
    save_base(folder, *new_model("tiny", SIDS, seed=0), SIDS, {"fitted_block": 1})
    base = load_base(folder)
    model = create_adapter(base, AdapterConfig(rank=2, dropout=0.5, targets=("q_proj", "lm_head")), 0)
    ctx = Context.of(model, 2, {})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in ctx.parameters.values():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    tokens, rng = base.item_tokens().numpy(), np.random.default_rng(0)
    documents = [
        Document(np.r_[base.bos(), tokens[rng.integers(12, size=n)].ravel()], np.arange(1 + 2 * n) > 2)
        for n in rng.integers(2, 7, size=9)
    ]
    loss = PackedLoss(adapted_lm(model), trie_softmax(base, Trie.build(SIDS.codes)))
    feed = PackedFeed(documents[:7], documents[7:], 64, 16)
    return Fit(loss, Ewc(), ctx, feed, FitSettings(lr=2e-3, epochs=1, seed=0), MemorySink())


def one_by_one(fit: Fit, chosen: list[int]) -> dict[str, Tensor]:
    """The mean of squared gradients, each document in a pass of its own and in no row with others."""
    fit.module.eval()
    found = {name: torch.zeros_like(p) for name, p in fit.ctx.parameters.items()}
    documents = fit.feed.documents  # type: ignore[attr-defined]
    for i in chosen:
        d = documents[i]
        row = [
            torch.from_numpy(x)[None] for x in (d.tokens, np.ones(len(d.tokens), int), np.arange(len(d.tokens)), d.loss)
        ]
        grads = torch.autograd.grad(fit.module(*row).sum(), [*fit.ctx.parameters.values()])
        for total, grad in zip(found.values(), grads, strict=True):
            total += grad.square() / len(chosen)
    return found


@pytest.mark.parametrize(("share", "chosen"), [(1.0, [0, 1, 2, 3, 4, 5, 6]), (0.3, [0, 6])])
def test_f_is_the_mean_of_squared_gradients_of_single_documents(fit: Fit, share: float, chosen: list[int]) -> None:
    found, expected = fit.ctx.squared_gradient(share), one_by_one(fit, chosen)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-9)
        assert tensor.any()
    assert all(p.grad is None for p in fit.ctx.parameters.values())


@pytest.mark.parametrize("processes", [2, 3])
def test_the_parts_of_several_processes_add_up_to_f(fit: Fit, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit.ctx.squared_gradient(1.0)
    monkeypatch.setattr(ranks, "ranks", lambda: processes)
    parts = [
        Look(
            fit.module, fit.ctx.parameters, fit.feed, lambda b, r=r: shard(b, r, processes), lambda t: t, fit._autocast
        )
        for r in range(processes)  # the last has fewer of the seven documents
    ]
    found = [part.squared_gradient(1.0) for part in parts]
    for name, tensor in whole.items():
        torch.testing.assert_close(sum(each[name] for each in found), tensor, rtol=1e-4, atol=1e-9)
        assert all(each[name].any() for each in found)


def test_a_block_ends_with_the_fisher_of_the_values_that_are_kept(tmp_path: Path, fit: Fit) -> None:
    fit.run()
    method = fit.method
    assert isinstance(method, Ewc)
    assert method._vector is not None
    assert method.fisher is not None
    expected = method._vector.flatten([*one_by_one(fit, [*range(7)]).values()])
    torch.testing.assert_close(method.fisher, expected, rtol=1e-4, atol=1e-9)
