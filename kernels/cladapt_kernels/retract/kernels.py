"""Tangents and retractions of a ragged batch of factors in three launches; the algebra is that of `stiefel`.

    products   a program per chunk of rows of a factor: its part of G, S, Q and C, in float32
    weights    a program per factor: sums the parts in order, and turns them into what multiplies X, D and F
    apply      a program per chunk: X + D + [X, D, F] weights, or the gradient less [X, F] weights

`factors` has the tables by which a program finds its factor, and `apply`. The number of Newton-Schulz iterations
follows on the device from the same bound as in `stiefel`, to 40 of them.

`FusedStiefel` makes the launches, for `Stiefel`, of float32 factors whose ranks are 64 at most.
"""

import torch
import triton
import triton.language as tl

from cladapt_kernels import factors
from cladapt_kernels.factors import (
    FIXED,
    MOVING,
    Ragged,
    apply,
    inverse_factor,
    load_factor,
    matrix_of,
    product,
    sizes_of,
    sum_parts,
    table_pointer,
)
from cladapt_kernels.retract.options import MOST_ITERATIONS, Factors, Gauge, Kind, Subspaces
from cladapt_kernels.tiles import load_tile, on_device_of, store_tile

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
    n, r, k = sizes_of(fixed, ALIGNED)
    f, point = table_pointer(fixed + 3, ALIGNED), table_pointer(fixed + 4, ALIGNED)
    x, x_stride, x_lies = matrix_of(moving, ALIGNED)
    g, g_stride, g_lies = matrix_of(moving + 3, ALIGNED)
    last = tl.minimum(first + CHUNK_ROWS, n)
    part = parts + tl.load(fixed + 5) + (first // CHUNK_ROWS) * (3 + tl.cdiv(k, RANK)) * RANK * RANK
    for column in range(0, RANK, BLOCK_K):
        s, gram = tl.zeros((BLOCK_K, RANK), tl.float32), tl.zeros((BLOCK_K, RANK), tl.float32)
        q = tl.zeros((BLOCK_K, RANK), tl.float32)
        for row in range(first, last, ROWS):
            if TANGENT:
                at = load_factor(x, x_stride, x_lies, row, column, last, r, ROWS, BLOCK_K)
                store_tile(point, at, row, column, last, r, r, 1, ROWS, BLOCK_K)
                d = load_factor(g, g_stride, g_lies, row, 0, last, r, ROWS, RANK)
            else:
                at = load_tile(point, row, column, last, r, r, 1, ROWS, BLOCK_K)
                whole = load_tile(point, row, 0, last, r, r, 1, ROWS, RANK)
                gram = tl.dot(tl.trans(at), whole, gram, input_precision="ieee")
                d = load_factor(x, x_stride, x_lies, row, 0, last, r, ROWS, RANK) - whole
                step = load_factor(x, x_stride, x_lies, row, column, last, r, ROWS, BLOCK_K) - at
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
                d = load_factor(g, g_stride, g_lies, row, 0, last, r, ROWS, RANK)
            else:
                d = load_factor(x, x_stride, x_lies, row, 0, last, r, ROWS, RANK)
                at = load_tile(point, row, 0, last, r, r, 1, ROWS, RANK)
                d = at + multiplier * (d - at)
            protected = load_tile(f, row, column, last, k, k, 1, ROWS, BLOCK_K)
            c = tl.dot(tl.trans(protected), d, c, input_precision="ieee")
        store_tile(part + (3 * RANK + column) * RANK, c, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)


@triton.jit
def _rotation(s, KIND: tl.constexpr):
    """P: what the tangent map takes off along X."""
    return tl.trans(s) if KIND == "canonical" else 0.5 * (s + tl.trans(s))


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
        t = 1.5 * eye - 0.5 * product(z, y, scratch, RANK, BLOCK_K)
        y = product(y, t, scratch, RANK, BLOCK_K)
        z = product(t, z, scratch, RANK, BLOCK_K)
        error = 0.75 * error * error + 0.25 * error * error * error
        count += 1
    e = z / tl.sqrt(centre) - eye
    left = e + excess + product(e, excess, scratch, RANK, BLOCK_K)
    rest = left + e + product(left, e, scratch, RANK, BLOCK_K)
    return e - 0.5 * (rest + product(e, rest, scratch, RANK, BLOCK_K))


@triton.jit
def _weights(
    fixed, parts, weights, multiplier,
    KIND: tl.constexpr, GAUGE: tl.constexpr, TANGENT: tl.constexpr, CHUNK_ROWS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_K: tl.constexpr, MOST_ITERATIONS: tl.constexpr,
):  # fmt: skip
    """K R - I, m R - I and -C R of a factor; of tangents -P and -C."""
    fixed += tl.program_id(0) * FIXED
    n, r, k = sizes_of(fixed, False)
    count, size = tl.cdiv(n, CHUNK_ROWS), (3 + tl.cdiv(k, RANK)) * RANK * RANK
    parts += tl.load(fixed + 5)
    weights += tl.load(fixed + 6)
    scratch = weights + (2 + tl.cdiv(k, RANK)) * RANK * RANK
    i = tl.arange(0, RANK)
    eye = (i[:, None] == i[None, :]).to(tl.float32)
    e, share = tl.zeros((RANK, RANK), tl.float32), 1.0
    if not TANGENT:
        s = multiplier * sum_parts(parts, size, count, RANK, RANK, RANK)
        gap = sum_parts(parts + RANK * RANK, size, count, RANK, RANK, RANK) - tl.where(i[:, None] < r, eye, 0.0)
        excess = multiplier * multiplier * sum_parts(parts + 2 * RANK * RANK, size, count, RANK, RANK, RANK)
        for column in range(0, k, BLOCK_K):
            c = sum_parts(parts + (3 * RANK + column) * RANK, size, count, BLOCK_K, BLOCK_K, RANK)
            excess -= tl.dot(tl.trans(c), c, input_precision="ieee")
        excess -= product(tl.trans(s), s, scratch, RANK, BLOCK_K)
        s = _rotation(s, KIND) - s
        excess += product(tl.trans(s), s, scratch, RANK, BLOCK_K)
        s = eye - _rotation(multiplier * sum_parts(parts, size, count, RANK, RANK, RANK), KIND)
        excess += product(tl.trans(s), product(gap, s, scratch, RANK, BLOCK_K), scratch, RANK, BLOCK_K)
        if GAUGE == "polar":
            e = _inverse_root(excess, eye, scratch, RANK, BLOCK_K, MOST_ITERATIONS)
        else:
            e = inverse_factor(eye + excess, eye, r, None, RANK) - eye
        share = multiplier
        step = multiplier * e + (multiplier - 1.0) * eye
        store_tile(weights + RANK * RANK, step, 0, 0, RANK, RANK, RANK, 1, RANK, RANK)
    # summed again: sums that were kept would not leave the iterations their registers
    pull = share * _rotation(sum_parts(parts, size, count, RANK, RANK, RANK), KIND)
    turned = e - pull - product(pull, e, scratch, RANK, BLOCK_K)
    store_tile(weights, turned, 0, 0, RANK, RANK, RANK, 1, RANK, RANK)
    for column in range(0, k, RANK):
        c = sum_parts(parts + (3 * RANK + column) * RANK, size, count, k - column, RANK, RANK)
        c += product(c, e, scratch, RANK, BLOCK_K)
        store_tile(weights + (2 * RANK + column) * RANK, -c, 0, 0, RANK, RANK, RANK, 1, RANK, RANK)


QR_WEIGHTS = {32: {"num_warps": 4, "num_stages": 2}}
"""Of weights with the gauge qr, which eight warps spill at rank 32, and four with the gauge polar."""


class FusedStiefel(Ragged):
    """`Stiefel` of float32 factors [n, r], r to 64, that are contiguous along one side."""

    def __init__(self, xs: Factors, fs: Subspaces, kind: Kind, gauge: Gauge) -> None:
        super().__init__(xs, fs, parts=(3, 1), spare=2)
        self._kind, self._gauge = kind, gauge

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
        shared = {"CHUNK_ROWS": factors.CHUNK_ROWS, "RANK": self._rank, "BLOCK_K": factors.BLOCK_K}
        products, weights, rows = TILES[self._rank]
        if self._gauge == "qr":
            weights = weights | QR_WEIGHTS.get(self._rank, {})
        tables = {"chunks": self._chunks, "fixed": self._fixed, "moving": moving, "ALIGNED": aligned}
        with on_device_of(self._parts):
            _products[(len(self._chunks),)](
                **tables, parts=self._parts, multiplier=multiplier, TANGENT=tangent, **shared, **products
            )
            _weights[(len(self._fixed),)](
                fixed=self._fixed, parts=self._parts, weights=self._weights, multiplier=multiplier, KIND=self._kind,
                GAUGE=self._gauge, TANGENT=tangent, MOST_ITERATIONS=MOST_ITERATIONS, **shared, **weights,
            )  # fmt: skip
            apply[(len(self._chunks),)](**tables, weights=self._weights, STEPS=not tangent, **shared, **rows)
