"""What kernels of ragged lists of factors share: tables by which a program finds its own, sums, products, the end.

    products   a program per chunk of rows of a factor: its parts of what is summed over rows, in float32
    weights    a program per factor, or few: sums the parts in order, and turns them into what multiplies X, D and F
    apply      a program per chunk: adds [X, D, F] weights

X [n, r] are the points, D steps from them, F [n, k] what each is kept out of. Addresses are written anew only where one
changed, and nothing is allocated after construction, so a CUDA graph may hold all launches. No atomics: two runs are
equal bit for bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cladapt_kernels.tiles import load_tile, padded, store_tile

CHUNK_ROWS = 256
"""Rows of a factor that one program works on, by rule."""
BLOCK_K = 16
"""Columns of F, or of a rank, that are multiplied together."""
FIXED = tl.constexpr(7)
"""Columns of the table of numbers: n, r, k, addresses of F and point, first of parts, first of weights."""
MOVING = tl.constexpr(6)
"""Columns of the table of addresses: address, stride and order of the factor, of what is written."""


@triton.jit
def table_number(place, ALIGNED: tl.constexpr):
    """A side or a stride from a table."""
    number = tl.load(place)
    if ALIGNED:
        number = tl.multiple_of(number, 4)
    return number


@triton.jit
def table_pointer(place, ALIGNED: tl.constexpr):
    """An address from a table, of float32."""
    pointer = tl.load(place).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # on the pointer: the compiler forgets it over the cast from a number
    return pointer


@triton.jit
def sizes_of(fixed, ALIGNED: tl.constexpr):
    """n, r and k of a factor."""
    return table_number(fixed, ALIGNED), table_number(fixed + 1, ALIGNED), table_number(fixed + 2, ALIGNED)


@triton.jit
def matrix_of(place, ALIGNED: tl.constexpr):
    """Pointer, stride and order of a factor or of what is written."""
    return table_pointer(place, ALIGNED), table_number(place + 1, ALIGNED), tl.load(place + 2)


@triton.jit
def load_factor(pointer, stride, lies, row, column, n, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a factor [n, r], whichever of its sides is contiguous."""
    if lies != 0:
        tile = tl.trans(load_tile(pointer, column, row, r, n, stride, 1, COLUMNS, ROWS))
    else:
        tile = load_tile(pointer, row, column, n, r, stride, 1, ROWS, COLUMNS)
    return tile


@triton.jit
def store_factor(pointer, tile, stride, lies, row, n, r, ROWS: tl.constexpr, RANK: tl.constexpr):
    """Write whole rows of a factor [n, r]."""
    if lies != 0:
        store_tile(pointer, tl.trans(tile), 0, row, r, n, stride, 1, RANK, ROWS)
    else:
        store_tile(pointer, tile, row, 0, n, r, stride, 1, ROWS, RANK)


@triton.jit
def sum_parts(parts, size, count, rows, ROWS: tl.constexpr, RANK: tl.constexpr):
    """One [rows, RANK] of all chunks' parts, added in order."""
    total = tl.zeros((ROWS, RANK), tl.float32)
    for chunk in range(count):
        total += load_tile(parts + chunk * size, 0, 0, rows, RANK, RANK, 1, ROWS, RANK)
    return total


@triton.jit
def add_product(total, tile, weights, RANK: tl.constexpr, BLOCK_K: tl.constexpr):
    """A total [., RANK] and a tile [., BLOCK_K] times weights [BLOCK_K, RANK] from memory."""
    own = load_tile(weights, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)
    return tl.dot(tile, own, total, input_precision="ieee")


@triton.jit
def product(a, b, scratch, RANK: tl.constexpr, BLOCK_K: tl.constexpr):
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
            found = add_product(found, left, scratch + (RANK + step) * RANK, RANK, BLOCK_K)
        tl.debug_barrier()
    return found


@triton.jit
def inverse_factor(m, eye, r, least, RANK: tl.constexpr):
    """L^{-T} of M = L L^T: Gauss's elimination of M and of I, column by column; `least`, or None, bounds the pivots."""
    rows, columns = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    inverse = eye
    for j in range(r):
        column = tl.sum(tl.where(columns == j, m, 0.0), 1)
        pivot = tl.sum(tl.where(tl.arange(0, RANK) == j, column, 0.0))
        if least is not None:
            pivot = tl.maximum(pivot, least)
        pivot = tl.sqrt(pivot)
        row = tl.sum(tl.where(rows == j, inverse, 0.0), 0) / pivot
        below = tl.where(tl.arange(0, RANK) > j, column, 0.0) / pivot
        m -= below[:, None] * below[None, :]
        inverse = tl.where(rows == j, row[None, :], inverse - below[:, None] * row[None, :])
    return tl.trans(inverse)


@triton.jit
def apply(
    chunks, fixed, moving, weights,
    STEPS: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add [X, D, F] weights to a chunk's rows of X + D; without STEPS [X, F] weights to whatever is written.

    Weights of a factor are RANK rows of X's, RANK of D's, then those of F's in blocks of RANK.
    """
    factor, first = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    fixed += factor * FIXED
    moving += factor * MOVING
    n, r, k = sizes_of(fixed, ALIGNED)
    f, point = table_pointer(fixed + 3, ALIGNED), table_pointer(fixed + 4, ALIGNED)
    weights += tl.load(fixed + 6)
    written, stride, lies = matrix_of(moving + 3, ALIGNED)
    last = tl.minimum(first + CHUNK_ROWS, n)
    for row in range(first, last, ROWS):
        total = tl.zeros((ROWS, RANK), tl.float32)
        for column in range(0, RANK, BLOCK_K):
            own = weights + column * RANK
            at = load_tile(point, row, column, last, r, r, 1, ROWS, BLOCK_K)
            total = add_product(total, at, own, RANK, BLOCK_K)
            if STEPS:
                step = load_factor(written, stride, lies, row, column, last, r, ROWS, BLOCK_K) - at
                total = add_product(total, step, own + RANK * RANK, RANK, BLOCK_K)
        for column in range(0, k, BLOCK_K):
            protected = load_tile(f, row, column, last, k, k, 1, ROWS, BLOCK_K)
            total = add_product(total, protected, weights + (2 * RANK + column) * RANK, RANK, BLOCK_K)
        total += load_factor(written, stride, lies, row, 0, last, r, ROWS, RANK)
        store_factor(written, total, stride, lies, row, last, r, ROWS, RANK)


class Ragged:
    """Factors [n, r] of any heights and ranks with their F [n, k]: points, tables, and room for parts and weights.

    Args:
        xs: float32 factors, each contiguous along one side; their addresses may change.
        fs: F of each, or None.
        parts: [RANK, RANK] matrices that a chunk has a part of, and those for every RANK columns of F.
        spare: matrices after a factor's weights that its program may multiply by way of.
    """

    def __init__(self, xs: Sequence[Tensor], fs: Sequence[Tensor | None], parts: tuple[int, int], spare: int) -> None:
        self._device, self._rank = xs[0].device, padded(max(x.shape[1] for x in xs))
        self._fs = [
            x.new_empty(x.shape[0], 0) if f is None else f.to(x).contiguous() for x, f in zip(xs, fs, strict=True)
        ]
        sizes = [x.numel() for x in xs]
        held = torch.empty(sum(sizes), device=self._device).split(sizes)
        self._points = [part.view(x.shape) for part, x in zip(held, xs, strict=True)]
        self._lay_out([(*x.shape, f.shape[1]) for x, f in zip(xs, self._fs, strict=True)], parts, spare)
        self._tables: dict[bool, tuple[list[int], Tensor, bool]] = {}

    def _lay_out(self, sizes: Sequence[tuple[int, int, int]], matrices: tuple[int, int], spare: int) -> None:
        """The tables of chunks and of numbers, and where each factor's parts and weights begin."""
        rows, chunks = [], []
        parts = weights = 0
        for i, (n, r, k) in enumerate(sizes):
            blocks = triton.cdiv(k, self._rank)
            rows.append([n, r, k, self._fs[i].data_ptr(), self._points[i].data_ptr(), parts, weights])
            chunks += [(i, first) for first in range(0, n, CHUNK_ROWS)]
            parts += triton.cdiv(n, CHUNK_ROWS) * (matrices[0] + matrices[1] * blocks) * self._rank**2
            weights += (2 + blocks + spare) * self._rank**2
        self._fixed = torch.tensor(rows, dtype=torch.int64).to(self._device)
        self._chunks = torch.tensor(chunks, dtype=torch.int32).to(self._device)
        self._parts, self._weights = (torch.empty(size, device=self._device) for size in (parts, weights))
        self._vector = all(side % 4 == 0 for row in rows for side in row[:5]) and all(
            address % 16 == 0 for row in rows for address in row[3:5]
        )

    def _name(self, index: int) -> str:
        """Of a factor, for errors."""
        return f"factor {index}"

    def _table(self, xs: Sequence[Tensor], written: Sequence[Tensor], use: bool = False) -> tuple[Tensor, bool]:
        """Addresses, strides and orders of factors and of what is written [B, 6], made anew where one changed; whether
        all loads may be of 16 bytes."""
        pairs = enumerate(zip(xs, written, strict=True))
        rows = [number for i, pair in pairs for x in pair for number in _place(self._name(i), x)]
        if use not in self._tables or self._tables[use][0] != rows:
            aligned = all(a % 16 == 0 for a in rows[::3]) and all(stride % 4 == 0 for stride in rows[1::3])
            table = torch.tensor(rows, dtype=torch.int64).view(-1, 6).to(self._device)
            self._tables[use] = (rows, table, aligned and self._vector)
        return self._tables[use][1:]


def _place(name: str, x: Tensor) -> tuple[int, int, int]:
    """Address, stride of the side that is not contiguous, and whether the columns are what is."""
    if x.dtype != torch.float32 or 1 not in x.stride():
        raise ValueError(f"{name} is {x.dtype} of strides {x.stride()}, expected float32, one side contiguous")
    lies = x.stride(1) != 1
    return x.data_ptr(), x.stride(1 if lies else 0), int(lies)
