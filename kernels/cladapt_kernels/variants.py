"""The calls that are compiled ahead of time: sizes of a recommender's backbone, and the corners of every kernel."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cladapt_kernels import adamw, gemm, mask, retract_triton, shrink, skinny
from cladapt_kernels.aot import Variant

TOKENS, K, N, RANK = 8192, 1024, 4096, 16
BF16, FP32 = torch.bfloat16, torch.float32
ROUNDING = ("mma", "wgmma", "tcgen05")  # of tensor cores, which would take float32 for TF32


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _seed() -> Tensor:
    return _empty(1, dtype=torch.int64)


def _shrink(factor: torch.dtype, r: int, p: float, dtype: torch.dtype = BF16) -> None:
    shrink.shrink(_empty(TOKENS, K, dtype=dtype), _empty(r, K, dtype=factor), p=p, seed=_seed())


def _seeded(
    m: int, r: int, dtype: torch.dtype = BF16, p: float = 0.0, backward: bool = False, factor: torch.dtype = FP32,
    by: Callable[..., Tensor] = gemm.seeded,
) -> None:  # fmt: skip
    x, w = _empty(m, N if backward else K, dtype=dtype), _empty(N, K, dtype=dtype)
    s, u = _empty(m, r, dtype=dtype), _empty(r, K, dtype=factor) if backward else _empty(N, r, dtype=factor).T
    by(x, w if backward else w.T, s, u, p=p, seed=_seed())


def _strip(
    r: int, p: float = 0.0, backward: bool = False, dtype: torch.dtype = BF16, factor: torch.dtype = FP32
) -> None:
    w, a, b = _empty(N, K, dtype=dtype), _empty(r, K, dtype=factor), _empty(N, r, dtype=factor)
    if backward:
        gemm.strip(_empty(TOKENS, N, dtype=dtype), w, b.T, a, drop_y=p, seed=_seed())
    else:
        gemm.strip(_empty(TOKENS, K, dtype=dtype), w.T, a, b.T, drop_x=p, seed=_seed())


def _single(r: int, dtype: torch.dtype = BF16, p: float = 0.0) -> None:
    x, dy, s = (_empty(TOKENS, side, dtype=dtype) for side in (K, N, r))
    skinny.single(s, x, s, dy, 2.0, _empty(r, K, dtype=FP32), _empty(N, r, dtype=FP32), p, _seed())


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
    Variant("forward, fp32", partial(_seeded, TOKENS, RANK, FP32), forbids=ROUNDING),
    Variant("backward", partial(_seeded, TOKENS, RANK, backward=True), ("wgmma", "cp.async")),
    Variant("backward, dropout", partial(_seeded, TOKENS, RANK, p=0.1, backward=True), ("wgmma", "cp.async")),
    Variant("described forward", partial(_seeded, TOKENS, RANK, by=gemm.described), ("wgmma", "tma")),
    Variant("described forward, rank 64", partial(_seeded, TOKENS, 64, by=gemm.described), ("wgmma", "tma")),
    Variant("described forward, rank 128", partial(_seeded, TOKENS, 128, by=gemm.described), ("wgmma", "tma")),
    Variant("described backward", partial(_seeded, TOKENS, RANK, backward=True, by=gemm.described), ("wgmma", "tma")),
    Variant(
        "described backward, dropout",
        partial(_seeded, TOKENS, RANK, p=0.1, backward=True, by=gemm.described),
        ("wgmma", "tma"),
    ),
    Variant("strip forward", partial(_strip, RANK), ("wgmma", "cp.async")),
    Variant("strip forward, rank 64", partial(_strip, 64), ("wgmma", "cp.async")),
    Variant("strip forward, dropout", partial(_strip, RANK, 0.1), ("wgmma", "cp.async")),
    Variant("strip backward", partial(_strip, RANK, backward=True), ("wgmma", "cp.async")),
    Variant("strip backward, dropout", partial(_strip, RANK, 0.1, True), ("wgmma", "cp.async")),
    Variant("factors", partial(_skinny, RANK)),
    Variant("factors, rank 128", partial(_skinny, 128)),
    Variant("factors, fp32", partial(_skinny, RANK, FP32), forbids=ROUNDING),
    Variant("factors, fp32, rank 64", partial(_skinny, 64, FP32), forbids=ROUNDING),
    Variant("factors, fp32, rank 128", partial(_skinny, 128, FP32), forbids=ROUNDING),
    Variant("factors, fp32, dropout", partial(_skinny, RANK, FP32, 0.1), forbids=ROUNDING),
    Variant("factors, fp32, rank 64, dropout", partial(_skinny, 64, FP32, 0.1), forbids=ROUNDING),
    Variant("factors at once", partial(_single, RANK)),
    Variant("factors at once, rank 128", partial(_single, 128)),
    Variant("factors at once, dropout", partial(_single, RANK, p=0.1)),
    Variant("factors at once, fp32", partial(_single, RANK, FP32), forbids=ROUNDING),
    Variant("factors at once, fp32, rank 64, dropout", partial(_single, 64, FP32, 0.1), forbids=ROUNDING),
    Variant("factors, dropout", partial(_skinny, RANK, p=0.1)),
    Variant("factors, all hooks", partial(_skinny, RANK, hooks=True)),
    Variant("factors, odd sizes", partial(_skinny, RANK, odd=1)),
    Variant("factors, fp32, odd sizes", partial(_skinny, RANK, FP32, odd=1), forbids=ROUNDING),
    *(
        Variant(f"fp32 by {name} factors, {what}", partial(call, dtype=FP32, factor=factor), forbids=ROUNDING)
        for name, factor in (("fp32", FP32), ("bf16", BF16))
        for what, call in {
            "shrink": partial(_shrink, r=RANK, p=0.0),
            "shrink, dropout": partial(_shrink, r=RANK, p=0.1),
            "shrink, rank 64, dropout": partial(_shrink, r=64, p=0.1),
            "forward, few rows": partial(_seeded, 512, RANK),
            "backward, dropout": partial(_seeded, TOKENS, RANK, p=0.1, backward=True),
            "strip forward": partial(_strip, RANK),
            "strip forward, dropout": partial(_strip, RANK, 0.1),
            "strip backward, dropout": partial(_strip, RANK, 0.1, backward=True),
        }.items()
    ),
    Variant("mask", partial(_mask, BF16)),
    Variant("mask, fp32", partial(_mask, FP32)),
    *adamw.variants(),
    *retract_triton.variants(),
)
