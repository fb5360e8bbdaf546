"""Item-wise sharpness-aware training: every item's loss is flattened in a direction of its own, rare items most.

The paper (EISAM, 2026) was not available in text or code: this is re-derived from its abstract and from the methods it
builds on, Focal-SAM (one direction for all classes) and CC-SAM (a direction per class). For a target item i of
frequency f_i, with g_i the gradient of its losses in a micro-batch,

    J = mean_b [ l_b(theta) + strength w_i ( l_b(theta + eps_i) - l_b(theta) ) ],   eps_i = radius_i g_i / |g_i|

    weights   power       (f_i / median)^-exponent
              focal       (1 - f_i / sum)^exponent                nearly constant in a catalogue of thousands
              max_focal   (1 - f_i / max)^exponent
              tail        1 where f_i <= tail, else 0             ImbSAM
              uniform     1
    direction item        g_i of each item                       with uniform weights: SAM by sample
              shared      sum_i w_i g_i for all                  Focal-SAM; with uniform weights: SAM
    perturb   false       J = mean_b w_i l_b: the weights alone, the control that tells what perturbing adds

Weights but those of `tail` are scaled so that their mean over training events is 1, and at most `largest`. Frequencies
are of training events of the stream up to the block. A step costs two passes.
State: none.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from cladapt.config import Settings
from cladapt.errors import ConfigError
from cladapt.methods._base import Context, Method
from cladapt.methods._sharpness import Sharpness


class EisamConfig(Settings):
    """Options of item-wise sharpness-aware training."""

    strength: Annotated[float, Field(ge=0.0)] = 0.5
    """Share of the perturbed loss; 0 is plain fine-tuning."""
    radius: Annotated[float, Field(gt=0.0)] = 0.05
    """Length of a perturbation, over all factors."""
    radius_exponent: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Rarer items are perturbed farther: radius_i = radius (f_i / mean)^-exponent; CC-SAM has 0.25."""
    weights: Literal["power", "focal", "max_focal", "tail", "uniform"] = "power"
    """How an item's share depends on its frequency."""
    exponent: Annotated[float, Field(ge=0.0)] = 0.5
    """Of the weights `power`, `focal` and `max_focal`."""
    largest: Annotated[float, Field(gt=0.0)] = 5.0
    """No weight is above this."""
    tail: Annotated[int, Field(ge=0)] = 20
    """Items with at most so many training events are the tail."""
    direction: Literal["item", "shared"] = "item"
    """A perturbation for each item, or one for all."""
    targets: Literal["packed", "exact"] = "packed"
    """`exact`: an example for each target. `packed`: targets share their history, whose tokens are moved for the target
    that comes next; the perturbation that a later target sees through them is another item's."""
    perturb: bool = True
    """Whether there is a second pass; without, losses are weighted only."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of a block's steps before the first perturbed one."""


class Eisam(Method):
    """Item-wise sharpness-aware training."""

    Config = EisamConfig
    config: EisamConfig

    @property
    def flattens(self) -> bool:
        return self.config.strength > 0.0

    def sharpness(self, ctx: Context) -> Sharpness | None:
        if not self.flattens:
            return None
        if ctx.frequency is None:
            raise ConfigError("eisam needs the items behind the targets", "train on a stream of items or classes")
        config, frequency = self.config, ctx.frequency.float()
        weight = item_weights(frequency, config.weights, config.exponent, config.tail, config.largest)
        mean = frequency[frequency > 0].mean()
        radius = config.radius * (frequency.clamp_min(1.0) / mean) ** -config.radius_exponent
        return Sharpness(
            weight * config.strength if config.perturb else weight,
            radius,
            shared=config.direction == "shared",
            perturbed=config.perturb,
            exact=config.perturb and config.targets == "exact",
            warmup=config.warmup if config.perturb else 0.0,
        )


def item_weights(frequency: Tensor, family: str, exponent: float, tail: int, largest: float) -> Tensor:
    """Weights of items float32 [n] by their frequencies [n]; those never learned from have the weight of one event."""
    counts = frequency.float().clamp_min(1.0)
    seen = frequency > 0
    if family == "tail":
        return (counts <= tail).float()
    share = {
        "power": (counts / counts[seen].median()) ** -exponent,
        "focal": (1.0 - counts / frequency.sum()) ** exponent,
        "max_focal": (1.0 - counts / counts[seen].max()) ** exponent,
        "uniform": torch.ones_like(counts),
    }[family]
    mean = (share * frequency).sum() / frequency.sum()
    return (share / mean.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(largest)
