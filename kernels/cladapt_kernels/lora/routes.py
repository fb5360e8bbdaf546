"""Which implementation a LoRA linear takes: by a table measured on the GPU at hand, else by a rule; never an error.

A table is `routes/<gpu>.csv`, written by the benchmark that timed each at every shape. The rule stands where no
table does. It is that of an H200: with 8192 rows `seeded` beats cuBLAS's addmm at every width from 1024 to 4096 and
`strip` at none; with 2048 rows cuBLAS is five times as fast. Float32 has no tensor cores that keep its digits, and its
products are cuBLAS's. The rule names no kernel that no GPU has timed: `described` and `single` wait for a table.
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
FEWEST_ROWS = 4096
WIDEST = {True: 4096, False: 2048}
"""The widest product that the rule gives to a kernel, where warp-group matrix instructions exist and where not."""
HIGHEST_RANK = 128
HIGHEST_EXACT_RANK = 64
"""Of float32: above, the sums of dA and dB spill."""
LOWEST_CAPABILITY = (8, 0)
FARTHEST = 4.0
"""A measured shape speaks for those whose K, N and r are within this factor of its own."""
Gemm = Literal["addmm", "seeded", "described", "strip"]
Factors = Literal["matmul", "skinny", "single"]


class Route(NamedTuple):
    """The implementations of Y, of dX and of dA with dB, and why."""

    forward: Gemm
    dx: Gemm
    factors: Factors
    reason: str


def route(like: Tensor, k: int, n: int, r: int, p: float = 0.0) -> Route:
    """The route of a linear, looked for once for all M of one octave.

    Args:
        like: [M, .], whose rows, device and dtype are X's.
        k, n, r: inputs, outputs, ranks (frozen ones too).
        p: dropout.
    """
    return _route(like.device, like.dtype, like.shape[0].bit_length(), k, n, r, p > 0)


@functools.lru_cache(maxsize=4096)
def _route(device: torch.device, dtype: torch.dtype, octave: int, k: int, n: int, r: int, drops: bool) -> Route:
    obstacle = _obstacle(device)
    if not obstacle and r > HIGHEST_RANK:
        obstacle = f"rank {r} is above {HIGHEST_RANK}"
    if not obstacle and dtype == torch.float64:
        obstacle = "no kernels in float64"
    rows, exact = 1 << octave >> 1, dtype == torch.float32
    even = k % 16 == 0 and n % 16 == 0  # else loads are narrow and the kernels spill
    measured = not obstacle and not exact and even
    found = _nearest(_name(device), str(dtype).removeprefix("torch."), rows, k, n, r) if measured else None
    if not obstacle and found is None and rows < FEWEST_ROWS:
        obstacle = f"fewer than {FEWEST_ROWS} rows, which no table has"
    if obstacle:
        return Route("addmm", "addmm", "matmul", obstacle)
    if exact:
        return Route("addmm", "addmm", "skinny" if r <= HIGHEST_EXACT_RANK else "matmul", "float32")
    if found is None:
        narrow = max(k, n) <= WIDEST[_capability(device) >= (9, 0)]
        gemm: Gemm = "seeded" if narrow and even else "addmm"
        found = Route(gemm, gemm, "skinny", "no table near this shape: the rule")
    if drops and even and found.dx == "addmm":  # a mask in memory costs passes over it, the kernels draw it again
        found = found._replace(forward="seeded", dx="seeded", factors="skinny", reason=f"{found.reason}; dropout")
    return found


def forget() -> None:
    """Read tables and devices anew at the next lookup."""
    for cached in (_route, _table, _obstacle, _capability, _name):
        cached.cache_clear()


def runs_kernels(device: torch.device) -> bool:
    """Whether our kernels run there."""
    return not _obstacle(device)


@functools.cache
def _obstacle(device: torch.device) -> str:
    """Why no kernel runs on this device, empty where they do."""
    if device.type != "cuda":
        return f"no kernels on {device.type}"
    if torch.version.hip is not None:
        return "no kernels measured on ROCm"
    if not has_triton():
        return "triton is not installed"
    if _capability(device) < LOWEST_CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*_capability(device), *LOWEST_CAPABILITY)
    return ""


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def _nearest(gpu: str, dtype: str, m: int, k: int, n: int, r: int) -> Route | None:
    """The measured row whose shape is nearest in octaves, of those with at most twice as many rows; None of far ones.

    A kernel that wins with many rows loses with few of them, which leave processors idle.
    """
    octaves = {
        shape: [abs(math.log2(own / other)) for own, other in zip(shape, (m, k, n, r), strict=True)]
        for shape in _table(gpu, dtype)
        if shape[0] <= 2 * m
    }
    near = [shape for shape, away in octaves.items() if max(away[1:]) <= math.log2(FARTHEST)]
    return _table(gpu, dtype)[min(near, key=lambda shape: sum(octaves[shape]))] if near else None


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
