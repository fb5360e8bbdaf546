"""Retraining: at every block a fresh adapter on all data up to it (the reference that continual methods save).

    v_t <- fresh;   v_t <- argmin CE(D_1 + ... + D_t)

Held-out events of every block stay out of the training targets. The cost of a block grows with the stream.
State: none.
"""

import torch

from cladapt.methods._base import Context, Method


class Retrain(Method):
    """A fresh adapter per block, learned on everything so far."""

    past_data = True
    recasts = True
    restarts = True

    @torch.no_grad()
    def begin_block(self, ctx: Context) -> None:
        for name, parameter in ctx.parameters.items():
            parameter.copy_(ctx.initial[name])
