"""What is measured: for each op, its providers on the same inputs, the first one the baseline.

An entry makes closures that run once and return nothing; the runner interleaves them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cladapt_kernels import reference
from cladapt_kernels.timing import Providers


@dataclass(frozen=True)
class Entry:
    """A benchmark: `tests` must be green before it is timed, `make(device)` gives its providers, the baseline first."""

    name: str
    shape: str
    tests: str
    make: Callable[[torch.device], Providers]


def _adapter(groups: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    anchor = (0.02 * torch.randn(groups * size, generator=generator)).to(device)
    value = anchor + 1e-3 * torch.randn(groups * size, generator=generator).to(device)
    lengths = torch.full((groups,), size, dtype=torch.int64, device=device)
    return value, anchor, reference.group_softmax(anchor, lengths), lengths


def _proximal(groups: int, size: int) -> Callable[[torch.device], Providers]:
    def make(device: torch.device) -> Providers:
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

    return make


REGISTRY = (
    Entry("proximal_kl", "28 groups of 1024", "tests/kernels/test_reference.py", _proximal(28, 1024)),
    Entry("proximal_kl", "224 groups of 16384", "tests/kernels/test_reference.py", _proximal(224, 16384)),
)
