"""EWC: entries of the adapter that earlier blocks depend on are held near their values before the block.

    L_t = CE(D_t) + strength / 2 sum_i F_i (v_i - a_i)^2,   a = v at the block's start        (arXiv 1612.00796)
    F <- decay F + F_t after block t,   F_t = mean over its examples of (d l / d v)^2 at the values that it leaves

The online form (arXiv 1805.06370, section 3): one F and one anchor, whatever the number of blocks. F_t is the
empirical Fisher of single examples: l is the negative log-likelihood of a document, summed over its targets, or of an
image in the softmax of its block. It costs a backward pass of each example, once a block. CE is a mean over targets:
the Laplace approximation has strength = (earlier examples) / (targets of the block), more holds more firmly.
The gradient strength F (v - a) joins inside the optimiser's step (`place=optimiser`) or before it by plain torch
(`eager`), the same but for rounding; `auto` is the former where kernels run and no later method edits gradients.
A classifier's rows are not held. The first block that is learned, also from an adapter that the run starts from, has
no F and is learned without the term.
Log: `ewc/term`, `ewc/distance` = ||v - a||, `ewc/ratio` and `ewc/cosine` of the term's gradient and the task's.
State: the anchor and F, 8 bytes per adapter parameter, the same in every block.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cladapt import ops
from cladapt.config import Settings
from cladapt.errors import ConfigError
from cladapt.methods._base import Context, Method
from cladapt.methods._proximal import join, log_figures
from cladapt.model.anchors import AdapterVector


class EwcConfig(Settings):
    """Options of EWC."""

    strength: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the penalty; 0 is plain fine-tuning, bit for bit."""
    decay: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """What stays of the Fisher information of earlier blocks when a block adds its own: 1 sums over all blocks, 0 knows
    the last one alone."""
    sample: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the block's examples that its Fisher information is taken of."""
    place: Literal["auto", "optimiser", "eager"] = "auto"
    """Where the term's gradient joins the task's: inside the optimiser's step, or before it by plain torch."""


class Ewc(Method):
    """Elastic weight consolidation of the adapter, online."""

    Config = EwcConfig
    config: EwcConfig
    by_entry = True

    def __init__(self, config: EwcConfig | None = None) -> None:
        super().__init__(config)
        self.anchor: Tensor | None = None
        self.fisher: Tensor | None = None
        self._vector: AdapterVector | None = None
        self._optimizer: ops.ProxAdamW | None = None
        self._held: list[nn.Parameter] = []

    def check(self, ctx: Context) -> None:
        self._refuse(self._obstacle(ctx))

    def _obstacle(self, ctx: Context) -> str:
        """Why the term cannot join inside the optimiser, empty where it can."""
        return "a method that comes after ewc edits gradients, and would not see the term" if ctx.edited_after else ""

    def _refuse(self, obstacle: str) -> None:
        if obstacle and self.config.place == "optimiser":
            raise ConfigError(f"ewc's option place=optimiser: {obstacle}", "use place=auto")

    def begin_block(self, ctx: Context) -> None:
        obstacle = self._obstacle(ctx)
        if ctx.optimizer is None and not obstacle:
            obstacle = "the trained parameters are not all float32"
        self._refuse(obstacle)
        kernel = ops.uses_kernel("prox_adamw", ctx.kernels)
        inside = self.config.place == "optimiser" or (self.config.place == "auto" and kernel and not obstacle)
        self._optimizer = ctx.optimizer if inside else None
        self._vector, self._held = AdapterVector(ctx.parameters, "factor"), list(ctx.parameters.values())
        anchor = self._vector.flatten([p.detach() for p in self._held])
        self._prepare(self._vector, anchor, torch.zeros_like(anchor) if self.fisher is None else self.fisher)

    def _prepare(self, vector: AdapterVector, anchor: Tensor, fisher: Tensor) -> None:
        self.anchor, self.fisher = anchor, fisher.to(anchor)
        self._active = self.config.strength > 0.0 and bool(self.fisher.any())
        if self._optimizer is not None and self._active:
            parts = [[part.contiguous() for part in vector.unflatten(flat)] for flat in (anchor, self.fisher)]
            term = ops.Term("fisher", self.config.strength, parts[0], fisher=parts[1])
            self._optimizer.set_term(term, self._held)

    def penalty(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The term (scalar) and its gradient [n] at the adapter vector `value` [n]."""
        if self.anchor is None or self.fisher is None:
            raise RuntimeError("begin_block comes before penalty")
        d = value - self.anchor
        grad = self.config.strength * self.fisher * d
        return 0.5 * torch.dot(grad, d), grad

    @torch.no_grad()
    def edit_grads(self, ctx: Context) -> None:
        if self._vector is None or self.anchor is None:
            raise RuntimeError("begin_block comes before edit_grads")
        if self._optimizer is not None and self._active:
            return
        value = self._vector.flatten([p.detach() for p in self._held])
        distance = torch.linalg.vector_norm(value - self.anchor)
        if self._active:
            join(ctx, "ewc", self._vector, *self.penalty(value), distance)
        else:
            ctx.log["ewc/distance"] = distance.item()

    def after_step(self, ctx: Context) -> None:
        if self._optimizer is not None and self._active and ctx.figures is not None:
            log_figures(ctx, "ewc", ctx.figures)

    def end_block(self, ctx: Context) -> None:
        if self._vector is None or self.fisher is None:
            raise RuntimeError("begin_block comes before end_block")
        if self.config.strength > 0.0:
            found = ctx.squared_gradient(self.config.sample)
            own = self._vector.flatten([found[name] for name in self._vector.names])
            self.fisher = self.config.decay * self.fisher + own

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.anchor is None or self.fisher is None else {"anchor": self.anchor, "fisher": self.fisher}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.fisher = state["fisher"]
        if self._vector is not None and self.anchor is not None:  # inside a block; between blocks begin_block does it
            self._prepare(self._vector, state["anchor"].to(self.anchor), state["fisher"])

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return 8 * sum(p.numel() for p in parameters.values())
