"""Time the registry of kernels: `python bench/run.py [--device cuda] [--only NAME]`; needs torch, numpy and pytest.

An op is not timed while its tests are red; the others are. Rows are written after each entry, to `registry.csv` in
`bench/results/<device>` or in the folder of `--results`, and on a GPU first the table of routes that the LoRA linear's
dispatcher reads, so that its own times are those of the table. On a CPU times are ratios; what a model says of an H200
has 0 runs. Whole training steps and decoding: `cladapt bench methods`.
"""

import argparse
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "kernels")]

# ruff: noqa: E402 - the paths come first
from cladapt_kernels.timing import FEWEST_RUNS, Entry, Row, measure, measure_roofs, where, write_rows
from registry import REGISTRY, ROUTES, red, red_by_report, summary, write_routes


def main(arguments: Sequence[str] | None = None, results: Path = ROOT / "results") -> int:
    """Time the registry; 0 when done, 1 where something raised, 2 for a wrong request, 5 where an op was refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--only", default="", help="entries whose name holds this; nothing is written without --results"
    )
    parser.add_argument("--runs", type=int, default=51, help="calls of each provider, fewer of those over 50 ms")
    parser.add_argument("--seconds", type=float, default=6.0, help="for an entry on a GPU, compilation not counted")
    parser.add_argument("--results", type=Path, help="folder of the csv files")
    parser.add_argument("--tested", action="store_true", help="run no tests and time everything")
    parser.add_argument("--report", type=Path, help="run no tests: pytest's JUnit report says which are red")
    options = parser.parse_args(arguments)
    if options.runs < FEWEST_RUNS:
        parser.error(f"--runs {options.runs} is too few for quantiles: use {FEWEST_RUNS} or more")
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds}: expected a time above 0")
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.report is not None and not options.report.is_file():
        parser.error(f"--report {options.report}: no such file; pytest --junitxml={options.report} writes it")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    gpu = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    asked = [entry for entry in (*ROUTES, *REGISTRY) if options.only in entry.name]
    if not asked:
        parser.error(f"--only {options.only}: no entry has such a name")

    if options.tested:
        broken: tuple[str, ...] = ()
    elif options.report is not None:
        broken = red_by_report(asked, options.report)
    else:
        broken = red(asked, ROOT.parent)
    refused = [entry for entry in asked if set(entry.tests) & set(broken)]
    for entry in refused:
        tests = ", ".join(file for file in entry.tests if file in broken)
        _say(f"refused {entry.name}, {entry.shape}: {tests} red or not run")

    folder = options.results or (None if options.only else results / gpu.lower().replace(" ", "-"))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    here, failures = where(device), 0
    roofs, rows = measure_roofs(device)

    def failed(entry: Entry, provider: str, error: Exception) -> None:
        nonlocal failures
        failures += 1
        _say(f"failed {entry.name}, {entry.shape}{provider and ', '}{provider}:")
        traceback.print_exception(error, file=sys.stderr)

    def timed(chosen: Sequence[Entry]) -> list[Row]:
        found: list[Row] = []
        for entry in chosen:
            began = time.perf_counter()
            try:
                own = measure(
                    entry, device, options.runs, roofs, options.seconds, lambda p, e, entry=entry: failed(entry, p, e)
                )
            except Exception as error:
                failed(entry, "", error)
                continue
            found += own
            rows.extend(own)
            _print(own)
            _say(f"timed {entry.name}, {entry.shape} in {time.perf_counter() - began:.1f} s")
            if folder is not None:
                write_rows(folder / "registry.csv", [{**row, **here} for row in rows])
        return found

    _print(rows)
    entries = [entry for entry in asked if entry not in refused]
    parts = timed([entry for entry in entries if entry in ROUTES])
    if on_gpu and parts and folder is not None:
        table = write_routes(parts, gpu)
        _say(f"wrote {table}")
        shutil.copyfile(table, folder / "routes.csv")
    timed([entry for entry in entries if entry not in ROUTES])
    return 5 if refused else 1 if failures else 0


def _print(rows: Sequence[Row]) -> None:
    for line in summary(rows):
        op, shape, provider, *figures = line.items()
        known = ", ".join(f"{name} {_text(value)}" for name, value in figures if value is not None)
        print(f"{op[1]} ({shape[1]}) {provider[1]}: {known}", flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
