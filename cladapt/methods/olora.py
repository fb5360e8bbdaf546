"""O-LoRA: each block has factors of its own, whose A is pushed to be orthogonal to those of earlier blocks.

    W_t = W_0 + scale sum_{i<=t} B_i A_i,   i < t frozen;   A_t, B_t start fresh          (arXiv 2310.14152)
    L = CE + orthogonality sum_{i<t} sum |A_i A_t^T| + decay sum ||.||_2 over A_t and B_t

The constraint is soft, and on the input side alone. The adapter of block t is saved as one of rank r t.
Log: `olora/term` = both terms.
State: the frozen factors, 4 bytes per adapter parameter and earlier block.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from cladapt.config import Settings
from cladapt.methods._base import Context
from cladapt.methods._history import WithHistory
from cladapt.model.anchors import is_up


class OloraConfig(Settings):
    """Options of O-LoRA."""

    orthogonality: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the overlap with earlier blocks; 0 leaves a sum of independent adapters."""
    decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the norms of the block's own factors."""


class Olora(WithHistory):
    """A sum of earlier adapters and a current one, kept apart by a penalty."""

    Config = OloraConfig
    config: OloraConfig
    recasts = True

    def begin_block(self, ctx: Context) -> None:
        self.begin_fresh(ctx)

    def loss_terms(self, ctx: Context, batch: Any, out: Tensor) -> dict[str, Tensor]:
        overlap = [
            torch.mm(self.frozen[name].to(p.device), p.mT).abs().sum()
            for name, p in ctx.parameters.items()
            if name in self.frozen and not is_up(name)
        ]
        terms = self.config.orthogonality * sum(overlap, out.new_zeros(()))
        if self.config.decay > 0:
            terms = terms + self.config.decay * sum(torch.linalg.vector_norm(p) for p in ctx.parameters.values())
        return {"olora/term": terms}
