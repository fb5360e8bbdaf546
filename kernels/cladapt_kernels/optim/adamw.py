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

import triton
import triton.language as tl


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
def _before_step(
    addresses, tensor, tensors, i, own, group, ranges, constants, parts, centres, step, strength, n_groups,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Value, anchor, gradient and the term's gradient of a chunk."""
    n_chunks = tl.num_programs(0)
    turn = tl.load(step).to(tl.int32) % 2
    value = tl.load(_place(addresses, 0, tensor, tensors, i, ALIGNED), mask=own, other=0.0)
    grad = tl.load(_place(addresses, 1, tensor, tensors, i, ALIGNED), mask=own, other=0.0)
    anchor, fisher, lift, q_peak, inverse_tau = _term(
        addresses, tensor, tensors, i, own, group, constants, KIND, ALIGNED
    )
    centre, s0, s1, s2, h = _carried(parts, centres, ranges, group, n_chunks, n_groups, turn, KIND, FOLD)
    pull = tl.load(strength) * _pull(value, anchor, fisher, lift, q_peak, inverse_tau, centre, s0, s1, s2, h, KIND)
    return value, anchor, grad, pull


@triton.jit
def _measure(
    addresses, sizes, chunks, ranges, constants, parts, centres, sums, step, strength, tensors, n_groups,
    INCLUDED: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """A chunk's part of ||g + t||^2, ||g||^2, ||t||^2, <g, t> and ||v - a||^2, t the term's gradient.

    Where it is INCLUDED the gradients that are given are g + t.
    """
    tensor, group, i, own = _chunk(chunks, sizes, BLOCK, ALIGNED)
    value, anchor, grad, pull = _before_step(
        addresses, tensor, tensors, i, own, group, ranges, constants, parts, centres, step, strength, n_groups,
        KIND, ALIGNED, FOLD,
    )  # fmt: skip
    pull = tl.where(own, pull, 0.0)
    if INCLUDED:
        grad -= pull
    entry = sums + 5 * tl.program_id(0)
    tl.store(entry, tl.sum((grad + pull) * (grad + pull)))
    tl.store(entry + 1, tl.sum(grad * grad))
    tl.store(entry + 2, tl.sum(pull * pull))
    tl.store(entry + 3, tl.sum(grad * pull))
    tl.store(entry + 4, tl.sum((value - anchor) * (value - anchor)))


@triton.jit
def _add(
    addresses, sizes, chunks, ranges, constants, parts, centres, step, strength, tensors, n_groups,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Add the term's gradient to the gradients that have an address."""
    tensor, group, i, own = _chunk(chunks, sizes, BLOCK, ALIGNED)
    own &= tl.full((BLOCK,), tl.load(addresses + tensors + tensor), tl.int64) != 0
    _, _, grad, pull = _before_step(
        addresses, tensor, tensors, i, own, group, ranges, constants, parts, centres, step, strength, n_groups,
        KIND, ALIGNED, FOLD,
    )  # fmt: skip
    tl.store(_place(addresses, 1, tensor, tensors, i, ALIGNED), grad + pull, mask=own)
