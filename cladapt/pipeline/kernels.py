"""The registry of kernels on this machine: what `python bench/run.py` measures, from an installed package as well."""

from pathlib import Path
from typing import Any

import torch

from cladapt.artifacts import atomic_path
from cladapt.errors import CheckFailed, ConfigError
from cladapt.ops import compute_device
from cladapt.train.sinks import Sink
from cladapt_kernels.registry import REGISTRY, ROUTES, checkout, red, summary
from cladapt_kernels.timing import FEWEST_RUNS, Row, measure, measure_roofs, where, write_rows

MOST_RUNS = 10_000
UNTESTED = "not run: this installation has no tests beside it"


def check_request(runs: int, out: Path | None) -> None:
    """`ConfigError` for a number of runs or a file that no benchmark can do with."""
    if runs < FEWEST_RUNS:
        raise ConfigError(f"--runs {runs} is too few for quantiles", f"use {FEWEST_RUNS} or more")
    if runs > MOST_RUNS:
        raise ConfigError(f"--runs {runs} would take days", f"use {MOST_RUNS} or fewer")
    if out is not None and out.suffix != ".csv":
        raise ConfigError(f"--out {out}: unknown kind of file {out.suffix!r}", "use a name that ends in .csv")


def kernels(runs: int, out: Path | None, sink: Sink) -> dict[str, Any]:
    """Measure every entry whose tests are green; rows go to the csv file `out` as well where one is given."""
    check_request(runs, out)
    entries = (*ROUTES, *REGISTRY)
    root = checkout()
    sink.emit({"kind": "note", "text": f"tests: {UNTESTED}" if root is None else "running the kernels' tests"})
    if root is not None and (tests := " ".join(red(entries, root))):
        raise CheckFailed(f"red tests: {tests}; no time is recorded", f"run python -m pytest {tests} in {root}")
    device = compute_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    here = where(device)
    roofs, rows = measure_roofs(device)
    measured: list[Row] = [*rows]
    for entry in entries:
        sink.emit({"kind": "note", "text": f"timing {entry.name}, {entry.shape}"})
        measured += measure(entry, device, runs, roofs)
    if out is not None:
        with atomic_path(out) as temporary:
            write_rows(temporary, [{**row, **here} for row in measured])
    return {
        **here,
        "runs": runs,
        "tests": UNTESTED if root is None else "green",
        "out": None if out is None else str(out),
        "measured": summary(measured),
    }
