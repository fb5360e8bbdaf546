"""The LoRA linear as GEMMs with the low-rank term inside: `seeded` in two launches with `shrink`, `strip` in one.

    seeded     Y = scale keep * (S U) + bias + X W     S is given; the accumulator starts from the low-rank term
    described  the same, whose tiles of X, W and Y are moved by the copy engine of sm_90 and later
    strip      the same, and S = inner_scale (keep * X) A^T is made on the way, so X is read once

Forward: W^T and U = B^T. Gradient of X: W and U = A, where the strip's S is dS = scale dY B. A strip is a block of rows
and every g-th tile of columns: its first tile multiplies each block of X by W and by A, S stays on the chip for all its
tiles; g strips to a block of rows cost g r / N more operations. Seeding: LoRAFusion (arXiv 2510.00206), section 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cladapt_kernels.descriptors import describable, describe
from cladapt_kernels.reference import drop_threshold
from cladapt_kernels.tiles import (
    capability,
    grouped_tile,
    keep_tile,
    load_tile,
    padded,
    processors,
    store_tile,
    widened,
)

# by rule: the largest that fit and spill nowhere; on an H200 WIDE and SQUARE were timed as they are (bench/LOG.md)
GROUP = 8
FEW_ROWS = 2048
WIDE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
SQUARE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
SMALL = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
NARROW = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
# float32, which tensor cores would round; with three stages Triton 3.9 spills a register, with two 3.7.1 does
EXACT = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4}
EXACT_STRIP = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


@triton.jit
def _low_rank(
    low, u, seed, row, column, n, r, stride_ur, stride_un, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """scale keep * (S U) of one tile, in float32."""
    up = load_tile(u, 0, column, r, n, stride_ur, stride_un, BLOCK_R, BLOCK_N).to(low.dtype)
    term = tl.full((), scale, tl.float32) * tl.dot(low, up, input_precision="ieee")
    if DROPOUT:
        keep = keep_tile(tl.load(seed), row, column, n, threshold, BLOCK_M, BLOCK_N)
        term = tl.where(keep, term, 0.0)
    return term


@triton.jit
def _product(
    x, w, total, row, column, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + X W of one tile."""
    for inner in range(0, k, BLOCK_K):
        left = load_tile(x, row, inner, m, k, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
        right = load_tile(w, inner, column, k, n, stride_wk, stride_wn, BLOCK_K, BLOCK_N)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _biased(total, bias, column, n, BLOCK_N: tl.constexpr):
    columns = column + tl.arange(0, BLOCK_N)
    return total + tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _finish(total, bias, y, row, column, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr):
    """Add the bias and store."""
    if BIAS:
        total = _biased(total, bias, column, n, BLOCK_N)
    store_tile(y, total, row, column, m, n, n, 1, BLOCK_M, BLOCK_N)


@triton.jit
def _seeded(
    x, w, s, u, bias, y, seed, m, n, k, r,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_ur, stride_un, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    DROPOUT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    low = load_tile(s, row, 0, m, r, r, 1, BLOCK_M, BLOCK_R)
    total = _low_rank(
        low, u, seed, row, column, n, r, stride_ur, stride_un, scale, threshold, BLOCK_M, BLOCK_N, BLOCK_R, DROPOUT
    )
    total = _product(
        x, w, total, row, column, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    _finish(total, bias, y, row, column, m, n, BLOCK_M, BLOCK_N, BIAS)


@triton.jit
def _described(
    x, w, s, u, bias, y, seed, m, n, k, r, stride_ur, stride_un, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """x, w and y are descriptors: w of W, or of W^T where TRANSPOSED."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    low = load_tile(s, row, 0, m, r, r, 1, BLOCK_M, BLOCK_R)
    total = _low_rank(
        low, u, seed, row, column, n, r, stride_ur, stride_un, scale, threshold, BLOCK_M, BLOCK_N, BLOCK_R, DROPOUT
    )
    for inner in range(0, k, BLOCK_K):
        left = x.load([row, inner])
        if TRANSPOSED:  # noqa: SIM108 - settled as the kernel is compiled
            right = w.load([column, inner]).T
        else:
            right = w.load([inner, column])
        total = tl.dot(left, right, total)
    if BIAS:
        total = _biased(total, bias, column, n, BLOCK_N)
    y.store([row, column], total.to(x.dtype))


@triton.jit
def _strip(
    x, w, a, u, bias, y, s, seed, m, n, k, r, strips,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_ar, stride_ak, stride_ur, stride_un,
    scale, inner_scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROP_X: tl.constexpr, DROP_Y: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // strips) * BLOCK_M
    strip = tl.program_id(0) % strips
    column = strip * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    inner_total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for inner in range(0, k, BLOCK_K):
        left = load_tile(x, row, inner, m, k, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
        right = load_tile(w, inner, column, k, n, stride_wk, stride_wn, BLOCK_K, BLOCK_N)
        down = load_tile(a, inner, 0, k, r, stride_ak, stride_ar, BLOCK_K, BLOCK_R).to(left.dtype)
        total = tl.dot(left, right, total, input_precision="ieee")
        if DROP_X:
            left = tl.where(keep_tile(tl.load(seed), row, inner, k, threshold, BLOCK_M, BLOCK_K), left, 0.0)
        inner_total = tl.dot(left, down, inner_total, input_precision="ieee")
    low = (inner_total * tl.full((), inner_scale, tl.float32)).to(s.dtype.element_ty)
    if strip == 0:
        store_tile(s, low, row, 0, m, r, r, 1, BLOCK_M, BLOCK_R)
    total += _low_rank(
        low, u, seed, row, column, n, r, stride_ur, stride_un, scale, threshold, BLOCK_M, BLOCK_N, BLOCK_R, DROP_Y
    )
    _finish(total, bias, y, row, column, m, n, BLOCK_M, BLOCK_N, BIAS)
    for tile in range(strip + strips, tl.cdiv(n, BLOCK_N), strips):
        column = tile * BLOCK_N
        total = _low_rank(
            low, u, seed, row, column, n, r, stride_ur, stride_un, scale, threshold, BLOCK_M, BLOCK_N, BLOCK_R, DROP_Y
        )
        total = _product(
            x, w, total, row, column, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
        _finish(total, bias, y, row, column, m, n, BLOCK_M, BLOCK_N, BIAS)


def seeded(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    u: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """scale keep * (s u) + bias + x w.

    Args:
        x, w: [M, K], [K, N] of one dtype, any strides.
        s, u: [M, r] of that dtype, contiguous; [r, N], cast to it on load.
        bias: [N].
        p, seed: dropout of the low-rank term, drawn from `seed` int64 [1].

    Returns:
        [M, N] of x's dtype.
    """
    (m, k), (r, n) = x.shape, u.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tile = _seeded_tile(x, r, dropout=p > 0)
    if y.numel():
        u = widened(x, u)
        _seeded[(triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"]),)](
            x=x, w=w, s=s, u=u, bias=bias, y=y, seed=seed, m=m, n=n, k=k, r=r,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wk=w.stride(0), stride_wn=w.stride(1),
            stride_ur=u.stride(0), stride_un=u.stride(1), scale=scale, threshold=drop_threshold(p),
            **tile, BLOCK_R=padded(r), GROUP=GROUP, DROPOUT=p > 0, BIAS=bias is not None,
        )  # fmt: skip
    return y


def described(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    u: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`seeded`, its arguments and its result, by descriptors; `seeded` itself where x or w is not `describable`."""
    (m, k), (r, n) = x.shape, u.shape
    transposed = w.stride(1) != 1
    stored = w.T if transposed else w
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not describable(x, stored, y):
        return seeded(x, w, s, u, scale, bias, p, seed)
    tile = _described_tile(x, n, r, dropout=p > 0)
    rows, columns, depth = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    _described[(triton.cdiv(m, rows) * triton.cdiv(n, columns),)](
        x=describe(x, rows, depth), w=describe(stored, *((columns, depth) if transposed else (depth, columns))),
        s=s, u=u, bias=bias, y=describe(y, rows, columns), seed=seed, m=m, n=n, k=k, r=r,
        stride_ur=u.stride(0), stride_un=u.stride(1), scale=scale, threshold=drop_threshold(p),
        **tile, BLOCK_R=padded(r), GROUP=GROUP, TRANSPOSED=transposed, DROPOUT=p > 0, BIAS=bias is not None,
    )  # fmt: skip
    return y


def strip(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    u: Tensor,
    scale: float = 1.0,
    inner_scale: float = 1.0,
    bias: Tensor | None = None,
    drop_x: float = 0.0,
    drop_y: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """s = inner_scale (keep * x) a^T and `seeded` of it.

    Args:
        x, w: [M, K], [K, N] of one dtype, any strides.
        a, u: [r, K], [r, N], cast to that dtype on load.
        bias: [N].
        drop_x, drop_y, seed: dropout of x on its way into s, of the low-rank term; one of them at most is above 0.

    Returns:
        [M, N] and s [M, r] of x's dtype.
    """
    (m, k), (r, n) = x.shape, u.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    s = torch.empty(m, r, dtype=x.dtype, device=x.device)
    tile = _strip_tile(x, masks_y=drop_y > 0)
    if y.numel():
        blocks, tiles = triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"])
        a, u = widened(x, a), widened(x, u)
        strips = min(max(1, processors(x.device) // blocks), tiles)
        _strip[(blocks * strips,)](
            x=x, w=w, a=a, u=u, bias=bias, y=y, s=s, seed=seed, m=m, n=n, k=k, r=r, strips=strips,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wk=w.stride(0), stride_wn=w.stride(1),
            stride_ar=a.stride(0), stride_ak=a.stride(1), stride_ur=u.stride(0), stride_un=u.stride(1),
            scale=scale, inner_scale=inner_scale, threshold=drop_threshold(max(drop_x, drop_y)),
            **tile, BLOCK_R=padded(r),
            DROP_X=drop_x > 0, DROP_Y=drop_y > 0, BIAS=bias is not None,
        )  # fmt: skip
    return y, s


def _seeded_tile(x: Tensor, r: int, dropout: bool) -> dict[str, int]:
    if x.element_size() == 4:
        return EXACT
    if x.shape[0] < FEW_ROWS:
        return SMALL
    # a mask over 256 columns or an Ampere's registers would spill, a high rank would not fit shared memory
    return SQUARE if dropout or r > 64 or capability(x.device) < 90 else WIDE


def _described_tile(x: Tensor, n: int, r: int, dropout: bool) -> dict[str, int]:
    wide = triton.cdiv(x.shape[0], WIDE["BLOCK_M"]) * triton.cdiv(n, WIDE["BLOCK_N"])
    # fewer wide tiles than processors leave some idle; a mask over 256 columns would spill, a high rank would not fit
    return SQUARE if dropout or r > 64 or wide < processors(x.device) else WIDE


def _strip_tile(x: Tensor, masks_y: bool) -> dict[str, int]:
    if x.element_size() == 4:
        return EXACT_STRIP
    # two accumulators: a tile of 256 columns spills everywhere, one of 128 where a mask or Ampere takes registers
    return NARROW if masks_y or capability(x.device) < 90 else SQUARE
