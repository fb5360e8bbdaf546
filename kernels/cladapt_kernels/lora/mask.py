"""The dropout mask as a matrix of its own, for products that cuBLAS does: one pass that writes it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cladapt_kernels.reference import drop_threshold
from cladapt_kernels.tiles import keep_tile, on_device_of, store_tile

TILE = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4}  # by rule


@triton.jit
def _mask(seed, mask, rows, columns, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    keep = keep_tile(tl.load(seed), row, column, columns, threshold, BLOCK_M, BLOCK_N)
    store_tile(mask, keep, row, column, rows, columns, columns, 1, BLOCK_M, BLOCK_N)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """`reference.keep_mask` of `seed` int64 [1] as zeros and ones: [rows, columns] of `dtype`, on the seed's device."""
    mask = torch.empty(rows, columns, dtype=dtype, device=seed.device)
    if mask.numel():
        with on_device_of(seed):
            _mask[(triton.cdiv(rows, TILE["BLOCK_M"]), triton.cdiv(columns, TILE["BLOCK_N"]))](
                seed=seed, mask=mask, rows=rows, columns=columns, threshold=drop_threshold(p), **TILE
            )
    return mask
