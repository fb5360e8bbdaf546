"""The launches of `adamw` for one list of parameters: tables of addresses and chunks, and the term's statistics."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from cladapt_kernels.optim.adamw import _add, _measure, _refresh, _step
from cladapt_kernels.optim.terms import Term, versions
from cladapt_kernels.tiles import on_device_of

BLOCK, FOLD = 2048, 64  # entries of a chunk, chunks folded at a time; by rule
FIGURES = 5
MOVING, FIXED = ("parameters", "grads", "first moments", "second moments"), ("anchors", "fisher", "copies")
"""Rows of the table of addresses, in this order."""
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class FusedStep:
    """The launches for one list of parameters and one term; float32, contiguous, on one device.

    `copies`, bf16 or fp16, receive the new values. `RuntimeError` where a parameter changed since the statistics were
    taken: `refresh` takes them anew. A change through `.data` has no version and is not seen.
    """

    def __init__(
        self, parameters: Sequence[Tensor], term: Term | None = None, copies: Sequence[Tensor] | None = None
    ) -> None:
        self.parameters, self.term, self.copies = list(parameters), term, copies
        if not self.parameters:
            raise ValueError("no parameters to step")
        self.device = self.parameters[0].device
        if term is not None:
            term.check(self.parameters)
        self._kind = "none" if term is None else term.kind
        if copies is not None and copies[0].dtype not in HALVES:
            raise ValueError(f"copies are {copies[0].dtype}, expected bfloat16 or float16")
        self._copy = "none" if copies is None else HALVES[copies[0].dtype]
        self._check("parameters", self.parameters)
        if copies is not None:
            self._check("copies", copies, copies[0].dtype)
        self._table = torch.zeros(len(MOVING + FIXED), len(self.parameters), dtype=torch.int64, device=self.device)
        self._rows: dict[str, list[int]] = {}
        self._aligned: dict[str, bool] = {}
        self._versions: list[int] | None = None
        groups = [*range(len(self.parameters))] if term is None else term.group_of_each(len(self.parameters))
        self._lay_out(groups)
        self._strength = self._scalar(0.0 if term is None else term.strength)
        self._one = torch.ones((), device=self.device)
        self._constants = self._group_constants(groups)
        fixed = {"copies": copies} | ({} if term is None else {"anchors": term.anchors, "fisher": term.fisher})
        self._place({name: tensors for name, tensors in fixed.items() if tensors is not None})

    def _lay_out(self, groups: Sequence[int]) -> None:
        """Chunks in the order of the groups, so that a group's are a range."""
        sizes = [p.numel() for p in self.parameters]
        order = sorted(range(len(sizes)), key=lambda t: groups[t])
        chunks = [(t, c, groups[t]) for t in order for c in range(triton.cdiv(sizes[t], BLOCK))]
        self._n_groups = max(groups) + 1
        counts = [0] * self._n_groups
        for _, _, group in chunks:
            counts[group] += 1
        ends = torch.tensor(counts).cumsum(0)
        self._n_chunks = len(chunks)
        self._sizes = torch.tensor(sizes, dtype=torch.int64).to(self.device)
        self._chunks = torch.tensor(chunks, dtype=torch.int32).view(-1, 3).to(self.device)
        self._ranges = torch.stack([ends - torch.tensor(counts), ends], 1).to(torch.int32).to(self.device)
        self._group_of_chunk = self._chunks[:, 2].long()
        self._vector = all(size % 4 == 0 for size in sizes)
        self._parts = torch.zeros(2, self._n_chunks, 4, device=self.device)
        self._centres = torch.zeros(2, self._n_groups, device=self.device)

    def _group_constants(self, groups: Sequence[int]) -> Tensor:
        """1 / tau, the largest a / tau and its q, of each group [G, 3]: float32 would round a sum's logarithm more."""
        found = torch.zeros(self._n_groups, 3, device=self.device)
        if self.term is None or self.term.kind != "kl":
            return found
        members: list[list[Tensor]] = [[] for _ in range(self._n_groups)]
        for anchor, group in zip(self.term.anchors, groups, strict=True):
            members[group].append(anchor.detach().reshape(-1))
        found[:, 0] = 1.0 if self.term.inverse_tau is None else self.term.inverse_tau
        for group, parts in enumerate(members):
            scaled = torch.cat(parts).double() * found[group, 0].double()
            found[group, 1] = scaled.max()
            found[group, 2] = torch.exp(found[group, 1].double() - scaled.logsumexp(0))
        return found

    def step(
        self,
        grads: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        step: Tensor,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: Tensor | None = None,
    ) -> None:
        """Update parameters and moments in place, and the copies.

        Args:
            grads, first, second: gradients and moments, one of each parameter's shape, float32, contiguous.
            step: float32 [] on the device, this step counted.
            lr: a number or float32 [].
            clip: float32 [] that gradients are multiplied by, the term's included; 1 without.

        Raises:
            RuntimeError: a parameter changed since the statistics were taken.
        """
        self.check_fresh()
        shared = self._shared(step, *self._point(grads, first, second))
        rests, logs = [1.0 - beta for beta in betas], _logs(*betas)
        if self._n_chunks:
            with on_device_of(self._parts):
                _step[(self._n_chunks,)](
                    **shared, rate=self._scalar(lr), strength=self._strength,
                    clip=self._one if clip is None else self._scalar(clip), beta1=betas[0], beta2=betas[1],
                    rest1=rests[0], rest2=rests[1], log_beta1=logs[0], log_beta2=logs[1],
                    eps=eps, weight_decay=weight_decay, COPY=self._copy,
                )  # fmt: skip
        written = [*self.parameters, *first, *second, *(self.copies or ())]
        torch.autograd.graph.increment_version(written)
        self._versions = versions(self.parameters)

    def refresh(self, step: Tensor) -> None:
        """Take the statistics at the parameters as they are, after `step` steps."""
        if self.term is None:
            return
        self._take(step, recentre=False)
        self._take(step, recentre=True)
        self._versions = versions(self.parameters)

    def _take(self, step: Tensor, recentre: bool) -> None:
        shared = self._shared(step, *self._point())
        with on_device_of(self._parts):
            _refresh[(self._n_chunks,)](**shared, RECENTRE=recentre)

    def _shared(self, step: Tensor, addresses: Tensor, aligned: bool) -> dict[str, Any]:
        """The arguments that all kernels have in common."""
        return {
            "addresses": addresses, "sizes": self._sizes, "chunks": self._chunks, "ranges": self._ranges,
            "constants": self._constants, "parts": self._parts, "centres": self._centres, "step": step,
            "tensors": len(self.parameters), "n_groups": self._n_groups,
            "KIND": self._kind, "ALIGNED": aligned, "BLOCK": BLOCK, "FOLD": FOLD, "num_warps": 8,
        }  # fmt: skip

    def measure(self, grads: Sequence[Tensor], step: Tensor, included: bool = False) -> Tensor:
        """||g + t||^2, ||g||^2, ||t||^2, <g, t>, ||v - a||^2 before a step, t the term's gradient: float64 [5].

        `grads` are g, or where t is `included` g + t.
        """
        if self.term is None:
            raise ValueError("measure needs a term; without one the gradient's norm says it all")
        self.check_fresh()
        shared = self._shared(step, *self._point(grads))
        sums = torch.empty(self._n_chunks, FIGURES, device=self.device)
        with on_device_of(self._parts):
            _measure[(self._n_chunks,)](**shared, sums=sums, strength=self._strength, INCLUDED=included)
        return sums.double().sum(0)

    def add(self, grads: Sequence[Tensor | None], step: Tensor) -> None:
        """Add the term's gradient to `grads`, one of each parameter or None where it is left out."""
        if self.term is None:
            raise ValueError("add needs a term")
        self.check_fresh()
        shared = self._shared(step, *self._point(grads))
        with on_device_of(self._parts):
            _add[(self._n_chunks,)](**shared, strength=self._strength)
        torch.autograd.graph.increment_version([grad for grad in grads if grad is not None])

    def rows(self, step: Tensor) -> Tensor:
        """`reference.proximal_statistics` of each group [G, 6], float64, from what the last step or refresh left.

        Of L2 and Fisher the weight alone.
        """
        if self._kind != "kl":
            found = torch.zeros(self._n_groups, 6, dtype=torch.float64, device=self.device)
            found[:, 0] = self._strength
            return found
        folded, centre = self.statistics(step)
        s0, s1, s2, h = folded.unbind(1)
        inverse_tau, peak, q_peak = self._constants.double().unbind(1)
        unit = (-h).exp()
        total = unit * (1 + s0) + s1
        log_mean = torch.where(h == 0, torch.log1p(s0 + s1), total.log() + h)
        weight = self._strength.double().expand_as(centre)
        return torch.stack([weight, inverse_tau, peak - q_peak.log(), centre, log_mean, (unit * s0 + s2) / total], 1)

    def statistics(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """What the last step or refresh left: s0, s1 exp -h, s2 exp -h, h [G, 4] and centre [G], float64; see above."""
        self.check_fresh()
        turn = step.long().remainder(2).reshape(1)
        parts = self._parts.index_select(0, turn)[0].double()
        folded = torch.zeros(self._n_groups, 4, dtype=torch.float64, device=self.device)
        h = folded[:, 3].scatter_reduce_(0, self._group_of_chunk, parts[:, 3], "amax")
        parts[:, 1:3] *= (parts[:, 3] - h[self._group_of_chunk]).exp()[:, None]
        folded[:, :3].index_add_(0, self._group_of_chunk, parts[:, :3])
        return folded, self._centres.index_select(0, turn)[0].double()

    def value(self, step: Tensor) -> Tensor:
        """R of each group [G], float64, after `step` steps."""
        if self._kind != "kl":
            return self.statistics(step)[0][:, 0]
        *_, log_mean, mean = self.rows(step).unbind(1)
        return mean - log_mean

    def changed(self) -> int | None:
        """The first parameter that changed since the statistics were taken, None where they hold."""
        known = self._versions
        if self.term is None or known is None or (found := versions(self.parameters)) == known:
            return None
        return next(i for i, version in enumerate(found) if version != known[i])

    def check_fresh(self) -> None:
        """`RuntimeError` where the statistics do not hold."""
        if self.term is not None and self._versions is None:
            raise RuntimeError("the term's statistics were never taken: call refresh first")
        if (index := self.changed()) is not None:
            raise RuntimeError(
                f"parameter {index} changed since the term's statistics were taken: call refresh after any change"
            )

    def _check(self, name: str, tensors: Sequence[Tensor | None], dtype: torch.dtype = torch.float32) -> None:
        if len(tensors) != len(self.parameters):
            raise ValueError(f"{len(tensors)} {name} for {len(self.parameters)} parameters")
        for index, (tensor, parameter) in enumerate(zip(tensors, self.parameters, strict=True)):
            if tensor is None:
                continue
            if tensor.device != self.device:
                raise ValueError(f"{name}[{index}] is on {tensor.device}, expected {self.device}")
            if tensor.dtype != dtype or tensor.shape != parameter.shape or not tensor.is_contiguous():
                kind = f"{tensor.dtype} {tuple(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
                raise ValueError(f"{name}[{index}] is {kind}, expected contiguous {dtype} {tuple(parameter.shape)}")

    def _point(
        self, grads: Sequence[Tensor | None] = (), first: Sequence[Tensor] = (), second: Sequence[Tensor] = ()
    ) -> tuple[Tensor, bool]:
        """The table of addresses, of which a launch reads the rows it is given, and whether loads may be of 16 bytes.

        Anchors, Fisher's diagonal and copies stay where they are; the others are looked at in every call.
        """
        given = {n: t for n, t in zip(MOVING, (self.parameters, grads, first, second), strict=True) if t}
        self._place(given)
        return self._table, self._vector and all(self._aligned.get(name, True) for name in (*given, *FIXED))

    def _place(self, given: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Bring the rows whose tensors are not where they were to the device, without a wait for it."""
        found = {name: [0 if t is None else t.data_ptr() for t in tensors] for name, tensors in given.items()}
        moved = [name for name, row in found.items() if row != self._rows.get(name)]
        for name in moved:
            if name in MOVING:
                self._check(name, given[name])
        for name in moved:
            row = torch.tensor(found[name], dtype=torch.int64, pin_memory=self.device.type == "cuda")
            self._table[(*MOVING, *FIXED).index(name)].copy_(row, non_blocking=True)
            self._rows[name], self._aligned[name] = found[name], all(address % 16 == 0 for address in found[name])

    def _scalar(self, value: float | Tensor) -> Tensor:
        """float32 [] on the parameters' device: a kernel reads an address, which of a CPU's scalar it cannot."""
        if not isinstance(value, Tensor):
            return torch.full((), value, device=self.device)
        return value.to(self.device, torch.float32)


@functools.cache
def _logs(*betas: float) -> list[float]:
    return torch.tensor(betas, dtype=torch.float64).log().tolist()
