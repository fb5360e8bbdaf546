"""PESO: a proximal term keeps the single evolving LoRA near its state before the block (arXiv 2510.25093, section 3).

    L_t = CE(D_t) + lambda * R,   groups g of the adapter vector v, anchor a = v at the block's start, p = softmax(v_g)
    literal   R = sum_g KL(softmax(v_g) || softmax(a_g))                      the paper
    code      R = literal / number of adapted modules                         the released code's mean
    scaled    R = mean_g KL(softmax(v_g / tau_g) || softmax(a_g / tau_g)),    tau_g = std(a_g), fixed during a block
    l2        R = 1/2 ||v - a||^2

The gradient is the closed form p * (d - E_p[d]) / tau with d = (v - a) / tau, added once per optimiser step, in
float32. It joins the task's gradient in one of three `place`s, in which it is the same but for rounding, and the norm
of the sum is what is clipped:
optimiser  inside its step, with no pass over the parameters of its own; after the edits of methods composed with it
epilogue   in the last backward pass of a step, where the fused linears write dA and dB; before all edits
eager      between the two, by plain torch, for rank groups too
`auto` is eager without kernels, else the first of the three that means what the order of the methods says: by the
model of `bench kernels` it moves 44 bytes a parameter and step, figures and clipping included, and the epilogue 76.
A group whose anchor has no spread (B = 0 at the first block) takes the spread of the whole anchor as tau.
Log: `peso/term` = lambda R, `peso/ratio` and `peso/cosine` of its gradient against the task's, `peso/distance` =
||v - a||. Block 1 has no predecessor to stay near and is learned without the term.
State: the anchor, 4 bytes per adapter parameter, the same in every block.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cladapt import ops
from cladapt.config import Settings
from cladapt.errors import ConfigError
from cladapt.methods._base import Context, Method
from cladapt.methods._proximal import join, log_figures
from cladapt.model.anchors import AdapterVector, Grouping


class PesoConfig(Settings):
    """Options of PESO."""

    strength: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the term; 0 is plain fine-tuning, bit for bit."""
    regulariser: Literal["literal", "code", "scaled", "l2"] = "scaled"
    """Which proximal term. `literal`: the paper's KL of softmaxes of the factors' entries; `code`: that over the number
    of adapted modules, as in the released code; `scaled`: that of entries divided by their spread; `l2`: half the
    squared distance."""
    groups: Grouping = "factor"
    """Softmax groups: each factor, each module (A and B together), or each rank-1 vector."""
    place: Literal["auto", "optimiser", "epilogue", "eager"] = "auto"
    """Where the term's gradient joins the task's: inside the optimiser's step, in the backward pass of the linears
    (a GPU), or between them by plain torch; `auto`: the cheapest that runs here and keeps the order of methods."""

    @model_validator(mode="after")
    def _place_has_groups(self) -> "PesoConfig":
        if self.groups == "rank" and self.place in ("optimiser", "epilogue"):
            raise ValueError(f"place={self.place} has groups of whole factors, groups is rank: use place=eager")
        return self


class Peso(Method):
    """Proximal single evolving LoRA."""

    Config = PesoConfig
    config: PesoConfig

    def __init__(self, config: PesoConfig | None = None) -> None:
        super().__init__(config)
        self.anchor: Tensor | None = None
        self._vector: AdapterVector | None = None
        self._optimizer: ops.ProxAdamW | None = None
        self._epilogue: ops.Epilogue | None = None
        self._pulled: list[nn.Parameter] = []

    def check(self, ctx: Context) -> None:
        self._refuse(self._obstacles(ctx))

    def begin_block(self, ctx: Context) -> None:
        self._active = self.config.strength > 0.0 and ctx.block > 1
        self._vector = AdapterVector(ctx.parameters, self.config.groups)
        place = self._place(ctx)
        self._optimizer = ctx.optimizer if self._active and place == "optimiser" else None
        self._epilogue = ctx.epilogue if self._active and place == "epilogue" else None
        self._pulled = list(ctx.parameters.values())
        self._prepare(self._vector, self._vector.flatten([p.detach() for p in ctx.parameters.values()]))

    def _place(self, ctx: Context) -> str:
        """Where the term joins; `ConfigError` where it cannot join in the place that was asked for."""
        obstacles = self._obstacles(ctx)
        if ctx.optimizer is None and not obstacles["optimiser"]:
            obstacles["optimiser"] = "the trained parameters are not all float32"
        self._refuse(obstacles)
        if (asked := self.config.place) != "auto":
            return asked
        if self.config.groups == "rank" or not ops.uses_kernel("prox_adamw", ctx.kernels):
            return "eager"
        return next((place for place, obstacle in obstacles.items() if not obstacle), "eager")

    def _obstacles(self, ctx: Context) -> dict[str, str]:
        """Why the term cannot join inside the optimiser and in the epilogue, empty where it can."""
        obstacles = {"optimiser": "", "epilogue": ""}
        if ctx.edited_after:
            obstacles["optimiser"] = "a method that comes after peso edits gradients, and would not see the term"
        if ctx.edited_before:
            obstacles["epilogue"] = "a method that comes before peso edits gradients, and would edit the term too"
        elif ctx.epilogue is None:
            reason = ops.backends(ctx.kernels)["lora_linear"][1]
            obstacles["epilogue"] = f"the linears do not run the fused op ({reason})"
        return obstacles

    def _refuse(self, obstacles: Mapping[str, str]) -> None:
        if obstacle := obstacles.get(self.config.place):
            raise ConfigError(f"peso's option place={self.config.place}: {obstacle}", "use place=auto")

    def _prepare(self, vector: AdapterVector, anchor: Tensor) -> None:
        lengths = vector.lengths.to(anchor.device)
        self.anchor, self._lengths = anchor, lengths
        if self.config.regulariser == "scaled":
            self._inverse_tau = 1.0 / anchor_spread(anchor, lengths)
        else:
            self._inverse_tau = torch.ones(lengths.numel(), dtype=anchor.dtype, device=anchor.device)
        self._anchor_p = ops.group_softmax(anchor * self._inverse_tau.repeat_interleave(lengths), lengths)
        if self._optimizer is not None:
            self._optimizer.set_term(self._term(vector, anchor), self._pulled)
        if self._epilogue is not None:
            self._epilogue.set_term(self._term(vector, anchor))

    def _term(self, vector: AdapterVector, anchor: Tensor) -> ops.Term:
        anchors = [part.contiguous() for part in vector.unflatten(anchor)]
        if self.config.regulariser == "l2":
            return ops.Term("l2", self.config.strength, anchors)
        groups = vector.modules if self.config.groups == "module" else None
        return ops.Term("kl", self._weight(vector), anchors, self._inverse_tau, groups=groups)

    def _weight(self, vector: AdapterVector) -> float:
        """lambda, and the mean of the forms that have one."""
        shares = {"code": vector.n_modules, "scaled": vector.lengths.numel()}
        return self.config.strength / shares.get(self.config.regulariser, 1)

    def penalty(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """lambda R (scalar) and its gradient [n] at the adapter vector `value` [n]."""
        if self.anchor is None or self._vector is None:
            raise RuntimeError("begin_block comes before penalty")
        if self.config.regulariser == "l2":
            per_group, grad = ops.proximal_l2(value, self.anchor, self._lengths)
        else:
            per_group, grad = ops.proximal_kl(value, self.anchor, self._anchor_p, self._lengths, self._inverse_tau)
        weight = self._weight(self._vector)
        return weight * per_group.sum(), grad.mul_(weight)

    @torch.no_grad()
    def edit_grads(self, ctx: Context) -> None:
        if self._vector is None or self.anchor is None:
            raise RuntimeError("begin_block comes before edit_grads")
        if self._optimizer is not None:
            return
        if self._epilogue is not None:
            self._epilogue.finish()
            log_figures(ctx, "peso", self._epilogue.measure())
            return
        value = self._vector.flatten([p.detach() for p in ctx.parameters.values()])
        distance = torch.linalg.vector_norm(value - self.anchor)
        if not self._active:
            ctx.log["peso/distance"] = distance.item()
            return
        join(ctx, "peso", self._vector, *self.penalty(value), distance)

    def after_step(self, ctx: Context) -> None:
        if self._optimizer is not None and ctx.figures is not None:
            log_figures(ctx, "peso", ctx.figures)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.anchor is None else {"anchor": self.anchor}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        # between blocks there is nothing to restore: begin_block takes the anchor from the adapter itself
        if self._vector is not None and self.anchor is not None:
            self._prepare(self._vector, state["anchor"].to(self.anchor.device))

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return 4 * sum(p.numel() for p in parameters.values())


def anchor_spread(anchor: Tensor, lengths: Tensor) -> Tensor:
    """Standard deviation of each group [G]; a group without spread takes that of the whole vector."""
    count = lengths.to(anchor.dtype)
    mean = ops.group_sum(anchor, lengths) / count
    centred = anchor - mean.repeat_interleave(lengths)
    spread = (ops.group_sum(centred * centred, lengths) / count).sqrt()
    return torch.where(spread > 0, spread, anchor.std(unbiased=False).clamp_min(torch.finfo(anchor.dtype).tiny))
