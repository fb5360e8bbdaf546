"""The registry of kernels on this machine: what `python bench/run.py` measures, found in the package's own checkout."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import cladapt
from cladapt.artifacts import atomic_path
from cladapt.errors import CheckFailed, ConfigError
from cladapt.ops import compute_device
from cladapt.train.sinks import Sink
from cladapt_kernels.timing import FEWEST_RUNS, Row, measure, measure_roofs, where, write_rows

MOST_RUNS = 10_000
UNTESTED = "not run: pytest is not installed"


def check_request(runs: int, out: Path | None) -> None:
    """`ConfigError` for a number of runs or a file that no benchmark can do with."""
    if runs < FEWEST_RUNS:
        raise ConfigError(f"--runs {runs} is too few for quantiles", f"use {FEWEST_RUNS} or more")
    if runs > MOST_RUNS:
        raise ConfigError(f"--runs {runs} would take days", f"use {MOST_RUNS} or fewer")
    if out is not None and out.suffix != ".csv":
        raise ConfigError(f"--out {out}: unknown kind of file {out.suffix!r}", "use a name that ends in .csv")


def checkout() -> Path:
    """The checkout that this package lies in; `ConfigError` where it is installed away from one."""
    root = Path(cladapt.__file__).resolve().parents[1]
    if not (root / "bench" / "registry" / "__init__.py").is_file():
        raise ConfigError(
            f"the benchmarks of kernels are not installed: no bench/registry in {root}",
            "clone the repository, run make install in it, and use that cladapt",
        )
    return root


def _registry(root: Path) -> Any:
    """The package `bench/registry` of a checkout."""
    folder = str(root / "bench")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("registry")
    finally:
        sys.path.remove(folder)


def kernels(runs: int, out: Path | None, sink: Sink) -> dict[str, Any]:
    """Measure every entry whose tests are green; rows go to the csv file `out` as well where one is given.

    `ConfigError` without a checkout, `CheckFailed` where a test is red.
    """
    check_request(runs, out)
    root = checkout()
    registry, tested = _registry(root), find_spec("pytest") is not None
    entries = (*registry.ROUTES, *registry.REGISTRY)
    sink.emit({"kind": "note", "text": "running the kernels' tests" if tested else f"tests: {UNTESTED}"})
    if tested and (tests := " ".join(registry.red(entries, root))):
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
        "tests": "green" if tested else UNTESTED,
        "out": None if out is None else str(out),
        "measured": registry.summary(measured),
    }
