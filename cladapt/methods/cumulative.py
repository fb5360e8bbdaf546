"""SumLoRA: each block has factors of its own, and the earlier ones stay in the model, frozen (arXiv 2510.25093, 4.1).

    W_t = W_0 + s (sum_i Bhat_i Ahat_i + B_t A_t),   Ahat = A / ||A||_F,  Bhat = B / ||B||_F,   s the adapter's scale
    keep=all      i = every earlier block          keep=latest   i = t-1 alone
    inherit       A_t, B_t start where block t-1 ended; otherwise fresh (B = 0)

The adapter of block t is saved as one of rank r (1 + number of i).
State: the frozen factors, 4 bytes per adapter parameter and kept block.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cladapt.config import Settings
from cladapt.methods._base import Context
from cladapt.methods._history import WithHistory
from cladapt.model.anchors import is_learned, joined, unit


class CumulativeConfig(Settings):
    """Options of SumLoRA."""

    keep: Literal["all", "latest"] = "all"
    """Which earlier blocks stay in the model."""
    inherit: bool = True
    """Whether a block's factors start from those of the block before."""


class Cumulative(WithHistory):
    """A sum of normalised earlier adapters and the current one."""

    Config = CumulativeConfig
    config: CumulativeConfig
    restarts = True

    @property
    def recasts(self) -> bool:  # type: ignore[override]
        return not self.config.inherit

    @torch.no_grad()
    def begin_block(self, ctx: Context) -> None:
        last = {name: p.detach().clone() for name, p in ctx.parameters.items()}
        if is_learned(last):
            self.frozen = self._with(last)
            if not self.config.inherit:
                for name, parameter in ctx.parameters.items():
                    parameter.copy_(ctx.initial[name])
        self.install(ctx)

    def _with(self, last: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The frozen factors once block t-1, whose factors are `last`, is among them."""
        return joined({} if self.config.keep == "latest" else self.frozen, unit(last))
