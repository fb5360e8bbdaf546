"""AdamW with a proximal term inside: torch's own fused step on a CPU, one launch of `adamw` on a GPU.

    g = clip (grad + strength dR/dv)      R: KL of softmax groups, L2 or diagonal Fisher, see `reference.proximal`

The term's gradient is a closed form, so no graph is built, and on a CPU a group is read once, while it is in the cache.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cladapt_kernels.optim.terms import Figures, Term, check_kind, launch_obstacle, versions

if TYPE_CHECKING:
    from cladapt_kernels.optim.fused_step import FusedStep

CACHED = 262144  # entries that are worked on at a time: larger falls out of the cache, smaller pays for calls


class ProxAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW(fused=True)` and a term: `set_term`, each step `measure` if its figures are wanted, `step`.

    A term may pull some of the parameters alone, of one group where a launch does the step. Without a term a step is
    torch's, bit for bit. `p.grad` stays the task's gradient. State and groups have AdamW's keys, so either reads the
    other's checkpoints; a term is not part of the state: set it again after a load. `route` says which implementation
    the last step took, and why.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value, good in (
            ("lr", lr, lr >= 0),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
        ):
            if not good:
                raise ValueError(f"{name}={value} is out of range")
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        defaults |= {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False}
        super().__init__(params, {**defaults, "decoupled_weight_decay": True})
        self.term: Term | None = None
        self.route = ""
        self._blocks: list[_Block] = []
        self._total: list[Tensor] = []
        self._fused: FusedStep | None = None
        self._clip: Tensor | None = None
        self._ready: _Seen | None = None  # what `measure` has seen
        self._states: list[dict[str, Any]] = []  # of what is pulled, as the launch knows them
        self._every: list[object] = []  # of all, as last looked at
        self._steps = torch.zeros(0)  # of what is pulled
        self._obstacle = ""
        self._pulled: list[Tensor] = []

    def set_term(self, term: Term | None, parameters: Sequence[Tensor] | None = None) -> None:
        """Pull `parameters` towards the term's anchors from the next step on, or with None none of them any longer.

        One anchor per parameter; without `parameters` all are pulled. The others are stepped as without a term, and
        their gradients count in the norm that is clipped. `ValueError` where the term does not fit.
        """
        every = self._parameters()
        pulled = every if parameters is None else list(parameters)
        self.term, self._fused, self._blocks, self._total = None, None, [], []
        self._clip, self._ready, self._pulled = None, None, []
        if term is None:
            return
        if not {id(p) for p in pulled} <= {id(p) for p in every}:
            raise ValueError("a term pulls parameters that this optimiser does not step")
        term.check(pulled)
        check_kind(pulled)
        self.term, self._pulled = term, pulled

    @torch.no_grad()
    def measure(self, max_norm: float = math.inf) -> Figures:
        """Figures of the step to come, nothing waited for; that step scales g to `max_norm` where it is longer."""
        parameters, zero = self._pulled, torch.zeros(())
        if self.term is None:
            found = torch.nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None])
            norm, task, own, inner, distance, value = found, found, *[zero.to(found)] * 4
        elif (fused := self._launcher(parameters)) is not None:
            squares = fused.measure(_gradients(parameters), self._steps[0])
            (norm, task, own), inner, distance = squares[:3].sqrt(), squares[3], squares[4].sqrt()
            value = self.term.strength * fused.value(self._steps[0]).sum()
        else:
            sums = self._fill(parameters, figures=True)
            norm = torch.nn.utils.get_total_norm(self._total)
            (task, own), inner, distance = sums[:2].sqrt(), sums[2], sums[3].sqrt()
            value = self.term.strength * sums[4]
        rest = [p.grad for p in self._others if p.grad is not None] if self.term is not None else []
        if rest:
            norm = torch.hypot(norm, torch.nn.utils.get_total_norm(rest).to(norm))
        # torch's clip_grad_norm_, its 1e-6 included
        self._clip = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm < math.inf else None
        self._ready = _Seen.of(self._parameters())
        return Figures(norm, task, own, inner, distance, value, norm.new_ones(()) if self._clip is None else self._clip)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `RuntimeError` where parameters or gradients changed between `measure` and this."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready, self._ready = self._ready, None
        clip, self._clip = self._clip, None
        if ready is not None and not ready.holds(self._parameters()):
            raise RuntimeError("a parameter or a gradient changed since measure: measure again before the step")
        if self.term is None:
            self.route = "torch: no term"
        elif (fused := self._launcher(self._pulled)) is not None:
            self._launch(fused, self._pulled, clip)
        else:
            self.route = f"torch: {self._obstacle}"
            if ready is None:
                self._fill(self._pulled, figures=False)
            if clip is not None:
                torch._foreach_mul_(self._total, clip)  # what is ours may be scaled in place
            self._torch_steps(self._pulled, self._total)
        others = self._parameters() if self.term is None else self._others
        stepped = [p for p in others if p.grad is not None]
        grads = [p.grad for p in stepped if p.grad is not None]
        if clip is not None and grads:
            grads = list(torch._foreach_mul(grads, clip.to(grads[0])))  # the task's gradients may not
        self._torch_steps(stepped, grads)
        return loss

    @property
    def stale(self) -> bool:
        """Whether a parameter changed other than by a step, so that the next one needs a `refresh` before it."""
        return self._fused is not None and self._fused.changed() is not None

    def refresh(self) -> None:
        """Take the term's statistics anew: after changing a parameter other than by a step, and where a state is saved.

        A launch carries them from step to step, and those of who resumes are taken: rounded otherwise.
        """
        self._ready, self._clip = None, None
        if self._fused is not None:
            self._fused.refresh(self._steps[0])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("amsgrad", "maximize"):
            if any(group.get(name) for group in state_dict["param_groups"]):
                raise ValueError(f"this state is of an AdamW with {name}, which ProxAdamW does not do")
        super().load_state_dict(state_dict)
        self._fused, self._ready, self._clip = None, None, None
        for group in self.param_groups:
            group["fused"] = True
            for p in group["params"]:
                if self.state[p]:  # of an AdamW that is not fused they are on the CPU
                    self.state[p]["step"] = self.state[p]["step"].to(p.device, torch.float32)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _others(self) -> list[Tensor]:
        """What a term does not pull, groups that were added after it too."""
        every = self._parameters()
        if len(every) == len(self._pulled):
            return []
        pulled = {id(p) for p in self._pulled}
        return [p for p in every if id(p) not in pulled]

    def _moments(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """First and second moments and steps, made where there are none."""
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
        states = [self.state[p] for p in parameters]
        return [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [s["step"] for s in states]

    def _torch_steps(self, parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """A step of these parameters, each by the options of its group."""
        gradient = dict(zip(parameters, grads, strict=True))
        for group in self.param_groups:
            own = [p for p in group["params"] if p in gradient]
            if own:
                self._torch_step(group, own, [gradient[p] for p in own])

    def _torch_step(self, group: Mapping[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        first, second, steps = self._moments(parameters)
        torch._foreach_add_(steps, 1)
        (beta1, beta2), options = group["betas"], {name: group[name] for name in ("lr", "weight_decay", "eps")}
        torch._fused_adamw_(
            parameters, grads, first, second, [], steps,
            beta1=beta1, beta2=beta2, **options, amsgrad=False, maximize=False,
        )  # fmt: skip

    def _launcher(self, parameters: list[Tensor]) -> "FusedStep | None":
        """The launch of this term, its statistics taken when it is made; None where torch does the step.

        It is made anew where a state was given from outside: its steps say which statistics are the last.
        """
        if self._fused is not None and not self._knows_states():
            self._fused = None
        if self._fused is None and self.term is not None:
            self._obstacle = self._why_torch(parameters)
            if not self._obstacle:
                from cladapt_kernels.optim.fused_step import FusedStep

                self._steps = torch.stack(self._moments(parameters)[2])
                self._states = [self.state[p] for p in parameters]
                for state, step in zip(self._states, self._steps.unbind(), strict=True):
                    state["step"] = step  # views of one tensor: one launch counts all
                self._fused = FusedStep(parameters, self.term)
                self._fused.refresh(self._steps[0])
        return self._fused

    def _knows_states(self) -> bool:
        """Whether those of what is pulled are the launch's, asked one by one where any state came or went."""
        every: list[object] = [*self.state.values()]
        if not _same(every, self._every):
            self._every = every
            return _same(map(self.state.get, self._pulled), self._states)
        return True

    def _why_torch(self, parameters: list[Tensor]) -> str:
        if obstacle := launch_obstacle(parameters):
            return obstacle
        if len(groups := self._groups_of(parameters)) > 1:
            return f"{len(groups)} groups of parameters"
        if len(torch.stack(self._moments(parameters)[2]).unique()) > 1:
            return "parameters have done different numbers of steps"
        return ""

    def _groups_of(self, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
        ids = {id(p) for p in parameters}
        return [group for group in self.param_groups if any(id(p) in ids for p in group["params"])]

    def _launch(self, fused: "FusedStep", parameters: list[Tensor], clip: Tensor | None) -> None:
        self.route = "triton: one launch"
        group = next(g for g in self.param_groups if any(p is parameters[0] for p in g["params"]))
        fused.check_fresh()  # before the steps are counted
        first, second = ([state[name] for state in self._states] for name in ("exp_avg", "exp_avg_sq"))
        self._steps.add_(1)
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        fused.step(
            _gradients(parameters), first, second, self._steps[0], **options,
            clip=None if clip is None else clip.float(),
        )  # fmt: skip

    def _fill(self, parameters: list[Tensor], figures: bool) -> Tensor:
        """grad + strength dR/dv into `_total`; with `figures` ||g||^2, ||t||^2, <g, t>, ||v - a||^2 and R, float64."""
        term = self.term
        if term is None:
            raise RuntimeError("set_term comes before its gradient")
        if not self._blocks:
            self._blocks, self._total = _blocks(parameters, term)
        grads = _gradients(parameters)
        sums = [block.fill(parameters, grads, figures) for block in self._blocks]
        return torch.stack([torch.stack(each) for each in sums]).double().sum(0) if figures else torch.empty(0)


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """With a term every parameter moves; one without a gradient of the task moves by the term alone."""
    return [torch.zeros_like(p) if (grad := p.grad) is None else grad for p in parameters]


def _same(found: Iterable[object], known: Sequence[object]) -> bool:
    """Whether these are the same objects, not equal ones."""
    every = [*found]
    return len(every) == len(known) and all(map(operator.is_, every, known))


class _Seen(NamedTuple):
    """Gradients, held so that no other takes the place of one, and how often they and parameters were written."""

    grads: list[Tensor | None]
    versions: list[int]

    @classmethod
    def of(cls, parameters: list[Tensor]) -> "_Seen":
        grads = [p.grad for p in parameters]
        given = [grad for grad in grads if grad is not None]
        return cls(grads, versions([*parameters, *given]))

    def holds(self, parameters: list[Tensor]) -> bool:
        now = _Seen.of(parameters)
        return now.versions == self.versions and _same(now.grads, self.grads)


class _Block:
    """Groups of one length that are worked on together: rows of a matrix [groups, length]."""

    def __init__(self, members: Sequence[Sequence[int]], groups: Sequence[int], term: Term, total: Tensor) -> None:
        self._term, self._total = term, total
        self._members = [index for row in members for index in row]
        self._anchor = self._rows(term.anchors)
        self._fisher = None if term.fisher is None else self._rows(term.fisher)
        taken = None if term.inverse_tau is None else term.inverse_tau[list(groups)]
        self._inverse_tau = None if taken is None else taken.to(total)[:, None]
        self._scratch: list[Tensor] = []

    def lend(self, scratch: Sequence[Tensor]) -> None:
        """Work in these buffers, which all blocks share: fresh memory would cost more than the work."""
        self._scratch = [s[: self._total.numel()].view(self._total.shape) for s in scratch]

    def fill(self, parameters: Sequence[Tensor], grads: Sequence[Tensor], figures: bool) -> list[Tensor]:
        """grad + strength dR/dv into `total`; with `figures` their sums, see `ProxAdamW._fill`."""
        value, d, spare = self._scratch
        self._rows(parameters, value)
        torch.sub(value, self._anchor, out=d)
        distance = _dot(d, d) if figures else d
        if self._term.kind == "kl":
            penalty = self._kl(value, d, spare, figures)
        else:
            torch.mul(d, 1.0 if self._fisher is None else self._fisher, out=value)
            penalty = 0.5 * _dot(value, d) if figures else d
            value.mul_(self._term.strength)
        self._rows(grads, self._total)
        products = ((self._total, self._total), (value, value), (self._total, value)) if figures else ()
        sums = [_dot(a, b) for a, b in products]
        self._total.add_(value)
        return [*sums, distance, penalty]

    def _kl(self, value: Tensor, d: Tensor, spare: Tensor, figures: bool) -> Tensor:
        """strength dKL/dv = strength p (d - E_p[d]) / tau in the place of `value`, p = softmax(v / tau); returns KL.

        KL = log E_p[exp(E_p[d] - d)] looks at p alone, and has no first-order part to lose digits by.
        """
        scale: float | Tensor = self._term.strength
        if self._inverse_tau is not None:
            value.mul_(self._inverse_tau)
            d.mul_(self._inverse_tau)
            scale = scale * self._inverse_tau
        torch.softmax(value, 1, out=value)
        d.sub_(torch.mul(value, d, out=spare).sum(1, keepdim=True))
        penalty = d
        if figures:
            rest = torch.mul(value, d, out=spare).sum(1)
            torch.expm1(torch.neg(d, out=spare), out=spare)
            penalty = (spare.mul_(value).sum(1).log1p_() + rest).sum()
        value.mul_(d).mul_(scale)
        return penalty

    def _rows(self, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        flat = [tensors[index].reshape(-1) for index in self._members]
        return torch.cat(flat, out=None if out is None else out.view(-1)).view(self._total.shape)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.view(-1), b.view(-1))


def _blocks(parameters: Sequence[Tensor], term: Term) -> tuple[list[_Block], list[Tensor]]:
    """Groups by length, as many at a time as stay in the cache; and where each parameter's gradient will be."""
    of_each = term.group_of_each(len(parameters))
    members: dict[int, list[int]] = {}
    for index, group in enumerate(of_each):
        members.setdefault(group, []).append(index)
    by_length: dict[int, list[int]] = {}
    for group, own in members.items():
        by_length.setdefault(sum(parameters[index].numel() for index in own), []).append(group)
    blocks, total, largest = [], list(parameters), 0
    for length, alike in by_length.items():
        rows = max(1, CACHED // length)
        for groups in (alike[i : i + rows] for i in range(0, len(alike), rows)):
            sums = parameters[0].new_empty(len(groups), length)
            rows_of = [members[group] for group in groups]
            blocks.append(_Block(rows_of, groups, term, sums))
            largest = max(largest, sums.numel())
            indices = [index for row in rows_of for index in row]
            parts = sums.view(-1).split([parameters[index].numel() for index in indices])
            for index, part in zip(indices, parts, strict=True):
                total[index] = part.view(parameters[index].shape)
    scratch = [parameters[0].new_empty(largest) for _ in range(3)]
    for block in blocks:
        block.lend(scratch)
    return blocks, total
