"""S = scale (keep * X) A^T: a wide matrix down to the rank, read once, accumulated in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cladapt_kernels.reference import drop_threshold
from cladapt_kernels.tiles import capability, keep_tile, load_tile, padded, store_tile, widened

BLOCK_M = 64  # by rule, as the rest of the tile; on an H200 timed at rank 16, against no other
STAGES = 3


@triton.jit
def _shrink(
    x, a, s, seed, m, k, r, stride_xm, stride_xk, stride_ar, stride_ak, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for column in range(0, k, BLOCK_K):
        wide = load_tile(x, row, column, m, k, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
        if DROPOUT:
            wide = tl.where(keep_tile(tl.load(seed), row, column, k, threshold, BLOCK_M, BLOCK_K), wide, 0.0)
        down = load_tile(a, column, 0, k, r, stride_ak, stride_ar, BLOCK_K, BLOCK_R).to(wide.dtype)
        total = tl.dot(wide, down, total, input_precision="ieee")
    total *= tl.full((), scale, tl.float32)
    store_tile(s, total, row, 0, m, r, r, 1, BLOCK_M, BLOCK_R)


def _tile(x: Tensor, r: int, dropout: bool) -> dict[str, int]:
    """By rule, what no Triton of the matrix spills or serializes: float32 is summed outside of tensor cores."""
    wide = x.element_size() == 4
    block = 64 if r > 32 or (wide and dropout) else 32 if dropout else 128
    return {"BLOCK_K": block, "num_warps": 8 if wide and capability(x.device) < 100 else 4}


def shrink(x: Tensor, a: Tensor, scale: float = 1.0, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """scale (keep * x) a^T.

    Args:
        x: [M, K], any strides.
        a: [r, K], any strides; cast to x's dtype on load.
        p, seed: dropout of x, drawn from `seed` int64 [1].

    Returns:
        [M, r] of x's dtype.
    """
    (m, k), r = x.shape, a.shape[0]
    s = torch.empty(m, r, dtype=x.dtype, device=x.device)
    if m:
        a = widened(x, a)
        _shrink[(triton.cdiv(m, BLOCK_M),)](
            x=x, a=a, s=s, seed=seed, m=m, k=k, r=r,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_ar=a.stride(0), stride_ak=a.stride(1),
            scale=scale, threshold=drop_threshold(p),
            BLOCK_M=BLOCK_M, **_tile(x, r, p > 0), BLOCK_R=padded(r), DROPOUT=p > 0, num_stages=STAGES,
        )  # fmt: skip
    return s
