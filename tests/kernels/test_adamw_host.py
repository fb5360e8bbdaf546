"""What the host does for a launch of AdamW: states from outside, steps counted at once, no wait for the device."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="the kernels are written in triton")

from cladapt_kernels.optim import ProxAdamW, Term, fused_step
from cladapt_kernels.optim import optimizer as optimizer_module
from cladapt_kernels.optim.fused_step import FusedStep

SIZES = (4, 64, 30)
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.02}


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """ProxAdamW takes the launch on any device."""
    monkeypatch.setattr(optimizer_module, "launch_obstacle", lambda *_: "")


def world(device: torch.device) -> tuple[list[nn.Parameter], ProxAdamW]:
    generator = torch.Generator().manual_seed(0)
    anchors = [(0.02 * torch.randn(n, generator=generator)).to(device) for n in SIZES]
    parameters = [nn.Parameter(1.01 * anchor) for anchor in anchors]
    optimizer = ProxAdamW(parameters, **OPTIONS)
    optimizer.set_term(Term("l2", 0.5, anchors))
    return parameters, optimizer


def run(optimizer: ProxAdamW, parameters: Sequence[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = (1e-3 * torch.randn(p.shape, generator=generator)).to(p.device)
        optimizer.measure(0.05)
        optimizer.step()
        assert optimizer.route == "triton: one launch"


def test_states_given_from_outside_are_continued(device: torch.device) -> None:
    (expected, straight), (parameters, optimizer) = world(device), world(device)
    run(straight, expected, range(4))
    run(optimizer, parameters, range(1))
    stale = [*optimizer.state.values()]
    for p, state in [*optimizer.state.items()]:
        optimizer.state[p] = {name: value.clone() for name, value in state.items()}
    run(optimizer, parameters, range(1, 4))
    for a, b in zip(parameters, expected, strict=True):
        assert torch.equal(a, b)  # the pull of L2 is v - a, whatever the statistics
    assert [float(optimizer.state[p]["step"]) for p in parameters] == [4.0] * len(SIZES)
    assert [float(state["step"]) for state in stale] == [1.0] * len(SIZES)


def test_a_launch_counts_all_steps_at_once(device: torch.device) -> None:
    parameters, optimizer = world(device)
    run(optimizer, parameters, range(2))
    states = [optimizer.state[p] for p in parameters]
    assert [state["step"].tolist() for state in states] == [2.0] * len(SIZES)
    assert len({state["step"].untyped_storage().data_ptr() for state in states}) == 1
    assert {name for state in states for name in state} == {"step", "exp_avg", "exp_avg_sq"}


def test_a_group_added_between_measure_and_step_is_an_error(device: torch.device) -> None:
    parameters, optimizer = world(device)
    run(optimizer, parameters, range(1))
    optimizer.measure()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, device=device))]})
    with pytest.raises(RuntimeError, match="changed since measure: measure again before the step"):
        optimizer.step()


def test_nothing_that_a_step_does_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Launcher:
        def __getitem__(self, _: tuple[int]) -> Callable[..., None]:
            return lambda **_: None

    for name in ("_step", "_measure", "_refresh"):
        monkeypatch.setattr(fused_step, name, Launcher())

    def made() -> list[Tensor]:
        return [torch.empty(64, device="meta")]  # which has nothing to read: whoever asks for a number raises

    values, anchors, first, second, step = made(), made(), made(), made(), torch.empty((), device="meta")
    fused = FusedStep(values, Term("l2", 0.5, anchors))
    fused.refresh(step)
    for _ in range(2):
        grads = made()
        assert fused.measure(grads, step).shape == (5,)
        assert fused.value(step).shape == (1,)
        fused.step(grads, first, second, step, 1e-3)
