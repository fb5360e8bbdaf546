"""The KL term by its closed form in plain torch, against autograd's gradient of it group by group."""

from functools import partial

import torch
from torch import Tensor

from cladapt_kernels import reference
from cladapt_kernels.timing import Entry, Providers, Work

TESTS = ("tests/kernels/test_reference.py",)


def _adapter(groups: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    anchor = (0.02 * torch.randn(groups * size, generator=generator)).to(device)
    value = anchor + 1e-3 * torch.randn(groups * size, generator=generator).to(device)
    lengths = torch.full((groups,), size, dtype=torch.int64, device=device)
    return value, anchor, reference.group_softmax(anchor, lengths), lengths


def _proximal(groups: int, size: int, device: torch.device) -> Providers:
    value, anchor, p, lengths = _adapter(groups, size, device)
    ones = torch.ones(groups, device=device)
    values, anchors = list(value.view(groups, size)), list(anchor.view(groups, size))

    def autograd_loop() -> None:
        leaves = [v.detach().requires_grad_() for v in values]
        total = torch.zeros((), device=device)
        for v, a in zip(leaves, anchors, strict=True):
            log_p, log_q = v.log_softmax(0), a.log_softmax(0)
            total = total + (log_p.exp() * (log_p - log_q)).sum()
        total.backward()

    return {
        "autograd, one group at a time": autograd_loop,
        "closed form, all groups at once": lambda: reference.proximal_kl(value, anchor, p, lengths, ones),
    }


def _proximal_entry(groups: int, size: int) -> Entry:
    floor = Work(bytes=4 * 4 * groups * size)  # v, a and q are read, the gradient is written
    make = partial(_proximal, groups, size)
    return Entry("proximal_kl", f"{groups} groups of {size}", TESTS, make, floor)


ENTRIES = (_proximal_entry(28, 1024), _proximal_entry(224, 16384))
