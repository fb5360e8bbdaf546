"""`--where`: SQL conditions against a plain loop, columns of text, and every way to refuse one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.data.readers import NoRows, RawLog, ReadOptions, read
from cladapt.errors import ConfigError

ROWS = [  # user, item, time, Quantity, Country, Invoice No
    ("a", "x", 1, "6", "France", "536365"),
    ("a", "y", 2, "-1", "France", "C536366"),
    ("b", "x", 3, "10", "Germany", "536367"),
    ("b", "y", 4, "", "France", "536368"),
    ("c", "x", 5, "2.5", "France", "C536369"),
    ("c", "y", 6, "9", "France", "536370"),
]
NAMES = ["user", "item", "timestamp", "Quantity", "Country", "Invoice No"]


def as_csv(folder: Path) -> Path:
    pl.DataFrame(ROWS, schema=NAMES, orient="row").write_csv(folder / "log.csv")
    return folder / "log.csv"


def as_parquet(folder: Path) -> Path:
    number = pl.col("Quantity").cast(pl.Float64, strict=False)
    pl.DataFrame(ROWS, schema=NAMES, orient="row").with_columns(number).write_parquet(folder / "log.parquet")
    return folder / "log.parquet"


def as_jsonl(folder: Path) -> Path:
    frame = pl.DataFrame(ROWS, schema=NAMES, orient="row")
    frame.with_columns(pl.col("Quantity").cast(pl.Float64, strict=False)).write_ndjson(folder / "log.jsonl")
    return folder / "log.jsonl"


def kept(log: RawLog) -> list[int]:
    return log.events["timestamp"].to_list()


def number(text: str) -> float | None:
    return float(text) if text else None


def more(text: str, least: float) -> bool | None:
    return float(text) > least if text else None


def both(*known: bool | None) -> bool | None:
    """AND of three values."""
    return False if False in known else None if None in known else True


CONDITIONS: list[tuple[str, Callable[[Any], bool | None]]] = [
    ("Quantity > 0", lambda r: more(r[3], 0)),
    ("Quantity > 0 AND Country = 'France'", lambda r: both(more(r[3], 0), r[4] == "France")),
    ("\"Invoice No\" NOT LIKE 'C%'", lambda r: not r[5].startswith("C")),
    (
        "Country IN ('Germany') OR Quantity * 2 = 12",
        lambda r: r[4] == "Germany" or (number(r[3]) == 6 if r[3] else None),
    ),
    ("Quantity BETWEEN 2 AND 9", lambda r: 2 <= float(r[3]) <= 9 if r[3] else None),
    ("Quantity IS NOT NULL", lambda r: number(r[3]) is not None),
    ("CAST(Quantity AS DOUBLE) > timestamp", lambda r: more(r[3], r[2])),
    ("timestamp >= 3 AND NOT Country = 'Germany'", lambda r: r[2] >= 3 and r[4] != "Germany"),
]


@pytest.mark.parametrize("write", [as_csv, as_parquet, as_jsonl])
@pytest.mark.parametrize(("clause", "holds"), CONDITIONS, ids=[clause for clause, _ in CONDITIONS])
def test_rows_are_kept_where_the_condition_is_true(
    write: Callable[[Path], Path], clause: str, holds: Callable[[Any], bool | None], tmp_path: Path
) -> None:
    log = read(write(tmp_path), options=ReadOptions(where=(clause,)))
    assert kept(log) == [row[2] for row in ROWS if holds(row)]
    assert log.dropped == {"where": len(ROWS) - log.events.height}
    assert log.notes.get("where_is_null", 0) == sum(holds(row) is None for row in ROWS)
    assert log.rejects.is_empty()


def test_several_conditions_must_all_hold_and_unknown_ones_are_counted(tmp_path: Path) -> None:
    log = read(as_csv(tmp_path), options=ReadOptions(where=("Quantity > 0", "Country = 'France'")))
    assert kept(log) == [1, 5, 6]
    assert (log.dropped, log.notes) == ({"where": 3}, {"where_is_null": 1})
    assert log.losses == [
        {"loss": "dropped by where", "events": 3, "events_share": 0.5, "users": 1, "users_share": pytest.approx(1 / 3)}
    ]


def test_a_text_that_is_no_number_where_one_is_needed_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp,n,m\na,x,1,5,1\na,y,2,many,1\na,z,3,-1,1\na,w,4,many,0\n")
    log = read(tmp_path / "log.csv", options=ReadOptions(where=("n > 0 AND m = 1",)))
    assert kept(log) == [1]
    assert log.dropped == {"where": 2, "bad_where": 1}  # m = 0 decides the last row
    assert log.rejects.select("line", "reason", "value").rows() == [(3, "bad_where", "many")]


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64])
@pytest.mark.parametrize(
    ("clause", "times", "unknown"),
    [("n >= 3", [1], 2), ("NOT n < 3", [1], 2), ("n IS NULL", [2, 4], 0), ("n >= 3 OR m = 2", [1, 2], 1)],
)
def test_nan_is_unknown(tmp_path: Path, dtype: Any, clause: str, times: list[int], unknown: int) -> None:
    frame = pl.DataFrame({"user": ["a"] * 4, "item": list("wxyz"), "timestamp": [1, 2, 3, 4], "m": [1, 2, 3, 4]})
    numbers = pl.Series("n", [5.0, float("nan"), 1.0, None], dtype=dtype)
    frame.with_columns(numbers).write_parquet(tmp_path / "log.parquet")
    log = read(tmp_path / "log.parquet", options=ReadOptions(where=(clause,)))
    assert kept(log) == times
    assert (log.dropped, log.notes.get("where_is_null", 0)) == ({"where": 4 - len(times)}, unknown)


def test_ids_beyond_exact_floats_are_compared_exactly(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\n9007199254740993,x,1\n9007199254740992,y,2\n")
    log = read(tmp_path / "log.csv", options=ReadOptions(where=('"user" = 9007199254740993',)))
    assert log.events["item"].to_list() == ["x"]


def test_a_partition_of_a_folder_can_be_asked_for(tmp_path: Path) -> None:
    for year in (2010, 2011):
        place = tmp_path / "log" / f"year={year}"
        place.mkdir(parents=True)
        pl.DataFrame({"user": ["a"], "item": ["x"], "timestamp": [year]}).write_parquet(place / "0.parquet")
    assert kept(read(tmp_path / "log", options=ReadOptions(where=("year > 2010",)))) == [2011]


@pytest.mark.parametrize(
    ("clause", "problem"),
    [
        ("Quantity >", "unable to parse"),
        ("Quantity > 0; DROP x", "unexpected token"),
        ("Quantiti > 0", "there is no column 'Quantiti'"),
        ("Quantity + 1", "it gives Float64, expected a condition that is true or false"),
        ("Country > 3 AND Country LIKE 'F%'", "expected String type, got: f64"),
        ("SUM(Quantity) > 3", "it gives one value for all rows"),
        ("Quantity > AVG(Quantity)", "it depends on other rows"),
        ("CAST(Country AS INT) > 3", "conversion"),
        ("Quantity > timestamp", "texts and numbers compare differently here"),
        ("", "unable to parse"),
    ],
)
def test_a_condition_that_cannot_be_applied_names_the_columns(clause: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(as_csv(tmp_path), options=ReadOptions(where=(clause,)))
    assert error.value.message.startswith(f"--where {clause!r} cannot be applied to {tmp_path / 'log.csv'}: ")
    assert problem in error.value.message
    assert "columns of log.csv: 'user" in error.value.hint
    assert "Quantity" in error.value.hint


def test_nothing_left_says_which_filter(tmp_path: Path) -> None:
    with pytest.raises(NoRows, match=r"none of the 6 rows can be used \(where: 6\)") as error:
        read(as_csv(tmp_path), options=ReadOptions(where=("Quantity > 99",)))
    assert error.value.hint == "loosen --where"
    assert error.value.rejects.is_empty()


def test_other_formats_take_conditions_on_their_own_columns(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("1\t10\t5\t100\n2\t20\t3\t90\n")
    assert kept(read(tmp_path, options=ReadOptions(where=("rating > 4",)))) == [100]
    with pytest.raises(ConfigError, match="there is no column 'stars'"):
        read(tmp_path, options=ReadOptions(where=("stars > 4",)))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "t.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t4\t5\nu\tj\t2\t6\n"
    )
    log = read(tmp_path / "d", options=ReadOptions(where=("rating > 3",)))
    assert (kept(log), log.notes) == ([5], {})
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "T.inter.json").write_text('{"u": ["i"]}')
    with pytest.raises(ConfigError, match="the lcrec format has fixed columns, so --where cannot apply"):
        read(tmp_path / "l", options=ReadOptions(where=("rating > 3",)))
