"""Frozen factors in the LoRA linear: ranks of the weight that see no dropout and get no gradient, by every route."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cladapt_kernels import reference
from cladapt_kernels.lora import linear as op
from cladapt_kernels.lora.linear import backward_by, forward_by, lora_linear, lora_linear_dequantised
from cladapt_kernels.lora.routes import Route

pytest.importorskip("triton", reason="the kernels are written in triton")

SCALE, FROZEN = 0.5, 6
Given = dict[str, Tensor]


def make(shape: tuple[int, int, int, int], dtype: torch.dtype, factors: torch.dtype, device: torch.device) -> Given:
    m, k, n, r = shape
    generator = torch.Generator().manual_seed(0)
    wide = {"x": (m, k), "weight": (n, k), "bias": (n,), "dy": (m, n)}
    low = {"a": (r, k), "b": (n, r), "frozen_a": (FROZEN, k), "frozen_b": (n, FROZEN)}
    drawn = {name: torch.randn(size, generator=generator).to(device) for name, size in (wide | low).items()}
    return {name: t.to(dtype if name in wide else factors) for name, t in drawn.items()}


def seed_on(device: torch.device) -> Tensor:
    return torch.tensor([2**40 + 12345], device=device)


def frozen_of(given: Given) -> tuple[Tensor, Tensor]:
    return given["frozen_a"], given["frozen_b"]


def truth(given: Given, p: float, dtype: torch.dtype, absolute: bool = False) -> tuple[Tensor, ...]:
    """Y, dX, dA and dB in `dtype`, each step rounded to it; of absolute values: what a sum's order may cost."""
    x, weight, bias, dy, a, b, first, second = (
        (t.abs() if absolute else t).to(dtype) for t in given.values()
    )  # fmt: skip
    keep = reference.keep_mask(seed_on(x.device), *x.shape, p) if p else None
    scale = SCALE / (1 - p)
    y = reference.lora_linear(x, weight, bias, a, b, scale, keep) + SCALE * (x @ first.T) @ second.T
    dx, da, db = reference.lora_linear_backward(dy, x, weight, a, b, scale, keep)
    return y, dx + SCALE * (dy @ second) @ first, da, db


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("impl", ["addmm", "seeded", "strip", "described"])
def test_every_implementation_is_as_near_to_float64_as_torch(
    impl: str, p: float, device: torch.device, dtypes: tuple[torch.dtype, ...], within_budget: Callable[..., None],
    poisoned: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    for dtype in dtypes:
        if device.type == "cpu" and (impl, dtype) in (("addmm", torch.float16), ("described", torch.float32)):
            continue
        given, scale = make((63, 72, 88, 5), dtype, torch.float32, device), SCALE / (1 - p)
        x, dy, seed, frozen = poisoned(given["x"]), poisoned(given["dy"]), seed_on(device), frozen_of(given)
        weight, a, b = given["weight"], given["a"], given["b"]
        y, s = forward_by(impl, x, weight, given["bias"], a, b, scale, p, seed, frozen)
        chosen = Route(impl, impl, "matmul" if impl == "addmm" else "skinny", "asked for")
        grads = backward_by(chosen, dy, x, weight, a, b, s, scale, p, seed, frozen=frozen)
        exact, sizes = truth(given, p, torch.float64), truth(given, p, torch.float64, absolute=True)
        for name, found, *others in zip(
            ("y", "dx", "da", "db"), (y, *grads), exact, truth(given, p, dtype), sizes, strict=True
        ):
            right, plain, size = others
            within_budget(f"{impl} {dtype} {name}", found, right, plain.to(found.dtype), size)


def trained(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    return given["x"].requires_grad_(), given["a"].requires_grad_(), given["b"].requires_grad_()


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("quantised", [False, True])
def test_they_pass_gradcheck_are_part_of_the_weight_and_are_traced(
    p: float, quantised: bool, device: torch.device
) -> None:
    given = make((6, 10, 12, 5), torch.float64, torch.float64, device)
    weight, bias, seed, frozen = given["weight"], given["bias"], seed_on(device), frozen_of(given)
    leaves = trained(given)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if quantised:
            return lora_linear_dequantised(x, lambda: weight, bias, a, b, SCALE, p, seed, frozen)
        return lora_linear(x, weight, bias, a, b, SCALE, p, seed, frozen)

    assert torch.autograd.gradcheck(run, leaves)
    x, a, b = leaves
    folded = weight + SCALE * frozen[1] @ frozen[0]
    expected = lora_linear(x, folded, bias, a, b, SCALE, p, seed)
    torch.testing.assert_close(run(*leaves), expected, rtol=1e-12, atol=1e-12)
    if quantised:
        return
    torch.library.opcheck(torch.ops.cladapt.lora_linear, (x, weight, bias, a, b, SCALE, p, seed, *frozen))
    traced = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (traced, run))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_the_route_is_that_of_all_ranks_and_chosen_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given, ranks = make((20, 24, 40, 4), torch.float32, torch.float32, device), []
    monkeypatch.setattr(op, "route", lambda *args: ranks.append(args[3]) or Route("addmm", "addmm", "matmul", ""))
    x, a, b = trained(given)
    lora_linear(x, given["weight"], None, a, b, SCALE, frozen=frozen_of(given)).sum().backward()
    assert ranks == [4 + FROZEN]  # the backward pass takes the forward pass's
