"""LSAT: a long-term and a short-term adapter, learned apart and served as their weighted sum (arXiv 2312.15599).

    t <= m   Theta_h <- fresh;  Theta_h <- argmin CE(D_1 + ... + D_t), the adapter of block t             (equation 2)
    t > m    Theta_t <- fresh;  Theta_t <- argmin CE(D_t), Theta_h not in the model                       (equation 1)
    served   lambda Theta_h + (1 - lambda) Theta_t, task arithmetic, lambda chosen by validation
             fusion=products   W_0 + s (lambda B_h A_h + (1 - lambda) B_t A_t), an adapter of twice the rank
             fusion=factors    A = lambda A_h + (1 - lambda) A_t, B alike

From the paper (sections 5 and 6): both modules start afresh and neither sees the other; the long-term one learns m
blocks (10 of 20 there), is retrained at each of them and then stays; lambda is one of 0, 0.1, ..., 1, chosen anew at
every block. From the released code (TianhaoShi2001/LSAT): fusion=factors. Re-derived: fusion=products, for a product of
averages is no average of products; the log-likelihood as what lambda is chosen by, there it is the AUC; Theta_h alone
up to block m. Not here: averaging the predictions of two passes, which is no one adapter.
An adapter that the run starts from after block m is the long-term one.
Log at a block's end: `lsat/weight` = lambda.
State: the long-term factors, 4 bytes per adapter parameter, from block m + 1 on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from cladapt.config import Settings
from cladapt.errors import ConfigError
from cladapt.methods._base import Context
from cladapt.methods._history import WithHistory
from cladapt.model.anchors import is_learned, is_up

WEIGHTS = tuple(step / 10 for step in range(11))


class LsatConfig(Settings):
    """Options of LSAT."""

    long_blocks: PositiveInt = 2
    """The long-term adapter learns the blocks up to this one, each later block a short-term one."""
    weight: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["validation"] = "validation"
    """The long-term adapter's share; `validation`: the one of 0, 0.1, ..., 1 with the best log-likelihood."""
    fusion: Literal["products", "factors"] = "products"
    """What is averaged: the two updates of the weights, or the factors as in the released code."""


class Lsat(WithHistory):
    """Long- and short-term adaptation-aware tuning, by task arithmetic."""

    Config = LsatConfig
    config: LsatConfig
    recasts = True
    restarts = True
    alters = True

    def learned_with(self, block: int) -> Sequence[int]:
        return range(1, block + 1) if block <= self.config.long_blocks else (block,)

    def check(self, ctx: Context) -> None:
        if ctx.block > self.config.long_blocks:
            self._long_term(ctx)

    @torch.no_grad()
    def begin_block(self, ctx: Context) -> None:
        self._begun = True
        ctx.set_history({})  # what was served is taken apart
        if ctx.block > self.config.long_blocks:
            if self.config.weight == "validation":
                self._scorer(ctx)
            if not self.frozen:
                self.frozen = self._long_term(ctx)
        for name, parameter in ctx.parameters.items():
            parameter.copy_(ctx.initial[name])

    def _scorer(self, ctx: Context) -> Callable[[], float]:
        if ctx.score is None:
            raise ConfigError(
                f"lsat's option weight=validation: block {ctx.block} has no validation target",
                "give a number from 0 to 1, such as method.options.weight=0.5",
            )
        return ctx.score

    def _long_term(self, ctx: Context) -> dict[str, Tensor]:
        """The factors as block m, or the adapter that the run starts from, has left them."""
        last = {name: p.detach().clone() for name, p in ctx.parameters.items()}
        if not is_learned(last):
            raise ConfigError(
                f"lsat's option long_blocks={self.config.long_blocks}: the first block to learn is {ctx.block}, which "
                "leaves none for the long-term adapter",
                f"use method.options.long_blocks={ctx.block} or more, or start from an adapter",
            )
        return last

    @torch.no_grad()
    def end_block(self, ctx: Context) -> None:
        if ctx.block <= self.config.long_blocks:
            return
        short = {name: p.detach().clone() for name, p in ctx.parameters.items()}
        asked = self.config.weight
        weight = self._best_weight(ctx, short) if asked == "validation" else asked
        self._serve(ctx, short, weight)
        ctx.log["lsat/weight"] = weight

    def _best_weight(self, ctx: Context, short: Mapping[str, Tensor]) -> float:
        score, scores = self._scorer(ctx), dict[float, float]()
        for weight in WEIGHTS:
            self._serve(ctx, short, weight)
            scores[weight] = score()
        return max(scores, key=scores.__getitem__)

    def _serve(self, ctx: Context, short: Mapping[str, Tensor], weight: float) -> None:
        """Put the weighted sum of both into the model."""
        long = {name: t.to(short[name].device) for name, t in self.frozen.items()}
        if self.config.fusion == "products":
            beside = {name: weight * t if is_up(name) else t for name, t in long.items()}
            ctx.set_history(beside if weight > 0.0 else {})
            own = {name: (1.0 - weight) * t if is_up(name) else t for name, t in short.items()}
        else:
            own = {name: torch.lerp(t, long[name], weight) for name, t in short.items()}
        for name, parameter in ctx.parameters.items():
            parameter.copy_(own[name])
