"""One AdamW step of all adapter tensors in one launch, the gradient of a proximal term folded in.

    g = clip (grad + strength dR/dv);   then AdamW as in `reference.adamw`
    KL    dR/dv = p (d - E_p[d]) / tau,  d = (v - a) / tau - c,  q = softmax(a / tau),  p = q exp(d) / E_q[exp d]

A program owns a chunk of a tensor, found by a table of addresses. KL needs two means over the whole group, which a
step takes from its predecessor: while the new values are in registers, each program writes its chunk's part of

    s0 = E_q[d],  s1 = E_q[exp d - 1 - d],  s2 = E_q[d (exp d - 1)]       E_p[d] = (s0 + s2) / (1 + s0 + s1)

and every program of the next step folds its group's parts, in order. c is E_q[d] one step ago, so s0 is small, s1 and
s2 are of second order, and KL = E_p[d] - log1p(s0 + s1) keeps its digits. Where an entry moved so far that q exp d
passes 1, s1 and s2 are kept times exp -h, h = max log (q exp d) of the group, so that nothing overflows.
Two buffers take turns by the parity of the step, which lives on the device like all that a CUDA graph may change.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from cladapt_kernels.optim import Term
from cladapt_kernels.tiles import on_device_of

if TYPE_CHECKING:
    from cladapt_kernels.aot import Variant

BLOCK, FOLD = 2048, 64  # entries of a chunk, chunks folded at a time
FIGURES = 5
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _place(addresses, row, tensor, tensors, i, ALIGNED: tl.constexpr):
    """Where entries i of a tensor's float32 data lie."""
    place = tl.load(addresses + row * tensors + tensor).to(tl.pointer_type(tl.float32)) + i
    if ALIGNED:
        place = tl.multiple_of(place, 16)  # on the sum: the compiler forgets it over the cast from a number
    return place


@triton.jit
def _chunk(chunks, sizes, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Tensor, group, entries and which of them exist, of this program's chunk."""
    entry = chunks + 3 * tl.program_id(0)
    tensor, group = tl.load(entry), tl.load(entry + 2)
    size = tl.load(sizes + tensor)
    if ALIGNED:
        size = tl.multiple_of(size, 4)
    i = tl.load(entry + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tensor, group, i, i < size


@triton.jit
def _exp(x):
    """exp x within two units in the last place.

    The hardware has 2^x alone, and x log2(e) in one product would lose a digit at |x| = 10.
    """
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4  # ln 2 in two parts, the first exact
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(whole)


@triton.jit
def _folded(parts, ranges, group, FOLD: tl.constexpr):
    """s0, s1, s2 and h of a group: its chunks' parts, in order, brought to the largest h."""
    first, last = tl.load(ranges + 2 * group), tl.load(ranges + 2 * group + 1)
    s0, s1, s2 = tl.zeros((FOLD,), tl.float32), tl.zeros((FOLD,), tl.float32), tl.zeros((FOLD,), tl.float32)
    peak = tl.zeros((FOLD,), tl.float32)
    for start in range(first, last, FOLD):
        chunk = start + tl.arange(0, FOLD)
        peak = tl.maximum(peak, tl.load(parts + 4 * chunk + 3, mask=chunk < last, other=0.0))
    h = tl.max(peak)
    for start in range(first, last, FOLD):
        chunk = start + tl.arange(0, FOLD)
        share = _exp(tl.load(parts + 4 * chunk + 3, mask=chunk < last, other=0.0) - h)
        s0 += tl.load(parts + 4 * chunk, mask=chunk < last, other=0.0)
        s1 += share * tl.load(parts + 4 * chunk + 1, mask=chunk < last, other=0.0)
        s2 += share * tl.load(parts + 4 * chunk + 2, mask=chunk < last, other=0.0)
    return tl.sum(s0), tl.sum(s1), tl.sum(s2), h


@triton.jit
def _pull(value, anchor, fisher, lift, q_peak, inverse_tau, centre, s0, s1, s2, h, KIND: tl.constexpr):
    """dR/dv of a chunk."""
    pull = value - anchor
    if KIND == "fisher":
        pull = fisher * pull
    if KIND == "kl":
        d = pull * inverse_tau - centre
        unit = _exp(-h)
        total = unit * (1.0 + s0) + s1
        pull = q_peak * _exp(lift + d - h) * (d - tl.div_rn(unit * s0 + s2, total)) * tl.div_rn(inverse_tau, total)
    return pull


@triton.jit
def _write_parts(
    parts, centres, ranges, group, value, anchor, fisher, lift, q_peak, own, inverse_tau, centre, KIND: tl.constexpr
):  # fmt: skip
    """A chunk's part of its group's statistics at `value`; of L2 and Fisher, of R itself."""
    entry = parts + 4 * tl.program_id(0)
    d = value - anchor
    if KIND == "kl":
        d = d * inverse_tau - centre
        # the series of exp d - 1 - d, which the difference would lose
        series = 1.0 / 120.0 + d * (1.0 / 720.0 + d * (1.0 / 5040.0 + d * (1.0 / 40320.0)))
        series = d * d * (0.5 + d * (1.0 / 6.0 + d * (1.0 / 24.0 + d * series)))
        h = tl.maximum(tl.max(tl.where(own, lift + d, float("-inf"))) + tl.log(q_peak), 0.0)
        # in one exponent: exp d alone overflows where q is small
        q, p, unit = q_peak * _exp(lift), q_peak * _exp(lift + d - h), _exp(-h)
        near = tl.abs(d) < 0.5
        s1 = tl.where(near, q * series * unit, p - q * (1.0 + d) * unit)
        s2 = d * tl.where(near, q * (series + d) * unit, p - q * unit)
        tl.store(entry, tl.sum(tl.where(own, q * d, 0.0)))
        tl.store(entry + 1, tl.sum(tl.where(own, s1, 0.0)))
        tl.store(entry + 2, tl.sum(tl.where(own, s2, 0.0)))
        tl.store(entry + 3, h)
        if tl.program_id(0) == tl.load(ranges + 2 * group):
            tl.store(centres + group, centre)
    else:
        d = d * fisher * d if KIND == "fisher" else d * d
        tl.store(entry, 0.5 * tl.sum(tl.where(own, d, 0.0)))


@triton.jit
def _term(
    addresses, tensor, tensors, i, own, group, constants, KIND: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Anchor, Fisher diagonal, log (q / q_peak), q_peak and 1 / tau of a chunk; what the term lacks is not used."""
    anchor = tl.load(_place(addresses, 4, tensor, tensors, i, ALIGNED), mask=own, other=0.0)
    fisher, lift, q_peak, inverse_tau = anchor, anchor, 0.0, 0.0
    if KIND == "fisher":
        fisher = tl.load(_place(addresses, 5, tensor, tensors, i, ALIGNED), mask=own, other=0.0)
    if KIND == "kl":
        inverse_tau, peak = tl.load(constants + 3 * group), tl.load(constants + 3 * group + 1)
        lift, q_peak = anchor * inverse_tau - peak, tl.load(constants + 3 * group + 2)
    return anchor, fisher, lift, q_peak, inverse_tau


@triton.jit
def _carried(parts, centres, ranges, group, n_chunks, n_groups, turn, KIND: tl.constexpr, FOLD: tl.constexpr):
    """Centre, s0, s1, s2 and h of a group as buffer `turn` has them."""
    centre, s0, s1, s2, h = 0.0, 0.0, 0.0, 0.0, 0.0
    if KIND == "kl":
        centre = tl.load(centres + turn * n_groups + group)
        s0, s1, s2, h = _folded(parts + turn * 4 * n_chunks, ranges, group, FOLD)
    return centre, s0, s1, s2, h


@triton.jit
def _step(
    addresses, sizes, chunks, ranges, constants, parts, centres, step, rate, strength, clip,
    tensors, n_groups, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps, weight_decay,
    KIND: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    tensor, group, i, own = _chunk(chunks, sizes, BLOCK, ALIGNED)
    value_at = _place(addresses, 0, tensor, tensors, i, ALIGNED)
    first_at = _place(addresses, 2, tensor, tensors, i, ALIGNED)
    second_at = _place(addresses, 3, tensor, tensors, i, ALIGNED)
    value = tl.load(value_at, mask=own, other=0.0)
    grad = tl.load(_place(addresses, 1, tensor, tensors, i, ALIGNED), mask=own, other=0.0)
    first = tl.load(first_at, mask=own, other=0.0)
    second = tl.load(second_at, mask=own, other=0.0)
    count, lr = tl.load(step), tl.load(rate)
    if KIND != "none":
        n_chunks = tl.num_programs(0)
        turn = count.to(tl.int32) % 2
        anchor, fisher, lift, q_peak, inverse_tau = _term(
            addresses, tensor, tensors, i, own, group, constants, KIND, ALIGNED
        )
        centre, s0, s1, s2, h = _carried(parts, centres, ranges, group, n_chunks, n_groups, 1 - turn, KIND, FOLD)
        grad += tl.load(strength) * _pull(value, anchor, fisher, lift, q_peak, inverse_tau, centre, s0, s1, s2, h, KIND)
    grad *= tl.load(clip)
    # in float64: of 1 - beta^step float32 would keep four digits
    correction1 = (1.0 - tl.exp(count.to(tl.float64) * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(count.to(tl.float64) * log_beta2)).to(tl.float32)
    first = tl.full((), beta1, tl.float32) * first + tl.full((), rest1, tl.float32) * grad
    second = tl.full((), beta2, tl.float32) * second + tl.full((), rest2, tl.float32) * grad * grad
    root = tl.div_rn(tl.sqrt_rn(second), tl.sqrt_rn(correction2)) + tl.full((), eps, tl.float32)
    rate_of_mean = tl.div_rn(lr, correction1)
    value = value * (1.0 - lr * tl.full((), weight_decay, tl.float32)) - rate_of_mean * tl.div_rn(first, root)
    tl.store(value_at, value, mask=own)
    tl.store(first_at, first, mask=own)
    tl.store(second_at, second, mask=own)
    if COPY != "none":
        address = tl.load(addresses + 6 * tensors + tensor)
        if COPY == "bf16":
            place = address.to(tl.pointer_type(tl.bfloat16)) + i
        else:
            place = address.to(tl.pointer_type(tl.float16)) + i
        if ALIGNED:
            place = tl.multiple_of(place, 16)
        tl.store(place, value.to(place.dtype.element_ty), mask=own)
    if KIND != "none":
        _write_parts(
            parts + turn * 4 * n_chunks, centres + turn * n_groups, ranges, group, value, anchor, fisher, lift,
            q_peak, own, inverse_tau, centre + s0, KIND,
        )  # fmt: skip


@triton.jit
def _refresh(
    addresses, sizes, chunks, ranges, constants, parts, centres, step, tensors, n_groups,
    RECENTRE: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Statistics at the values as they are: about 0 into the other buffer, then, recentred, into the step's own."""
    tensor, group, i, own = _chunk(chunks, sizes, BLOCK, ALIGNED)
    n_chunks = tl.num_programs(0)
    turn = tl.load(step).to(tl.int32) % 2
    value = tl.load(_place(addresses, 0, tensor, tensors, i, ALIGNED), mask=own, other=0.0)
    anchor, fisher, lift, q_peak, inverse_tau = _term(
        addresses, tensor, tensors, i, own, group, constants, KIND, ALIGNED
    )
    centre = 0.0
    if RECENTRE:
        _, centre, _, _, _ = _carried(parts, centres, ranges, group, n_chunks, n_groups, 1 - turn, KIND, FOLD)
    else:
        turn = 1 - turn
    _write_parts(
        parts + turn * 4 * n_chunks, centres + turn * n_groups, ranges, group, value, anchor, fisher, lift, q_peak, own,
        inverse_tau, centre, KIND,
    )  # fmt: skip


@triton.jit
def _measure(
    addresses, sizes, chunks, ranges, constants, parts, centres, sums, step, strength, tensors, n_groups,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """A chunk's part of ||g + t||^2, ||g||^2, ||t||^2, <g, t> and ||v - a||^2, t the term's gradient."""
    tensor, group, i, own = _chunk(chunks, sizes, BLOCK, ALIGNED)
    n_chunks = tl.num_programs(0)
    turn = tl.load(step).to(tl.int32) % 2
    value = tl.load(_place(addresses, 0, tensor, tensors, i, ALIGNED), mask=own, other=0.0)
    grad = tl.load(_place(addresses, 1, tensor, tensors, i, ALIGNED), mask=own, other=0.0)
    anchor, fisher, lift, q_peak, inverse_tau = _term(
        addresses, tensor, tensors, i, own, group, constants, KIND, ALIGNED
    )
    centre, s0, s1, s2, h = _carried(parts, centres, ranges, group, n_chunks, n_groups, turn, KIND, FOLD)
    pull = tl.load(strength) * _pull(value, anchor, fisher, lift, q_peak, inverse_tau, centre, s0, s1, s2, h, KIND)
    pull = tl.where(own, pull, 0.0)
    entry = sums + 5 * tl.program_id(0)
    tl.store(entry, tl.sum((grad + pull) * (grad + pull)))
    tl.store(entry + 1, tl.sum(grad * grad))
    tl.store(entry + 2, tl.sum(pull * pull))
    tl.store(entry + 3, tl.sum(grad * pull))
    tl.store(entry + 4, tl.sum((value - anchor) * (value - anchor)))


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
        self._tables: dict[tuple[bool, bool], tuple[list[list[int]], Tensor, bool]] = {}
        self._versions: list[int] | None = None
        groups = [*range(len(self.parameters))] if term is None else term.group_of_each(len(self.parameters))
        self._lay_out(groups)
        self._strength = self._scalar(0.0 if term is None else term.strength)
        self._one = torch.ones((), device=self.device)
        self._constants = self._group_constants(groups)

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
        """Update parameters and moments in place; `step` float32 [] counts this one too. lr, clip: float32 []."""
        self.check_fresh()
        addresses, aligned = self._point(grads, first, second)
        rests = [1.0 - beta for beta in betas]
        logs = torch.tensor(betas, dtype=torch.float64).log().tolist()
        if self._n_chunks:
            with on_device_of(self._parts):
                _step[(self._n_chunks,)](
                    addresses, self._sizes, self._chunks, self._ranges, self._constants, self._parts, self._centres,
                    step, self._scalar(lr), self._strength, self._one if clip is None else self._scalar(clip),
                    len(self.parameters), self._n_groups, *betas, *rests, *logs, eps, weight_decay,
                    KIND=self._kind, COPY=self._copy, ALIGNED=aligned, BLOCK=BLOCK, FOLD=FOLD, num_warps=8,
                )  # fmt: skip
        written = [*self.parameters, *first, *second, *(self.copies or ())]
        torch.autograd.graph.increment_version(written)
        self._versions = [p._version for p in self.parameters]

    def refresh(self, step: Tensor) -> None:
        """Take the statistics at the parameters as they are, after `step` steps."""
        if self.term is None:
            return
        self._take(step, recentre=False)
        self._take(step, recentre=True)
        self._versions = [p._version for p in self.parameters]

    def _take(self, step: Tensor, recentre: bool) -> None:
        addresses, aligned = self._point()
        with on_device_of(self._parts):
            _refresh[(self._n_chunks,)](
                addresses, self._sizes, self._chunks, self._ranges, self._constants, self._parts, self._centres,
                step, len(self.parameters), self._n_groups,
                RECENTRE=recentre, KIND=self._kind, ALIGNED=aligned, BLOCK=BLOCK, FOLD=FOLD, num_warps=8,
            )  # fmt: skip

    def measure(self, grads: Sequence[Tensor], step: Tensor) -> Tensor:
        """||g + t||^2, ||g||^2, ||t||^2, <g, t>, ||v - a||^2 before a step, t the term's gradient: float64 [5]."""
        if self.term is None:
            raise ValueError("measure needs a term; without one the gradient's norm says it all")
        self.check_fresh()
        addresses, aligned = self._point(grads)
        sums = torch.empty(self._n_chunks, FIGURES, device=self.device)
        with on_device_of(self._parts):
            _measure[(self._n_chunks,)](
                addresses, self._sizes, self._chunks, self._ranges, self._constants, self._parts, self._centres,
                sums, step, self._strength, len(self.parameters), self._n_groups,
                KIND=self._kind, ALIGNED=aligned, BLOCK=BLOCK, FOLD=FOLD, num_warps=8,
            )  # fmt: skip
        return sums.double().sum(0)

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
        s0, s1, s2, h = self.statistics(step)[0].unbind(1)
        if self._kind != "kl":
            return s0
        unit = (-h).exp()
        total = unit * (1 + s0) + s1
        return (unit * s0 + s2) / total - torch.where(h == 0, torch.log1p(s0 + s1), total.log() + h)

    def changed(self) -> int | None:
        """The first parameter that changed since the statistics were taken, None where they hold."""
        known = self._versions
        if self.term is None or known is None:
            return None
        return next((i for i, p in enumerate(self.parameters) if p._version != known[i]), None)

    def check_fresh(self) -> None:
        """`RuntimeError` where the statistics do not hold."""
        if self.term is not None and self._versions is None:
            raise RuntimeError("the term's statistics were never taken: call refresh first")
        if (index := self.changed()) is not None:
            raise RuntimeError(
                f"parameter {index} changed since the term's statistics were taken: call refresh after any change"
            )

    def _check(self, name: str, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
        if len(tensors) != len(self.parameters):
            raise ValueError(f"{len(tensors)} {name} for {len(self.parameters)} parameters")
        for index, (tensor, parameter) in enumerate(zip(tensors, self.parameters, strict=True)):
            if tensor.device != self.device:
                raise ValueError(f"{name}[{index}] is on {tensor.device}, expected {self.device}")
            if tensor.dtype != dtype or tensor.shape != parameter.shape or not tensor.is_contiguous():
                kind = f"{tensor.dtype} {tuple(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
                raise ValueError(f"{name}[{index}] is {kind}, expected contiguous {dtype} {tuple(parameter.shape)}")

    def _point(
        self, grads: Sequence[Tensor] = (), first: Sequence[Tensor] = (), second: Sequence[Tensor] = ()
    ) -> tuple[Tensor, bool]:
        """The table of addresses, made anew where one changed, and whether all loads may be of 16 bytes."""
        term, none = self.term, [0] * len(self.parameters)
        rows = [
            [p.data_ptr() for p in self.parameters],
            *([t.data_ptr() for t in g] or none for g in (grads, first, second)),
        ]
        rows += [
            [t.data_ptr() for t in extra] if extra else none
            for extra in (term and term.anchors, term and term.fisher, self.copies)
        ]
        use = (bool(grads), bool(first))
        if use not in self._tables or self._tables[use][0] != rows:
            for name, tensors in (("grads", grads), ("first moments", first), ("second moments", second)):
                if tensors:
                    self._check(name, tensors)
            aligned = self._vector and all(address % 16 == 0 for row in rows for address in row)
            self._tables[use] = (rows, torch.tensor(rows, dtype=torch.int64).to(self.device), aligned)
        return self._tables[use][1:]

    def _scalar(self, value: float | Tensor) -> Tensor:
        """float32 [] on the parameters' device: a kernel reads an address, which of a CPU's scalar it cannot."""
        if not isinstance(value, Tensor):
            return torch.full((), value, device=self.device)
        return value.to(self.device, torch.float32)


def variants() -> "list[Variant]":
    """The calls that are compiled ahead of time."""
    from cladapt_kernels.aot import Variant

    def tensors(dtype: torch.dtype = torch.float32, size: int = 16384) -> list[Tensor]:
        return [torch.empty(size, dtype=dtype, device="meta") for _ in range(4)]

    def fused(kind: str, copy: torch.dtype | None = None, size: int = 16384) -> FusedStep:
        fisher = tensors(size=size) if kind == "fisher" else None
        term = None if kind == "none" else Term(kind, 1.0, tensors(size=size), fisher=fisher)
        return FusedStep(tensors(size=size), term, None if copy is None else tensors(copy, size))

    def step(kind: str, copy: torch.dtype | None = None, size: int = 16384) -> None:
        call = fused(kind, copy, size)
        call._versions = [p._version for p in call.parameters]
        grads, first, second = (tensors(size=size) for _ in range(3))
        call.step(grads, first, second, torch.empty((), device="meta"), 1e-3, weight_decay=0.01)

    def take(recentre: bool) -> None:
        fused("kl")._take(torch.empty((), device="meta"), recentre)

    def measure() -> None:
        call = fused("kl")
        call._versions = [p._version for p in call.parameters]
        call.measure(tensors(), torch.empty((), device="meta"))

    kinds = ("none", "kl", "l2", "fisher")
    return [
        *(Variant(f"adamw, {kind}", partial(step, kind)) for kind in kinds),
        Variant("adamw, kl, bf16 copies", partial(step, "kl", torch.bfloat16)),
        Variant("adamw, kl, odd sizes", partial(step, "kl", None, 16389)),
        Variant("adamw, refresh", partial(take, False)),
        Variant("adamw, refresh, recentred", partial(take, True)),
        Variant("adamw, measure", measure),
    ]
