"""Ranges of an evaluation's table: what a file may say, and what does not hold."""

import json
import math
from pathlib import Path

import pytest

from cladapt.errors import CheckFailed, ConfigError, DataError
from cladapt.eval.expect import check_expected, read_expected

METRICS = ("HR@5", "HR@10", "log_likelihood", "users")
LINES = ("peso", "frozen", "block popularity", "markov", "ceiling")
TABLE = [
    {"model": "peso", "users": 10, "HR@5": 0.2, "HR@10": 0.33, "log_likelihood": -3.0},
    {"model": "block popularity", "users": 10, "HR@5": 0.1, "HR@10": 0.2, "log_likelihood": None},
]


def written(folder: Path, text: str) -> Path:
    path = folder / "expected.yaml"
    path.write_text(text)
    return path


def test_yaml_and_json_say_the_same_and_null_is_an_open_end(tmp_path: Path) -> None:
    asked = {"peso": {"HR@10": [0.3, 0.36], "log_likelihood": [None, -2]}, "block popularity": {"HR@5": [0, None]}}
    expected = {
        "peso": {"HR@10": (0.3, 0.36), "log_likelihood": (-math.inf, -2.0)},
        "block popularity": {"HR@5": (0.0, math.inf)},
    }
    assert read_expected(written(tmp_path, json.dumps(asked)), METRICS, LINES) == expected
    yaml = "peso: {HR@10: [0.3, 0.36], log_likelihood: [null, -2]}\nblock popularity:\n  HR@5: [0, null]\n"
    assert read_expected(written(tmp_path, yaml), METRICS, LINES) == expected


def test_values_at_the_ends_hold_and_all_others_are_listed_at_once() -> None:
    check_expected({"peso": {"HR@10": (0.33, 0.33), "users": (10.0, math.inf)}}, TABLE)
    ranges = {"HR@10": (0.0, 0.3), "HR@5": (0.1, 0.3), "log_likelihood": (-2.0, math.inf)}
    with pytest.raises(CheckFailed) as failed:
        check_expected({"peso": ranges, "block popularity": {"log_likelihood": (-9.0, 0.0)}}, TABLE)
    assert failed.value.exit_code == 5
    assert failed.value.message == (
        "3 of 4 expected values do not hold: peso: HR@10=0.33 is outside [0, 0.3]; "
        "peso: log_likelihood=-3 is outside [-2, null]; "
        "block popularity: log_likelihood has no value, expected [-9, 0]"
    )


def test_a_line_that_this_table_lacks_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="no line 'ceiling', there are peso, block popularity"):
        check_expected({"ceiling": {"HR@5": (0.0, 1.0)}}, TABLE)


def test_every_mistake_in_a_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    text = "pesso: {HR@10: [0, 1]}\npeso: {HR10: [0, 1], HR@5: [1, 0], users: 3}\nmarkov: 1\n"
    with pytest.raises(ConfigError) as wrong:
        read_expected(written(tmp_path, text), METRICS, LINES)
    for part in (
        "no line 'pesso', did you mean 'peso'?",
        "peso: no metric 'HR10', did you mean 'HR@10'?",
        "peso: HR@5=[1, 0]: expected [low, high]",
        "peso: users=3: expected [low, high]",
        "markov: expected metrics with their ranges, found 1",
    ):
        assert part in wrong.value.message


@pytest.mark.parametrize("value", ["[0]", "[0, 1, 2]", "[a, b]", "[true, 1]", "[.nan, 1]", "{low: 0}", "null"])
def test_what_is_no_range_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"peso: HR@5=.*: expected \[low, high\]"):
        read_expected(written(tmp_path, f"peso: {{HR@5: {value}}}"), METRICS, LINES)


def test_a_file_that_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: .*nowhere.yaml"):
        read_expected(tmp_path / "nowhere.yaml", METRICS, LINES)
    with pytest.raises(ConfigError, match="expects nothing"):
        read_expected(written(tmp_path, ""), METRICS, LINES)
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_expected(written(tmp_path, "peso: ["), METRICS, LINES)
