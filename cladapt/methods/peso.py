"""PESO: a proximal term keeps the single evolving LoRA near its state before the block (arXiv 2510.25093, section 3).

    L_t = CE(D_t) + lambda * R,   groups g of the adapter vector v, anchor a = v at the block's start, p = softmax(v_g)
    literal   R = sum_g KL(softmax(v_g) || softmax(a_g))                      the paper
    code      R = literal / number of adapted modules                         the released code's mean
    scaled    R = mean_g KL(softmax(v_g / tau_g) || softmax(a_g / tau_g)),    tau_g = std(a_g), fixed during a block
    l2        R = 1/2 ||v - a||^2

The gradient is the closed form p * (d - E_p[d]) / tau with d = (v - a) / tau, added once per optimiser step, in
float32: before the step, or inside it where the optimiser takes it in (not for rank groups). A group whose anchor
has no spread (B = 0 at the first block) takes the spread of the whole anchor as tau.
Log: `peso/term` = lambda R, `peso/ratio` and `peso/cosine` of its gradient against the task's, `peso/distance` =
||v - a||. Block 1 has no predecessor to stay near and is learned without the term.
State: the anchor, 4 bytes per adapter parameter, the same in every block.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cladapt import ops
from cladapt.config import Settings
from cladapt.methods._base import Context, Method
from cladapt.model.anchors import AdapterVector, Grouping

FIGURES = ("peso/term", "peso/distance", "peso/ratio", "peso/cosine")


class PesoConfig(Settings):
    """Options of PESO."""

    strength: Annotated[float, Field(ge=0.0)] = 0.1
    """lambda; 0 is plain fine-tuning, bit for bit."""
    regulariser: Literal["literal", "code", "scaled", "l2"] = "scaled"
    """Which proximal term."""
    groups: Grouping = "factor"
    """Softmax groups: each factor, each module (A and B together), or each rank-1 vector."""


class Peso(Method):
    """Proximal single evolving LoRA."""

    Config = PesoConfig
    config: PesoConfig

    def __init__(self, config: PesoConfig | None = None) -> None:
        super().__init__(config)
        self.anchor: Tensor | None = None
        self._vector: AdapterVector | None = None
        self._optimizer: ops.ProxAdamW | None = None

    def begin_block(self, ctx: Context) -> None:
        self._active = self.config.strength > 0.0 and ctx.block > 1
        self._vector = AdapterVector(ctx.parameters, self.config.groups)
        inside = self._active and self.config.groups != "rank"
        self._optimizer = ctx.optimizer if inside else None
        self._prepare(self._vector, self._vector.flatten([p.detach() for p in ctx.parameters.values()]))

    def _prepare(self, vector: AdapterVector, anchor: Tensor) -> None:
        lengths = vector.lengths.to(anchor.device)
        self.anchor, self._lengths = anchor, lengths
        if self.config.regulariser == "scaled":
            self._inverse_tau = 1.0 / anchor_spread(anchor, lengths)
        else:
            self._inverse_tau = torch.ones(lengths.numel(), dtype=anchor.dtype, device=anchor.device)
        self._anchor_p = ops.group_softmax(anchor * self._inverse_tau.repeat_interleave(lengths), lengths)
        if self._optimizer is not None:
            self._optimizer.set_term(self._term(vector, anchor))

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
        parameters = list(ctx.parameters.values())
        value = self._vector.flatten([p.detach() for p in parameters])
        distance = torch.linalg.vector_norm(value - self.anchor)
        if not self._active:
            ctx.log["peso/distance"] = distance.item()
            return
        term, grad = self.penalty(value)
        grads = [p.grad for p in parameters if p.grad is not None]
        task = self._vector.flatten(grads)
        task_norm, own_norm = torch.linalg.vector_norm(task), torch.linalg.vector_norm(grad)
        tiny = torch.finfo(task.dtype).tiny
        ratio = own_norm / task_norm.clamp_min(tiny)
        cosine = torch.dot(task, grad) / (task_norm * own_norm).clamp_min(tiny)
        figures = torch.stack([term, distance, ratio, cosine]).tolist()
        ctx.log.update(zip(FIGURES, figures, strict=True))
        torch._foreach_add_(grads, [g.to(p.dtype) for g, p in zip(self._vector.unflatten(grad), grads, strict=True)])

    def after_step(self, ctx: Context) -> None:
        figures = ctx.figures
        if self._optimizer is None or figures is None:
            return
        tiny = torch.finfo(torch.float32).tiny
        task, own = figures.task_norm, figures.term_norm
        ratio, cosine = own / task.clamp_min(tiny), figures.inner / (task * own).clamp_min(tiny)
        told = torch.stack([t.double() for t in (figures.term, figures.distance, ratio, cosine)]).tolist()
        ctx.log.update(zip(FIGURES, told, strict=True))

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
