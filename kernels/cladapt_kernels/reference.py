"""Plain-torch truth of every op: what a kernel must compute, in the dtype of its inputs, differentiable by hand.

A flat vector holds all groups one after another; `lengths` [G] int64 says how long each is.
"""

import torch
from torch import Tensor

LONG_GROUP = 4096  # entries per group from which, on a CPU, group by group in the cache beats one pass over all
LARGEST = 60.0  # of d whose exponential is taken as it is; float32's overflows at 88
PHILOX_ROUNDS = 10
AV_ROUNDING = 1e-6  # share of ||A||_F below which a singular value of A V is taken for rounding


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which entries of a [rows, columns] matrix dropout keeps: bool, each with probability 1 - p, from `seed` alone.

    Philox-4x32-10 at counter row * ceil(columns / 4) + column // 4, word column % 4, of which the top 24 bits decide.
    Salmon et al., Parallel random numbers: as easy as 1, 2, 3, section 4. `seed` int64 [1].
    """
    low = 0xFFFFFFFF
    per_row = -(-columns // 4)
    word = [torch.arange(rows * per_row, dtype=torch.int64, device=seed.device)]
    word[0] &= low
    word += [torch.zeros_like(word[0]) for _ in range(3)]
    key = [seed & low, (seed >> 32) & low]
    for _ in range(PHILOX_ROUNDS):
        first, third = word[0], word[2]
        word = [
            _high(0xCD9E8D57, third) ^ word[1] ^ key[0],
            (0xCD9E8D57 * third) & low,
            _high(0xD2511F53, first) ^ word[3] ^ key[1],
            (0xD2511F53 * first) & low,
        ]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    bits = torch.stack(word, dim=1).view(rows, 4 * per_row)[:, :columns]
    return (bits >> 8) >= drop_threshold(p)


def drop_threshold(p: float) -> int:
    """An entry whose 24 random bits are below this is dropped."""
    return round(p * 2**24)


def _high(a: int, b: Tensor) -> Tensor:
    """Upper 32 bits of the product of two unsigned 32-bit numbers held in int64."""
    return (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, keep: Tensor | None = None
) -> Tensor:
    """Frozen linear and LoRA: x [M, K] W^T [K, N] + bias + scale (keep * x) A^T B^T; A [r, K], B [N, r] -> [M, N].

    `scale` includes the 1 / (1 - p) of dropout. LoRA (arXiv 2106.09685), section 4.1.
    """
    dropped = x if keep is None else x * keep
    y = x @ weight.T + scale * (dropped @ a.T) @ b.T
    return y if bias is None else y + bias


def lora_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear`: with dS = scale dY B,  dX = dY W + keep * (dS A),  dA = dS^T (keep * X),
    dB = scale dY^T (keep * X) A^T.

    Args:
        grad: dY [M, N]; the others as of `lora_linear`.

    Returns:
        dX [M, K], dA [r, K], dB [N, r].
    """
    dropped = x if keep is None else x * keep
    inner = scale * grad @ b
    low_rank = inner @ a
    dx = grad @ weight + (low_rank if keep is None else keep * low_rank)
    return dx, inner.T @ dropped, scale * grad.T @ (dropped @ a.T)


def group_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum of each group: values [n], lengths [G] -> [G]; deterministic, ordered within a group."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def group_expand(values: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Repeat each group's value over its entries: values [G], lengths [G] -> [total]."""
    return torch.repeat_interleave(values, lengths, output_size=total)


def group_softmax(values: Tensor, lengths: Tensor) -> Tensor:
    """Softmax inside each group: values [n], lengths [G] -> [n]."""
    peak = torch.segment_reduce(values, "max", lengths=lengths, unsafe=True)
    exp = torch.exp(values - group_expand(peak, lengths, values.numel()))
    return exp / group_expand(group_sum(exp, lengths), lengths, values.numel())


def proximal_kl(
    value: Tensor, anchor: Tensor, anchor_p: Tensor, lengths: Tensor, inverse_tau: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(softmax(v/tau) || softmax(a/tau)) of each group and its gradient.

        d = (v - a) / tau;   d = d - E_q[d];   m = log E_q[exp d];   p = q exp(d - m)
        KL = E_p[d] - m;     dKL/dv = p (d - E_p[d]) / tau

    Centring d by the anchor's q = `anchor_p` leaves no first-order term to cancel, so float32 keeps its digits. Where d
    passes LARGEST in a group, what is beyond it is taken off all its d, which changes nothing else: exp would overflow.
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
    beyond = (torch.segment_reduce(d, "max", lengths=lengths, unsafe=True) - LARGEST).clamp_min(0.0)
    d = d - group_expand(beyond, lengths, total)
    log_mean = torch.log1p(group_sum(anchor_p * torch.expm1(d), lengths))
    p = anchor_p * torch.exp(d - group_expand(log_mean, lengths, total))
    mean = group_sum(p * d, lengths)
    return mean - log_mean, p * (d - group_expand(mean, lengths, total)) * scale


def _proximal_kl_group(value: Tensor, anchor: Tensor, anchor_p: Tensor, inverse_tau: Tensor) -> tuple[Tensor, Tensor]:
    d = (value - anchor).mul_(inverse_tau)
    d.sub_(torch.dot(anchor_p, d))
    d.sub_((d.max() - LARGEST).clamp_min(0.0))
    log_mean = torch.dot(anchor_p, torch.expm1(d)).log1p()
    p = (d - log_mean).exp_().mul_(anchor_p)
    mean = torch.dot(p, d)
    return mean - log_mean, d.sub_(mean).mul_(p).mul_(inverse_tau)


def proximal_statistics(
    value: Tensor, anchor: Tensor, anchor_p: Tensor, lengths: Tensor, inverse_tau: Tensor, weight: Tensor
) -> Tensor:
    """What `proximal_kl` needs to know of each group, [G, 6]: weight, 1/tau, log sum exp(a/tau), c, m, E_p[d].

    With them the gradient is elementwise: weight / tau * p (d - E_p[d]), d = (v - a) / tau - c,
    p = exp(a / tau - log sum + d - m). c is E_q[(v - a) / tau], and where d passes LARGEST what is beyond it too.
    """
    total = value.numel()
    scale = group_expand(inverse_tau, lengths, total)
    d = (value - anchor) * scale
    centre = group_sum(anchor_p * d, lengths)
    d = d - group_expand(centre, lengths, total)
    beyond = (torch.segment_reduce(d, "max", lengths=lengths, unsafe=True) - LARGEST).clamp_min(0.0)
    centre, d = centre + beyond, d - group_expand(beyond, lengths, total)
    log_mean = torch.log1p(group_sum(anchor_p * torch.expm1(d), lengths))
    mean = group_sum(anchor_p * torch.exp(d - group_expand(log_mean, lengths, total)) * d, lengths)
    peak = torch.segment_reduce(anchor * scale, "max", lengths=lengths, unsafe=True)
    log_sum = peak + group_sum(torch.exp(anchor * scale - group_expand(peak, lengths, total)), lengths).log()
    return torch.stack([weight.expand_as(mean), inverse_tau, log_sum, centre, log_mean, mean], dim=1)


def proximal_gradient(kind: str, value: Tensor, anchor: Tensor, statistics: Tensor) -> Tensor:
    """weight dR/dv of entries of one group, `kl` or `l2`, by its row of `proximal_statistics` [6]; of value's shape.

    The exponent is taken once: exp(a / tau - log sum) and exp(d - m) leave the range where p does not.
    """
    weight, inverse_tau, log_sum, centre, log_mean, mean = statistics.unbind()
    if kind == "l2":
        return weight * (value - anchor)
    d = (value - anchor) * inverse_tau - centre
    p = torch.exp(anchor * inverse_tau - log_sum + (d - log_mean))
    return weight * inverse_tau * p * (d - mean)


def proximal_l2(value: Tensor, anchor: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 ||v - a||^2 of each group [G] and its gradient v - a [n], of value, anchor [n] and lengths [G]."""
    d = value - anchor
    return 0.5 * group_sum(d * d, lengths), d


def proximal(
    kind: str,
    value: Tensor,
    anchor: Tensor,
    lengths: Tensor,
    inverse_tau: Tensor | None = None,
    fisher: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """R of each group [G] and its gradient [n]: `kl` (tau = 1 without `inverse_tau` [G]), `l2`, or `fisher`.

    R = 1/2 sum_i f_i (v_i - a_i)^2 with the diagonal `fisher` f [n].
    """
    if kind == "l2":
        return proximal_l2(value, anchor, lengths)
    if kind == "fisher" and fisher is not None:
        d = value - anchor
        return 0.5 * group_sum(fisher * d * d, lengths), fisher * d
    if kind != "kl":
        raise ValueError(f"term {kind!r}, expected kl, l2, or fisher with its diagonal")
    if inverse_tau is None:
        inverse_tau = torch.ones(lengths.numel(), dtype=value.dtype, device=value.device)
    anchor_p = group_softmax(anchor * group_expand(inverse_tau, lengths, anchor.numel()), lengths)
    return proximal_kl(value, anchor, anchor_p, lengths, inverse_tau)


def adamw(
    value: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW, the `step`-th from 1: the new value and moments, all [n].

        m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        value = (1 - lr wd) value - lr / (1 - b1^step) m / (sqrt(v / (1 - b2^step)) + eps)

    With a proximal term g is clip (grad + strength dR/dv), R of `proximal` at `value`. AdamW (arXiv 1711.05101).
    """
    first = betas[0] * first + (1 - betas[0]) * grad
    second = betas[1] * second + (1 - betas[1]) * grad * grad
    root = (second / (1 - betas[1] ** step)).sqrt() + eps
    value = value * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * first / root
    return value, first, second


def tangent(x: Tensor, d: Tensor, f: Tensor | None = None, kind: str = "symmetric") -> Tensor:
    """A direction D [n, r] as a tangent of the Stiefel manifold at X [n, r], orthogonal to F [n, k] where it is given.

    D' = (I - F F^T) D;  `symmetric`  D' - X sym(X^T D'), the projection in the Euclidean metric;
    `canonical`  D' - X D'^T X, the gradient in the canonical metric: it doubles rotations and is no projection.
    EBLoRA (arXiv 2602.00722), whose released code has the second.
    """
    if f is not None:
        d = d - f @ (f.mT @ d)
    inner = d.mT @ x if kind == "canonical" else 0.5 * (x.mT @ d + d.mT @ x)
    return d - x @ inner


def retract(x: Tensor, d: Tensor, f: Tensor | None = None, kind: str = "symmetric", gauge: str = "polar") -> Tensor:
    """The orthonormal matrix after a step D from X [n, r]: Y = X + tangent(D), then its polar factor or its Q.

    `polar`  U W^T of the SVD of Y, the nearest orthonormal matrix; `qr`  Q with a positive diagonal of R.
    """
    y = x + tangent(x, d, f, kind)
    if gauge == "qr":
        q, r = torch.linalg.qr(y)
        return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    u, _, w = torch.linalg.svd(y, full_matrices=False)
    return u @ w


def rectify(
    a: Tensor,
    b: Tensor,
    da: Tensor,
    db: Tensor,
    v: Tensor | None = None,
    form: str = "invariant",
    gauge: str = "zero",
    damping: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Steps X [r, n] and Y [m, r] in the place of dA and dB, so that B X + Y A leaves inputs along V [n, k] alone.

    With D = dA (I - V V^T), H = A (I - V V^T) A^T and K = B^+ dB

        X = D + K A (I - V V^T) + Z A,   Y = (I - B B^+) dB R - B Z,   T = (B dA + dB A) (I - V V^T)
        least_squares  R = H (A A^T)^{-1}: B X + Y A is T projected onto the tangent space of rank r at B A
        exact          N = I - A V (A V)^+, R = A A^T N (N A A^T N)^+, Z = Z N: the nearest to T with (B X + Y A) V = 0;
                       X V = 0 and Y A V = 0 each, so that ((B + Y) (A + X) - B A) V = 0
        invariant      A V = 0 is assumed, so that R = I and B X + Y A = T; (A + X) V = 0: rounding is taken off too

    Z [r, r] is free, B X + Y A is the same for any: `zero`;  `balanced`  -1/2 (B^+ B D A^T (A A^T)^{-1} + K R), each
    factor makes half of what both can;  `sylvester`  (B^T B) Z + Z (A A^T) = B^T Y - X A^T of Z = 0, for the least
    ||X||^2 + ||Y||^2 but for what of D B does not see. With `exact` both have N A for A.

    B^+ = (B^T B + damping tr(B^T B) / r I)^{-1} B^T, 0 where B = 0, and A A^T likewise; singular values of A V below
    AV_ROUNDING ||A||_F are 0. Re-derived: Janus-LoRA (arXiv 2605.28495) says in words what it rectifies; the last gauge
    is LoRA-Pro's (arXiv 2407.18242).
    """
    v = a.new_zeros(a.shape[1], 0) if v is None else v
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    av, outside, gram_a, gram_b = a @ v, a - (a @ v) @ v.mT, a @ a.mT, b.mT @ b
    d, n, ridge = da - (da @ v) @ v.mT, eye, _ridge(gram_a, damping) * eye
    if form == "exact":
        n = eye - av @ torch.linalg.pinv(av, atol=AV_ROUNDING * a.norm().item(), rtol=0.0)
        inverse_a = n @ torch.linalg.inv(n @ gram_a @ n + ridge + gram_a.trace() * (eye - n)) @ n
        r = n + (eye - n) @ gram_a @ inverse_a
    else:
        inverse_a = torch.linalg.inv(gram_a + ridge)
        r = eye - av @ av.mT @ inverse_a if form == "least_squares" else eye
    inverse_b = torch.linalg.inv(gram_b + _ridge(gram_b, damping) * eye)
    k, seen = inverse_b @ (b.mT @ db), inverse_b @ gram_b @ d
    y = (db - b @ k) @ r
    if gauge == "balanced":
        z = -0.5 * (seen @ a.mT @ inverse_a + k @ r)
    elif gauge == "sylvester":
        right = (b.mT @ y - (seen + k @ outside) @ a.mT) @ n
        z = _sylvester(gram_b + _ridge(gram_b, damping) * eye, n @ gram_a @ n + ridge, right) @ n
    else:
        z = torch.zeros_like(eye)
    x = d + k @ outside + z @ a
    return x - ((a + x) @ v) @ v.mT if form == "invariant" else x, y - b @ z


def _ridge(gram: Tensor, damping: float) -> Tensor:
    """damping tr(G) / r; 1 where G = 0, so that it has an inverse."""
    trace = gram.trace()
    return torch.where(trace > 0, damping * trace / len(gram), 1.0)


def _sylvester(left: Tensor, right: Tensor, c: Tensor) -> Tensor:
    """Z of left Z + Z right = C, both symmetric."""
    (first, p), (second, q) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    return p @ ((p.mT @ c @ q) / (first[:, None] + second)) @ q.mT
