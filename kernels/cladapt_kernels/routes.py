"""Which of several equal ways a LoRA linear takes: a table measured on the GPU at hand, else a rule; never an error.

A table is `routes/<gpu>.csv`, written by the benchmark that timed every way at every shape. The rule stands where no
table does: a GEMM of ours may fall behind cuBLAS by 54 % at 1024 x 1024 and by 27 % at 2048 x 2048 before the passes
over X and Y that it saves are lost, by 13 % at 4096 x 4096, where it is not worth the risk.
"""

import csv
import functools
import importlib.util
import math
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

TABLES = Path(__file__).parent / "routes"
WIDEST_UNMEASURED = 2048
HIGHEST_RANK = 128
Gemm = Literal["addmm", "seeded", "strip"]
Factors = Literal["matmul", "skinny"]


class Route(NamedTuple):
    """The ways of Y, of dX and of dA with dB, and why."""

    forward: Gemm
    dx: Gemm
    factors: Factors
    reason: str


def route(x: Tensor, n: int, r: int, p: float = 0.0) -> Route:
    """The route of x [M, K] to [M, N] at rank r with dropout p."""
    if x.device.type != "cuda":
        return Route("addmm", "addmm", "matmul", f"no kernels on {x.device.type}")
    if not has_triton():
        return Route("addmm", "addmm", "matmul", "triton is not installed")
    if r > HIGHEST_RANK:
        return Route("addmm", "addmm", "matmul", f"rank {r} is above {HIGHEST_RANK}")
    if x.dtype == torch.float64:
        return Route("addmm", "addmm", "matmul", "no kernels in float64")
    m, k = x.shape
    found = _nearest(torch.cuda.get_device_name(x.device), str(x.dtype).removeprefix("torch."), m, k, n, r)
    if found is None:
        small = max(k, n) <= WIDEST_UNMEASURED and x.element_size() == 2
        gemm: Gemm = "seeded" if small else "addmm"
        found = Route(gemm, gemm, "skinny", "no table of this GPU: the rule for shapes")
    if p > 0 and found.dx == "addmm":  # a mask of its own in memory would cost more than the product
        found = found._replace(forward="seeded", dx="seeded", factors="skinny", reason=f"{found.reason}; dropout")
    return found


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def _nearest(gpu: str, dtype: str, m: int, k: int, n: int, r: int) -> Route | None:
    """The measured row whose shape is nearest in octaves."""
    rows = _table(gpu, dtype)
    if not rows:
        return None
    wanted = (max(m, 1), k, n, r)
    shape = min(rows, key=lambda row: sum(abs(math.log2(a / b)) for a, b in zip(row, wanted, strict=True)))
    return rows[shape]


@functools.cache
def _table(gpu: str, dtype: str) -> dict[tuple[int, ...], Route]:
    path = TABLES / f"{gpu.lower().replace(' ', '-')}.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if row["dtype"] == dtype]
    return {
        tuple(int(row[name]) for name in "mknr"): Route(
            cast(Gemm, row["forward"]), cast(Gemm, row["dx"]), cast(Factors, row["factors"]), f"measured on {gpu}"
        )
        for row in rows
    }
