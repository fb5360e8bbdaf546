"""Tangents and retractions of a ragged batch of factors in three launches; the algebra is that of `stiefel`.

    products   a program per chunk of rows of a factor: its part of G, S, Q and C, in float32
    weights    a program per factor: sums the parts in order, and turns them into what multiplies X, D and F
    apply      a program per chunk: X + D + [X, D, F] weights, or the gradient less [X, F] weights

A program finds its factor by tables of numbers and addresses; addresses are written anew only where one changed, and
nothing is allocated after construction, so a CUDA graph may hold all of it. The number of Newton-Schulz iterations
follows on the device from the same bound as in `stiefel`, to 40 of them. No atomics: two runs are equal bit for bit.

`FusedStiefel` makes the launches, for `Stiefel`, of float32 factors whose ranks are 64 at most.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cladapt_kernels.retract.options import MOST_ITERATIONS, Factors, Gauge, Kind, Subspaces
from cladapt_kernels.tiles import load_tile, on_device_of, padded, store_tile

CHUNK_ROWS = 256
"""Rows of one program of products and of apply, by rule."""
BLOCK_K = 16
"""Columns of F that are worked on together."""
# Of products, weights and apply, by the rank's padding. By rule: as many rows and as few warps as spill nowhere, by any
# Triton of the matrix; on an H200 rank 16 was timed with 64 rows and 4 warps of apply, which Triton 3.9 spills. A loop
# that multiplies by way of memory may not read ahead.
TILES = {
    16: ({"ROWS": 16, "num_warps": 4}, {"num_warps": 2}, {"ROWS": 32, "num_warps": 8}),
    32: ({"ROWS": 16, "num_warps": 8}, {"num_warps": 8, "num_stages": 1}, {"ROWS": 32, "num_warps": 8}),
    64: (
        {"ROWS": 16, "num_warps": 8, "num_stages": 1},
        {"num_warps": 8, "num_stages": 1},
        {"ROWS": 16, "num_warps": 8, "num_stages": 1},
    ),
}
FIXED = tl.constexpr(7)  # columns of the table of numbers: n, r, k, addresses of F and point, first of parts, weights
MOVING = tl.constexpr(6)  # of the table of addresses: address, stride and order of the factor, of the gradient


@triton.jit
def _number(place, ALIGNED: tl.constexpr):
    """A side or a stride from a table."""
    number = tl.load(place)
    if ALIGNED:
        number = tl.multiple_of(number, 4)
    return number


@triton.jit
def _pointer(place, ALIGNED: tl.constexpr):
    """An address from a table, of float32."""
    pointer = tl.load(place).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # on the pointer: the compiler forgets it over the cast from a number
    return pointer


@triton.jit
def _sizes(fixed, ALIGNED: tl.constexpr):
    """n, r and k of a factor."""
    return _number(fixed, ALIGNED), _number(fixed + 1, ALIGNED), _number(fixed + 2, ALIGNED)


@triton.jit
def _matrix(place, ALIGNED: tl.constexpr):
    """Pointer, stride and order of a factor or its gradient."""
    return _pointer(place, ALIGNED), _number(place + 1, ALIGNED), tl.load(place + 2)


@triton.jit
def _load(pointer, stride, lies, row, column, n, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a factor [n, r], whichever of its sides is contiguous."""
    if lies != 0:
        tile = tl.trans(load_tile(pointer, column, row, r, n, stride, 1, COLUMNS, ROWS))
    else:
        tile = load_tile(pointer, row, column, n, r, stride, 1, ROWS, COLUMNS)
    return tile


@triton.jit
def _store(pointer, tile, stride, lies, row, n, r, ROWS: tl.constexpr, RANK: tl.constexpr):
    if lies != 0:
        store_tile(pointer, tl.trans(tile), 0, row, r, n, stride, 1, RANK, ROWS)
    else:
        store_tile(pointer, tile, row, 0, n, r, stride, 1, ROWS, RANK)


@triton.jit
def _products(
    chunks, fixed, moving, parts, multiplier,
    TANGENT: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A chunk's part of G = X^T X, S = X^T D, Q = D^T D and C = F^T (X + multiplier D).

    Of tangents S and C = F^T D alone, D the gradient.
    """
    factor, first = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    fixed += factor * FIXED
    moving += factor * MOVING
    n, r, k = _sizes(fixed, ALIGNED)
    f, point = _pointer(fixed + 3, ALIGNED), _pointer(fixed + 4, ALIGNED)
    x, x_stride, x_lies = _matrix(moving, ALIGNED)
    g, g_stride, g_lies = _matrix(moving + 3, ALIGNED)
    last = tl.minimum(first + CHUNK_ROWS, n)
    part = parts + tl.load(fixed + 5) + (first // CHUNK_ROWS) * (3 + tl.cdiv(k, RANK)) * RANK * RANK
    for column in range(0, RANK, BLOCK_K):
        s, gram = tl.zeros((BLOCK_K, RANK), tl.float32), tl.zeros((BLOCK_K, RANK), tl.float32)
        q = tl.zeros((BLOCK_K, RANK), tl.float32)
        for row in range(first, last, ROWS):
            if TANGENT:
                at = _load(x, x_stride, x_lies, row, column, last, r, ROWS, BLOCK_K)
                store_tile(point, at, row, column, last, r, r, 1, ROWS, BLOCK_K)
                d = _load(g, g_stride, g_lies, row, 0, last, r, ROWS, RANK)
            else:
                at = load_tile(point, row, column, last, r, r, 1, ROWS, BLOCK_K)
                whole = load_tile(point, row, 0, last, r, r, 1, ROWS, RANK)
                gram = tl.dot(tl.trans(at), whole, gram, input_precision="ieee")
                d = _load(x, x_stride, x_lies, row, 0, last, r, ROWS, RANK) - whole
                step = _load(x, x_stride, x_lies, row, column, last, r, ROWS, BLOCK_K) - at
                q = tl.dot(tl.trans(step), d, q, input_precision="ieee")
            s = tl.dot(tl.trans(at), d, s, input_precision="ieee")
        own = part + column * RANK
        store_tile(own, s, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)
        if not TANGENT:
            store_tile(own + RANK * RANK, gram, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)
            store_tile(own + 2 * RANK * RANK, q, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)
    for column in range(0, k, BLOCK_K):
        c = tl.zeros((BLOCK_K, RANK), tl.float32)
        for row in range(first, last, ROWS):
            if TANGENT:
                d = _load(g, g_stride, g_lies, row, 0, last, r, ROWS, RANK)
            else:
                d = _load(x, x_stride, x_lies, row, 0, last, r, ROWS, RANK)
                at = load_tile(point, row, 0, last, r, r, 1, ROWS, RANK)
                d = at + multiplier * (d - at)
            protected = load_tile(f, row, column, last, k, k, 1, ROWS, BLOCK_K)
            c = tl.dot(tl.trans(protected), d, c, input_precision="ieee")
        store_tile(part + (3 * RANK + column) * RANK, c, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)


@triton.jit
def _summed(parts, size, count, rows, ROWS: tl.constexpr, RANK: tl.constexpr):
    """One [rows, RANK] of all chunks' parts, added in order."""
    total = tl.zeros((ROWS, RANK), tl.float32)
    for chunk in range(count):
        total += load_tile(parts + chunk * size, 0, 0, rows, RANK, RANK, 1, ROWS, RANK)
    return total


@triton.jit
def _rotation(s, KIND: tl.constexpr):
    """P: what the tangent map takes off along X."""
    return tl.trans(s) if KIND == "canonical" else 0.5 * (s + tl.trans(s))


@triton.jit
def _added(total, tile, weights, RANK: tl.constexpr, BLOCK_K: tl.constexpr):
    own = load_tile(weights, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)
    return tl.dot(tile, own, total, input_precision="ieee")


@triton.jit
def _product(a, b, scratch, RANK: tl.constexpr, BLOCK_K: tl.constexpr):
    """A B of [RANK, RANK]; by way of memory where whole rows would not fit a thread's registers."""
    if RANK <= 16:
        found = tl.dot(a, b, input_precision="ieee")
    else:
        store_tile(scratch, a, 0, 0, RANK, RANK, RANK, 1, RANK, RANK)
        store_tile(scratch + RANK * RANK, b, 0, 0, RANK, RANK, RANK, 1, RANK, RANK)
        tl.debug_barrier()
        found = tl.zeros((RANK, RANK), tl.float32)
        for step in range(0, RANK, BLOCK_K):
            left = load_tile(scratch, 0, step, RANK, RANK, RANK, 1, RANK, BLOCK_K)
            found = _added(found, left, scratch + (RANK + step) * RANK, RANK, BLOCK_K)
        tl.debug_barrier()
    return found


@triton.jit
def _inverse_root(excess, eye, scratch, RANK: tl.constexpr, BLOCK_K: tl.constexpr, MOST_ITERATIONS: tl.constexpr):
    """E of M^{-1/2} = I + E, M = I + excess: coupled Newton-Schulz iterations, and one of Newton on E alone.

    The last keeps the digits of E that Z, near I, has rounded away: I + E leaves of M what (I + E) M (I + E) says.
    """
    bound = tl.maximum(tl.max(tl.sum(tl.abs(eye + excess), 1)), 1.0)
    centre = 0.5 * (1.0 + bound)
    error = (bound - 1.0) / (bound + 1.0)
    y, z = (eye + excess) / centre, eye
    count = 0
    while (error > 1e-8) & (count < MOST_ITERATIONS):
        t = 1.5 * eye - 0.5 * _product(z, y, scratch, RANK, BLOCK_K)
        y = _product(y, t, scratch, RANK, BLOCK_K)
        z = _product(t, z, scratch, RANK, BLOCK_K)
        error = 0.75 * error * error + 0.25 * error * error * error
        count += 1
    e = z / tl.sqrt(centre) - eye
    left = e + excess + _product(e, excess, scratch, RANK, BLOCK_K)
    rest = left + e + _product(left, e, scratch, RANK, BLOCK_K)
    return e - 0.5 * (rest + _product(e, rest, scratch, RANK, BLOCK_K))


@triton.jit
def _inverse_factor(m, eye, r, RANK: tl.constexpr):
    """L^{-T} of M = L L^T: Gauss's elimination of M and of I, column by column."""
    rows, columns = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    inverse = eye
    for j in range(r):
        column = tl.sum(tl.where(columns == j, m, 0.0), 1)
        pivot = tl.sqrt(tl.sum(tl.where(tl.arange(0, RANK) == j, column, 0.0)))
        row = tl.sum(tl.where(rows == j, inverse, 0.0), 0) / pivot
        below = tl.where(tl.arange(0, RANK) > j, column, 0.0) / pivot
        m -= below[:, None] * below[None, :]
        inverse = tl.where(rows == j, row[None, :], inverse - below[:, None] * row[None, :])
    return tl.trans(inverse)


@triton.jit
def _weights(
    fixed, parts, weights, multiplier,
    KIND: tl.constexpr, GAUGE: tl.constexpr, TANGENT: tl.constexpr, CHUNK_ROWS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_K: tl.constexpr, MOST_ITERATIONS: tl.constexpr,
):  # fmt: skip
    """K R - I, m R - I and -C R of a factor; of tangents -P and -C."""
    fixed += tl.program_id(0) * FIXED
    n, r, k = _sizes(fixed, False)
    count, size = tl.cdiv(n, CHUNK_ROWS), (3 + tl.cdiv(k, RANK)) * RANK * RANK
    parts += tl.load(fixed + 5)
    weights += tl.load(fixed + 6)
    scratch = weights + (2 + tl.cdiv(k, RANK)) * RANK * RANK
    i = tl.arange(0, RANK)
    eye = (i[:, None] == i[None, :]).to(tl.float32)
    e, share = tl.zeros((RANK, RANK), tl.float32), 1.0
    if not TANGENT:
        s = multiplier * _summed(parts, size, count, RANK, RANK, RANK)
        gap = _summed(parts + RANK * RANK, size, count, RANK, RANK, RANK) - tl.where(i[:, None] < r, eye, 0.0)
        excess = multiplier * multiplier * _summed(parts + 2 * RANK * RANK, size, count, RANK, RANK, RANK)
        for column in range(0, k, BLOCK_K):
            c = _summed(parts + (3 * RANK + column) * RANK, size, count, BLOCK_K, BLOCK_K, RANK)
            excess -= tl.dot(tl.trans(c), c, input_precision="ieee")
        excess -= _product(tl.trans(s), s, scratch, RANK, BLOCK_K)
        s = _rotation(s, KIND) - s
        excess += _product(tl.trans(s), s, scratch, RANK, BLOCK_K)
        s = eye - _rotation(multiplier * _summed(parts, size, count, RANK, RANK, RANK), KIND)
        excess += _product(tl.trans(s), _product(gap, s, scratch, RANK, BLOCK_K), scratch, RANK, BLOCK_K)
        if GAUGE == "polar":
            e = _inverse_root(excess, eye, scratch, RANK, BLOCK_K, MOST_ITERATIONS)
        else:
            e = _inverse_factor(eye + excess, eye, r, RANK) - eye
        share = multiplier
        step = multiplier * e + (multiplier - 1.0) * eye
        store_tile(weights + RANK * RANK, step, 0, 0, RANK, RANK, RANK, 1, RANK, RANK)
    # summed again: sums that were kept would not leave the iterations their registers
    pull = share * _rotation(_summed(parts, size, count, RANK, RANK, RANK), KIND)
    turned = e - pull - _product(pull, e, scratch, RANK, BLOCK_K)
    store_tile(weights, turned, 0, 0, RANK, RANK, RANK, 1, RANK, RANK)
    for column in range(0, k, RANK):
        c = _summed(parts + (3 * RANK + column) * RANK, size, count, k - column, RANK, RANK)
        c += _product(c, e, scratch, RANK, BLOCK_K)
        store_tile(weights + (2 * RANK + column) * RANK, -c, 0, 0, RANK, RANK, RANK, 1, RANK, RANK)


@triton.jit
def _apply(
    chunks, fixed, moving, weights,
    TANGENT: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What the weights add to X + D, or to the gradient, of a chunk's rows."""
    factor, first = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    fixed += factor * FIXED
    moving += factor * MOVING
    n, r, k = _sizes(fixed, ALIGNED)
    f, point = _pointer(fixed + 3, ALIGNED), _pointer(fixed + 4, ALIGNED)
    weights += tl.load(fixed + 6)
    x, stride, lies = _matrix(moving + 3 if TANGENT else moving, ALIGNED)
    last = tl.minimum(first + CHUNK_ROWS, n)
    for row in range(first, last, ROWS):
        total = tl.zeros((ROWS, RANK), tl.float32)
        for column in range(0, RANK, BLOCK_K):
            own = weights + column * RANK
            at = load_tile(point, row, column, last, r, r, 1, ROWS, BLOCK_K)
            total = _added(total, at, own, RANK, BLOCK_K)
            if not TANGENT:
                step = _load(x, stride, lies, row, column, last, r, ROWS, BLOCK_K) - at
                total = _added(total, step, own + RANK * RANK, RANK, BLOCK_K)
        for column in range(0, k, BLOCK_K):
            protected = load_tile(f, row, column, last, k, k, 1, ROWS, BLOCK_K)
            total = _added(total, protected, weights + (2 * RANK + column) * RANK, RANK, BLOCK_K)
        total += _load(x, stride, lies, row, 0, last, r, ROWS, RANK)
        _store(x, total, stride, lies, row, last, r, ROWS, RANK)


QR_WEIGHTS = {32: {"num_warps": 4, "num_stages": 2}}
"""Of weights with the gauge qr, which eight warps spill at rank 32, and four with the gauge polar."""


class FusedStiefel:
    """`Stiefel` of float32 factors [n, r], r to 64, that are contiguous along one side."""

    def __init__(self, xs: Factors, fs: Subspaces, kind: Kind, gauge: Gauge) -> None:
        self._kind, self._gauge, self._device = kind, gauge, xs[0].device
        self._rank = padded(max(x.shape[1] for x in xs))
        self._fs = [
            x.new_empty(x.shape[0], 0) if f is None else f.to(x).contiguous() for x, f in zip(xs, fs, strict=True)
        ]
        sizes = [x.numel() for x in xs]
        held = torch.empty(sum(sizes), device=self._device).split(sizes)
        self._points = [part.view(x.shape) for part, x in zip(held, xs, strict=True)]
        self._lay_out([(*x.shape, f.shape[1]) for x, f in zip(xs, self._fs, strict=True)])
        self._tables: dict[bool, tuple[list[int], Tensor, bool]] = {}

    def _lay_out(self, sizes: Sequence[tuple[int, int, int]]) -> None:
        """The tables of chunks and of numbers, and where each factor's parts and weights begin."""
        rank, rows, chunks = self._rank, [], []
        parts = weights = 0
        for i, (n, r, k) in enumerate(sizes):
            blocks = triton.cdiv(k, rank)
            rows.append([n, r, k, self._fs[i].data_ptr(), self._points[i].data_ptr(), parts, weights])
            chunks += [(i, first) for first in range(0, n, CHUNK_ROWS)]
            parts += triton.cdiv(n, CHUNK_ROWS) * (3 + blocks) * rank**2
            weights += (2 + blocks + 2) * rank**2  # the last two to multiply by way of
        self._fixed = torch.tensor(rows, dtype=torch.int64).to(self._device)
        self._chunks = torch.tensor(chunks, dtype=torch.int32).to(self._device)
        self._parts, self._weights = (torch.empty(size, device=self._device) for size in (parts, weights))
        self._vector = all(side % 4 == 0 for row in rows for side in row[:5]) and all(
            address % 16 == 0 for row in rows for address in row[3:5]
        )

    def remember(self, xs: Factors) -> None:
        torch._foreach_copy_(self._points, list(xs))

    def tangent_(self, xs: Factors, gs: Factors) -> None:
        self._launch(xs, gs, True, 1.0)
        torch.autograd.graph.increment_version(list(gs))

    def retract_(self, xs: Factors, multiplier: float) -> None:
        self._launch(xs, xs, False, multiplier)
        torch.autograd.graph.increment_version(list(xs))

    def _launch(self, xs: Factors, gs: Factors, tangent: bool, multiplier: float) -> None:
        moving, aligned = self._table(xs, gs, tangent)
        shared = {"TANGENT": tangent, "CHUNK_ROWS": CHUNK_ROWS, "RANK": self._rank, "BLOCK_K": BLOCK_K}
        products, weights, apply = TILES[self._rank]
        if self._gauge == "qr":
            weights = weights | QR_WEIGHTS.get(self._rank, {})
        tables = {"chunks": self._chunks, "fixed": self._fixed, "moving": moving, "ALIGNED": aligned}
        with on_device_of(self._parts):
            _products[(len(self._chunks),)](**tables, parts=self._parts, multiplier=multiplier, **shared, **products)
            _weights[(len(self._fixed),)](
                fixed=self._fixed, parts=self._parts, weights=self._weights, multiplier=multiplier, KIND=self._kind,
                GAUGE=self._gauge, MOST_ITERATIONS=MOST_ITERATIONS, **shared, **weights,
            )  # fmt: skip
            _apply[(len(self._chunks),)](**tables, weights=self._weights, **shared, **apply)

    def _table(self, xs: Factors, gs: Factors, tangent: bool) -> tuple[Tensor, bool]:
        """Addresses, strides and orders of factors and gradients [B, 6], made anew where one changed; whether all
        loads may be of 16 bytes."""
        rows = [number for i, pair in enumerate(zip(xs, gs, strict=True)) for x in pair for number in _place(i, x)]
        if tangent not in self._tables or self._tables[tangent][0] != rows:
            aligned = all(a % 16 == 0 for a in rows[::3]) and all(stride % 4 == 0 for stride in rows[1::3])
            table = torch.tensor(rows, dtype=torch.int64).view(-1, 6).to(self._device)
            self._tables[tangent] = (rows, table, aligned and self._vector)
        return self._tables[tangent][1:]


def _place(index: int, x: Tensor) -> tuple[int, int, int]:
    """Address, stride of the side that is not contiguous, and whether the columns are what is."""
    if x.dtype != torch.float32 or 1 not in x.stride():
        raise ValueError(f"factor {index} is {x.dtype} of strides {x.stride()}, expected float32, one side contiguous")
    lies = x.stride(1) != 1
    return x.data_ptr(), x.stride(1 if lies else 0), int(lies)
