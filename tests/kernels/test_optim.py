"""ProxAdamW against torch's AdamW bit for bit, and its terms against autograd in float64."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cladapt_kernels import reference
from cladapt_kernels.optim import ProxAdamW, Term
from cladapt_kernels.optim import optimizer as optimizer_module

SIZES = (1, 63, 1000, 16384 + 5, 63)
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.02}


def world(dtype: torch.dtype = torch.float32, sizes: Sequence[int] = SIZES) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters near their anchors; the same for each dtype but for rounding."""
    generator = torch.Generator().manual_seed(0)
    anchors = [0.02 * torch.randn(size, generator=generator) for size in sizes]
    moved = [a + 1e-3 * torch.randn(a.shape, generator=generator) for a in anchors]
    return [nn.Parameter(p.to(dtype)) for p in moved], [a.to(dtype) for a in anchors]


def give_gradients(parameters: Sequence[nn.Parameter], seed: int, size: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (size * torch.randn(p.shape, generator=generator)).to(p)


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def term_of(kind: str, anchors: Sequence[Tensor], strength: float = 0.5, groups: Sequence[int] | None = None) -> Term:
    if kind == "literal":
        return Term("kl", strength, anchors, groups=groups)
    if kind == "scaled":
        count = len(anchors) if groups is None else max(groups) + 1
        taus = torch.linspace(20, 60, count, dtype=anchors[0].dtype)
        return Term("kl", strength, anchors, taus, groups=groups)
    if kind == "fisher":
        generator = torch.Generator().manual_seed(9)
        fisher = [torch.rand(a.shape, generator=generator).to(a) for a in anchors]
        return Term("fisher", strength, anchors, fisher=fisher, groups=groups)
    return Term("l2", strength, anchors, groups=groups)


def penalty(term: Term, parameters: Sequence[Tensor]) -> Tensor:
    """strength R for autograd, written down as the paper has it."""
    pairs = list(zip(parameters, term.anchors, strict=True))
    if term.kind == "l2":
        return term.strength * torch.stack([0.5 * (p - a).square().sum() for p, a in pairs]).sum()
    if term.fisher is not None:
        weighed = [f * (p - a).square() for (p, a), f in zip(pairs, term.fisher, strict=True)]
        return term.strength * torch.stack([0.5 * w.sum() for w in weighed]).sum()
    total = torch.zeros((), dtype=parameters[0].dtype)
    of_each = term.group_of_each(len(pairs))
    for group in range(max(of_each) + 1):
        own = [pair for pair, g in zip(pairs, of_each, strict=True) if g == group]
        scale = 1.0 if term.inverse_tau is None else term.inverse_tau[group]
        log_p = (torch.cat([p.reshape(-1) for p, _ in own]) * scale).log_softmax(0)
        log_q = (torch.cat([a.reshape(-1) for _, a in own]) * scale).log_softmax(0)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return term.strength * total


def torch_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], term: Term, max_norm: float
) -> float:
    """A step by autograd and torch: the term's gradient is added before the clip."""
    grads = torch.autograd.grad(penalty(term, parameters), parameters)
    for p, grad in zip(parameters, grads, strict=True):
        gradient(p).add_(grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    optimizer.step()
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_term_it_is_torch_bit_for_bit(dtype: torch.dtype) -> None:
    (ours, _), (theirs, _) = world(dtype), world(dtype)
    own, known = ProxAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    for step in range(4):
        for parameters in (ours, theirs):
            give_gradients(parameters, step)
            parameters[1].grad = None if step == 2 else parameters[1].grad  # skipped, its count of steps too
        own.step()
        known.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert own.state[a].keys() == known.state[b].keys()
        assert all(torch.equal(own.state[a][key], known.state[b][key]) for key in known.state[b])
    assert own.route == "torch: no term"


@pytest.mark.parametrize("kind", ["literal", "scaled", "l2", "fisher"])
@pytest.mark.parametrize("measured", [False, True])
def test_a_term_of_strength_zero_is_no_term_bit_for_bit(kind: str, measured: bool) -> None:
    (ours, anchors), (theirs, _) = world(), world()
    own, known = ProxAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    own.set_term(term_of(kind, anchors, strength=0.0))
    for step in range(3):
        for parameters in (ours, theirs):
            give_gradients(parameters, step)
        if measured:
            own.measure(0.05)
            torch.nn.utils.clip_grad_norm_(theirs, 0.05)
        own.step()
        known.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["literal", "scaled", "l2", "fisher"])
@pytest.mark.parametrize("groups", [None, (0, 0, 1, 2, 1)])
@pytest.mark.parametrize("cached", [1, 4096, 65536])
def test_steps_equal_autograd_and_torch_in_float64(
    kind: str, groups: tuple[int, ...] | None, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_module, "CACHED", cached)
    (ours, anchors), (theirs, _) = world(torch.float64), world(torch.float64)
    term = term_of(kind, anchors, strength=20.0, groups=groups)
    own, known = ProxAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    own.set_term(term)
    for step in range(4):
        for parameters in (ours, theirs):
            give_gradients(parameters, step, size=1e-6)  # so that the term is most of the step
        expected = penalty(term, ours).item()
        figures = own.measure(max_norm=1e-2)
        own.step()
        norm = torch_step(known, theirs, term, max_norm=1e-2)
        assert figures.norm.item() == pytest.approx(norm, rel=1e-9)
        assert figures.term.item() == pytest.approx(expected, rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["literal", "scaled", "l2", "fisher"])
def test_float32_figures_keep_their_digits(kind: str) -> None:
    parameters, anchors = world()
    term, exact = term_of(kind, anchors), [a.double() for a in anchors]
    give_gradients(parameters, 0)
    optimizer = ProxAdamW(parameters, **OPTIONS)
    optimizer.set_term(term)
    figures = optimizer.measure(0.01)
    values = [p.detach().double().requires_grad_() for p in parameters]
    fisher = None if term.fisher is None else [f.double() for f in term.fisher]
    tau = None if term.inverse_tau is None else term.inverse_tau.double()
    truth = penalty(Term(term.kind, term.strength, exact, tau, fisher), values)
    pull = torch.cat(torch.autograd.grad(truth, values))
    task = torch.cat([gradient(p).double() for p in parameters])
    distance = torch.cat(values) - torch.cat(exact)
    expected = [(task + pull).norm(), task.norm(), pull.norm(), task @ pull, distance.norm(), truth.detach()]
    for name, found, wanted in zip(figures._fields, figures[:6], expected, strict=False):
        size = task.norm() * pull.norm() if name == "inner" else wanted
        assert abs(found - wanted) < 1e-4 * size, name
    assert figures.numbers() == {name: value.item() for name, value in zip(figures._fields, figures, strict=True)}
    assert figures.clip.item() == pytest.approx(0.01 / (expected[0].item() + 1e-6), rel=1e-4)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "added behind the term"])
@pytest.mark.parametrize("launched", [False, True])
def test_a_term_may_pull_some_parameters_and_the_others_count_in_the_norm(
    launched: bool, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launched:
        pytest.importorskip("triton", reason="the kernels are written in triton")
        monkeypatch.setattr(optimizer_module, "launch_obstacle", lambda *_: "")
    dtype = torch.float32 if launched else torch.float64
    (ours, anchors), (theirs, _) = world(dtype, (4, 64, 30)), world(torch.float64, (4, 64, 30))
    pulled, term = ours[:2], term_of("scaled", anchors[:2], strength=20.0)
    exact = term_of("scaled", [a.double() for a in anchors[:2]], strength=20.0)
    rest = {**OPTIONS, "weight_decay": 0.0}
    own, known = (
        kind([{"params": ps[:2], **OPTIONS}]) for kind, ps in ((ProxAdamW, ours), (torch.optim.AdamW, theirs))
    )
    known.add_param_group({"params": theirs[2:], **rest})
    if late:
        own.set_term(term, pulled)
    own.add_param_group({"params": ours[2:], **rest})
    if not late:
        own.set_term(term, pulled)
    for step in range(3):
        for parameters in (ours, theirs):
            give_gradients(parameters, step)
        figures = own.measure(max_norm=5e-3)
        own.step()
        assert own.route == ("triton: one launch" if launched else "torch: no kernels on cpu")
        grads = torch.autograd.grad(penalty(exact, theirs[:2]), theirs[:2])
        for p, grad in zip(theirs[:2], grads, strict=True):
            gradient(p).add_(grad)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 5e-3).item()
        known.step()
        assert figures.norm.item() == pytest.approx(norm, rel=1e-4)
        assert figures.clip.item() < 1
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3 * OPTIONS["lr"])
    with pytest.raises(ValueError, match="a term pulls parameters that this optimiser does not step"):
        own.set_term(term, theirs[:2])


def test_the_reference_knows_each_term_and_the_step() -> None:
    parameters, anchors = world(torch.float64)
    lengths = torch.tensor([a.numel() for a in anchors])
    value, anchor = torch.cat([p.detach() for p in parameters]), torch.cat(anchors)
    for kind in ("literal", "scaled", "l2", "fisher"):
        term = term_of(kind, anchors)
        fisher = None if term.fisher is None else torch.cat(list(term.fisher))
        found, grad = reference.proximal(term.kind, value, anchor, lengths, term.inverse_tau, fisher)
        truth = penalty(term, parameters)
        expected = torch.cat(torch.autograd.grad(truth, parameters))
        assert term.strength * found.sum().item() == pytest.approx(truth.item(), rel=1e-6)
        torch.testing.assert_close(term.strength * grad, expected, rtol=1e-7, atol=1e-16)
    optimizer = torch.optim.AdamW(parameters, **OPTIONS)
    state = (value, torch.zeros_like(value), torch.zeros_like(value))
    for step in range(3):
        give_gradients(parameters, step)
        grad = torch.cat([gradient(p) for p in parameters])
        optimizer.step()
        state = reference.adamw(*state[:1], grad, *state[1:], step + 1, **OPTIONS)
    torch.testing.assert_close(state[0], torch.cat([p.detach() for p in parameters]), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="term 'ridge', expected kl, l2, or fisher"):
        reference.proximal("ridge", value, anchor, lengths)


def test_a_parameter_without_a_gradient_moves_by_the_term_alone_and_gradients_stay_the_tasks() -> None:
    (ours, anchors), (theirs, _) = world(), world()
    for parameters in (ours, theirs):
        give_gradients(parameters, 0)
    ours[1].grad, theirs[1].grad = None, torch.zeros_like(theirs[1])
    kept = [None if p.grad is None else p.grad.clone() for p in ours]
    for parameters in (ours, theirs):
        optimizer = ProxAdamW(parameters, **OPTIONS)
        optimizer.set_term(term_of("scaled", anchors))
        optimizer.measure(0.01)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours[1].grad is None
    assert all(k is None or torch.equal(gradient(p), k) for p, k in zip(ours, kept, strict=True))


def run(optimizer: ProxAdamW, parameters: Sequence[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(parameters, step)
        optimizer.measure(0.05)
        optimizer.step()


def test_a_saved_state_continues_bit_for_bit_and_torch_reads_it() -> None:
    (straight, anchors), (broken, _) = world(), world()
    optimizers = [ProxAdamW(parameters, **OPTIONS) for parameters in (straight, broken)]
    for optimizer in optimizers:
        optimizer.set_term(term_of("scaled", anchors))
    run(optimizers[0], straight, range(6))
    run(optimizers[1], broken, range(3))
    state, (resumed, _) = copy.deepcopy(optimizers[1].state_dict()), world()
    with torch.no_grad():
        for p, q in zip(resumed, broken, strict=True):
            p.copy_(q)
    again = ProxAdamW(resumed, lr=1.0)
    again.load_state_dict(copy.deepcopy(state))  # torch shares what it loads
    again.set_term(term_of("scaled", anchors))
    run(again, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    known = torch.optim.AdamW(broken, fused=True)
    known.load_state_dict(state)
    give_gradients(broken, 7)
    known.step()
    back = ProxAdamW(broken)
    back.load_state_dict(known.state_dict())
    assert {float(s["step"]) for s in back.state.values()} == {4.0}


def test_states_of_other_adamws_are_read_where_they_mean_the_same() -> None:
    parameters, _ = world()
    give_gradients(parameters, 0)
    choices: list[dict[str, Any]] = [{"foreach": True}, {"amsgrad": True}]
    for options in choices:
        known = torch.optim.AdamW(parameters, **options)
        known.step()
        optimizer = ProxAdamW(parameters)
        if "amsgrad" in options:
            with pytest.raises(ValueError, match="an AdamW with amsgrad, which ProxAdamW does not do"):
                optimizer.load_state_dict(known.state_dict())
        else:
            optimizer.load_state_dict(known.state_dict())
            optimizer.step()
            assert optimizer.state[parameters[0]]["step"].item() == 2


def test_a_change_between_measure_and_step_is_an_error_and_the_step_after_it_is_whole() -> None:
    parameters, anchors = world()
    optimizer = ProxAdamW(parameters, **OPTIONS)
    optimizer.set_term(term_of("l2", anchors))
    give_gradients(parameters, 0)
    optimizer.measure()
    with torch.no_grad():
        parameters[0].mul_(2.0)
    with pytest.raises(RuntimeError, match="changed since measure: measure again before the step"):
        optimizer.step()
    optimizer.step()
    optimizer.measure()
    gradient(parameters[0]).mul_(2.0)
    with pytest.raises(RuntimeError, match="changed since measure"):
        optimizer.step()


def test_what_does_not_fit_is_named() -> None:
    parameters, anchors = world(sizes=(4, 6))
    optimizer = ProxAdamW(parameters)
    short, wrong = anchors[:1], [anchors[0], anchors[1].double()]
    for term, message in (
        (Term("ridge", 1.0, anchors), "term 'ridge', expected one of kl, l2, fisher"),
        (Term("fisher", 1.0, anchors), "'fisher' without its diagonal"),
        (Term("l2", 1.0, short), "1 anchors for 2 parameters"),
        (Term("l2", 1.0, wrong), r"anchors\[1\] is cpu torch.float64 \(6,\), expected cpu torch.float32 \(6,\)"),
        (Term("l2", 1.0, [anchors[0], anchors[1].to("meta")]), r"anchors\[1\] is meta"),
        (Term("fisher", 1.0, anchors, fisher=short), "1 fisher for 2 parameters"),
        (Term("kl", 1.0, anchors, torch.ones(3)), r"inverse_tau is \(3,\), expected \(2,\)"),
        (Term("kl", 1.0, anchors, groups=(0, 2)), r"groups \[0, 2\]…, expected numbers from 0 without a gap"),
        (Term("kl", 1.0, anchors, groups=(0,)), "expected numbers from 0 without a gap, 2 of them"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.set_term(term)
    strided = [nn.Parameter(torch.ones(6, 4).t())]
    with pytest.raises(ValueError, match="parameter 0 is empty or not contiguous"):
        ProxAdamW(strided).set_term(Term("l2", 1.0, [torch.ones(4, 6)]))
    half = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    with pytest.raises(ValueError, match="bfloat16 on cpu; a term needs float32 or float64"):
        ProxAdamW(half).set_term(Term("l2", 1.0, [torch.ones(4, dtype=torch.bfloat16)]))
    with pytest.raises(ValueError, match="lr=-1 is out of range"):
        ProxAdamW(parameters, lr=-1)


def test_the_step_says_why_torch_does_it() -> None:
    parameters, anchors = world(sizes=(4, 6))
    give_gradients(parameters, 0)
    optimizer = ProxAdamW(parameters)
    optimizer.set_term(term_of("l2", anchors))
    optimizer.step()
    assert optimizer.route == "torch: no kernels on cpu"
