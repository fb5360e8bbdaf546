"""The measurement of Rec-PCA on a case of toy size."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "bench" / "rec_pca.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_rec_pca", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("solver", ["dense", "lanczos"])
def test_a_row_says_what_was_measured(bench: Any, solver: str) -> None:
    row = bench.measure(400, 16, 3, solver, 4)
    assert (row["items"], row["columns"], row["dimensions"], row["solver"]) == (400, 16, 4, solver)
    assert 400 * 5 < row["edges"] <= 400 * 6  # both directions, a few pairs drawn twice
    assert row["fit_cpu_s"] >= 0
