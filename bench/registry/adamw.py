"""AdamW with the proximal KL inside, against torch's fused AdamW with the term's gradient added before it.

All providers do one step on the same values and gradients, each on a copy of its own. The measured ones also give the
norm, clip by it, and tell the term, its norm, its angle to the task's gradient and the distance to the anchor, which is
what a training step logs. The model of bytes on a GPU has everything come from memory, in float32:

    torch's fused AdamW, one launch without a term      28 a parameter: g, v, m, s read, v, m, s written
    one launch with KL or L2, with Fisher               32, 36: the anchor, the diagonal
    its figures before it, one more launch              12, 16: g, v, the anchor, the diagonal
    bf16 copies                                          2
    the term in the gradients, by `Epilogue`, and AdamW  76: the statistics twice 16, v and the anchor where a linear
                                                         writes the gradient 8, figures 12, norm and clip 12, AdamW 28;
                                                         84 where no linear comes before: g once more each way
    the penalty by autograd, beside AdamW              116: 52 forward, 52 backward, 12 to add it to the gradient
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from cladapt_kernels import reference
from cladapt_kernels.optim import Epilogue, ProxAdamW, Term
from cladapt_kernels.timing import Entry, Providers, Work

STRENGTH, RATE, LIMIT = 0.1, 1e-6, 1.0
TESTS = tuple(f"tests/kernels/test_{name}.py" for name in ("optim", "adamw", "adamw_host", "proximal"))
AUTOGRAD, CLOSED = "fused AdamW, penalty by autograd", "fused AdamW, penalty in closed form"
INSIDE, PLAIN = "ProxAdamW", "fused AdamW, no penalty"
JOINED = "fused AdamW, Epilogue without a linear"
UNLAUNCHED = "ProxAdamW, its launches left out"
IN_A_ROW = 3


class _Case:
    """Groups of one size with anchors nearby; every provider steps parameters of its own."""

    def __init__(self, groups: int, size: int, device: torch.device) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(0)
        self.device, self.groups = device, groups
        self.anchors = [0.02 * part for part in self._drawn()]
        self._moves, self._tasks = self._drawn(), self._drawn()
        self.anchor = torch.cat(self.anchors)
        self.lengths = torch.full((groups,), size, device=device)
        self.ones = torch.ones(groups, device=device)
        self.anchor_p = reference.group_softmax(self.anchor, self.lengths)

    def _drawn(self) -> list[Tensor]:
        drawn = torch.randn(self.groups, self.size, generator=self.generator)
        return list(drawn.to(self.device).unbind())

    def parameters(self) -> list[nn.Parameter]:
        made = [nn.Parameter(a + 1e-3 * move) for a, move in zip(self.anchors, self._moves, strict=True)]
        for parameter, task in zip(made, self._tasks, strict=True):
            parameter.grad = 1e-3 * task
        return made

    def beside(self, gradient: Callable[[list[nn.Parameter]], list[Tensor]], measured: bool) -> Callable[[], None]:
        """torch's fused AdamW, the term's gradient added to the task's before it."""
        parameters = self.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)
        tasks = [p.grad for p in parameters if p.grad is not None]

        def step() -> None:
            grads = gradient(parameters)
            if measured:
                task, own = torch.cat([t.reshape(-1) for t in tasks]), torch.cat(grads)
                away = torch.cat([p.detach() for p in parameters]) - self.anchor
                torch.stack([torch.dot(task, own), *(torch.linalg.vector_norm(t) for t in (task, own, away))]).tolist()
            torch._foreach_add_(tasks, grads)  # in place: they drift, which costs nothing, where copies would
            if measured:
                torch.nn.utils.clip_grad_norm_(parameters, LIMIT).item()
            optimizer.step()

        return step

    def autograd(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        total = torch.zeros((), device=self.device)
        for value, anchor in zip(parameters, self.anchors, strict=True):
            log_p, log_q = value.log_softmax(0), anchor.log_softmax(0)
            total = total + (log_p.exp() * (log_p - log_q)).sum()
        return list(torch.autograd.grad(STRENGTH * total, parameters))

    def closed_form(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        value = torch.cat([p.detach().reshape(-1) for p in parameters])
        _, grad = reference.proximal_kl(value, self.anchor, self.anchor_p, self.lengths, self.ones)
        return list(grad.mul_(STRENGTH).split(self.size))

    def inside(self, measured: bool) -> Callable[[], None]:
        optimizer = ProxAdamW(self.parameters(), lr=RATE)
        optimizer.set_term(Term("kl", STRENGTH, self.anchors))

        def step() -> None:
            if measured:
                optimizer.measure(LIMIT).numbers()
            optimizer.step()

        return step

    def joined(self) -> Callable[[], None]:
        """The term in the gradients by the epilogue's last launch: no linear has written them with it."""
        parameters = self.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)
        epilogue = Epilogue(parameters)
        epilogue.set_term(Term("kl", STRENGTH, self.anchors))

        def step() -> None:
            epilogue.arm()
            epilogue.finish()
            epilogue.measure().numbers()
            torch.nn.utils.clip_grad_norm_(parameters, LIMIT).item()
            optimizer.step()

        return step

    def no_term(self) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, fused=True)
        return lambda: optimizer.step() and None


def _step(groups: int, size: int, device: torch.device) -> Providers:
    case = _Case(groups, size, device)
    return {
        AUTOGRAD: case.beside(case.autograd, measured=False),
        CLOSED: case.beside(case.closed_form, measured=False),
        INSIDE: case.inside(measured=False),
        PLAIN: case.no_term(),
    }


def _measured_step(groups: int, size: int, device: torch.device) -> Providers:
    case = _Case(groups, size, device)
    return {
        CLOSED: case.beside(case.closed_form, measured=True),
        INSIDE: case.inside(measured=True),
        JOINED: case.joined(),
    }


@contextmanager
def _unlaunched(device: torch.device) -> Iterator[None]:
    """Where there is no GPU, all that the host does for a launch but the launch."""
    if device.type == "cuda":
        yield
        return
    from cladapt_kernels.optim import fused_step, optimizer

    kernels: dict[str, Any] = {
        name: defaultdict(lambda: lambda **_: None) for name in ("_step", "_measure", "_refresh")
    }
    with patch.multiple(fused_step, **kernels), patch.object(optimizer, "launch_obstacle", lambda _: ""):
        yield


def _called(groups: int, size: int, device: torch.device) -> Providers:
    """Norm, clip and step of many small tensors, `IN_A_ROW` of them, each with gradients of its own as training has."""
    case = _Case(groups, size, device)

    def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        with _unlaunched(device):
            for _ in range(IN_A_ROW):
                for p in parameters:
                    p.grad = torch.zeros_like(p)
                if isinstance(optimizer, ProxAdamW):
                    optimizer.measure(LIMIT)
                else:
                    torch.nn.utils.clip_grad_norm_(parameters, LIMIT)
                optimizer.step()

    plain, own = case.parameters(), case.parameters()
    inside = ProxAdamW(own, lr=RATE)
    inside.set_term(Term("kl", STRENGTH, case.anchors))
    return {
        PLAIN: partial(run, torch.optim.AdamW(plain, lr=RATE, fused=True), plain),
        UNLAUNCHED if device.type != "cuda" else INSIDE: partial(run, inside, own),
    }


def _entries(groups: int, size: int) -> tuple[Entry, Entry]:
    count, shape = groups * size, f"{groups} groups of {size}"
    inside = Work(bytes=32 * count)
    measured = {INSIDE: Work(bytes=44 * count), JOINED: Work(bytes=84 * count)}
    work = {AUTOGRAD: Work(bytes=144 * count), INSIDE: inside, PLAIN: Work(bytes=28 * count)}
    return (
        Entry("prox_adamw", shape, TESTS, partial(_step, groups, size), inside, work),
        Entry("prox_adamw, measured", shape, TESTS, partial(_measured_step, groups, size), inside, measured),
    )


HOST = Entry("prox_adamw, host", "392 groups of 16", TESTS, partial(_called, 392, 16))
ENTRIES = (*_entries(28, 1024), *_entries(224, 16384))
