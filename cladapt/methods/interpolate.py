"""Interpolation: after a block, the adapter is averaged with the one before it (a control in weight space).

    v_t <- (1 - w) v_{t-1} + w argmin CE(D_t)

The factors are averaged, not their products. Learning starts from v_{t-1}, so both ends share a basin.
State: the adapter before the block, 4 bytes per parameter.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from cladapt.config import Settings
from cladapt.methods._base import Context, Method


class InterpolateConfig(Settings):
    """Options of interpolation."""

    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the newly learned adapter in the average; 1 is plain fine-tuning."""


class Interpolate(Method):
    """Average of the adapter before and after a block."""

    Config = InterpolateConfig
    config: InterpolateConfig
    by_entry = True
    alters = True

    def __init__(self, config: InterpolateConfig | None = None) -> None:
        super().__init__(config)
        self.before: dict[str, Tensor] = {}

    def begin_block(self, ctx: Context) -> None:
        self.before = {name: p.detach().clone() for name, p in ctx.parameters.items()}

    @torch.no_grad()
    def end_block(self, ctx: Context) -> None:
        if self.config.weight < 1.0:
            for name, parameter in ctx.parameters.items():
                before = self.before[name].to(parameter.device)
                parameter.copy_(torch.lerp(before, parameter, self.config.weight))

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.before)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.before = dict(state)

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return 4 * sum(p.numel() for p in parameters.values())
