"""The launch of AdamW with a proximal term: against float64, statistics carried and taken, neighbours, staleness."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="the kernels are written in triton")

from cladapt_kernels import reference
from cladapt_kernels.optim import ProxAdamW, Term, fused_step
from cladapt_kernels.optim.fused_step import FusedStep

ODD, EVEN = (1, 63, 1000, 16384 + 5), (4, 64, 1000, 4096 + 8)
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.02}
KINDS = ("none", "literal", "scaled", "l2", "fisher")
Make = Callable[..., Tensor]


class World:
    """Tensors of one step, made by `make`, so that a test says what lies around them; gradients as given by `seed`."""

    def __init__(self, device: torch.device, make: Make, sizes: Sequence[int] = ODD) -> None:
        self.sizes, self.device, self.make = sizes, device, make
        self._generator = torch.Generator().manual_seed(0)
        self.anchors = self._drawn(0.02)
        self.values = [make((n,), torch.float32, device) for n in sizes]
        for value, anchor, step in zip(self.values, self.anchors, self._drawn(1e-3), strict=True):
            value.copy_(anchor + step)
        self.first, self.second = (self._zeros() for _ in range(2))
        self.fisher = [f.abs() for f in self._drawn(1.0)]
        self.taus = torch.linspace(20, 60, len(sizes), device=device)
        self.step = torch.zeros((), device=device)

    def _zeros(self) -> list[Tensor]:
        return [self.make((n,), torch.float32, self.device).zero_() for n in self.sizes]

    def _drawn(self, size: float) -> list[Tensor]:
        made = [self.make((n,), torch.float32, self.device) for n in self.sizes]
        return [t.copy_(size * torch.randn(t.shape, generator=self._generator)) for t in made]

    def grads(self, size: float = 1e-3) -> list[Tensor]:
        return self._drawn(size)

    def term(self, kind: str, strength: float | Tensor = 0.5, groups: Sequence[int] | None = None) -> Term | None:
        if kind == "none":
            return None
        if kind in ("literal", "scaled"):
            taus = None if kind == "literal" else self.taus[: None if groups is None else max(groups) + 1]
            return Term("kl", strength, self.anchors, taus, groups=groups)
        return Term(kind, strength, self.anchors, fisher=self.fisher if kind == "fisher" else None, groups=groups)

    def launch(self, fused: FusedStep, grads: list[Tensor], clip: Tensor | None = None) -> None:
        self.step.add_(1)
        fused.step(grads, self.first, self.second, self.step, **OPTIONS, clip=clip)


class Truth:
    """The same steps by `reference`, in any dtype."""

    def __init__(self, world: World, kind: str, dtype: torch.dtype, groups: Sequence[int] | None = None) -> None:
        self.kind, self.dtype, self.count = kind, dtype, 0
        of_each = [*range(len(world.sizes))] if groups is None else groups
        self.order = sorted(range(len(world.sizes)), key=lambda t: of_each[t])
        self.lengths = torch.tensor(
            [
                sum(n for n, g in zip(world.sizes, of_each, strict=True) if g == group)
                for group in range(max(of_each) + 1)
            ],
            device=world.device,
        )
        self.value, self.anchor, self.fisher = map(self.flat, (world.values, world.anchors, world.fisher))
        self.taus = world.taus[: len(self.lengths)].to(dtype) if kind == "scaled" else None
        self.first, self.second = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensors[index].reshape(-1) for index in self.order]).to(self.dtype)

    def penalty(self) -> tuple[Tensor, Tensor]:
        kind = "kl" if self.kind in ("literal", "scaled") else self.kind
        return reference.proximal(kind, self.value, self.anchor, self.lengths, self.taus, self.fisher)

    def step(self, grads: Sequence[Tensor], strength: float = 0.5, clip: float = 1.0) -> None:
        self.count += 1
        grad = self.flat(grads)
        if self.kind != "none":
            grad = grad + strength * self.penalty()[1]
        state = (self.value, clip * grad, self.first, self.second)
        self.value, self.first, self.second = reference.adamw(*state, self.count, **OPTIONS)


@pytest.mark.parametrize("sizes", [ODD[1:], EVEN])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_stay_within_the_budget_of_float32_and_touch_nothing_else(
    kind: str, sizes: tuple[int, ...], device: torch.device, guarded: Make, within_budget: Callable[..., None]
) -> None:
    world = World(device, guarded, sizes)
    fused = FusedStep(world.values, world.term(kind))
    fused.refresh(world.step)
    exact, rounded = Truth(world, kind, torch.float64), Truth(world, kind, torch.float32)
    for times in (2.0, 4.0, 4.0):  # from the second step on, what differs is also how the values were rounded before
        grads = world.grads(1e-6)  # so that the term is most of the step
        world.launch(fused, grads)
        exact.step(grads)
        rounded.step(grads)
        for name, found in (("value", world.values), ("first", world.first), ("second", world.second)):
            within_budget(name, torch.cat(found), getattr(exact, name), getattr(rounded, name), times=times)


@pytest.mark.parametrize("kind", ["literal", "scaled"])
def test_a_group_of_one_parameter_is_pulled_by_rounding_alone(kind: str, device: torch.device, guarded: Make) -> None:
    world = World(device, guarded, (1, 100, 1))
    fused = FusedStep(world.values, world.term(kind))
    fused.refresh(world.step)
    for _ in range(3):
        before = [first.clone() for first in world.first]
        away = [(v - a).abs() for v, a in zip(world.values, world.anchors, strict=True)]
        world.launch(fused, [torch.zeros_like(value) for value in world.values])
        for i in (0, 2):
            # its softmax is 1 wherever it is: the gradient strength (d - d) / tau is a difference of equals, of which
            # either is rounded by a few units in the last place of d <= |v - a| / tau
            inverse_tau = 1.0 if kind == "literal" else world.taus[i].item()
            pull = (world.first[i].double() - 0.9 * before[i].double()) / 0.1
            limit = 0.5 * inverse_tau * 8 * torch.finfo(torch.float32).eps * (away[i].item() + 1e-3) * inverse_tau
            assert pull.abs().item() <= limit


@pytest.mark.parametrize("kind", ["literal", "scaled", "l2", "fisher"])
@pytest.mark.parametrize(("fold", "groups"), [(4, None), (fused_step.FOLD, (0, 1, 0, 1))])
def test_carried_statistics_are_those_taken_anew_and_give_the_term(
    kind: str, fold: int, groups: tuple[int, ...] | None, device: torch.device, guarded: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fused_step, "FOLD", fold)
    world = World(device, guarded)
    fused = FusedStep(world.values, world.term(kind, groups=groups))
    fused.refresh(world.step)
    for _ in range(3):
        world.launch(fused, world.grads())
    carried = fused.value(world.step)
    (s0, s1, s2, _), centre = fused.statistics(world.step)[0].unbind(1), fused.statistics(world.step)[1]
    mean = centre + (s0 + s2) / (1 + s0 + s1)
    fused.refresh(world.step)
    torch.testing.assert_close(fused.value(world.step), carried, rtol=1e-4, atol=1e-10)
    (s0, s1, s2, _), centre = fused.statistics(world.step)[0].unbind(1), fused.statistics(world.step)[1]
    torch.testing.assert_close(centre + (s0 + s2) / (1 + s0 + s1), mean, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(carried, Truth(world, kind, torch.float64, groups).penalty()[0], rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("far", [10.0, 100.0, 1000.0])
def test_a_parameter_far_from_its_anchor_has_the_gradient_of_float64(far: float, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, tau = (3000, 5000), 1e-3
    anchors = [(tau * torch.randn(n, generator=generator)).to(device) for n in sizes]
    values = [a.clone() for a in anchors]
    values[0][17] += far * tau  # one group leaps, in the second of its chunks too
    values[0][2900] += 0.99 * far * tau
    values[1] += 0.1 * tau * torch.randn(sizes[1], generator=generator).to(device)
    inverse_tau, count = torch.full((2,), 1 / tau, device=device), torch.zeros((), device=device)
    fused = FusedStep(values, Term("kl", 0.5, anchors, inverse_tau))
    first, second, grads = ([torch.zeros_like(v) for v in values] for _ in range(3))
    fused.refresh(count)
    for turn in range(2):  # with the statistics that refresh took, then with those of a step
        before = [m.double() for m in first]
        exact = [torch.softmax(v.double() / tau, 0) for v in values]
        gaps = [(v.double() - a.double()) / tau for v, a in zip(values, anchors, strict=True)]
        logs = [torch.log_softmax(v.double() / tau, 0) - torch.log_softmax(a.double() / tau, 0)
                for v, a in zip(values, anchors, strict=True)]  # fmt: skip
        penalty = torch.stack([(p * log).sum() for p, log in zip(exact, logs, strict=True)])
        torch.testing.assert_close(fused.value(count), penalty, rtol=1e-4, atol=1e-7)
        count += 1
        fused.step(grads, first, second, count, 1e-6, (0.9, 0.99))
        for p, gap, old, moment in zip(exact, gaps, before, first, strict=True):
            pull = 0.5 / tau * p * (gap - (p * gap).sum())
            found = (moment.double() - 0.9 * old) / 0.1
            assert found.isfinite().all()
            assert (found - pull).abs().max() < 1e-4 * pull.abs().max() + 1e-6 * 0.5 / tau * far, turn


@pytest.mark.parametrize("kind", ["literal", "scaled", "l2", "fisher"])
def test_figures_before_a_step_equal_float64(kind: str, device: torch.device, guarded: Make) -> None:
    world = World(device, guarded)
    fused = FusedStep(world.values, world.term(kind))
    fused.refresh(world.step)
    for _ in range(2):
        world.launch(fused, world.grads())
    grads = world.grads()
    truth = Truth(world, kind, torch.float64)
    task, pull, away = truth.flat(grads), 0.5 * truth.penalty()[1], truth.value - truth.anchor
    found = fused.measure(grads, world.step)
    expected = torch.stack([(task + pull) @ (task + pull), task @ task, pull @ pull, task @ pull, away @ away])
    size = expected.abs()
    size[3] = task.norm() * pull.norm()
    assert ((found - expected).abs() < 1e-4 * size).all()


def test_rate_strength_and_clip_are_read_from_the_device(device: torch.device, guarded: Make) -> None:
    world, strength = World(device, guarded), torch.tensor(0.0, device=device)
    fused = FusedStep(world.values, world.term("l2", strength))
    fused.refresh(world.step)
    truth = Truth(world, "l2", torch.float64)
    clip, rate = torch.ones((), device=device), torch.tensor(OPTIONS["lr"], device=device)
    for new_strength, new_clip in ((0.5, 1.0), (3.0, 0.25)):
        strength.fill_(new_strength)
        clip.fill_(new_clip)
        grads = world.grads()
        world.step.add_(1)
        fused.step(grads, world.first, world.second, world.step, **{**OPTIONS, "lr": rate}, clip=clip)
        truth.step(grads, new_strength, new_clip)
    torch.testing.assert_close(torch.cat(world.values).double(), truth.value, rtol=1e-5, atol=1e-7)


def test_a_rate_and_a_clip_on_the_cpu_are_brought_to_the_device(device: torch.device, guarded: Make) -> None:
    ended = []
    for rate, clip in ((1e-3, None), (torch.tensor(1e-3), torch.tensor(1.0)), (torch.tensor(1e-3).double(), None)):
        world = World(device, guarded)
        fused, grads = FusedStep(world.values), world.grads()
        # a kernel reads addresses: this one, and as float32
        assert fused._scalar(rate).device.type == device.type
        assert fused._scalar(rate).dtype == torch.float32
        world.step.add_(1)
        fused.step(grads, world.first, world.second, world.step, **{**OPTIONS, "lr": rate}, clip=clip)
        ended.append(torch.cat(world.values))
    assert torch.equal(ended[0], ended[1])
    assert torch.equal(ended[0], ended[2])


def test_strength_zero_is_no_term_and_two_runs_are_equal_bit_for_bit(device: torch.device, guarded: Make) -> None:
    ended = []
    for kind in ("none", "none", "scaled", "fisher"):
        world = World(device, guarded)
        fused = FusedStep(world.values, world.term(kind, 0.0))
        fused.refresh(world.step)
        for _ in range(2):
            world.launch(fused, world.grads())
        ended.append(torch.cat([*world.values, *world.first, *world.second]))
    assert all(torch.equal(ended[0], other) for other in ended[1:])


@pytest.mark.parametrize("sizes", [ODD, EVEN])
def test_copies_are_the_values_rounded(
    sizes: tuple[int, ...], device: torch.device, guarded: Make, dtypes: tuple[torch.dtype, ...]
) -> None:
    for dtype in dtypes[1:]:
        world = World(device, guarded, sizes)
        copies = [guarded((n,), dtype, device) for n in sizes]
        fused = FusedStep(world.values, world.term("l2"), copies)
        fused.refresh(world.step)
        world.launch(fused, world.grads())
        assert all(torch.equal(c, v.to(dtype)) for c, v in zip(copies, world.values, strict=True))


def test_tensors_that_start_anywhere_are_stepped_alike(device: torch.device, guarded: Make) -> None:
    def shifted(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return guarded((shape[0] + 1,), dtype, device)[1:]

    ended = []
    for make in (guarded, shifted):
        world = World(device, make, EVEN)
        fused = FusedStep(world.values, world.term("literal"))
        fused.refresh(world.step)
        world.launch(fused, world.grads())
        ended.append(torch.cat(world.values))
    torch.testing.assert_close(ended[0], ended[1], rtol=0, atol=1e-8)


def test_a_changed_parameter_is_an_error_until_the_statistics_are_taken(device: torch.device, guarded: Make) -> None:
    world = World(device, guarded)
    fused = FusedStep(world.values, world.term("scaled"))
    with pytest.raises(RuntimeError, match="never taken: call refresh first"):
        world.launch(fused, world.grads())
    world.step.zero_()
    fused.refresh(world.step)
    world.launch(fused, world.grads())
    world.values[2].mul_(1.01)
    for use in (lambda: fused.measure(world.grads(), world.step), lambda: fused.value(world.step)):
        with pytest.raises(RuntimeError, match="parameter 2 changed since the term's statistics were taken: call ref"):
            use()
    fused.refresh(world.step)
    truth = Truth(world, "scaled", torch.float64)
    torch.testing.assert_close(fused.value(world.step), truth.penalty()[0], rtol=1e-4, atol=1e-12)
    world.launch(fused, world.grads())


def test_a_launch_is_a_change_that_autograd_sees(device: torch.device, guarded: Make) -> None:
    world = World(device, guarded)
    fused, before = FusedStep(world.values), [t._version for t in (*world.values, *world.first)]
    world.launch(fused, world.grads())
    assert all(t._version > v for t, v in zip((*world.values, *world.first), before, strict=True))


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    ones = [torch.ones(4, device=device), torch.ones(6, device=device)]
    fused, step = FusedStep(ones), torch.ones((), device=device)
    elsewhere = [ones[0], torch.ones(6, device="meta")]
    for grads, message in (
        (ones[:1], "1 grads for 2 parameters"),
        (elsewhere, r"grads\[1\] is on meta, expected"),
        ([ones[0], ones[1].double()], r"grads\[1\] is torch.float64 \(6,\), expected contiguous torch.float32 \(6,\)"),
        ([ones[0], ones[0]], r"grads\[1\] is torch.float32 \(4,\)"),
        ([ones[0], torch.ones(12, device=device)[::2]], r"grads\[1\] is torch.float32 \(6,\), not contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            fused.step(grads, ones, ones, step, 1e-3)
    with pytest.raises(ValueError, match="term 'ridge', expected one of kl, l2, fisher"):
        FusedStep(ones, Term("ridge", 1.0, ones))
    with pytest.raises(ValueError, match=r"parameters\[1\] is on meta"):
        FusedStep(elsewhere)
    with pytest.raises(ValueError, match=r"copies are torch.float64, expected bfloat16 or float16"):
        FusedStep(ones, copies=[t.double() for t in ones])
    with pytest.raises(ValueError, match="no parameters to step"):
        FusedStep([])
    with pytest.raises(ValueError, match="measure needs a term"):
        fused.measure(ones, step)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """ProxAdamW takes the launch on any device."""
    monkeypatch.setattr(ProxAdamW, "_why_torch", lambda *_: "")
    ordinary = ProxAdamW._launcher

    def launcher(optimizer: ProxAdamW, parameters: list[Tensor]) -> FusedStep | None:
        optimizer._moments(parameters)
        return ordinary(optimizer, parameters)

    monkeypatch.setattr(ProxAdamW, "_launcher", launcher)


def optimizer_of(world: World, kind: str) -> tuple[ProxAdamW, list[nn.Parameter]]:
    parameters = [nn.Parameter(value) for value in world.values]
    optimizer = ProxAdamW(parameters, **OPTIONS)
    optimizer.set_term(world.term(kind))
    return optimizer, parameters


def run(optimizer: ProxAdamW, parameters: list[nn.Parameter], given: Sequence[list[Tensor]]) -> list[Tensor]:
    figures = []
    for grads in given:
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        figures.append(torch.stack([f.double() for f in optimizer.measure(max_norm=0.05)]))
        optimizer.step()
    return figures


@pytest.mark.parametrize("kind", ["scaled", "l2", "fisher"])
def test_the_optimizer_launches_what_torch_computes(
    kind: str, device: torch.device, guarded: Make, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    worlds = [World(device, guarded) for _ in range(2)]
    given = [worlds[0].grads() for _ in range(3)]
    monkeypatch.setattr(ProxAdamW, "_why_torch", lambda *_: "asked for")
    optimizer, theirs = optimizer_of(worlds[0], kind)
    expected = run(optimizer, theirs, given)
    assert optimizer.route == "torch: asked for"
    request.getfixturevalue("launched")
    optimizer, ours = optimizer_of(worlds[1], kind)
    found = run(optimizer, ours, given)
    assert optimizer.route == "triton: one launch"
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-3, atol=1e-9)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * OPTIONS["lr"])


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("kind", ["scaled", "l2"])
def test_a_state_saved_at_a_refresh_continues_bit_for_bit(kind: str, device: torch.device, guarded: Make) -> None:
    straight, broken = World(device, guarded), World(device, guarded)
    given = [straight.grads() for _ in range(4)]
    optimizer, expected = optimizer_of(straight, kind)
    run(optimizer, expected, given[:2])
    optimizer.refresh()  # statistics taken anew are those that whoever resumes will have
    run(optimizer, expected, given[2:])
    optimizer, parameters = optimizer_of(broken, kind)
    run(optimizer, parameters, given[:2])
    again, resumed = optimizer_of(broken, kind)
    again.load_state_dict(optimizer.state_dict())
    run(again, resumed, given[2:])
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))


@pytest.mark.usefixtures("launched")
def test_the_optimizer_tells_of_a_change_and_refresh_mends_it(device: torch.device, guarded: Make) -> None:
    world = World(device, guarded)
    optimizer, parameters = optimizer_of(world, "scaled")
    run(optimizer, parameters, [world.grads()])
    assert not optimizer.stale
    with torch.no_grad():
        parameters[3].mul_(0.99)
    with pytest.raises(RuntimeError, match="parameter 3 changed since the term's statistics were taken"):
        optimizer.step()
    assert optimizer.stale
    optimizer.refresh()
    assert not optimizer.stale
    optimizer.step()
    assert optimizer.state[parameters[0]]["step"].item() == 2  # what failed is not counted


def test_aligned_tensors_are_read_and_written_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import json, re, triton
from triton.backends.compiler import GPUTarget
from cladapt_kernels.aot import compile as aot
from cladapt_kernels.aot.variants import VARIANTS

told = {}
for variant in VARIANTS:
    if variant.name in ("adamw, kl", "adamw, kl, odd sizes"):
        with aot.recorded() as launches:
            variant.call()
        (launch,) = launches
        target = GPUTarget("cuda", 90, 32)
        ptx = triton.compile(aot._source(launch), target=target, options=launch.options).asm["ptx"]
        told[variant.name] = [len(re.findall(kind + r"[.]global[.]v4", ptx)) for kind in ("ld", "st")]
print(json.dumps(told))
""",
        encoding="utf-8",
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "kernels")}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # 2048 entries by 256 threads are two loads each: of five tensors read, and of three written
    assert json.loads(done.stdout) == {"adamw, kl": [10, 6], "adamw, kl, odd sizes": [0, 0]}


def test_steps_and_figures_are_launched_on_the_device_of_their_tensors(
    device: torch.device, guarded: Make, launched_inside: list[str]
) -> None:
    # triton launches on the current device, which with several GPUs may be another
    world = World(device, guarded)
    fused, grads = FusedStep(world.values, world.term("l2")), world.grads()
    fused.refresh(world.step)
    fused.measure(grads, world.step)
    fused.add(grads, world.step)
    world.launch(fused, grads)
    assert {*launched_inside} == {"_refresh", "_measure", "_add", "_step"}


def test_a_step_is_given_no_address_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    class Launcher:
        def __getitem__(self, _: tuple[int]) -> Callable[..., None]:
            return lambda *args, **more: given.extend(
                value for value in (*args, *more.values()) if isinstance(value, Tensor)
            )

    # meta stands for a device that is not the CPU
    values, grads, first, second = ([torch.empty(64, device="meta")] for _ in range(4))
    monkeypatch.setattr(fused_step, "_step", Launcher())
    on_cpu = torch.tensor(1e-3), torch.tensor(1.0)
    FusedStep(values).step(grads, first, second, torch.empty((), device="meta"), on_cpu[0], clip=on_cpu[1])
    assert len(given) >= 9
    assert {tensor.device.type for tensor in given} == {"meta"}
