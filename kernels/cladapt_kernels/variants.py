"""The calls that are compiled ahead of time: sizes of a recommender's backbone, and the corners of every kernel."""

from functools import partial

import torch
from torch import Tensor

from cladapt_kernels import adamw, gemm, mask, retract_triton, shrink, skinny
from cladapt_kernels.aot import Variant

TOKENS, K, N, RANK = 8192, 1024, 4096, 16
BF16, FP32 = torch.bfloat16, torch.float32


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _seed() -> Tensor:
    return _empty(1, dtype=torch.int64)


def _shrink(factor: torch.dtype, r: int, p: float) -> None:
    shrink.shrink(_empty(TOKENS, K), _empty(r, K, dtype=factor), p=p, seed=_seed())


def _seeded(m: int, r: int, dtype: torch.dtype = BF16, p: float = 0.0, backward: bool = False) -> None:
    x, w = _empty(m, N if backward else K, dtype=dtype), _empty(N, K, dtype=dtype)
    s, u = _empty(m, r, dtype=dtype), _empty(r, K, dtype=FP32) if backward else _empty(N, r, dtype=FP32).T
    gemm.seeded(x, w if backward else w.T, s, u, p=p, seed=_seed())


def _strip(r: int, p: float = 0.0, backward: bool = False) -> None:
    w, a, b = _empty(N, K), _empty(r, K, dtype=FP32), _empty(N, r, dtype=FP32)
    if backward:
        gemm.strip(_empty(TOKENS, N), w, b.T, a, drop_y=p, seed=_seed())
    else:
        gemm.strip(_empty(TOKENS, K), w.T, a, b.T, drop_x=p, seed=_seed())


def _skinny(r: int, dtype: torch.dtype = BF16, p: float = 0.0, hooks: bool = False, odd: int = 0) -> None:
    k, n = K + odd, N + odd
    x, dy, s = _empty(TOKENS, k, dtype=dtype), _empty(TOKENS, n, dtype=dtype), _empty(TOKENS, r, dtype=dtype)
    da, db = _empty(r, k, dtype=FP32), _empty(n, r, dtype=FP32)
    term = skinny.Proximal("kl", da, db, da, db, _empty(2, 6, dtype=FP32)) if hooks else None
    offsets = _empty(33, dtype=torch.int32) if hooks else None
    skinny.skinny(s, x, s, dy, 2.0, da, db, p, _seed(), hooks, offsets, term, hooks)


def _mask(dtype: torch.dtype) -> None:
    mask.keep_mask(_seed(), TOKENS, K, 0.1, dtype)


VARIANTS = (
    *(
        Variant(f"{name} factors, rank {r}, dropout {p}", partial(_shrink, factor, r, p), ("wgmma",))
        for name, factor in (("bf16", BF16), ("fp32", FP32))
        for r, p in ((16, 0.0), (16, 0.1), (128, 0.0))
    ),
    Variant("forward", partial(_seeded, TOKENS, RANK), ("wgmma", "cp.async")),
    Variant("forward, rank 128", partial(_seeded, TOKENS, 128), ("wgmma", "cp.async")),
    Variant("forward, few rows", partial(_seeded, 512, RANK), ("wgmma", "cp.async")),
    Variant("forward, fp32", partial(_seeded, TOKENS, RANK, FP32)),
    Variant("backward", partial(_seeded, TOKENS, RANK, backward=True), ("wgmma", "cp.async")),
    Variant("backward, dropout", partial(_seeded, TOKENS, RANK, p=0.1, backward=True), ("wgmma", "cp.async")),
    Variant("strip forward", partial(_strip, RANK), ("wgmma", "cp.async")),
    Variant("strip forward, rank 64", partial(_strip, 64), ("wgmma", "cp.async")),
    Variant("strip forward, dropout", partial(_strip, RANK, 0.1), ("wgmma", "cp.async")),
    Variant("strip backward", partial(_strip, RANK, backward=True), ("wgmma", "cp.async")),
    Variant("strip backward, dropout", partial(_strip, RANK, 0.1, True), ("wgmma", "cp.async")),
    Variant("factors", partial(_skinny, RANK)),
    Variant("factors, rank 128", partial(_skinny, 128)),
    Variant("factors, fp32", partial(_skinny, RANK, FP32)),
    Variant("factors, fp32, rank 64", partial(_skinny, 64, FP32)),
    Variant("factors, fp32, rank 128", partial(_skinny, 128, FP32)),
    Variant("factors, fp32, dropout", partial(_skinny, RANK, FP32, 0.1)),
    Variant("factors, dropout", partial(_skinny, RANK, p=0.1)),
    Variant("factors, all hooks", partial(_skinny, RANK, hooks=True)),
    Variant("factors, odd sizes", partial(_skinny, RANK, odd=1)),
    Variant("factors, fp32, odd sizes", partial(_skinny, RANK, FP32, odd=1)),
    Variant("mask", partial(_mask, BF16)),
    Variant("mask, fp32", partial(_mask, FP32)),
    *adamw.variants(),
    *retract_triton.variants(),
)
