"""`cladapt bench`: what it offers, and what it refuses before it measures."""

import csv
import json
from pathlib import Path

import pytest
import torch

from cladapt.pipeline import kernels
from cladapt_cli.app import run
from cladapt_kernels.timing import Entry, Work

ROOT = Path(__file__).resolve().parents[2]


def test_the_group_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert "methods" in text
    assert "kernels" in text
    assert "profile" in text


def test_too_few_runs_are_a_usage_error_of_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "methods", "--runs", "1"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "error: --runs 1 is too few for quantiles\nhint: use 3 or more\n"


@pytest.fixture
def two_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of one op that does nothing and one for GPUs alone, their tests green."""
    quick = Entry("quick", "s", ("tests/quick.py",), lambda _: {"a": lambda: None, "b": lambda: None})
    model = {"x": Work(flops=790e6)}
    only = Entry("wide", "s", ("tests/wide.py",), lambda _: {}, floor=Work(bytes=4.3e6), work=model, gpu_only=True)
    monkeypatch.setattr("registry.ROUTES", ())
    monkeypatch.setattr("registry.REGISTRY", (quick, only))
    monkeypatch.setattr(kernels, "compute_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("registry.red", lambda *_: ())


@pytest.mark.usefixtures("two_entries")
def test_kernels_are_measured_and_what_is_modelled_is_told_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "rows.csv"
    assert run(["bench", "kernels", "--runs", "3", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["runs"], result["tests"], result["out"]) == (3, "green", str(out))
    lines = {(line["op"], line["provider"]): line for line in result["measured"]}
    assert list(lines) == [("quick", "a"), ("quick", "b"), ("wide", "floor"), ("wide", "x")]
    assert (lines["quick", "a"]["over baseline"], lines["quick", "a"]["H200 model us"]) == (1.0, None)
    assert (lines["wide", "x"]["over baseline"], lines["wide", "x"]["H200 model us"]) == (None, pytest.approx(1.0))
    with out.open(newline="") as handle:
        assert [row["runs"] for row in csv.DictReader(handle)] == ["3", "3", "0", "0"]


@pytest.mark.usefixtures("two_entries")
def test_kernels_with_red_tests_are_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("registry.red", lambda entries, _: entries[1].tests)
    assert run(["bench", "kernels", "--out", str(tmp_path / "rows.csv"), "--quiet"]) == 5
    streams = capsys.readouterr()
    assert streams.out == ""
    expected = "error: red tests: tests/wide.py; no time is recorded\nhint: run python -m pytest tests/wide.py in "
    assert streams.err == f"{expected}{ROOT}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("two_entries")
def test_kernels_where_no_pytest_is_say_that_nothing_was_tested(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.red", lambda *_: pytest.fail("there is nothing to run with"))
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert run(["bench", "kernels", "--runs", "3"]) == 0
    streams = capsys.readouterr()
    assert "not run: pytest is not installed" in streams.out
    assert "quick" in streams.out


def test_kernels_of_a_package_away_from_its_checkout_have_no_benchmarks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert kernels.checkout() == ROOT
    monkeypatch.setattr("cladapt.__file__", str(tmp_path / "cladapt" / "__init__.py"))
    assert run(["bench", "kernels"]) == 2
    assert capsys.readouterr().err == (
        f"error: the benchmarks of kernels are not installed: no bench/registry in {tmp_path}\n"
        "hint: clone the repository, run make install in it, and use that cladapt\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "2"], "error: --runs 2 is too few for quantiles\nhint: use 3 or more\n"),
        (["--runs", "10000000"], "error: --runs 10000000 would take days\nhint: use 10000 or fewer\n"),
        (["--out", "x.txt"], "error: --out x.txt: unknown kind of file '.txt'\nhint: use a name that ends in .csv\n"),
    ],
)
def test_kernels_refuse_what_cannot_be_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "kernels", *arguments]) == 2
    assert capsys.readouterr().err == message
