"""Time the registry of kernels: `python bench/run.py [--device cuda] [--only NAME]`; needs torch and pytest alone.

Nothing is timed while its tests are red. A whole run writes `bench/results/<device>/registry.csv`, and on a GPU first
the table of routes that the LoRA linear's dispatcher reads, so that its own times are those of the table. On a CPU
times are ratios; what a model says of an H200 has 0 runs. Whole training steps and decoding: `cladapt bench methods`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / "kernels"))

from cladapt_kernels.registry import REGISTRY, ROUTES, red, summary, write_routes  # noqa: E402 - the path comes first
from cladapt_kernels.timing import FEWEST_RUNS, Entry, Row, measure, measure_roofs, where, write_rows  # noqa: E402


def main(arguments: Sequence[str] | None = None, results: Path = ROOT / "results") -> int:
    """Time the registry; 0 when done, 2 where nothing can be timed as asked, 5 where tests are red."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="entries whose name holds this; nothing is written")
    parser.add_argument("--runs", type=int, default=51)
    parser.add_argument("--tested", action="store_true", help="the tests have just run: do not run them again")
    options = parser.parse_args(arguments)
    if options.runs < FEWEST_RUNS:
        parser.error(f"--runs {options.runs} is too few for quantiles: use {FEWEST_RUNS} or more")
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    entries = [entry for entry in (*ROUTES, *REGISTRY) if options.only in entry.name]
    if not entries:
        parser.error(f"--only {options.only}: no entry has such a name")
    if not options.tested and (tests := red(entries, ROOT.parent)):
        print(f"error: {tests} is red: nothing is timed", file=sys.stderr)
        return 5
    roofs, rows = measure_roofs(device)

    def timed(chosen: Sequence[Entry]) -> list[Row]:
        found: list[Row] = []
        for entry in chosen:
            print(f"timing {entry.name}, {entry.shape}", file=sys.stderr, flush=True)
            found += measure(entry, device, options.runs, roofs)
        return found

    ways = timed([entry for entry in entries if entry in ROUTES])
    if on_gpu and not options.only:
        print(f"wrote {write_routes(ways, torch.cuda.get_device_name(device))}", file=sys.stderr)
    rows = [*rows, *ways, *timed([entry for entry in entries if entry not in ROUTES])]
    for line in summary(rows):
        op, shape, provider, *figures = line.items()
        told = ", ".join(f"{name} {_text(value)}" for name, value in figures if value is not None)
        print(f"{op[1]} ({shape[1]}) {provider[1]}: {told}")
    if not options.only:
        name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
        folder = results / name.lower().replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        here = where(device)
        write_rows(folder / "registry.csv", [{**row, **here} for row in rows])
    return 0


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
