"""What the LoRA kernels share on the device: the dropout mask of a tile, the order of tiles, padding of ranks."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST_DOT = 16  # tl.dot multiplies nothing narrower


_assumed = 90  # where there is no GPU, and while kernels are compiled ahead of time


@contextmanager
def assuming(capability: int) -> Iterator[None]:
    """Choose tiles for this compute capability wherever tensors are not on a GPU."""
    global _assumed
    before, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = before


def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0."""
    if device.type != "cuda":
        return _assumed
    return _capability(device)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; those of an H100 where there is none."""
    return 132 if device.type != "cuda" else _processors(device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """The context in which a kernel is launched: Triton launches on the current GPU, wherever the tensors are."""
    return torch.cuda.device_of(tensor)


def widened(x: Tensor, factor: Tensor) -> Tensor:
    """The factor as a kernel takes it that multiplies it by x: in float32 if x is, else as it is.

    On sm_100 a float32 operand that was widened in the kernel is multiplied in TF32.
    """
    return factor.to(x.dtype) if x.dtype == torch.float32 else factor


def padded(rank: int) -> int:
    """The rank as a tile's side: the next power of two, at least what tl.dot takes."""
    return max(SMALLEST_DOT, triton.next_power_of_2(rank))


@triton.jit
def keep_tile(seed, row, column, columns, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`reference.keep_mask` of the tile at (row, column), of which `column` is a multiple of 4."""
    rows = row + tl.arange(0, ROWS)
    words = column // 4 + tl.arange(0, COLUMNS // 4)
    counter = rows[:, None] * tl.cdiv(columns, 4) + words[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter.to(tl.int32))
    # not tl.join: on sm_100 a float32 operand behind one counts as half as wide and is multiplied in TF32
    lane = tl.arange(0, 4)[None, None, :]
    even = tl.where(lane == 0, w0[:, :, None], w2[:, :, None])
    odd = tl.where(lane == 1, w1[:, :, None], w3[:, :, None])
    bits = tl.where(lane % 2 == 0, even, odd).reshape(ROWS, COLUMNS)
    return (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.int32) >= threshold


@triton.jit
def tile_pointers(pointer, row, column, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the tile at (row, column) lies: one 64-bit start, so that offsets inside the tile fit 32 bits."""
    start = pointer + tl.full((), row, tl.int64) * row_stride + tl.full((), column, tl.int64) * column_stride
    return start + tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :] * column_stride


@triton.jit
def tile_mask(row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which entries of the tile at (row, column) lie inside a matrix [rows, columns]."""
    return (tl.arange(0, ROWS) < rows - row)[:, None] & (tl.arange(0, COLUMNS) < columns - column)[None, :]


@triton.jit
def load_tile(
    pointer, row, column, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The tile at (row, column) of a matrix [rows, columns] of any strides, zeros outside of it."""
    place = tile_pointers(pointer, row, column, row_stride, column_stride, ROWS, COLUMNS)
    return tl.load(place, mask=tile_mask(row, column, rows, columns, ROWS, COLUMNS), other=0.0)


@triton.jit
def store_tile(
    pointer, tile, row, column, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the part of a tile that lies inside a matrix [rows, columns], in its dtype."""
    place = tile_pointers(pointer, row, column, row_stride, column_stride, ROWS, COLUMNS)
    mask = tile_mask(row, column, rows, columns, ROWS, COLUMNS)
    tl.store(place, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def grouped_tile(program, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Tile (m, n) of a program: `GROUP` rows of tiles at a time, so that what they share stays in L2."""
    per_group = GROUP * n_tiles
    first = (program // per_group) * GROUP
    height = min(m_tiles - first, GROUP)
    within = program % per_group
    return first + within % height, within // height
