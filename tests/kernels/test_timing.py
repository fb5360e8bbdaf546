"""Timing: the order of calls, ratios known by construction, the one csv schema."""

import csv
from pathlib import Path

import pytest
import torch

from cladapt_kernels import timing
from cladapt_kernels.timing import COLUMNS, WHERE, compare, interleaved, quantiles, where, write_rows

CPU = torch.device("cpu")


def test_every_call_of_one_provider_has_one_of_each_other_beside_it_in_both_orders() -> None:
    calls: list[str] = []
    providers = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = interleaved(providers, CPU, 4)
    assert "".join(calls) == "cbaabc" * 3  # one pair of turns warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_quantiles_of_known_values() -> None:
    assert quantiles([float(v) for v in range(11)]) == {"q20": 2.0, "q50": 5.0, "q80": 8.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that calls move by hand."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("counted", "metric", "ratio"), [("", "time over 'slow'", 0.25), ("users", "users per second over 'slow'", 4.0)]
)
def test_ratios_are_of_times_or_of_speeds(clock: list[float], counted: str, metric: str, ratio: float) -> None:
    def takes(seconds: float) -> None:
        clock[0] += seconds

    providers = {"slow": lambda: takes(8.0), "fast": lambda: takes(2.0)}
    slow, fast = compare("op", "a shape", providers, CPU, 5, counted)
    common = {"name": "op", "shape": "a shape", "runs": 5, "metric": metric, "unit": "ratio"}
    assert slow == {**common, "provider": "slow", "q20": 1.0, "q50": 1.0, "q80": 1.0}
    assert fast == {**common, "provider": "fast", "q20": ratio, "q50": ratio, "q80": ratio}


def test_the_csv_has_the_schema_and_refuses_other_columns(tmp_path: Path) -> None:
    rows = [{**row, **where(CPU)} for row in compare("op", "s", {"x": lambda: None}, CPU, 3)]
    write_rows(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open(newline="") as handle:
        reader = csv.DictReader(handle)
        assert tuple(reader.fieldnames or ()) == (*COLUMNS, *WHERE)
        (row,) = reader
    assert (row["name"], row["provider"], row["runs"], row["torch"]) == ("op", "x", "3", torch.__version__)
    with pytest.raises(ValueError, match="surprise"):
        write_rows(tmp_path / "rows.csv", [{**rows[0], "surprise": 1}])


def test_an_installed_package_names_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "timing.py"))
    assert where(CPU)["commit"] == ""
