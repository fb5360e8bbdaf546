"""Kernels of the linear whose tokens lie in runs of one item each: gradients by item, and products perturbed by them.

    factors  G_A,i = dS^T (keep * X), G_B,i = scale dY^T S over the rows of item i; their squared norms, their sums
    shrink   S' = scale (keep * X) (A + kappa_i G_A,i)^T
    seeded   Y = scale keep * (S' (U + kappa_i G_i)) + bias + X W

In `factors` a program sums one strip of columns over all runs of one item, so its workspace, float32 [items, r, K + N],
is what is asked for, and its sum over the items is the ordinary gradient. In the others a tile of rows ends where its
run does, so it has one item; A + kappa G is never formed: in 16 bits G would be lost in A's rounding. Gradients by
sample as by-products: arXiv 2411.00999; products by segment: arXiv 2310.18547.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from cladapt_kernels.lora import gemm, skinny
from cladapt_kernels.lora.gemm import _finish
from cladapt_kernels.lora.gemm import _product as _plus_product
from cladapt_kernels.lora.skinny import _product as _plus_rows
from cladapt_kernels.reference import drop_threshold
from cladapt_kernels.tiles import capability, grouped_tile, keep_tile, load_tile, padded, store_tile, widened

BLOCK_M = 64  # of `shrink`; by rule, as all tiles here, timed on no GPU
STAGES = 3
MORE_WARPS = {"num_warps": 8}  # for a loop of runs around that of `skinny`
HIGH = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
Table = Callable[[int], Tensor]
"""`Runs.tiles`: tiles of at most so many rows of one run each, as first row, one beyond the last, item."""


@triton.jit
def _of_runs(
    narrow, wide, bounds, begin, end, seed, column, r, width, stride_wm, stride_wc, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """narrow^T (keep * wide) over the rows of the runs from `begin` to `end`, in float32."""
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for run in range(begin, end):
        first, last = tl.load(bounds + 2 * run), tl.load(bounds + 2 * run + 1)
        total = _plus_rows(
            narrow, wide, total, seed, first, last, column, r, width, stride_wm, stride_wc, threshold,
            BLOCK_M, BLOCK_C, BLOCK_R, DROPOUT,
        )  # fmt: skip
    return total


@triton.jit
def _factors_by_item(
    ds, x, s, dy, sums, squares, bounds, offsets, seed, k, n, r, stride_xm, stride_xk, stride_dym, stride_dyn,
    scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    strip, item = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(offsets + item), tl.load(offsets + item + 1)
    sums += tl.full((), item, tl.int64) * r * (k + n)
    x_strips = tl.cdiv(k, BLOCK_C)
    if strip < x_strips:
        column = strip * BLOCK_C
        total = _of_runs(
            ds, x, bounds, begin, end, seed, column, r, k, stride_xm, stride_xk, threshold,
            BLOCK_M, BLOCK_C, BLOCK_R, DROPOUT,
        )  # fmt: skip
        store_tile(sums, total, 0, column, r, k, k + n, 1, BLOCK_R, BLOCK_C)
    else:
        column = (strip - x_strips) * BLOCK_C
        total = _of_runs(
            s, dy, bounds, begin, end, seed, column, r, n, stride_dym, stride_dyn, threshold,
            BLOCK_M, BLOCK_C, BLOCK_R, False,
        )  # fmt: skip
        total *= tl.full((), scale, tl.float32)
        store_tile(sums + k, total, 0, column, r, n, k + n, 1, BLOCK_R, BLOCK_C)
    # what lies outside is zero: its loads were
    tl.store(squares + item * tl.num_programs(0) + strip, tl.sum(total * total))


@triton.jit
def _of_tile(table, tile):
    """First row, one beyond the last, and item of a tile."""
    return tl.load(table + 3 * tile), tl.load(table + 3 * tile + 1), tl.load(table + 3 * tile + 2)


@triton.jit
def _shrink_by_item(
    x, a, own, kappa, table, s, seed, k, r,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_oi, stride_or, stride_ok, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    row, last, item = _of_tile(table, tl.program_id(0))
    own += item.to(tl.int64) * stride_oi
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    moved = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for column in range(0, k, BLOCK_K):
        wide = load_tile(x, row, column, last, k, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
        if DROPOUT:
            wide = tl.where(keep_tile(tl.load(seed), row, column, k, threshold, BLOCK_M, BLOCK_K), wide, 0.0)
        down = load_tile(a, column, 0, k, r, stride_ak, stride_ar, BLOCK_K, BLOCK_R).to(wide.dtype)
        total = tl.dot(wide, down, total, input_precision="ieee")
        step = load_tile(own, column, 0, k, r, stride_ok, stride_or, BLOCK_K, BLOCK_R).to(wide.dtype)
        moved = tl.dot(wide, step, moved, input_precision="ieee")
    total = (total + tl.load(kappa + item) * moved) * tl.full((), scale, tl.float32)
    store_tile(s, total, row, 0, last, r, r, 1, BLOCK_M, BLOCK_R)


@triton.jit(do_not_specialize=["tiles"])
def _seeded_by_item(
    x, w, s, u, own, kappa, table, bias, y, seed, tiles, n, k, r,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_ur, stride_un, stride_oi, stride_or, stride_on, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    DROPOUT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    tile, strip = grouped_tile(tl.program_id(0), tiles, tl.cdiv(n, BLOCK_N), GROUP)
    row, last, item = _of_tile(table, tile)
    column = strip * BLOCK_N
    low = load_tile(s, row, 0, last, r, r, 1, BLOCK_M, BLOCK_R)
    own += item.to(tl.int64) * stride_oi
    step = load_tile(own, 0, column, r, n, stride_or, stride_on, BLOCK_R, BLOCK_N).to(low.dtype)
    total = tl.load(kappa + item) * tl.dot(low, step, input_precision="ieee")
    up = load_tile(u, 0, column, r, n, stride_ur, stride_un, BLOCK_R, BLOCK_N).to(low.dtype)
    total = tl.dot(low, up, total, input_precision="ieee") * tl.full((), scale, tl.float32)
    if DROPOUT:
        keep = keep_tile(tl.load(seed), row, column, n, threshold, BLOCK_M, BLOCK_N)
        total = tl.where(keep, total, 0.0)
    total = _plus_product(
        x, w, total, row, column, last, n, k, stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    _finish(total, bias, y, row, column, last, n, BLOCK_M, BLOCK_N, BIAS)


def factors(
    ds: Tensor,
    x: Tensor,
    s: Tensor,
    dy: Tensor,
    scale: float,
    da: Tensor,
    db: Tensor,
    bounds: Tensor,
    offsets: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write da = ds^T (keep * x) and db = scale dy^T s, and return what the rows of each item add to them.

    Args:
        ds, s: [M, r], contiguous, of the dtype of x and dy.
        x, dy: [M, K], [M, N], any strides.
        da, db: [r, K], [N, r], contiguous: what is written.
        bounds: int32 [T, 2]: first row and one beyond the last of each run, sorted by item.
        offsets: int32 [items + 1]: the runs of item i are offsets[i] to offsets[i + 1]; they may be none.
        p, seed: dropout of x, drawn from `seed` int64 [1].

    Returns:
        G_A,i and G_B,i^T side by side: float32 [items, r, K + N]; their squared norms float32 [items].
    """
    k, n, r, items = x.shape[1], dy.shape[1], ds.shape[1], len(offsets) - 1
    tile = skinny.tile_of(x, r) | MORE_WARPS
    strips = skinny.strips_of(k, n, tile)
    sums = torch.empty(items, r, k + n, dtype=torch.float32, device=x.device)
    squares = torch.empty(items, strips, dtype=torch.float32, device=x.device)
    _factors_by_item[(strips, items)](
        ds=ds, x=x, s=s, dy=dy, sums=sums, squares=squares, bounds=bounds, offsets=offsets, seed=seed, k=k, n=n, r=r,
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_dym=dy.stride(0), stride_dyn=dy.stride(1),
        scale=scale, threshold=drop_threshold(p), **tile, BLOCK_R=padded(r), DROPOUT=p > 0,
    )  # fmt: skip
    skinny.fold(sums, da, db)
    return sums, squares.sum(1)


def shrink(
    x: Tensor,
    a: Tensor,
    own: Tensor,
    kappa: Tensor,
    table: Table,
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """scale (keep * x) (a + kappa_i own_i)^T of the rows of each item i.

    Args:
        x: [M, K], any strides.
        a: [r, K], any strides; cast to x's dtype on load.
        own: float32 [items, r, K], any strides; cast as a.
        kappa: float32 [items].
        table: tiles of runs int32 [tiles, 3] that cover the rows.
        p, seed: dropout of x, drawn from `seed` int64 [1].

    Returns:
        [M, r] of x's dtype.
    """
    (m, k), r, tiles = x.shape, a.shape[0], table(BLOCK_M)
    s = torch.empty(m, r, dtype=x.dtype, device=x.device)
    if len(tiles):
        a = widened(x, a)
        _shrink_by_item[(len(tiles),)](
            x=x, a=a, own=own, kappa=kappa, table=tiles, s=s, seed=seed, k=k, r=r,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_ar=a.stride(0), stride_ak=a.stride(1),
            **_strides(own, "rk"), scale=scale, threshold=drop_threshold(p),
            BLOCK_M=BLOCK_M, **_shrink_tile(x, r, p > 0), BLOCK_R=padded(r), DROPOUT=p > 0, num_stages=STAGES,
        )  # fmt: skip
    return s


def seeded(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    u: Tensor,
    own: Tensor,
    kappa: Tensor,
    table: Table,
    scale: float = 1.0,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """scale keep * (s (u + kappa_i own_i)) + bias + x w of the rows of each item i.

    Args:
        x, w: [M, K], [K, N] of one dtype, any strides.
        s, u: [M, r] of that dtype, contiguous; [r, N], cast to it on load.
        own: float32 [items, r, N], any strides; cast as u.
        kappa: float32 [items].
        table: tiles of runs int32 [tiles, 3] that cover the rows.
        bias: [N].
        p, seed: dropout of the low-rank term, drawn from `seed` int64 [1].

    Returns:
        [M, N] of x's dtype.
    """
    (m, k), (r, n) = x.shape, u.shape
    tile = _seeded_tile(x, r)
    y, tiles = torch.empty(m, n, dtype=x.dtype, device=x.device), table(tile["BLOCK_M"])
    if len(tiles):
        u = widened(x, u)
        _seeded_by_item[(len(tiles) * triton.cdiv(n, tile["BLOCK_N"]),)](
            x=x, w=w, s=s, u=u, own=own, kappa=kappa, table=tiles, bias=bias, y=y, seed=seed,
            tiles=len(tiles), n=n, k=k, r=r,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wk=w.stride(0), stride_wn=w.stride(1),
            stride_ur=u.stride(0), stride_un=u.stride(1), **_strides(own, "rn"),
            scale=scale, threshold=drop_threshold(p),
            **tile, BLOCK_R=padded(r), GROUP=gemm.GROUP, DROPOUT=p > 0, BIAS=bias is not None,
        )  # fmt: skip
    return y


def _strides(own: Tensor, names: str) -> dict[str, int]:
    return {f"stride_o{name}": stride for name, stride in zip(f"i{names}", own.stride(), strict=True)}


def _shrink_tile(x: Tensor, r: int, dropout: bool) -> dict[str, int]:
    """By rule, what no Triton of the matrix spills or serializes: float32 is summed outside of tensor cores."""
    wide = x.element_size() == 4
    block = 32 if dropout or r > 64 or (wide and r > 32) else 64 if wide or r > 32 else 128
    return {"BLOCK_K": block, "num_warps": 8 if r > 64 or (wide and (r > 32 or capability(x.device) < 100)) else 4}


def _seeded_tile(x: Tensor, r: int) -> dict[str, int]:
    """Rows of a run are few: a tile of more rows or columns is not wanted, with high ranks one of fewer rows."""
    return gemm.EXACT if x.element_size() == 4 else gemm.SQUARE if r <= 64 else HIGH
