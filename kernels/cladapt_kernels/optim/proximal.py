"""A proximal term's gradient in the backward pass of the linears whose factors it pulls, not in the optimiser's step.

    dA += strength dR/dA,   dB += strength dR/dB      R: KL of softmax groups or L2, see `reference.proximal`

`arm` comes before the last backward pass of a step, and takes the statistics of the term's groups at the parameters as
they are. The first backward pass of a linear then adds the term to dA and dB where it writes them (`skinny`). `finish`
adds what is left: of rows picked from a factor, or of parameters that a factor is computed from, the linear's gradient
is not the parameter's. Each parameter so has the term once, and a norm of gradients is that of the sum.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cladapt_kernels import reference
from cladapt_kernels.optim.terms import Figures, Term, check_kind, launch_obstacle

if TYPE_CHECKING:
    from cladapt_kernels.optim.fused_step import FusedStep

KINDS = ("kl", "l2")


class Pull:
    """The term's gradient of the `index`-th parameter; whoever adds it says so by `waiting`."""

    def __init__(self, kind: str, index: int, value: Tensor, anchor: Tensor) -> None:
        self.kind, self.index, self.value, self.anchor = kind, index, value, anchor
        self.waiting = False
        self.table = anchor.new_zeros(0, 2, 6)
        """Of each parameter its group's row of `reference.proximal_statistics`, and zeros."""

    def rows(self, other: "Pull | None") -> Tensor:
        """Its own row and that of the other, or zeros: [2, 6], a view where the two are neighbours."""
        if other is None:
            return self.table[self.index]
        if other.index == self.index + 1:
            return self.table[self.index : self.index + 2, 0]
        return self.table[[self.index, other.index], 0]

    def gradient(self) -> Tensor:
        """The gradient by plain torch, of the parameter's shape."""
        return reference.proximal_gradient(self.kind, self.value.detach(), self.anchor, self.table[self.index, 0])


Pulls = tuple[Pull | None, Pull | None] | None
"""Of A and of B."""


class Epilogue:
    """The term of some parameters: `set_term`, each step `arm`, the last backward pass, `finish`, `measure`.

    `route` says which implementation takes the statistics, and why.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.term: Term | None = None
        self.route = ""
        self._pulls: dict[int, Pull] = {}
        self._fused: FusedStep | None = None
        self._value: Tensor | None = None  # R as armed
        self._step = self._group_of_each = torch.zeros(())
        self._armed = False

    def set_term(self, term: Term | None) -> None:
        """Pull towards the term's anchors from the next step on, or with None no longer; one anchor per parameter.

        `ValueError` where the term does not fit, and for a Fisher diagonal, which no epilogue has.
        """
        self.term, self._fused, self._pulls = None, None, {}
        self._value, self._armed = None, False
        if term is None:
            return
        if term.kind not in KINDS:
            raise ValueError(f"term {term.kind!r}, the epilogue has {' and '.join(KINDS)}")
        term.check(self.parameters)
        check_kind(self.parameters)
        self.term = term
        self._pulls = {
            id(p): Pull(term.kind, index, p, anchor)
            for index, (p, anchor) in enumerate(zip(self.parameters, term.anchors, strict=True))
        }
        device = self.parameters[0].device
        self._group_of_each = torch.tensor(term.group_of_each(len(self.parameters))).to(device)
        obstacle = launch_obstacle(self.parameters)
        self.route = f"torch: {obstacle}" if obstacle else "triton"
        if not obstacle:
            from cladapt_kernels.optim.fused_step import FusedStep

            self._step = torch.zeros((), device=device)
            self._fused = FusedStep(self.parameters, term)

    def of(self, a: Tensor, b: Tensor) -> Pulls:
        """What the backward pass of a linear may add to dA and dB: None of a tensor that is no parameter of these."""
        return (self._pulls.get(id(a)), self._pulls.get(id(b))) if self._pulls else None

    @torch.no_grad()
    def arm(self) -> None:
        """Take the statistics at the parameters as they are: the next backward pass adds the term."""
        if self.term is None:
            return
        if self._fused is not None:
            self._fused.refresh(self._step)
            rows, self._value = self._fused.rows(self._step), self._fused.value(self._step).sum()
        else:
            rows, self._value = self._rows(self.term)
        own = rows.to(self.parameters[0].dtype)[self._group_of_each]
        table = torch.stack([own, torch.zeros_like(own)], 1)
        for pull in self._pulls.values():
            pull.table, pull.waiting = table, True
        self._armed = True

    @torch.no_grad()
    def finish(self) -> None:
        """Add the term to the gradients that it has not reached; `RuntimeError` where nothing was armed."""
        if self.term is None:
            return
        if not self._armed:
            raise RuntimeError("arm comes before the backward pass whose gradients a term is to be in")
        self._armed = False
        left = [p for p, pull in zip(self.parameters, self._pulls.values(), strict=True) if pull.waiting]
        for p in left:
            self._pulls[id(p)].waiting = False
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if left and self._fused is not None:
            chosen = {id(p) for p in left}
            self._fused.add([p.grad if id(p) in chosen else None for p in self.parameters], self._step)
        elif left:
            for p in left:
                p.grad.add_(self._pulls[id(p)].gradient())  # type: ignore[union-attr]  # made above

    @torch.no_grad()
    def measure(self) -> Figures:
        """Figures of the gradients once `finish` is done, nothing waited for; nothing is clipped here.

        `RuntimeError` before that.
        """
        if self.term is None or self._value is None or self._armed:
            raise RuntimeError("set_term, arm and finish come before measure")
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if self._fused is not None:
            sums = self._fused.measure(grads, self._step, included=True)
        else:
            sums = torch.zeros(5, dtype=torch.float64, device=grads[0].device)
            for total, pull in zip(grads, self._pulls.values(), strict=True):
                own, moved = pull.gradient().double(), (pull.value - pull.anchor).double()
                task = total.double() - own
                sums += torch.stack([(x * y).sum() for x, y in (
                    (total.double(), total.double()), (task, task), (own, own), (task, own), (moved, moved)
                )])  # fmt: skip
        norm, task_norm, term_norm = sums[:3].sqrt()
        return Figures(
            norm, task_norm, term_norm, sums[3], sums[4].sqrt(), self.term.strength * self._value, norm.new_ones(())
        )

    def _rows(self, term: Term) -> tuple[Tensor, Tensor]:
        """`reference.proximal_statistics` [G, 6] and R, in float64, whose sums keep their digits in any order."""
        of_each = term.group_of_each(len(self.parameters))
        order = sorted(range(len(of_each)), key=of_each.__getitem__)
        lengths = [0] * (max(of_each) + 1)
        for index in order:
            lengths[of_each[index]] += self.parameters[index].numel()
        value, anchor = (
            torch.cat([tensors[index].detach().reshape(-1).double() for index in order])
            for tensors in (self.parameters, term.anchors)
        )
        sizes = torch.tensor(lengths).to(value.device)
        tau = term.inverse_tau
        inverse_tau = value.new_ones(len(lengths)) if tau is None else tau.to(value)
        scaled = anchor * reference.group_expand(inverse_tau, sizes, anchor.numel())
        anchor_p = reference.group_softmax(scaled, sizes)
        weight = torch.as_tensor(term.strength).to(value)
        rows = reference.proximal_statistics(value, anchor, anchor_p, sizes, inverse_tau, weight)
        if term.kind == "l2":
            return rows, 0.5 * (value - anchor).square().sum()
        return rows, (rows[:, 5] - rows[:, 4]).sum()
