"""Rectification of the steps of a ragged batch of modules; the algebra is that of `rectifier`.

    products   a program per chunk of rows of A^T or B: its part of S = X^T D and G = X^T X, of V^T A^T and V^T dA^T
    sums       a program per module: adds the parts in order, for an algebra outside
    weights    a program per module: K, R and Z, from the parts or from outside, and what multiplies X, D and V
    apply      a program per chunk: X + D + [X, D, V] weights

A factor X is A^T [n, r], with V, or B [m, r]; module i has factors 2 i and 2 i + 1 in the tables of `factors`. All is
float32, and (B^T B + ridge I)^{-1} comes from Gauss's elimination, none of whose pivots can be below the ridge. The
gauge `sylvester` needs eigenvectors, and the form `exact` the null space of A V to more digits than float32 has: for
these `sums` hands over to `solve`, batched in float64 on the device, whose eigensolver waits for the host. The others
are three launches and allocate nothing, so a CUDA graph may hold them.

`FusedRectifier` makes the launches, for `Rectifier`, of float32 factors whose ranks are 64 at most.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from cladapt_kernels.rectify.options import Factors, Form, Gauge, Subspaces
from cladapt_kernels.rectify.solve import Products, solve
from cladapt_kernels.tiles import load_tile, on_device_of, store_tile

# Of products, sums, weights and apply, by the rank's padding. By rule, that of `retract`. Without a limit of registers
# weights of rank 32 spill: ptxas wants more programs at a time than there are modules.
TILES = {
    16: ({"ROWS": 16, "num_warps": 4}, {"num_warps": 2}, {"num_warps": 2}, {"ROWS": 32, "num_warps": 8}),
    32: (
        {"ROWS": 16, "num_warps": 8, "maxnreg": 128},
        {"num_warps": 4},
        {"num_warps": 8, "num_stages": 1, "maxnreg": 168},
        {"ROWS": 32, "num_warps": 8},
    ),
    64: (
        {"ROWS": 16, "num_warps": 8, "num_stages": 1},
        {"num_warps": 8},
        {"num_warps": 8, "num_stages": 1},
        {"ROWS": 16, "num_warps": 8, "num_stages": 1},
    ),
}


@triton.jit
def _products(
    chunks, fixed, moving, parts,
    ALIGNED: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A chunk's part of S = X^T D and G = X^T X, then of V^T X and of V^T D."""
    factor, first = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    fixed += factor * FIXED
    moving += factor * MOVING
    n, r, k = sizes_of(fixed, ALIGNED)
    v, point = table_pointer(fixed + 3, ALIGNED), table_pointer(fixed + 4, ALIGNED)
    x, stride, lies = matrix_of(moving, ALIGNED)
    last = tl.minimum(first + CHUNK_ROWS, n)
    blocks = tl.cdiv(k, RANK)
    part = parts + tl.load(fixed + 5) + (first // CHUNK_ROWS) * (2 + 2 * blocks) * RANK * RANK
    for column in range(0, RANK, BLOCK_K):
        s, gram = tl.zeros((BLOCK_K, RANK), tl.float32), tl.zeros((BLOCK_K, RANK), tl.float32)
        for row in range(first, last, ROWS):
            at = load_tile(point, row, column, last, r, r, 1, ROWS, BLOCK_K)
            whole = load_tile(point, row, 0, last, r, r, 1, ROWS, RANK)
            d = load_factor(x, stride, lies, row, 0, last, r, ROWS, RANK) - whole
            s = tl.dot(tl.trans(at), d, s, input_precision="ieee")
            gram = tl.dot(tl.trans(at), whole, gram, input_precision="ieee")
        own = part + column * RANK
        store_tile(own, s, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)
        store_tile(own + RANK * RANK, gram, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)
    for column in range(0, k, BLOCK_K):
        cx, cd = tl.zeros((BLOCK_K, RANK), tl.float32), tl.zeros((BLOCK_K, RANK), tl.float32)
        for row in range(first, last, ROWS):
            whole = load_tile(point, row, 0, last, r, r, 1, ROWS, RANK)
            d = load_factor(x, stride, lies, row, 0, last, r, ROWS, RANK) - whole
            protected = tl.trans(load_tile(v, row, column, last, k, k, 1, ROWS, BLOCK_K))
            cx = tl.dot(protected, whole, cx, input_precision="ieee")
            cd = tl.dot(protected, d, cd, input_precision="ieee")
        own = part + (2 * RANK + column) * RANK
        store_tile(own, cx, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)
        store_tile(own + blocks * RANK * RANK, cd, 0, 0, BLOCK_K, RANK, RANK, 1, BLOCK_K, RANK)


@triton.jit
def _module(fixed, parts, CHUNK_ROWS: tl.constexpr, RANK: tl.constexpr):
    """Of this program's module r and k; of A^T and of B, where parts begin and how many chunks there are."""
    fixed += 2 * tl.program_id(0) * FIXED
    n, r, k = sizes_of(fixed, False)
    m = tl.load(fixed + FIXED)
    down, up = parts + tl.load(fixed + 5), parts + tl.load(fixed + FIXED + 5)
    return r, k, down, tl.cdiv(n, CHUNK_ROWS), up, tl.cdiv(m, CHUNK_ROWS)


@triton.jit
def _sums(
    fixed, parts, sums, along, modules, most,
    CHUNK_ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """S and G of A^T and of B [modules, 4, RANK, RANK]; V^T A^T and V^T dA^T [2, modules, most, RANK]."""
    _, k, down, count, up, up_count = _module(fixed, parts, CHUNK_ROWS, RANK)
    module, size = tl.program_id(0).to(tl.int64), (2 + 2 * tl.cdiv(k, RANK)) * RANK * RANK
    sums += module * 4 * RANK * RANK
    for i in range(2):
        own = i * RANK * RANK
        _keep(sums + own, sum_parts(down + own, size, count, RANK, RANK, RANK), RANK)
        total = sum_parts(up + own, 2 * RANK * RANK, up_count, RANK, RANK, RANK)
        _keep(sums + 2 * RANK * RANK + own, total, RANK)
        place = along + (i * modules + module) * most * RANK
        for row in range(0, k, BLOCK_K):
            part = down + (2 + i * tl.cdiv(k, RANK)) * RANK * RANK + row * RANK
            c = sum_parts(part, size, count, BLOCK_K, BLOCK_K, RANK)
            store_tile(place, c, row, 0, k, RANK, RANK, 1, BLOCK_K, RANK)


@triton.jit
def _keep(place, matrix, RANK: tl.constexpr):
    store_tile(place, matrix, 0, 0, RANK, RANK, RANK, 1, RANK, RANK)


@triton.jit
def _kept(place, RANK: tl.constexpr):
    return load_tile(place, 0, 0, RANK, RANK, RANK, 1, RANK, RANK)


@triton.jit
def _before(factor, right, scratch, RANK: tl.constexpr, BLOCK_K: tl.constexpr):
    """M^{-1} right, M^{-1} = factor factor^T, whose own entries would have lost small directions of M."""
    return product(factor, product(tl.trans(factor), right, scratch, RANK, BLOCK_K), scratch, RANK, BLOCK_K)


@triton.jit
def _behind(left, factor, scratch, RANK: tl.constexpr, BLOCK_K: tl.constexpr):
    """left M^{-1}"""
    return product(product(left, factor, scratch, RANK, BLOCK_K), tl.trans(factor), scratch, RANK, BLOCK_K)


@triton.jit
def _ridge(gram, eye, damping, r):
    """damping tr(G) / r; 1 where G = 0."""
    trace = tl.sum(gram * eye)
    return tl.where(trace > 0.0, damping * trace / r, 1.0)


@triton.jit
def _solve(
    r, k, down, count, up, up_count, damping, solved, scratch,
    FORM: tl.constexpr, GAUGE: tl.constexpr, RANK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write K, R where it is not I, and Z where it is not 0."""
    size, blocks = (2 + 2 * tl.cdiv(k, RANK)) * RANK * RANK, tl.cdiv(k, RANK)
    i = tl.arange(0, RANK)
    eye = (i[:, None] == i[None, :]).to(tl.float32)
    if GAUGE == "balanced":
        d = tl.trans(sum_parts(down, size, count, RANK, RANK, RANK))
        for row in range(0, k, BLOCK_K):
            own = down + (2 * RANK + row) * RANK
            c = sum_parts(own, size, count, BLOCK_K, BLOCK_K, RANK)
            cd = sum_parts(own + blocks * RANK * RANK, size, count, BLOCK_K, BLOCK_K, RANK)
            d = tl.dot(tl.trans(-cd), c, d, input_precision="ieee")
        _keep(scratch + 2 * RANK * RANK, d, RANK)
        tl.debug_barrier()
    gram = sum_parts(up + RANK * RANK, 2 * RANK * RANK, up_count, RANK, RANK, RANK)
    ridge = _ridge(gram, eye, damping, r)
    factor = inverse_factor(gram + ridge * eye, eye, r, ridge, RANK)
    s = sum_parts(up, 2 * RANK * RANK, up_count, RANK, RANK, RANK)
    _keep(solved, _before(factor, s, scratch, RANK, BLOCK_K), RANK)
    if GAUGE == "balanced":
        d = _kept(scratch + 2 * RANK * RANK, RANK)
        d -= ridge * _before(factor, d, scratch, RANK, BLOCK_K)
        tl.debug_barrier()
        _keep(scratch + 2 * RANK * RANK, d, RANK)
    if FORM == "least_squares" or GAUGE == "balanced":
        gram = sum_parts(down + RANK * RANK, size, count, RANK, RANK, RANK)
        ridge = _ridge(gram, eye, damping, r)
        factor = inverse_factor(gram + ridge * eye, eye, r, ridge, RANK)
        if FORM == "least_squares":
            protected = tl.zeros((RANK, RANK), tl.float32)
            for row in range(0, k, BLOCK_K):
                c = sum_parts(down + (2 * RANK + row) * RANK, size, count, BLOCK_K, BLOCK_K, RANK)
                protected = tl.dot(tl.trans(c), c, protected, input_precision="ieee")
            _keep(solved + RANK * RANK, eye - _behind(protected, factor, scratch, RANK, BLOCK_K), RANK)
        tl.debug_barrier()
        if GAUGE == "balanced":
            z = _behind(_kept(scratch + 2 * RANK * RANK, RANK), factor, scratch, RANK, BLOCK_K)
            z += _turned(solved, scratch, FORM, RANK, BLOCK_K)
            _keep(solved + 2 * RANK * RANK, -0.5 * z, RANK)
    tl.debug_barrier()


@triton.jit
def _turned(solved, scratch, FORM: tl.constexpr, RANK: tl.constexpr, BLOCK_K: tl.constexpr):
    """K R"""
    turned = _kept(solved, RANK)
    if FORM != "invariant":
        turned = product(turned, _kept(solved + RANK * RANK, RANK), scratch, RANK, BLOCK_K)
    return turned


@triton.jit
def _with_gauge(matrix, solved, GAUGE: tl.constexpr, RANK: tl.constexpr):
    """The matrix and Z"""
    return matrix if GAUGE == "zero" else matrix + _kept(solved + 2 * RANK * RANK, RANK)


@triton.jit
def _weights(
    fixed, parts, weights, solved, damping,
    FORM: tl.constexpr, GAUGE: tl.constexpr, CHUNK_ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of A^T (K + Z)^T, 0 and -(dA V + K A V)^T; of B -(K R + Z) and R - I.

    Of the form `invariant` -(A V + dA V + (K + Z) A V)^T, which takes rounding off as well, and nothing for steps.
    """
    r, k, down, count, up, up_count = _module(fixed, parts, CHUNK_ROWS, RANK)
    size, blocks = (2 + 2 * tl.cdiv(k, RANK)) * RANK * RANK, tl.cdiv(k, RANK)
    fixed += 2 * tl.program_id(0) * FIXED
    own, above = weights + tl.load(fixed + 6), weights + tl.load(fixed + FIXED + 6)
    scratch = own + (2 + blocks) * RANK * RANK
    solved += tl.program_id(0).to(tl.int64) * 3 * RANK * RANK
    if FORM != "exact" and GAUGE != "sylvester":
        _solve(r, k, down, count, up, up_count, damping, solved, scratch, FORM, GAUGE, RANK, BLOCK_K)
    _keep(above, -_with_gauge(_turned(solved, scratch, FORM, RANK, BLOCK_K), solved, GAUGE, RANK), RANK)
    _keep(own, tl.trans(_with_gauge(_kept(solved, RANK), solved, GAUGE, RANK)), RANK)
    if FORM != "invariant":
        i = tl.arange(0, RANK)
        eye = (i[:, None] == i[None, :]).to(tl.float32)
        _keep(above + RANK * RANK, _kept(solved + RANK * RANK, RANK) - eye, RANK)
        _keep(own + RANK * RANK, tl.zeros((RANK, RANK), tl.float32), RANK)
    tl.debug_barrier()
    for column in range(0, k, RANK):
        first = down + (2 * RANK + column) * RANK
        through = _kept(own, RANK) if FORM == "invariant" else tl.trans(_kept(solved, RANK))
        c = sum_parts(first, size, count, k - column, RANK, RANK)
        total = product(c, through, scratch, RANK, BLOCK_K)
        if FORM == "invariant":
            total += c
        total += sum_parts(first + blocks * RANK * RANK, size, count, k - column, RANK, RANK)
        _keep(own + (2 * RANK + column) * RANK, -total, RANK)


class FusedRectifier(Ragged):
    """`Rectifier` of float32 factors of ranks to 64 that are contiguous along one side."""

    def __init__(
        self, downs: Factors, ups: Factors, subspaces: Subspaces, form: Form, gauge: Gauge, damping: float
    ) -> None:
        super().__init__(_woven(downs, ups), [f for v in subspaces for f in (v, None)], (2, 2), spare=3)
        self._form, self._gauge, self._damping, count = form, gauge, float(damping), len(downs)
        self._solved = torch.zeros(count, 3, self._rank, self._rank, device=self._device)
        self._by_torch = form == "exact" or gauge == "sylvester"
        if self._by_torch:
            most = max(v.shape[1] for v in self._fs)
            self._sums = torch.empty(count, 4, self._rank, self._rank, device=self._device)
            self._along = torch.zeros(2, count, most, self._rank, device=self._device)
            alike: dict[int, list[int]] = {}
            for i, b in enumerate(ups):
                alike.setdefault(b.shape[1], []).append(i)
            self._ranks = {r: torch.tensor(own).to(self._device) for r, own in alike.items()}

    def remember(self, downs: Factors, ups: Factors) -> None:
        torch._foreach_copy_(self._points, _woven(downs, ups))

    def rectify_(self, downs: Factors, ups: Factors) -> None:
        xs = _woven(downs, ups)
        moving, aligned = self._table(xs, xs)
        self._multiply(moving, aligned)
        if self._by_torch:
            self._solve_by_torch()
        self._move(moving, aligned)
        torch.autograd.graph.increment_version([*downs, *ups])

    def _name(self, index: int) -> str:
        return f"{('A^T', 'B')[index % 2]} of module {index // 2}"

    def _multiply(self, moving: Tensor, aligned: bool) -> None:
        """Launch `products`, and `sums` where they are needed."""
        shared = {"CHUNK_ROWS": factors.CHUNK_ROWS, "RANK": self._rank, "BLOCK_K": factors.BLOCK_K}
        products, sums, _, _ = TILES[self._rank]
        with on_device_of(self._parts):
            _products[(len(self._chunks),)](
                self._chunks, self._fixed, moving, self._parts, ALIGNED=aligned, **shared, **products
            )
            if self._by_torch:
                count, most = self._along.shape[1:3]
                _sums[(count,)](
                    self._fixed, self._parts, self._sums, self._along, count, most, **shared, **sums
                )  # fmt: skip

    def _solve_by_torch(self) -> None:
        """K, R and Z of all modules, those of one rank at a time, so that none is padded."""
        sums, along = self._sums.double(), self._along.double()
        for r, own in self._ranks.items():
            inner_a, gram_a, inner_b, gram_b = sums[own, :, :r, :r].unbind(1)
            av, dav = along[:, own, :, :r].mT
            products = Products(gram_a, gram_b, inner_a.mT, inner_b, av, dav)
            found = torch.stack(solve(products, self._form, self._gauge, self._damping), 1)
            self._solved[own, :, :r, :r] = found.float()

    def _move(self, moving: Tensor, aligned: bool) -> None:
        """Launch `weights` and `apply`."""
        shared = {"CHUNK_ROWS": factors.CHUNK_ROWS, "RANK": self._rank, "BLOCK_K": factors.BLOCK_K}
        _, _, weights, rows = TILES[self._rank]
        with on_device_of(self._parts):
            _weights[(len(self._solved),)](
                self._fixed, self._parts, self._weights, self._solved, self._damping, FORM=self._form,
                GAUGE=self._gauge, **shared, **weights,
            )  # fmt: skip
            apply[(len(self._chunks),)](
                self._chunks, self._fixed, moving, self._weights, STEPS=self._form != "invariant", ALIGNED=aligned,
                **shared, **rows,
            )  # fmt: skip


def _woven(downs: Factors, ups: Factors) -> list[Tensor]:
    """A^T and B of the first module, of the second, and so on."""
    return [x for a, b in zip(downs, ups, strict=True) for x in (a.mT, b)]
