"""The calls that are compiled ahead of time: sizes of a recommender's backbone, and the corners of every kernel."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cladapt_kernels.aot.compile import Variant
from cladapt_kernels.lora import by_item, gemm, mask, shrink, skinny
from cladapt_kernels.optim.fused_step import FusedStep
from cladapt_kernels.optim.terms import Term
from cladapt_kernels.rectify import Form
from cladapt_kernels.rectify import Gauge as Share
from cladapt_kernels.rectify.kernels import FusedRectifier
from cladapt_kernels.retract import Gauge, Kind
from cladapt_kernels.retract.kernels import FusedStiefel

TOKENS, K, N, RANK, ITEMS = 8192, 1024, 4096, 16, 32
BF16, FP32 = torch.bfloat16, torch.float32
ROUNDING = ("mma", "wgmma", "tcgen05")  # of tensor cores, which would take float32 for TF32


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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


def _skinny(r: int, dtype: torch.dtype = BF16, p: float = 0.0, odd: int = 0, kind: str = "") -> None:
    k, n = K + odd, N + odd
    x, dy, s = _empty(TOKENS, k, dtype=dtype), _empty(TOKENS, n, dtype=dtype), _empty(TOKENS, r, dtype=dtype)
    da, db = _empty(r, k, dtype=FP32), _empty(n, r, dtype=FP32)
    term = skinny.Proximal(kind, da, db, da, db, _empty(2, 6, dtype=FP32)) if kind else None
    skinny.skinny(s, x, s, dy, 2.0, da, db, p, _seed(), term)


def _items(r: int, dtype: torch.dtype = BF16, p: float = 0.0) -> None:
    x, dy, s = (_empty(TOKENS, side, dtype=dtype) for side in (K, N, r))
    bounds, offsets = _empty(ITEMS, 2, dtype=torch.int32), _empty(ITEMS + 1, dtype=torch.int32)
    by_item.factors(s, x, s, dy, 2.0, _empty(r, K, dtype=FP32), _empty(N, r, dtype=FP32), bounds, offsets, p, _seed())


def _table(rows: int) -> Tensor:
    return _empty(TOKENS // rows, 3, dtype=torch.int32)


def _items_shrink(r: int, dtype: torch.dtype = BF16, p: float = 0.0) -> None:
    own, kappa = _empty(ITEMS, r, K + N, dtype=FP32)[..., :K], _empty(ITEMS, dtype=FP32)
    by_item.shrink(_empty(TOKENS, K, dtype=dtype), _empty(r, K, dtype=FP32), own, kappa, _table, 1.0, p, _seed())


def _items_forward(r: int, dtype: torch.dtype = BF16) -> None:
    x, w, s, b = (_empty(*shape, dtype=dtype) for shape in ((TOKENS, K), (N, K), (TOKENS, r), (N, r)))
    own, kappa = _empty(ITEMS, r, K + N, dtype=FP32)[..., K:], _empty(ITEMS, dtype=FP32)
    by_item.seeded(x, w.T, s, b.float().T, own, kappa, _table, 2.0, _empty(N, dtype=dtype))


def _items_backward(r: int, dtype: torch.dtype = BF16, p: float = 0.0) -> None:
    dy, w, d = (_empty(*shape, dtype=dtype) for shape in ((TOKENS, N), (N, K), (TOKENS, r)))
    own, kappa = _empty(ITEMS, r, K + N, dtype=FP32)[..., :K], _empty(ITEMS, dtype=FP32)
    by_item.seeded(dy, w, d, _empty(r, K, dtype=FP32), own, kappa, _table, p=p, seed=_seed())


def _vectors(dtype: torch.dtype = FP32, size: int = 16384) -> list[Tensor]:
    return [_empty(size, dtype=dtype) for _ in range(4)]


def _fused(kind: str, copy: torch.dtype | None = None, size: int = 16384) -> FusedStep:
    """A step's launches whose statistics are taken for fresh."""
    fisher = _vectors(size=size) if kind == "fisher" else None
    term = None if kind == "none" else Term(kind, 1.0, _vectors(size=size), fisher=fisher)
    found = FusedStep(_vectors(size=size), term, None if copy is None else _vectors(copy, size))
    found._versions = [p._version for p in found.parameters]
    return found


def _adamw(kind: str, copy: torch.dtype | None = None, size: int = 16384) -> None:
    grads, first, second = (_vectors(size=size) for _ in range(3))
    _fused(kind, copy, size).step(grads, first, second, _empty(dtype=FP32), 1e-3, weight_decay=0.01)


def _refresh(recentre: bool) -> None:
    _fused("kl")._take(_empty(dtype=FP32), recentre)


def _measure(included: bool) -> None:
    _fused("kl").measure(_vectors(), _empty(dtype=FP32), included)


def _add(kind: str) -> None:
    _fused(kind).add(_vectors(), _empty(dtype=FP32))


def _mask(dtype: torch.dtype) -> None:
    mask.keep_mask(_seed(), TOKENS, K, 0.1, dtype)


def _stiefel(r: int, tangent: bool = False, kind: Kind = "symmetric", gauge: Gauge = "polar", n: int = 1024) -> None:
    """A tangent or a retraction; how many columns F has is no part of what is compiled."""
    xs = [_empty(n, r, dtype=FP32)]
    FusedStiefel(xs, [_empty(n, 64, dtype=FP32)], kind, gauge)._launch(xs, xs, tangent, 1.0)


def _rectifier(r: int, form: Form, gauge: Share, n: int = 1024) -> None:
    """A rectification of three modules, but for what torch solves between two launches."""
    downs, ups = [_empty(r, n, dtype=FP32)] * 3, [_empty(n, r, dtype=FP32)] * 3
    fused = FusedRectifier(downs, ups, [_empty(n, 64)] * 3, form, gauge, 1e-6)
    table = fused._table(fused._points, fused._points)
    fused._multiply(*table)
    fused._move(*table)


STEP_RANKS = (16, 32, 64)
FORMS: tuple[tuple[Form, Share], ...] = (
    ("invariant", "zero"),
    ("invariant", "balanced"),
    ("invariant", "sylvester"),
    ("least_squares", "zero"),
    ("least_squares", "balanced"),
    ("exact", "zero"),
    ("exact", "balanced"),
)
"""Every form, gauge and algebra of a rectification."""
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
    Variant("factors, kl term", partial(_skinny, RANK, kind="kl")),
    Variant("factors, l2 term", partial(_skinny, RANK, kind="l2")),
    Variant("factors, odd sizes", partial(_skinny, RANK, odd=1)),
    Variant("factors, fp32, odd sizes", partial(_skinny, RANK, FP32, odd=1), forbids=ROUNDING),
    *(
        Variant(f"by item, {name}, rank {r}, dropout {p}", partial(call, r, p=p), expects)
        for name, (call, expects) in {
            "factors": (_items, ()),
            "shrink": (_items_shrink, ("wgmma",)),
            "backward": (_items_backward, ("wgmma", "cp.async")),
        }.items()
        for r, p in ((RANK, 0.0), (RANK, 0.1), (64, 0.0), (128, 0.0))
    ),
    *(
        Variant(f"by item, forward, rank {r}", partial(_items_forward, r), ("wgmma", "cp.async"))
        for r in (RANK, 64, 128)
    ),
    *(
        Variant(f"by item, fp32, {name}, rank {r}, dropout {p}", partial(call, r, FP32, p), forbids=ROUNDING)
        for name, call, *given in (
            ("factors", _items, (RANK, 0.0), (64, 0.1)),
            ("shrink", _items_shrink, (RANK, 0.0), (64, 0.1)),
            ("backward", _items_backward, (RANK, 0.0), (RANK, 0.1)),
        )
        for r, p in given
    ),
    Variant("by item, fp32, forward", partial(_items_forward, RANK, FP32), forbids=ROUNDING),
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
    *(Variant(f"adamw, {kind}", partial(_adamw, kind)) for kind in ("none", "kl", "l2", "fisher")),
    Variant("adamw, kl, bf16 copies", partial(_adamw, "kl", BF16)),
    Variant("adamw, kl, odd sizes", partial(_adamw, "kl", None, 16389)),
    Variant("adamw, refresh", partial(_refresh, False)),
    Variant("adamw, refresh, recentred", partial(_refresh, True)),
    Variant("adamw, measure", partial(_measure, False)),
    Variant("adamw, measure, term included", partial(_measure, True)),
    Variant("adamw, add kl", partial(_add, "kl")),
    Variant("adamw, add l2", partial(_add, "l2")),
    *(Variant(f"retract, rank {r}", partial(_stiefel, r)) for r in STEP_RANKS),
    *(
        Variant(f"retract, rank {r}, canonical, qr", partial(_stiefel, r, kind="canonical", gauge="qr"))
        for r in STEP_RANKS
    ),
    *(Variant(f"tangent, rank {r}", partial(_stiefel, r, True)) for r in STEP_RANKS),
    Variant("retract, odd sizes", partial(_stiefel, 13, n=1023)),
    *(
        Variant(f"rectify, rank {r}, {form}, {gauge}", partial(_rectifier, r, form, gauge))
        for r in STEP_RANKS
        for form, gauge in FORMS
    ),
    Variant("rectify, odd sizes", partial(_rectifier, 13, "least_squares", "balanced", 1023)),
)
