"""One micro-batch under a `Sharpness`: a pass with weighted losses, or two that leave the gradient of its J."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cladapt.errors import ConfigError
from cladapt.methods import Sharpness
from cladapt.model.items import ItemPasses

LEAST = 1e-9
"""The least share of a loss in the first pass: at 0 neither its gradient nor the gradient's direction could be read."""

Pass = Callable[[Tensor, bool, bool], Tensor]
"""Forward and backward with the share [G] of each item's losses, the first pass or not, the last or not: losses [n]."""


def by_item(
    policy: Sharpness,
    items: Tensor,
    model: nn.Module,
    passes: ItemPasses,
    run: Pass,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Leave the gradient of the policy's J, and give the plain losses [n].

    `items` int64 [G]: those of `passes`; `reduce` adds a tensor over the processes. Shares are of losses, so all that
    learns has its part of J; directions are those of the factors alone. The first pass has the share c = 1 - weight of
    each loss and keeps c_i g_i: their sum is the first part of the gradient, their directions are g_i's but for the
    sign. Both passes draw the same masks.
    """
    weight = policy.weight[items]
    if not policy.perturbed:
        return run(weight, True, True)
    first = torch.where((1.0 - weight).abs() < LEAST, LEAST, 1.0 - weight)
    generators = _generators(weight.device)
    with passes.inside(model):
        losses = run(first, True, False)
        if name := passes.missing(model):
            raise ConfigError(
                f"sharpness-aware training perturbs the factors of plain LoRA linears, {name} is none",
                "adapt plain linears, without 4-bit weights, with a method that learns their factors",
            )
        _set_kappa(policy, passes, weight, first, policy.radius[items], reduce)
        _restore(generators)
        run(weight, False, True)
    return losses


def _set_kappa(
    policy: Sharpness,
    passes: ItemPasses,
    weight: Tensor,
    first: Tensor,
    radius: Tensor,
    reduce: Callable[[Tensor], Tensor],
) -> None:
    """How far each item goes along what the first pass has kept; a shared direction becomes that of every item."""
    for kept in passes.kept:
        kept.gradients = reduce(kept.whole())
        if policy.shared:
            own = torch.einsum("i,irw->rw", (weight / first).to(kept.gradients.dtype), kept.gradients)
            kept.gradients = own.expand_as(kept.gradients)
    norm = torch.stack([kept.squares() for kept in passes.kept]).sum(0).sqrt()
    sign = torch.ones_like(norm) if policy.shared else first.sign().double()
    kappa = torch.where(norm > 0, radius.double() * sign / norm, 0.0)
    for kept in passes.kept:
        kept.kappa = kappa.to(kept.whole().dtype)


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(states: tuple[Tensor, Any]) -> None:
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
