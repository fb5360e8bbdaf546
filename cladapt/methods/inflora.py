"""InfLoRA: each block learns B alone, on an A that spans its own inputs outside those of earlier blocks.

    A_t      leading r eigenvectors of (I - V V^T) C_t (I - V V^T), times 1 / sqrt(3), fixed;   C_t = sum of x x^T
    W_t      W_0 + scale sum_{i<=t} B_i A_i,  i < t frozen;   so delta W V = 0                    (arXiv 2404.00228)
    V        grown after the block until it holds `energy` of C_t, of V and its complement the smaller one kept

C_t is taken by a pass over a share of the block's examples before it is learned, and V from one after it. Layers that
are given the same tensor share C_t and V; the released code adapts the keys and values of ViT, which do. Adapter t is
saved as one of rank r t.
Log: `inflora/protected` = mean share of the input side that V holds.
State: min(k, n - k) columns of 4 n bytes for each input, and the frozen factors, 4 bytes per adapter parameter and
earlier block.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from cladapt.methods._base import Context
from cladapt.methods._estimate import Gram, protect, refuse_larger_rank, start_outside
from cladapt.methods._history import WithHistory
from cladapt.methods._subspace import EnergySettings, Subspaces, most_protected_bytes, refuse_other_parameters
from cladapt.model.anchors import factor_pairs


class InfloraConfig(EnergySettings):
    """Options of InfLoRA."""

    sample: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the block's examples in the passes that see its inputs."""


class Inflora(WithHistory):
    """Fixed input directions for each block, outside those of the blocks before."""

    Config = InfloraConfig
    config: InfloraConfig
    recasts = True

    def __init__(self, config: InfloraConfig | None = None) -> None:
        super().__init__(config)
        self.subspaces = Subspaces()
        self._share = 0.0

    def check(self, ctx: Context) -> None:
        refuse_other_parameters(ctx, "inflora learns B on a fixed A")
        refuse_larger_rank(ctx)

    @torch.no_grad()
    def begin_block(self, ctx: Context) -> None:
        self.begin_fresh(ctx)
        start_outside(ctx, Gram.over(ctx, self.config.sample), self.subspaces)
        self._share = self.subspaces.share(ctx.inputs())

    @torch.no_grad()
    def edit_grads(self, ctx: Context) -> None:
        for down, _ in factor_pairs(ctx.parameters).values():
            down.grad = None  # neither a step nor decay

    def after_step(self, ctx: Context) -> None:
        ctx.log["inflora/protected"] = self._share

    @torch.no_grad()
    def end_block(self, ctx: Context) -> None:
        protect(
            self.subspaces, Gram.over(ctx, self.config.sample), ctx, self.config.energy_after(max(0, ctx.block - 1))
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **self.subspaces.state_dict()}

    def block_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return super().block_bytes(parameters) + most_protected_bytes(parameters)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.subspaces.load_state_dict(state)
        super().load_state_dict(state)
