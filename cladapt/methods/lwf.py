"""LwF: what the adapter before the block makes of the block's examples is learned with them (arXiv 1606.09282).

    L = CE + strength T^2 / N sum_i KL(softmax(z_i^before / T) || softmax(z_i / T))

z_i are the logits of a choice between things that may have been learned before: for an image the classes of earlier
blocks, for an item every code of its ID among its siblings in the catalogue. N counts the targets that CE is a mean
over, images or codes: a code without a sibling is one of them, and no choice. One more forward pass a step, without
gradients and without dropout. Block 1 has no adapter before it and is learned without the term. Re-derived: the paper
distils whole images' class probabilities; codes as choices are ours. Rows of a classifier belong to the adapter: those
of earlier classes learn by the term, as in the paper. A method that keeps earlier blocks as frozen factors and begins
each with its own comes first: `olora+lwf`.
Log: `lwf/term` = the term with its weight.
State: all that learns as it was before the block, 4 bytes per parameter.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cladapt.config import Settings
from cladapt.methods._base import Context, Method


class LwfConfig(Settings):
    """Options of LwF."""

    strength: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the term; 0 is plain fine-tuning, bit for bit."""
    temperature: Annotated[float, Field(ge=1e-3)] = 2.0
    """T: above 1, what was nearly as likely counts for more."""


class Lwf(Method):
    """Learning without forgetting: distillation from the adapter before the block."""

    Config = LwfConfig
    config: LwfConfig
    distils = True

    def __init__(self, config: LwfConfig | None = None) -> None:
        super().__init__(config)
        self.before: dict[str, Tensor] = {}

    @property
    def needs_outputs(self) -> bool:  # type: ignore[override]
        return self.config.strength > 0.0

    def begin_block(self, ctx: Context) -> None:
        self.before = {name: p.detach().clone() for name, p in ctx.learned.items()}

    def loss_terms(self, ctx: Context, batch: Any, out: Tensor) -> dict[str, Tensor]:
        if not self.config.strength or ctx.block == 1:
            return {}
        found, before = ctx.outputs(), ctx.outputs_with(self.before, batch)
        term = distillation(found.scores, before.scores, found.choice, self.config.temperature)
        return {"lwf/term": self.config.strength * term / max(1, ctx.targets)}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.before)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.before = dict(state)

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return 4 * sum(t.numel() for t in (self.before or parameters).values())


def distillation(scores: Tensor, target: Tensor, choice: Tensor, temperature: float) -> Tensor:
    """T^2 sum_i KL(softmax(target_i / T) || softmax(scores_i / T)) over choices: [e], [e], int64 [e] of 0 to n - 1.

    `target` has no gradient; 0 where there is no choice.
    """
    if not len(choice):
        return scores.sum() * 0.0
    count = int(choice[-1]) + 1
    ours, theirs = (_log_softmax(each / temperature, choice, count) for each in (scores, target.detach()))
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum()


def _log_softmax(scores: Tensor, choice: Tensor, count: int) -> Tensor:
    highest = scores.new_full((count,), -torch.inf).scatter_reduce(0, choice, scores.detach(), "amax")
    shifted = scores - highest[choice]
    return shifted - torch.zeros_like(highest).index_add(0, choice, shifted.exp()).log()[choice]
