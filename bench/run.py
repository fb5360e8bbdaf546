"""Time the registry: providers interleaved in one process, medians and ratios to the baseline, one csv schema.

`python bench/run.py [--device cuda] [--only NAME]`. An entry whose tests are red is not timed.
"""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent), str(ROOT.parent / "kernels")]

from registry import REGISTRY, Entry, Providers  # noqa: E402 - the paths above come first

COLUMNS = ("name", "shape", "provider", "metric", "unit", "q20", "q50", "q80", "runs")
WHERE = ("device", "torch", "commit", "time")


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
    for turn in range(runs + 2):
        for name in names if turn % 2 else reversed(names):
            elapsed = timed(providers[name], device)
            if turn >= 2:
                seconds[name].append(elapsed)
    return seconds


def quantiles(values: list[float]) -> dict[str, float]:
    """20, 50 and 80 % quantiles."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"q20": cuts[1], "q50": statistics.median(values), "q80": cuts[7]}


def measure(entry: Entry, device: torch.device, runs: int) -> list[dict[str, object]]:
    """Rows of one entry: the ratio of each provider to the baseline, pair by pair; absolute times on a GPU alone."""
    seconds = interleaved(entry.make(device), device, runs)
    baseline, *_ = seconds
    rows = []
    for provider, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[baseline], strict=True)]
        common = {"name": entry.name, "shape": entry.shape, "provider": provider, "runs": runs}
        rows.append({**common, "metric": f"time over '{baseline}'", "unit": "ratio", **quantiles(ratios)})
        if device.type == "cuda":
            rows.append({**common, "metric": "time", "unit": "us", **quantiles([1e6 * v for v in values])})
    return rows


def green(tests: str) -> bool:
    """Whether the tests of an entry pass at this commit."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", tests]
    return subprocess.run(command, cwd=ROOT.parent, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Time the registry and write `bench/results/<device>/registry.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=int, default=51)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT.parent, capture_output=True, text=True)
    where = {
        "device": name if device.type == "cuda" else f"cpu, {platform.machine()}",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    rows, checked = [], {}
    for entry in REGISTRY:
        if arguments.only not in entry.name:
            continue
        if entry.tests not in checked:
            checked[entry.tests] = green(entry.tests)
        if not checked[entry.tests]:
            print(f"error: {entry.tests} is red: {entry.name} is not timed", file=sys.stderr)
            return 5
        for row in measure(entry, device, arguments.runs):
            rows.append({**row, **where})
            print(f"{entry.name} ({entry.shape}) {row['provider']}: {row['metric']} {row['q50']:.3f} {row['unit']}")
    folder = ROOT / "results" / name.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "registry.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, (*COLUMNS, *WHERE))
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
