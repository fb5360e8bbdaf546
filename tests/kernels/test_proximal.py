"""A term that joins in the linears' backward passes: against autograd in float64, once a step, wherever it is left."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cladapt_kernels import reference
from cladapt_kernels.lora import linear as op
from cladapt_kernels.lora.linear import lora_linear
from cladapt_kernels.lora.routes import Factors, Route
from cladapt_kernels.optim import ProxAdamW, Term, optimizer, proximal
from cladapt_kernels.optim.proximal import Epilogue

pytest.importorskip("triton", reason="the kernels are written in triton")

M, K, N, R, SCALE = 40, 24, 36, 4, 0.5
FORMS = ("literal", "scaled", "l2")


class World:
    """A linear with factors near their anchors, and a term that pulls them."""

    def __init__(self, form: str, dtype: torch.dtype, device: torch.device, together: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

        self.x, self.weight, self.dy = draw(M, K), draw(N, K), draw(M, N)
        self.anchors = [draw(R, K, scale=0.05), draw(N, R, scale=0.05)]
        self.a, self.b = ((t + draw(*t.shape, scale=0.01)).requires_grad_() for t in self.anchors)
        groups = (0, 0) if together else None
        tau = None if form == "literal" else torch.full((1 if together else 2,), 20.0).to(device, dtype)
        strength = {"literal": 1e4, "scaled": 10.0, "l2": 5.0}[form]
        self.term = Term("l2" if form == "l2" else "kl", strength, self.anchors, tau, groups=groups)
        self.epilogue = Epilogue([self.a, self.b])
        self.epilogue.set_term(self.term)

    def backward(self, rows: slice = slice(None)) -> None:
        pulls = self.epilogue.of(self.a, self.b)
        y = lora_linear(self.x[rows], self.weight, None, self.a, self.b, SCALE, pulls=pulls)
        y.backward(self.dy[rows])

    def own(self) -> tuple[Tensor, list[Tensor]]:
        """strength R and its gradients by autograd, in float64."""
        return pull_of(self.term, [self.a, self.b])

    def task(self) -> list[Tensor]:
        given = (t.detach().double() for t in (self.dy, self.x, self.weight, self.a, self.b))
        return list(reference.lora_linear_backward(*given, SCALE)[1:])


def pull_of(term: Term, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    values = [p.detach().double().requires_grad_() for p in parameters]
    anchors = [a.double() for a in term.anchors]
    total = torch.zeros((), dtype=torch.float64, device=values[0].device)
    of_each = term.group_of_each(len(values))
    for group in range(max(of_each) + 1):
        v, a = (
            torch.cat([t.reshape(-1) for t, g in zip(ts, of_each, strict=True) if g == group])
            for ts in (values, anchors)
        )
        if term.kind == "l2":
            total = total + 0.5 * (v - a).square().sum()
            continue
        scale = 1.0 if term.inverse_tau is None else term.inverse_tau[group].double()
        log_p, log_q = (v * scale).log_softmax(0), (a * scale).log_softmax(0)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    total = term.strength * total
    return total.detach(), list(torch.autograd.grad(total, values))


def by_kernels(monkeypatch: pytest.MonkeyPatch, factors: Factors = "skinny") -> None:
    """Factors' gradients by the kernel, statistics by the launches, on any device."""
    monkeypatch.setattr(op, "route", lambda *_: Route("addmm", "addmm", factors, "asked for"))
    for module in (optimizer, proximal):
        monkeypatch.setattr(module, "launch_obstacle", lambda *_: "")


@pytest.fixture(params=["torch", "skinny"])
def by_both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors' gradients by plain torch, then by the kernel."""
    if request.param == "skinny":
        by_kernels(monkeypatch)


def gradients(world: World) -> list[Tensor]:
    found = [world.a.grad, world.b.grad]
    assert all(grad is not None for grad in found)
    return [grad.double() for grad in found if grad is not None]


@pytest.mark.parametrize("together", [False, True], ids=["factors", "module"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", ["torch", "skinny", "single"])
def test_gradients_are_those_of_loss_and_term(
    route: str, form: str, together: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if route != "torch":
        by_kernels(monkeypatch, "single" if route == "single" else "skinny")
    dtype = torch.float64 if route == "torch" else torch.float32
    world = World(form, dtype, device, together)
    assert world.epilogue.route == ("triton" if route != "torch" else f"torch: no kernels on {device.type}") or (
        device.type == "cuda"
    )
    world.epilogue.arm()
    world.backward()
    assert not any(pull.waiting for pull in world.epilogue._pulls.values())  # none is left to `finish`
    value, pulls = world.own()
    rtol, atol = (1e-9, 1e-9) if route == "torch" else (1e-4, 1e-4)
    for found, task, pull in zip(gradients(world), world.task(), pulls, strict=True):
        assert pull.abs().max() > 0.02 * task.abs().max()
        torch.testing.assert_close(found, task + pull, rtol=rtol, atol=atol)
    world.epilogue.finish()
    figures = world.epilogue.measure().numbers()
    task, own = (torch.cat([t.flatten() for t in ts]) for ts in (world.task(), pulls))
    moved = torch.cat(
        [(p.detach() - a).double().flatten() for p, a in zip((world.a, world.b), world.anchors, strict=True)]
    )
    expected = {
        "norm": (task + own).norm(), "task_norm": task.norm(), "term_norm": own.norm(), "inner": task @ own,
        "distance": moved.norm(), "term": value, "clip": torch.ones(()),
    }  # fmt: skip
    size = (task.norm() * own.norm()).item()
    for name, wanted in expected.items():
        tolerance = 1e-4 * (size if name == "inner" else abs(wanted.item()))
        assert figures[name] == pytest.approx(wanted.item(), abs=tolerance), name


@pytest.mark.usefixtures("by_both")
def test_the_term_joins_once_a_step_and_only_when_armed(device: torch.device) -> None:
    world = World("scaled", torch.float32, device)
    world.backward(slice(0, 10))  # a micro-batch that is not the last
    world.epilogue.arm()
    world.backward(slice(10, 30))
    world.backward(slice(30, M))  # the head is called for one chunk after the other
    world.epilogue.finish()
    _, pulls = world.own()
    for found, task, pull in zip(gradients(world), world.task(), pulls, strict=True):
        torch.testing.assert_close(found, task + pull, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="arm comes before the backward pass"):
        world.epilogue.finish()
    world.a.grad = world.b.grad = None
    world.epilogue.set_term(None)
    world.epilogue.arm()
    world.backward()
    for found, task in zip(gradients(world), world.task(), strict=True):
        torch.testing.assert_close(found, task, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("by_both")
def test_what_no_linear_reaches_is_left_to_finish(form: str, device: torch.device) -> None:
    world = World(form, torch.float32, device)
    size = torch.full((1,), 0.7, device=device, requires_grad=True)
    unused = torch.full((5,), 0.03, device=device, requires_grad=True)
    parameters = [world.a, world.b, size, unused]
    anchors = [*world.anchors, size.detach().clone(), torch.linspace(-0.1, 0.1, 5, device=device)]
    tau = None if world.term.inverse_tau is None else torch.full((4,), 20.0, device=device)
    epilogue = Epilogue(parameters)
    epilogue.set_term(term := Term(world.term.kind, 2.0, anchors, tau))
    epilogue.arm()
    factor = size * world.b  # B = s U: what the linear sees is no parameter
    y = lora_linear(world.x, world.weight, None, world.a, factor, SCALE, pulls=epilogue.of(world.a, factor))
    y.backward(world.dy)
    waiting = [epilogue._pulls[id(p)].waiting for p in parameters]
    assert waiting == [False, True, True, True]
    epilogue.finish()
    values = [p.detach().double().requires_grad_() for p in (world.a, world.b, size)]
    exact = reference.lora_linear(
        world.x.double(), world.weight.double(), None, values[0], values[2] * values[1], SCALE
    )
    tasks = [*torch.autograd.grad((exact * world.dy.double()).sum(), values), torch.zeros_like(unused).double()]
    for p, task, pull in zip(parameters, tasks, pull_of(term, parameters)[1], strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), task + pull, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("far", [10.0, 100.0, 1000.0])
@pytest.mark.usefixtures("by_both")
def test_a_factor_far_from_its_anchor_has_the_gradient_of_float64(far: float, device: torch.device) -> None:
    world = World("scaled", torch.float32, device)
    with torch.no_grad():
        world.a[0, 0] = world.anchors[0][0, 0] + far / 20.0
    world.epilogue.arm()
    world.backward()
    _, pulls = world.own()
    for found, task, pull in zip(gradients(world), world.task(), pulls, strict=True):
        torch.testing.assert_close(found, task + pull, rtol=1e-3, atol=1e-3)


def test_what_an_epilogue_cannot_add_is_named(device: torch.device) -> None:
    world = World("l2", torch.float32, device)
    with pytest.raises(ValueError, match="term 'fisher', the epilogue has kl and l2"):
        world.epilogue.set_term(Term("fisher", 1.0, world.anchors, fisher=world.anchors))
    with pytest.raises(ValueError, match="1 anchors for 2 parameters"):
        world.epilogue.set_term(Term("l2", 1.0, world.anchors[:1]))
    assert world.epilogue.of(world.a, world.b) is None
    with pytest.raises(RuntimeError, match="set_term, arm and finish come before measure"):
        world.epilogue.measure()
    world.epilogue.set_term(world.term)
    for prepare in (lambda: None, world.epilogue.arm):
        prepare()
        with pytest.raises(RuntimeError, match="set_term, arm and finish come before measure"):
            world.epilogue.measure()


def trained(place: str, form: str, steps: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Factors after so many steps on batches of their own, the term joining at `place`, clipped."""
    world = World(form, dtype, device)
    parameters = [world.a, world.b]
    generator = torch.Generator().manual_seed(1)
    inside = ProxAdamW(parameters, lr=2e-3, weight_decay=0.01)
    if place == "optimiser":
        inside.set_term(world.term)
    else:
        world.epilogue.set_term(world.term if place == "epilogue" else None)
    for _ in range(steps):
        batch = torch.randn(M, K, generator=generator).to(device, dtype)
        for rows in (slice(0, M // 2), slice(M // 2, M)):  # two micro-batches
            if rows.stop == M and place == "epilogue":
                world.epilogue.arm()
            pulls = world.epilogue.of(*parameters)
            y = lora_linear(batch[rows], world.weight, None, *parameters, SCALE, pulls=pulls)
            ((y - world.dy[rows]).square().sum() / 50).backward()
        if place == "eager":
            lengths = torch.tensor([R * K, N * R], device=device)
            value, anchor = (torch.cat([t.detach().reshape(-1) for t in ts]) for ts in (parameters, world.anchors))
            _, pull = reference.proximal(world.term.kind, value, anchor, lengths, world.term.inverse_tau)
            for p, part in zip(parameters, (world.term.strength * pull).split(lengths.tolist()), strict=True):
                p.grad += part.view_as(p)  # type: ignore[operator]  # made by the backward pass
        if place == "epilogue":
            world.epilogue.finish()
        inside.measure(1.0)
        inside.step()
        inside.zero_grad(set_to_none=True)
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("steps", "kernels"), [(200, False), pytest.param(15, True, marks=pytest.mark.slow)])
def test_steps_are_the_same_in_every_place(
    steps: int, kernels: bool, form: str, device: torch.device, within_budget: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    start = World(form, torch.float64, device)
    truth, plain = (trained("eager", form, steps, dtype, device) for dtype in (torch.float64, torch.float32))
    assert (truth[0] - start.a.detach()).abs().max() > 5e-5 * steps  # something was learned
    if kernels:  # a GPU takes them without being asked
        by_kernels(monkeypatch)
    for place in ("optimiser", "epilogue"):
        found = trained(place, form, steps, torch.float32, device)
        for name, ours, exact, other in zip("ab", found, truth, plain, strict=True):
            within_budget(f"{place} {name}", ours, exact, other, exact.abs())
