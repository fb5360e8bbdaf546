"""The measurement of appending on a log of toy size."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "bench" / "append.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_append", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_log_ends_with_the_new_rows_and_no_time_is_twice(bench: Any) -> None:
    log = bench.make_log(300, 20)
    assert log.height == 320
    assert log["timestamp"].is_sorted()
    assert log["timestamp"].n_unique() == 320


@pytest.mark.slow
def test_every_command_is_measured(bench: Any, tmp_path: Path) -> None:
    rows = bench.measure(tmp_path, 2000, 100)
    assert [row["command"] for row in rows] == [
        "import",
        "append what is new",
        "append the whole log, nothing new",
        "check",
    ]
    assert all(row["cpu_s"] > 0 and row["peak_mib"] > 10 for row in rows)
    with pytest.raises(SystemExit, match="data append"):
        bench.cost("data", "append", str(tmp_path / "nowhere"), "x")
