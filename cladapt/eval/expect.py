"""Expected ranges of an evaluation's table, YAML or JSON: line -> metric -> [low, high]; `null` leaves an end open."""

import difflib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cladapt.config import load_recipe
from cladapt.errors import CheckFailed, ConfigError, DataError

Range = tuple[float, float]
Expected = Mapping[str, Mapping[str, Range]]


def read_expected(path: Path, metrics: Collection[str], lines: Collection[str]) -> Expected:
    """Read a file of ranges; one `ConfigError` lists every name that no table has and every range that is none."""
    if not os.path.isfile(path):  # unlike Path's, false for a name too long as well
        raise DataError(f"no such file: {path}", "check the path")
    values = load_recipe(path)
    if not values:
        raise ConfigError(f"{path} expects nothing", "write e.g. `peso: {HR@10: [0.30, 0.36]}`")
    problems: list[str] = []
    expected: dict[str, dict[str, Range]] = {}
    for line, ranges in values.items():
        if line not in lines:
            problems.append(_unknown("line", line, lines))
        if not isinstance(ranges, Mapping) or not ranges:
            problems.append(f"{line}: expected metrics with their ranges, found {ranges!r}")
            continue
        problems += [f"{line}: {_unknown('metric', metric, metrics)}" for metric in ranges if metric not in metrics]
        found = {metric: _range(value) for metric, value in ranges.items()}
        problems += [f"{line}: {m}={ranges[m]!r}: expected [low, high]" for m, value in found.items() if value is None]
        expected[line] = {metric: value for metric, value in found.items() if value is not None}
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)}", "names are those of the table of `cladapt eval`")
    return expected


def check_expected(expected: Expected, table: Sequence[Mapping[str, Any]]) -> None:
    """`CheckFailed` that lists all values outside their range; `ConfigError` for a line that this table lacks."""
    found = {line["model"]: line for line in table}
    if strange := [_unknown("line", line, found) for line in expected if line not in found]:
        raise ConfigError(f"what is expected does not fit the table: {'; '.join(strange)}", "leave these lines out")
    wrong = []
    for line, ranges in expected.items():
        for metric, (low, high) in ranges.items():
            value = found[line].get(metric)
            if value is None:
                wrong.append(f"{line}: {metric} has no value, expected {_text(low, high)}")
            elif not low <= value <= high:
                wrong.append(f"{line}: {metric}={value:.6g} is outside {_text(low, high)}")
    if wrong:
        total = sum(map(len, expected.values()))
        raise CheckFailed(
            f"{len(wrong)} of {total} expected values do not hold: {'; '.join(wrong)}",
            "all tables are written; see what changed, or correct the ranges",
        )


def _range(value: Any) -> Range | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    if any(isinstance(end, bool) or not isinstance(end, int | float | None) for end in value):
        return None
    low, high = (
        float(end) if end is not None else open_ for end, open_ in zip(value, (-math.inf, math.inf), strict=True)
    )
    return (low, high) if low <= high else None  # NaN is no end either


def _text(low: float, high: float) -> str:
    ends = (f"{end:g}" if math.isfinite(end) else "null" for end in (low, high))
    return f"[{', '.join(ends)}]"


def _unknown(kind: str, name: Any, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"no {kind} {name!r}, " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}")
