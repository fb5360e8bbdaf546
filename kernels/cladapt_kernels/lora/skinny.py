"""dA = dS^T (keep * X) and dB = scale dY^T S: two tall matrices read once, deterministic.

`skinny`: a program sums one chunk of rows of one strip of columns of X or dY into a float32 workspace
[chunks, r, K + N]; a second launch folds the chunks in order and adds a proximal gradient.

`single`: the two gradients alone in one launch. Whichever program of a strip is the last to be ready, which a counter
tells, folds the strip's chunks in order.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cladapt_kernels.optim.proximal import Pull
from cladapt_kernels.reference import drop_threshold
from cladapt_kernels.tiles import keep_tile, load_tile, padded, processors, store_tile

BLOCK_M, BLOCK_FOLD = 64, 1024
WIDE = {"BLOCK_M": 64, "BLOCK_C": 128, "num_warps": 4, "num_stages": 4}
HIGH = {"BLOCK_M": 32, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3}  # ranks whose sums would fill the registers
EXACT = {"BLOCK_M": 32, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1}  # float32, which tensor cores would round
CHUNKS = 8  # all of these by rule: they spill nowhere; on an H200 WIDE was timed at rank 16, against no other
FEWEST_ROWS = 256  # of a chunk
CROWD = 2  # programs per multiprocessor that `single` aims at


@triton.jit
def _product(
    narrow, wide, total, seed, first, last, column, r, width, stride_wm, stride_wc, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """total + narrow^T (keep * wide) over the rows from `first` to `last` and the columns from `column`, in float32."""
    for row in range(first, last, BLOCK_M):
        right = load_tile(wide, row, column, last, width, stride_wm, stride_wc, BLOCK_M, BLOCK_C)
        if DROPOUT:
            right = tl.where(keep_tile(tl.load(seed), row, column, width, threshold, BLOCK_M, BLOCK_C), right, 0.0)
        left = load_tile(narrow, 0, row, r, last, 1, r, BLOCK_R, BLOCK_M)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _partial(
    ds, x, s, dy, sums, seed, m, k, n, r, chunk_rows, stride_xm, stride_xk, stride_dym, stride_dyn, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    strip, chunk = tl.program_id(0), tl.program_id(1)
    first = chunk * chunk_rows
    last = min(first + chunk_rows, m)
    workspace = sums + tl.full((), chunk, tl.int64) * r * (k + n)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    x_strips = tl.cdiv(k, BLOCK_C)
    if strip < x_strips:
        column = strip * BLOCK_C
        total = _product(
            ds, x, total, seed, first, last, column, r, k, stride_xm, stride_xk, threshold,
            BLOCK_M, BLOCK_C, BLOCK_R, DROPOUT,
        )  # fmt: skip
        store_tile(workspace, total, 0, column, r, k, k + n, 1, BLOCK_R, BLOCK_C)
    else:
        column = (strip - x_strips) * BLOCK_C
        total = _product(
            s, dy, total, seed, first, last, column, r, n, stride_dym, stride_dyn, threshold,
            BLOCK_M, BLOCK_C, BLOCK_R, False,
        )  # fmt: skip
        total *= tl.full((), scale, tl.float32)
        store_tile(workspace + k, total, 0, column, r, n, k + n, 1, BLOCK_R, BLOCK_C)


@triton.jit
def _fold(
    sums, da, db, a, b, anchor_a, anchor_b, statistics, stride_statistics, chunks, k, n, r,
    BLOCK: tl.constexpr, PROXIMAL: tl.constexpr,
):  # fmt: skip
    """Programs of row 0 finish dA [r, K], those of row 1 dB [N, r], stored transposed."""
    up = tl.program_id(1)
    width = tl.where(up == 0, k, n)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rank, column = i // width, i % width
    own = i < r * width
    total = tl.zeros((BLOCK,), tl.float32)
    source = sums + rank.to(tl.int64) * (k + n) + column + tl.where(up == 0, 0, k)
    for _ in range(chunks):
        total += tl.load(source, mask=own, other=0.0)
        source += r * (k + n)
    down, up_own = i < tl.where(up == 0, r * k, 0), i < tl.where(up == 0, 0, r * n)
    place = tl.where(up == 0, i, column * r + rank)
    if PROXIMAL != "none":
        value = tl.load(a + place, mask=down, other=0.0).to(tl.float32)
        value += tl.load(b + place, mask=up_own, other=0.0).to(tl.float32)
        anchor = tl.load(anchor_a + place, mask=down, other=0.0) + tl.load(anchor_b + place, mask=up_own, other=0.0)
        statistics += stride_statistics * up
        weight = tl.load(statistics)
        if PROXIMAL == "l2":
            total += weight * (value - anchor)
        else:
            inverse_tau, log_sum = tl.load(statistics + 1), tl.load(statistics + 2)
            centre, log_mean = tl.load(statistics + 3), tl.load(statistics + 4)
            d = (value - anchor) * inverse_tau - centre
            p = tl.exp(anchor * inverse_tau - log_sum + (d - log_mean))  # of two, one may leave the range
            total += weight * inverse_tau * p * (d - tl.load(statistics + 5))
    tl.store(da + place, total.to(da.dtype.element_ty), mask=down)
    tl.store(db + place, total.to(db.dtype.element_ty), mask=up_own)


@triton.jit(do_not_specialize=["chunks", "chunk_rows"])
def _single(
    ds, x, s, dy, sums, counters, da, db, seed, m, k, n, r, chunks, chunk_rows,
    stride_xm, stride_xk, stride_dym, stride_dyn, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The workspace is [strips, chunks, BLOCK_R, BLOCK_C]; the counters are zeros before and after."""
    strip, chunk = tl.program_id(0), tl.program_id(1)
    first = chunk * chunk_rows
    last = min(first + chunk_rows, m)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    x_strips = tl.cdiv(k, BLOCK_C)
    if strip < x_strips:
        column = strip * BLOCK_C
        total = _product(
            ds, x, total, seed, first, last, column, r, k, stride_xm, stride_xk, threshold,
            BLOCK_M, BLOCK_C, BLOCK_R, DROPOUT,
        )  # fmt: skip
    else:
        column = (strip - x_strips) * BLOCK_C
        total = _product(
            s, dy, total, seed, first, last, column, r, n, stride_dym, stride_dyn, threshold,
            BLOCK_M, BLOCK_C, BLOCK_R, False,
        )  # fmt: skip
        total *= tl.full((), scale, tl.float32)
    SIZE: tl.constexpr = BLOCK_R * BLOCK_C
    inside = tl.arange(0, BLOCK_R)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    workspace = sums + tl.full((), strip, tl.int64) * chunks * SIZE + inside
    tl.store(workspace + chunk * SIZE, total)
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(counters + strip, 1, sem="acq_rel", scope="gpu") == chunks - 1:
        tl.store(counters + strip, 0)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for i in range(0, chunks, 4):
            for j in tl.static_range(4):  # loads of four at once, sums in order
                left = (chunks - i - j) * SIZE
                total += tl.load(workspace + (i + j) * SIZE, mask=inside < left, other=0.0, cache_modifier=".cg")
        if strip < x_strips:
            store_tile(da, total, 0, column, r, k, k, 1, BLOCK_R, BLOCK_C)
        else:
            store_tile(db, total, 0, column, r, n, 1, r, BLOCK_R, BLOCK_C)


@dataclass(frozen=True)
class Proximal:
    """The proximal gradient that a step's last micro-batch adds to dA and dB; see `reference.proximal_statistics`."""

    kind: str
    """`kl` or `l2`."""
    a: Tensor
    b: Tensor
    anchor_a: Tensor
    """float32 [r, K]."""
    anchor_b: Tensor
    """float32 [N, r]."""
    statistics: Tensor
    """float32 [2, 6] of contiguous rows, of A and of B."""


def proximal_of(first: Pull, second: Pull | None, b: Tensor) -> Proximal:
    """What `skinny` adds to dA, and to dB where that waits too; neither waits any longer.

    A row of zeros adds nothing to dB, whose B [N, r] then stands for the anchor as well.
    """
    first.waiting = False
    if second is None or not second.waiting:
        b = b.contiguous()
        return Proximal(first.kind, first.value, b, first.anchor, b, first.rows(None))
    second.waiting = False
    return Proximal(first.kind, first.value, second.value, first.anchor, second.anchor, first.rows(second))


def skinny(
    ds: Tensor,
    x: Tensor,
    s: Tensor,
    dy: Tensor,
    scale: float,
    da: Tensor,
    db: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
    proximal: Proximal | None = None,
) -> None:
    """Write da = ds^T (keep * x) and db = scale dy^T s.

    Args:
        ds, s: [M, r], contiguous, of the dtype of x and dy.
        x, dy: [M, K], [M, N], any strides.
        da, db: [r, K], [N, r], contiguous: what is written.
        p, seed: dropout of x, drawn from `seed` int64 [1].
        proximal: a term whose gradient is added last.
    """
    (m, k), n, r = x.shape, dy.shape[1], ds.shape[1]
    chunk_rows = max(FEWEST_ROWS, triton.cdiv(triton.cdiv(m, CHUNKS), BLOCK_M) * BLOCK_M)
    chunks = max(1, triton.cdiv(m, chunk_rows))
    tile = tile_of(x, r)
    sums = torch.empty(chunks, r, k + n, dtype=torch.float32, device=x.device)
    _partial[(strips_of(k, n, tile), chunks)](
        ds=ds, x=x, s=s, dy=dy, sums=sums, seed=seed, m=m, k=k, n=n, r=r, chunk_rows=chunk_rows,
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_dym=dy.stride(0), stride_dyn=dy.stride(1),
        scale=scale, threshold=drop_threshold(p), **tile, BLOCK_R=padded(r), DROPOUT=p > 0,
    )  # fmt: skip
    fold(sums, da, db, proximal)


def fold(sums: Tensor, da: Tensor, db: Tensor, proximal: Proximal | None = None) -> None:
    """Write da [r, K] and db [N, r], the sum of sums [parts, r, K + N] in order, and a proximal gradient if given."""
    (parts, r, _), k, n = sums.shape, da.shape[1], db.shape[0]
    term = {name: getattr(proximal, name, None) for name in ("a", "b", "anchor_a", "anchor_b", "statistics")}
    _fold[(triton.cdiv(r * max(k, n), BLOCK_FOLD), 2)](
        sums=sums, da=da, db=db, **term,
        stride_statistics=0 if proximal is None else proximal.statistics.stride(0), chunks=parts, k=k, n=n, r=r,
        BLOCK=BLOCK_FOLD, PROXIMAL="none" if proximal is None else proximal.kind, num_warps=4,
    )  # fmt: skip


def strips_of(k: int, n: int, tile: dict[str, int]) -> int:
    """How many strips of columns X [., K] and dY [., N] have together."""
    return triton.cdiv(k, tile["BLOCK_C"]) + triton.cdiv(n, tile["BLOCK_C"])


def single(
    ds: Tensor,
    x: Tensor,
    s: Tensor,
    dy: Tensor,
    scale: float,
    da: Tensor,
    db: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    """Write da = ds^T (keep * x) and db = scale dy^T s in one launch; arguments as of `skinny`."""
    (m, k), n, r = x.shape, dy.shape[1], ds.shape[1]
    tile, rank = tile_of(x, r) | _single_tile(x, r), padded(r)
    strips = strips_of(k, n, tile)
    wanted = max(1, CROWD * processors(x.device) // strips)
    chunk_rows = max(FEWEST_ROWS, triton.cdiv(triton.cdiv(m, wanted), tile["BLOCK_M"]) * tile["BLOCK_M"])
    chunks = max(1, triton.cdiv(m, chunk_rows))
    sums = torch.empty(strips * chunks * rank * tile["BLOCK_C"], dtype=torch.float32, device=x.device)
    _single[(strips, chunks)](
        ds=ds, x=x, s=s, dy=dy, sums=sums, counters=counters(x.device, strips), da=da, db=db, seed=seed,
        m=m, k=k, n=n, r=r, chunks=chunks, chunk_rows=chunk_rows,
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_dym=dy.stride(0), stride_dyn=dy.stride(1),
        scale=scale, threshold=drop_threshold(p), **tile, BLOCK_R=rank, DROPOUT=p > 0,
    )  # fmt: skip


def _single_tile(x: Tensor, r: int) -> dict[str, int]:
    """What spills less where the fold is in the same launch."""
    return {"num_stages": 2} if x.element_size() == 4 else {"BLOCK_M": 64} if r > 32 else {}


def tile_of(x: Tensor, r: int) -> dict[str, int]:
    """By the dtype of X and the rank."""
    return EXACT if x.element_size() == 4 else WIDE if r <= 32 else HIGH


def counters(device: torch.device, strips: int) -> Tensor:
    """Zeros int32 [strips or more], which `single` leaves as zeros; launches of two streams share none."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _zeros(device, stream, triton.next_power_of_2(strips))


@functools.cache
def _zeros(device: torch.device, stream: int, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
