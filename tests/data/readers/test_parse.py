"""Ids and times in every type that a table may hold."""

from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.data.readers._parse import to_ids, to_seconds
from cladapt.errors import DataError

MOMENT = 1_706_963_696  # 2024-02-03 12:34:56 UTC


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1706963696", MOMENT),
        (" 1706963696.5 ", MOMENT + 0.5),
        ("-3600", -3600),
        ("2024-02-03", MOMENT - 12 * 3600 - 34 * 60 - 56),
        ("2024-02-03T12:34", MOMENT - 56),
        ("2024-02-03T12:34:56Z", MOMENT),
        ("2024-02-03 12:34:56 UTC", MOMENT),
        ("2024-02-03 12:34:56.250", MOMENT + 0.25),
        ("2024-02-03T14:34:56+02:00", MOMENT),
        ("2024-02-03T07:04:56-0530", MOMENT),
        ("2024-02-03 13:34:56+01", MOMENT),
        ("2024-13-03", None),
        ("03/02/2024", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_a_time_text_is_read_as_utc_seconds_or_not_at_all(text: str, seconds: float | None) -> None:
    assert to_seconds(pl.Series([text]), "t").to_list() == [seconds]


@settings(max_examples=50, deadline=None)
@given(
    st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)),
    st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)
def test_iso_texts_agree_with_the_standard_library(moment: datetime, zone: timezone) -> None:
    aware = moment.replace(tzinfo=zone)
    assert to_seconds(pl.Series([aware.isoformat()]), "t")[0] == pytest.approx(aware.timestamp(), abs=1e-5)


def test_typed_times_are_read_in_any_unit_and_zone() -> None:
    naive = pl.Series([datetime(2024, 2, 3, 12, 34, 56)])
    berlin = naive.dt.replace_time_zone("UTC").dt.convert_time_zone("Europe/Berlin")
    for series in (naive, berlin, *(naive.cast(pl.Datetime(unit)) for unit in ("ms", "ns"))):
        assert to_seconds(series, "t").to_list() == [MOMENT]
    assert to_seconds(pl.Series([date(1970, 1, 3), None]), "t").to_list() == [2 * 86_400, None]
    assert to_seconds(pl.Series([MOMENT], dtype=pl.UInt32), "t").to_list() == [MOMENT]


@pytest.mark.parametrize(
    ("ids", "texts"),
    [([1, None], ["1", None]), ([12.0, None, float("nan")], ["12", None, None]), (["", "a b"], [None, "a b"])],
)
def test_ids_become_text(ids: list[Any], texts: list[str | None]) -> None:
    assert to_ids(pl.Series(ids), "u").to_list() == texts


@pytest.mark.parametrize(
    ("convert", "series", "message"),
    [
        (to_ids, pl.Series([1.5]), "log: 1.5 is not an id"),
        (to_ids, pl.Series([[1]]), r"log: a column of type List\(Int64\) holds no ids"),
        (to_seconds, pl.Series([True]), "log: a column of type Boolean holds no times"),
    ],
)
def test_a_column_of_the_wrong_kind_is_an_error(
    convert: Callable[[pl.Series, str], pl.Series], series: pl.Series, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        convert(series, "log")
