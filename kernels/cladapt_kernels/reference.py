"""Plain-torch truth of every op: what a kernel must compute, in the dtype of its inputs, differentiable by hand.

A flat vector holds all groups one after another; `lengths` [G] int64 says how long each is.
"""

import torch
from torch import Tensor

LONG_GROUP = 4096  # entries per group from which, on a CPU, group by group in the cache beats one pass over all


def group_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum of each group: [n], [G] -> [G]; deterministic, ordered within a group."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def group_expand(values: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Repeat each group's value over its entries: [G], [G] -> [total]."""
    return torch.repeat_interleave(values, lengths, output_size=total)


def group_softmax(values: Tensor, lengths: Tensor) -> Tensor:
    """Softmax inside each group: [n] -> [n]."""
    peak = torch.segment_reduce(values, "max", lengths=lengths, unsafe=True)
    exp = torch.exp(values - group_expand(peak, lengths, values.numel()))
    return exp / group_expand(group_sum(exp, lengths), lengths, values.numel())


def proximal_kl(
    value: Tensor, anchor: Tensor, anchor_p: Tensor, lengths: Tensor, inverse_tau: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(softmax(v/tau) || softmax(a/tau)) of each group and its gradient.

        d = (v - a) / tau;   d = d - E_q[d];   m = log E_q[exp d];   p = q exp(d - m)
        KL = E_p[d] - m;     dKL/dv = p (d - E_p[d]) / tau

    Centring d by the anchor's q = `anchor_p` leaves no first-order term to cancel, so float32 keeps its digits.
    Shapes: value, anchor, anchor_p [n]; lengths, inverse_tau [G]. Returns KL [G], gradient [n]. PESO, section 3.
    """
    if value.numel() > LONG_GROUP * lengths.numel():
        sizes = lengths.tolist()
        parts = zip(*(t.split(sizes) for t in (value, anchor, anchor_p)), inverse_tau.unbind(), strict=True)
        penalties, grads = zip(*(_proximal_kl_group(*part) for part in parts), strict=True)
        return torch.stack(penalties), torch.cat(grads)
    total = value.numel()
    scale = group_expand(inverse_tau, lengths, total)
    d = (value - anchor) * scale
    d = d - group_expand(group_sum(anchor_p * d, lengths), lengths, total)
    log_mean = torch.log1p(group_sum(anchor_p * torch.expm1(d), lengths))
    p = anchor_p * torch.exp(d - group_expand(log_mean, lengths, total))
    mean = group_sum(p * d, lengths)
    return mean - log_mean, p * (d - group_expand(mean, lengths, total)) * scale


def _proximal_kl_group(value: Tensor, anchor: Tensor, anchor_p: Tensor, inverse_tau: Tensor) -> tuple[Tensor, Tensor]:
    d = (value - anchor).mul_(inverse_tau)
    d.sub_(torch.dot(anchor_p, d))
    log_mean = torch.dot(anchor_p, torch.expm1(d)).log1p()
    p = (d - log_mean).exp_().mul_(anchor_p)
    mean = torch.dot(p, d)
    return mean - log_mean, d.sub_(mean).mul_(p).mul_(inverse_tau)


def proximal_l2(value: Tensor, anchor: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 ||v - a||^2 of each group [G] and its gradient v - a [n]."""
    d = value - anchor
    return 0.5 * group_sum(d * d, lengths), d
