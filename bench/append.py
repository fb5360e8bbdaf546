"""What appending costs: CPU seconds and peak memory of `cladapt data append` to long streams. `python bench/append.py`

A made-up log (events spread evenly over users and times, items by a Zipf law) is imported, then new rows are appended:
alone, and again at the end of the whole log. Each command is a process of its own. The figures go to
`bench/results/cpu/append.csv`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from cladapt.artifacts import atomic_path

ROOT = Path(__file__).resolve().parent


def make_log(events: int, new: int, seed: int = 0) -> pl.DataFrame:
    """`events` rows and `new` later ones, in order of time: user, item, timestamp (seconds, all different)."""
    rng = np.random.default_rng(seed)
    n = events + new
    return pl.DataFrame(
        {
            "user": pl.Series(rng.integers(max(1, n // 20), size=n)).cast(pl.String),
            "item": pl.Series(np.minimum(rng.zipf(1.3, size=n), 50_000)).cast(pl.String),
            "timestamp": np.arange(n) * 7,
        }
    )


def cost(*arguments: str) -> tuple[float, float]:
    """CPU seconds and peak memory in MiB of one command; `SystemExit` where it fails."""
    process = subprocess.Popen([sys.executable, "-m", "cladapt_cli", *arguments, "--quiet"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # else it passes for running
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure(folder: Path, events: int, new: int) -> list[dict[str, object]]:
    """A row for the import, each way to append, and the check of the stream."""
    log = make_log(events, new)
    for name, part in (("log", log[:events]), ("new", log[events:]), ("whole", log)):
        part.write_parquet(folder / f"{name}.parquet")
    stream, rows = str(folder / "stream"), []
    calls = {"import": ("data", "import", str(folder / "log.parquet"), "--out", stream)}
    calls["append what is new"] = ("data", "append", stream, str(folder / "new.parquet"))
    calls["append the whole log, nothing new"] = ("data", "append", stream, str(folder / "whole.parquet"))
    calls["check"] = ("data", "check", stream)
    for name, call in calls.items():
        seconds, peak = cost(*call)
        rows.append(
            {"events": events, "new": new, "command": name, "cpu_s": round(seconds, 1), "peak_mib": round(peak)}
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--new", type=int, nargs="+", default=[50_000, 500_000])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu" / "append.csv")
    given = parser.parse_args()
    rows = []
    for events in given.events:
        for new in given.new:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(Path(folder), events, new)
            print(pl.DataFrame(rows))
    with atomic_path(given.out) as path:
        pl.DataFrame(rows).write_csv(path)


if __name__ == "__main__":
    main()
