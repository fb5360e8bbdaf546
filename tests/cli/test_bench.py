"""`cladapt bench`: what it offers, and what it refuses before it measures."""

import pytest

from cladapt_cli.app import run


def test_the_group_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--help"]) == 0
    assert "methods" in capsys.readouterr().out


def test_too_few_runs_are_a_usage_error_of_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "methods", "--runs", "1"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "error: --runs 1 is too few for quantiles\nhint: use 3 or more\n"
