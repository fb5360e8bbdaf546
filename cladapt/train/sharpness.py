"""One micro-batch under a `Sharpness`: a pass with weighted losses, or two that leave the gradient of its J."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cladapt.errors import ConfigError
from cladapt.methods import Context, Method, Sharpness
from cladapt.model.items import ItemPasses, perturbed_layers
from cladapt.train.feeds import Batch
from cladapt.train.targets import Targets

LEAST = 1e-9
"""The least share of a loss in the first pass: at 0 neither its gradient nor the gradient's direction could be read."""

Pass = Callable[[Tensor, bool, Tensor | None], Tensor]
"""Forward and backward with a share [G] of each group's losses, the first pass or not: losses [n]. Layers keep the
gradient by group of that share, or of another one where it is given."""


@dataclass(frozen=True)
class Grouped:
    """The groups of a micro-batch."""

    of: Tensor
    """int64, below G: that of every token [R, S] or image [B]."""
    weight: Tensor
    """float32 [G]."""
    radius: Tensor
    """float32 [G]."""
    mixed: bool
    """Whether losses of different weights share tokens, as those of several targets after one history do."""

    def to(self, device: torch.device) -> "Grouped":
        """The same there."""
        return Grouped(self.of.to(device), self.weight.to(device), self.radius.to(device), self.mixed)


def grouped(policy: Sharpness, targets: Targets, batch: Batch) -> Grouped:
    """The groups that the policy makes of a batch, all on the CPU."""
    owner = targets.owner(batch)
    if policy.groups == "sample":
        key = targets.sample(batch)
    elif policy.groups == "batch":  # losses of one weight: their gradients' sums are weighted
        key = policy.weight[owner]
    else:
        key = owner
    values, of = key.unique(return_inverse=True)
    item, group = targets.of_losses(batch, owner), targets.of_losses(batch, of)
    count = torch.bincount(group, minlength=len(values))
    weight = _means(policy.weight[item], group, count)
    if policy.groups == "batch":
        radius = policy.radius[item].mean().expand_as(weight)
    else:
        radius = _means(policy.radius[item], group, count)
    weight = _largest(weight, count, policy.share)
    one = policy.groups == "sample"  # then an example has one weight
    mixed = not one and _differ(weight[group], targets.of_losses(batch, targets.sample(batch)))
    return Grouped(of, weight, radius, mixed)


def policy_of(method: Method, block: int, targets: Targets) -> Sharpness | None:
    """What a method will ask of the passes over a block with these targets, before anything is learned."""
    return method.sharpness(Context({}, block, frequency=targets.frequency))


def buffer_bytes(policy: Sharpness, targets: Targets, batch: Batch, model: nn.Module) -> int:
    """Bytes that steps with two passes keep, float32: gradients by group, groups times factors, and what is reused."""
    if not policy.perturbed:
        return 0
    reused = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad) if policy.refresh > 1 else 0
    layers = perturbed_layers(model, policy.layers).values()
    factors = sum(p.numel() for layer in layers for name, p in layer.named_parameters() if "lora_" in name)
    return 4 * (len(grouped(policy, targets, batch).weight) * factors + reused)


def _means(values: Tensor, group: Tensor, count: Tensor) -> Tensor:
    return torch.zeros(len(count)).index_add_(0, group, values) / count.clamp_min(1)


def _differ(values: Tensor, example: Tensor) -> bool:
    """Whether the values [n] of any example, int64 [n], are not all one."""
    start = torch.zeros(int(example.max()) + 1, dtype=values.dtype) if len(example) else values
    low, high = (start.scatter_reduce(0, example, values, how, include_self=False) for how in ("amin", "amax"))
    return bool((low != high).any())


def _largest(weight: Tensor, count: Tensor, share: float) -> Tensor:
    """The weights of the groups that come first by weight, until they have the share of all losses; zeros elsewhere."""
    order = weight.argsort(descending=True, stable=True)
    before = count[order].cumsum(0) - count[order]
    kept = order[before < share * count.sum()]
    return torch.zeros_like(weight).index_copy_(0, kept, weight[kept])


def two_passes(
    policy: Sharpness,
    groups: Grouped,
    model: nn.Module,
    passes: ItemPasses,
    run: Pass,
    reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Leave the gradient of the policy's J; the plain losses [n], and what perturbing adds to their sum.

        sum_b weight_g [l_b(theta + eps_g) - l_b(theta)]

    `passes` has the groups of the tokens at hand; `reduce` adds a tensor over the processes. Shares are of losses, so
    all that learns has its part of J; directions are those of the factors alone. The first pass has the share
    c = 1 - weight of each loss and keeps c_g d_g: their sum is the first part of the gradient, their directions are
    d_g's but for the sign. Where groups are `mixed`, a token carries losses of several shares, and directions take a
    backward of their own. Both passes draw the same masks; where none is drawn, the second leaves out what has no
    weight.
    """
    weight = groups.weight
    if not policy.perturbed:
        return run(weight, True, None), weight.new_zeros(())
    shared = policy.groups == "batch"
    share, kept = torch.where((1.0 - weight).abs() < LEAST, LEAST, 1.0 - weight), None
    if groups.mixed:
        share, kept = 1.0 - weight, weight if shared else torch.ones_like(weight)
    drawn = _generators(weight.device)
    with passes.inside(model):
        losses = run(share, True, kept)
        before = (weight[passes.of_losses] * losses).sum()
        if name := passes.missing(model):
            raise ConfigError(
                f"sharpness-aware training perturbs the factors of plain LoRA linears, {name} is none",
                "adapt plain linears, without 4-bit weights, with a method that learns their factors",
            )
        _set_kappa(shared, passes, groups, share if kept is None else kept, reduce)
        if _same(drawn, _generators(weight.device)):
            passes.leave_out(weight == 0)
        _restore(drawn)
        moved = run(weight, False, None)
        rise = (weight[passes.of_losses] * moved).sum() - before
    return losses, rise


def _set_kappa(
    shared: bool, passes: ItemPasses, groups: Grouped, share: Tensor, reduce: Callable[[Tensor], Tensor]
) -> None:
    """How far each group goes along what was kept of a `share` [G] of losses, or all along the one direction of all."""
    for kept in passes.kept:
        kept.gradients = reduce(kept.whole())
        if shared:
            scale = torch.ones_like(share) if groups.mixed else groups.weight / share
            own = torch.einsum("i,irw->rw", scale.to(kept.gradients.dtype), kept.gradients)
            kept.gradients = own.expand_as(kept.gradients)
    norm = torch.stack([kept.squares() for kept in passes.kept]).sum(0).sqrt()
    sign = torch.ones_like(norm) if shared else share.sign().double() * (groups.weight != 0)
    kappa = torch.where(norm > 0, groups.radius.double() * sign / norm, 0.0)
    for kept in passes.kept:
        kept.kappa = kappa.to(kept.whole().dtype)


class Reuse:
    """What second passes change in the gradient, used again until the next one (LookSAM, CVPR 2022, for J).

        v = dJ - g,   u = (v - <v, g> / <g, g> g) / |g|      at a step with two passes, g the gradient of plain losses
        g + |g| u                                            at the steps until the next

    for each tensor. LookSAM fixes the length of the second term by a constant; here it is what it was against |g|.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.plain: dict[str, Tensor] = {}
        """g of the step at hand, summed over its micro-batches."""
        self.tensors: dict[str, Tensor] = {}
        """u of the last step with two passes, by the parameter's name."""

    def due(self, step: int) -> bool:
        """Whether a step, counted from 0, has two passes."""
        return not self.tensors or step % self.every == 0

    def add_plain(self, grads: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's part of g."""
        for name, grad in grads.items():
            self.plain[name] = self.plain[name] + grad if name in self.plain else grad

    def keep(self, parameters: Mapping[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> None:
        """Take u from the gradients dJ that the parameters hold; `reduce` adds g over the processes."""
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            plain = reduce(self.plain[name])
            square = plain.square().sum()
            change = parameter.grad - plain
            change = change - (change * plain).sum() / square.clamp_min(torch.finfo(square.dtype).tiny) * plain
            self.tensors[name] = torch.where(square > 0, change / square.sqrt(), 0.0)
        self.plain = {}

    def apply(self, parameters: Mapping[str, Tensor]) -> None:
        """Add |g| u to the gradients g that the parameters hold."""
        for name, change in self.tensors.items():
            grad = parameters[name].grad
            if grad is not None:
                grad.add_(grad.norm() * change)


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _same(one: tuple[Tensor, Any], other: tuple[Tensor, Any]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _restore(states: tuple[Tensor, Any]) -> None:
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
