"""Time the registry of kernels: `python bench/run.py [--device cuda] [--only NAME]`; needs torch and pytest alone.

An entry whose tests are red is not timed. Whole training steps and decoding: `cladapt bench methods`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "kernels")]

from registry import REGISTRY  # noqa: E402 - the paths above come first

from cladapt_kernels.timing import Row, compare, where, write_rows  # noqa: E402


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
    rows: list[Row] = []
    here, checked = where(device), {}
    for entry in REGISTRY:
        if arguments.only not in entry.name:
            continue
        if entry.tests not in checked:
            checked[entry.tests] = green(entry.tests)
        if not checked[entry.tests]:
            print(f"error: {entry.tests} is red: {entry.name} is not timed", file=sys.stderr)
            return 5
        for row in compare(entry.name, entry.shape, entry.make(device), device, arguments.runs):
            rows.append({**row, **here})
            print(f"{entry.name} ({entry.shape}) {row['provider']}: {row['metric']} {row['q50']:.3f} {row['unit']}")
    folder = ROOT / "results" / name.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "registry.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
