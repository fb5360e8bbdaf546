"""How anything is timed here: providers interleaved in one process, medians of ratios to the first, one csv schema.

Imports torch alone, so that kernels can be timed where the rest of the project is not installed.
"""

import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Providers = Mapping[str, Callable[[], object]]
Row = dict[str, object]

COLUMNS = ("name", "shape", "provider", "metric", "unit", "q20", "q50", "q80", "runs")
WHERE = ("device", "torch", "commit", "time")
WARMUP = 2
FEWEST_RUNS = 3  # below, the quantiles say nothing


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def interleaved(providers: Providers, device: torch.device, runs: int) -> dict[str, list[float]]:
    """Seconds of `runs` calls of each provider, in turn, the order turned around every time; two calls warm up."""
    names = list(providers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(runs + WARMUP):
        for name in names if turn % 2 else reversed(names):
            elapsed = timed(providers[name], device)
            if turn >= WARMUP:
                seconds[name].append(elapsed)
    return seconds


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """20, 50 and 80 % quantiles."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"q20": cuts[1], "q50": statistics.median(values), "q80": cuts[7]}


def compare(
    name: str, shape: str, providers: Providers, device: torch.device, runs: int, counted: str = ""
) -> list[Row]:
    """One row per provider: the ratio to the first one, pair by pair; absolute times beside it on a GPU alone.

    The ratio is of times, or of speeds where `counted` says what each call does equally much of.
    """
    seconds = interleaved(providers, device, runs)
    baseline, *_ = seconds
    metric = f"{counted} per second over '{baseline}'" if counted else f"time over '{baseline}'"
    rows: list[Row] = []
    for provider, values in seconds.items():
        pairs = zip(values, seconds[baseline], strict=True)
        ratios = [b / a if counted else a / b for a, b in pairs]
        common: Row = {"name": name, "shape": shape, "provider": provider, "runs": runs}
        rows.append({**common, "metric": metric, "unit": "ratio", **quantiles(ratios)})
        if device.type == "cuda":
            rows.append({**common, "metric": "time", "unit": "us", **quantiles([1e6 * v for v in values])})
    return rows


def where(device: torch.device) -> dict[str, str]:
    """On which device, with which torch, at which commit of this source and when: the columns WHERE."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {platform.machine()}",
        "torch": torch.__version__,
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as csv with the columns COLUMNS and WHERE, nothing more and nothing less."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, (*COLUMNS, *WHERE), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _commit() -> str:
    """Commit of the checkout that tracks this package, marked when it has changes; empty for an installed package."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    # an environment inside someone's own repository is not under that repository's commits
    tracked = git("ls-files", "__init__.py")
    return git("describe", "--always", "--dirty", "--exclude=*") if tracked else ""
