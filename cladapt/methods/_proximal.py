"""What proximal terms share: their gradient joins the task's by plain torch, and the figures that they log."""

import torch
from torch import Tensor

from cladapt import ops
from cladapt.methods._base import Context
from cladapt.model.anchors import AdapterVector


def join(ctx: Context, name: str, vector: AdapterVector, term: Tensor, grad: Tensor, distance: Tensor) -> None:
    """Add a term's gradient [n] to the task's, and log what `log_figures` does.

    A parameter without a gradient is one that another method holds fixed: it stays without.
    """
    grads = [parameter.grad for parameter in ctx.parameters.values()]
    task = vector.flatten(
        [torch.zeros_like(p) if g is None else g for p, g in zip(ctx.parameters.values(), grads, strict=True)]
    )
    norms = torch.linalg.vector_norm(task), torch.linalg.vector_norm(grad)
    _log(ctx, name, term, distance, *norms, torch.dot(task, grad))
    learned = [(g, own.to(g.dtype)) for g, own in zip(grads, vector.unflatten(grad), strict=True) if g is not None]
    if learned:
        torch._foreach_add_(*map(list, zip(*learned, strict=True)))


def log_figures(ctx: Context, name: str, figures: ops.Figures) -> None:
    """Log `name/term`, `name/distance` = ||v - a||, `name/ratio` and `name/cosine` of its gradient and the task's."""
    _log(ctx, name, figures.term, figures.distance, figures.task_norm, figures.term_norm, figures.inner)


def _log(ctx: Context, name: str, term: Tensor, distance: Tensor, task: Tensor, own: Tensor, inner: Tensor) -> None:
    tiny = torch.finfo(torch.float32).tiny
    ratio, cosine = own / task.clamp_min(tiny), inner / (task * own).clamp_min(tiny)
    numbers = torch.stack([t.double() for t in (term, distance, ratio, cosine)]).tolist()
    ctx.log.update(
        zip((f"{name}/{figure}" for figure in ("term", "distance", "ratio", "cosine")), numbers, strict=True)
    )
