"""Item-wise sharpness-aware training: the loss is flattened group by group in directions of their own, rare items most.

The paper (EISAM, 2026) was not available in text or code: this is re-derived from its abstract and from the methods it
builds on, Focal-SAM (one direction for all classes) and CC-SAM (a direction per class). For a target item i of
frequency f_i, with d_g the gradient of the losses of its group g in a micro-batch,

    J = mean_b [ l_b(theta) + strength w_i ( l_b(theta + eps_g) - l_b(theta) ) ],   eps_g = radius d_g / |d_g|

    weights  power      (f_i / median)^-exponent
             focal      (1 - f_i / sum)^exponent           nearly constant in a catalogue of thousands
             max_focal  (1 - f_i / max)^exponent
             tail       1 where f_i <= tail, else 0
             uniform    1
    groups   sample     the losses of an example: a history in one piece, or with `targets=exact` one target
             item       the losses of an item
             batch      all losses, in the direction sum_i w_i g_i

so that others are settings of it, with strength=1 and warmup=0: SAM has uniform weights and groups=batch, SAM by sample
groups=sample, Focal-SAM focal weights and groups=batch, ImbSAM weights=tail and groups=batch, LookSAM is SAM with
`refresh` above 1. `perturb=false` is J = mean_b w_i l_b, the weights alone, which tells what perturbing adds.

Weights but those of `tail` are scaled so that their mean over training events is 1, then cut at `largest`. Frequencies
are of training events of the stream up to the block, without those held out there, learned later or not; w of an
example is the mean over its targets. A step costs two passes, and one more backward where losses of several weights
share a history (groups of items, or a batch with weights, over packed histories). The default groups follow what was
measured (bench/LOG.md): with an example for each target they hardly differ from items, of which a batch has each about
once, and over packed histories they are nearer to it and cheaper.
State: none; with `refresh` one tensor of every factor.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cladapt.config import Settings
from cladapt.errors import ConfigError
from cladapt.methods._base import Context, Method
from cladapt.methods._sharpness import Groups, Sharpness
from cladapt.model.items import blocks_of


class EisamConfig(Settings):
    """Options of item-wise sharpness-aware training."""

    strength: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the perturbed loss, the plain one has the rest of 1; 0 is plain fine-tuning."""
    radius: Annotated[float, Field(gt=0.0)] = 0.05
    """Length of a perturbation, over all factors."""
    radius_exponent: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Rarer items are perturbed farther: radius_i = radius (f_i / mean)^-exponent; CC-SAM has 0.25."""
    weights: Literal["power", "focal", "max_focal", "tail", "uniform"] = "power"
    """How an item's weight falls with its training events f. `power`: f^-exponent; `focal`: (1 - f / sum)^exponent;
    `max_focal`: (1 - f / max)^exponent; `tail`: 1 up to `tail` events, else 0; `uniform`: 1."""
    exponent: Annotated[float, Field(ge=0.0)] = 0.5
    """Exponent of the weights `power`, `focal` and `max_focal`."""
    largest: Annotated[float, Field(gt=0.0)] = 5.0
    """No weight is above this."""
    tail: Annotated[int, Field(ge=1)] = 20
    """Items with at most so many training events are the tail."""
    groups: Groups = "sample"
    """Whose losses are perturbed in one direction: those of an `item`, of a `sample` (a history, or with targets=exact
    one target), or of the whole `batch`."""
    targets: Literal["packed", "exact"] = "packed"
    """`exact`: an example for each target. `packed`: targets share their history. There a history moves in one piece
    (groups=sample), or a token for the target that comes next (groups=item), and later targets see it so."""
    perturb: bool = True
    """Whether there is a second pass; without, losses are weighted, and options of perturbations refused."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of a block's steps before the first perturbed one."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Groups of the largest weights are perturbed until they hold this share of a batch's targets. Without dropout,
    rows that hold none of them are left out of the second pass."""
    layers: Annotated[int, Field(ge=0)] = 0
    """The last so many layers are perturbed; 0: all. Saves memory of gradients by group, hardly time."""
    refresh: Annotated[int, Field(ge=1)] = 1
    """A second pass at every so many steps; those between have one, and use again what the second changed."""

    @model_validator(mode="after")
    def _all_that_is_set_is_read(self) -> "EisamConfig":
        of_weights = {"exponent", "largest", "tail"}
        read = {"tail": {"tail"}, "uniform": set[str]()}.get(self.weights, {"exponent", "largest"})
        changed = self.changed()
        if unread := sorted(changed & of_weights - read):
            raise ValueError(f"weights={self.weights} does not read {', '.join(unread)}: leave it out")
        if not self.perturb and (unread := sorted(changed - of_weights - {"weights", "perturb"})):
            raise ValueError(f"perturb=false perturbs nothing and does not read {', '.join(unread)}: leave it out")
        return self


class Eisam(Method):
    """Item-wise sharpness-aware training."""

    Config = EisamConfig
    config: EisamConfig

    @property
    def flattens(self) -> bool:
        return self.config.strength > 0.0

    def check(self, ctx: Context) -> None:
        blocks = max(blocks_of(ctx.parameters).values(), default=-1) + 1
        if self.config.layers > blocks:
            raise ConfigError(
                f"eisam: layers={self.config.layers}, the base has {blocks} adapted ones",
                f"use 1 to {blocks}, or 0 for all",
            )

    def sharpness(self, ctx: Context) -> Sharpness | None:
        if not self.flattens:
            return None
        if ctx.frequency is None:
            raise ConfigError("eisam needs the items behind the targets", "train on a stream of items or classes")
        config, frequency = self.config, ctx.frequency.float()
        weight = item_weights(frequency, config.weights, config.exponent, config.tail, config.largest)
        mean = frequency[frequency > 0].mean()
        radius = config.radius * (frequency.clamp_min(1.0) / mean) ** -config.radius_exponent
        if not config.perturb:
            return Sharpness(weight, radius, perturbed=False)
        return Sharpness(
            weight * config.strength,
            radius,
            groups=config.groups,
            exact=config.targets == "exact",
            warmup=config.warmup,
            share=config.share,
            layers=config.layers,
            refresh=config.refresh,
        )


def item_weights(frequency: Tensor, family: str, exponent: float, tail: int, largest: float) -> Tensor:
    """Weights of items float32 [n] by their frequencies [n]; those never learned from have the weight of one event."""
    counts = frequency.double().clamp_min(1.0)
    seen = frequency > 0
    if family == "tail":
        return (counts <= tail).float()
    base = {
        "power": counts[seen].median() / counts,
        "focal": 1.0 - counts / frequency.sum(),
        "max_focal": 1.0 - counts / counts[seen].max(),
        "uniform": torch.ones_like(counts),
    }[family]
    share = (base / base[seen].max().clamp_min(torch.finfo(base.dtype).tiny)) ** exponent
    mean = (share * frequency)[seen].sum() / frequency.sum()
    return (share / mean.clamp_min(torch.finfo(share.dtype).tiny)).clamp_max(largest).float()
