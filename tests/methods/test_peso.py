"""PESO's term against autograd, its closed-form optimum on a quadratic, and what it logs."""

import pytest
import torch
from torch import nn

from cladapt import ops
from cladapt.config import MethodConfig
from cladapt.errors import ConfigError
from cladapt.methods import Context, build
from cladapt.methods.peso import Peso, PesoConfig, anchor_spread
from cladapt.model.anchors import Grouping


def parameters(zero_b: bool = False) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    a = 0.02 * torch.randn(4, 16, generator=generator, dtype=torch.float64)
    b = 0.02 * torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return {
        "q.lora_A.default.weight": nn.Parameter(a),
        "q.lora_B.default.weight": nn.Parameter(torch.zeros_like(b) if zero_b else b),
    }


def moved(ps: dict[str, nn.Parameter], step: float = 1e-2) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in ps.values():
            p += step * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def penalty_by_autograd(ps: dict[str, nn.Parameter], anchors: list[torch.Tensor], config: PesoConfig) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p, a in zip(ps.values(), anchors, strict=True):
        v, a = p.flatten(), a.flatten()
        if config.regulariser == "l2":
            total = total + 0.5 * ((v - a) ** 2).sum()
            continue
        tau = a.std(unbiased=False) if config.regulariser == "scaled" else 1.0
        lv, la = (v / tau).log_softmax(0), (a / tau).log_softmax(0)
        total = total + (lv.exp() * (lv - la)).sum() / (len(anchors) if config.regulariser == "scaled" else 1)
    return config.strength * total  # one module: the code's mean over modules equals the sum


@pytest.mark.parametrize("place", ["eager", "epilogue"])
@pytest.mark.parametrize("regulariser", ["literal", "code", "scaled", "l2"])
def test_edit_grads_adds_the_gradient_that_autograd_gives(regulariser: str, place: str) -> None:
    config = PesoConfig(strength=3.0, regulariser=regulariser, place=place)
    ps = parameters()
    anchors = [p.detach().clone() for p in ps.values()]
    epilogue = ops.Epilogue([*ps.values()])
    method, ctx = Peso(config), Context(ps, block=2, epilogue=epilogue)
    method.begin_block(ctx)
    assert (epilogue.term is not None) == (place == "epilogue")
    moved(ps)
    epilogue.arm()  # no linear comes by: all is left to `edit_grads`
    task = [torch.randn_like(p) for p in ps.values()]
    for p, g in zip(ps.values(), task, strict=True):
        p.grad = g.clone()
    method.edit_grads(ctx)
    term = penalty_by_autograd(ps, anchors, config)
    own = torch.autograd.grad(term, list(ps.values()))
    for p, g, o in zip(ps.values(), task, own, strict=True):
        torch.testing.assert_close(p.grad, g + o, rtol=1e-7, atol=1e-12)
    assert ctx.log["peso/term"] == pytest.approx(term.item(), rel=1e-6)
    flat_task, flat_own = torch.cat([t.flatten() for t in task]), torch.cat([o.flatten() for o in own])
    assert ctx.log["peso/ratio"] == pytest.approx((flat_own.norm() / flat_task.norm()).item(), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(flat_task, flat_own, dim=0).item()
    assert ctx.log["peso/cosine"] == pytest.approx(cosine, rel=1e-5)


def test_code_is_the_literal_sum_divided_by_the_number_of_modules() -> None:
    ps = {**parameters(), **{n.replace("q.", "v."): nn.Parameter(p.detach().clone()) for n, p in parameters().items()}}
    terms = {}
    for kind in ("literal", "code"):
        method = Peso(PesoConfig(regulariser=kind))
        method.begin_block(Context(ps, block=2))
        assert method._vector is not None
        value = method._vector.flatten([p.detach() + 0.01 * i for i, p in enumerate(ps.values())])
        terms[kind] = method.penalty(value + torch.linspace(0, 0.1, len(value)))[0].item()
    assert terms["code"] == pytest.approx(terms["literal"] / 2)


def test_l2_interpolates_between_task_optimum_and_anchor_as_the_closed_form_says() -> None:
    # CE replaced by 1/2 (v-v*)' S (v-v*): the optimum is (S + lambda I)^-1 (S v* + lambda a)  (paper, corollary 2)
    ps = parameters()
    n = sum(p.numel() for p in ps.values())
    generator = torch.Generator().manual_seed(3)
    curvature = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    optimum = torch.randn(n, generator=generator, dtype=torch.float64)
    method, ctx = Peso(PesoConfig(strength=0.5, regulariser="l2")), Context(ps, block=2)
    method.begin_block(ctx)
    assert method._vector is not None
    anchor = method._vector.flatten([p.detach() for p in ps.values()]).clone()
    for _ in range(400):
        v = method._vector.flatten([p.detach() for p in ps.values()])
        for p, g in zip(ps.values(), method._vector.unflatten(curvature * (v - optimum)), strict=True):
            p.grad = g.clone()
        method.edit_grads(ctx)
        with torch.no_grad():
            for p in ps.values():
                p -= 0.5 * p.grad
    expected = (curvature * optimum + 0.5 * anchor) / (curvature + 0.5)
    torch.testing.assert_close(method._vector.flatten([p.detach() for p in ps.values()]), expected)


def test_a_group_without_spread_takes_that_of_the_whole_anchor() -> None:
    anchor = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])
    spread = anchor_spread(anchor, torch.tensor([2, 3]))
    torch.testing.assert_close(spread, torch.tensor([1.0, (2 / 5) ** 0.5]))


def test_scaled_is_finite_when_b_starts_at_zero() -> None:
    ps = parameters(zero_b=True)
    method, ctx = Peso(PesoConfig(regulariser="scaled")), Context(ps, block=2)
    method.begin_block(ctx)
    moved(ps)
    for p in ps.values():
        p.grad = torch.ones_like(p)
    method.edit_grads(ctx)
    assert all(torch.isfinite(p.grad).all() for p in ps.values())
    assert ctx.log["peso/term"] > 0


def test_block_one_has_nothing_to_stay_near() -> None:
    ps = parameters()
    method, ctx = Peso(PesoConfig(strength=100.0, regulariser="l2")), Context(ps, block=1)
    method.begin_block(ctx)
    moved(ps)
    for p in ps.values():
        p.grad = torch.ones_like(p)
    method.edit_grads(ctx)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in ps.values())
    assert ctx.log.keys() == {"peso/distance"}


@pytest.mark.parametrize(
    ("groups", "before", "after", "kernels", "place"),
    [
        ("factor", False, False, False, "eager"),
        ("factor", False, False, True, "optimiser"),
        ("module", True, False, True, "optimiser"),
        ("factor", False, True, True, "epilogue"),
        ("factor", True, True, True, "eager"),
        ("rank", False, False, True, "eager"),
    ],
)
def test_auto_keeps_the_order_of_methods_and_the_groups(
    groups: Grouping, before: bool, after: bool, kernels: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "uses_kernel", lambda *_: kernels)
    ps = parameters()
    optimizer, epilogue = ops.ProxAdamW(ps.values()), ops.Epilogue([*ps.values()])
    ctx = Context(ps, block=2, optimizer=optimizer, epilogue=epilogue, edited_before=before, edited_after=after)
    Peso(PesoConfig(groups=groups)).begin_block(ctx)
    taken = {"optimiser": optimizer.term, "epilogue": epilogue.term}
    assert [name for name, term in taken.items() if term is not None] == [name for name in taken if name == place]


@pytest.mark.parametrize(
    ("place", "reason"),
    [("optimiser", "the trained parameters are not all float32"), ("epilogue", "the linears do not run the fused op")],
)
def test_a_place_that_is_not_there_is_an_error(place: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"peso's option place={place}: {reason}") as caught:
        Peso(PesoConfig(place=place)).begin_block(Context(parameters(), block=1))
    assert caught.value.hint == "use place=auto"
    with pytest.raises(ConfigError, match=f"place={place} has groups of whole factors, groups is rank: use"):
        build(MethodConfig(name="peso", options={"groups": "rank", "place": place}))


def test_options_are_checked_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="unknown key 'strenght', did you mean 'strength'"):
        build(MethodConfig(name="peso", options={"strenght": 1}))
    with pytest.raises(ConfigError, match="strength=-1"):
        build(MethodConfig(name="peso", options={"strength": -1}))


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no method 'pesso'") as caught:
        build(MethodConfig(name="pesso"))
    assert caught.value.hint == "did you mean 'peso'?"
