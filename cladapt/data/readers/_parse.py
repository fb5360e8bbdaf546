"""Columns of any type to ids, unix seconds and text. A unit of time is never guessed: doubtful numbers are errors."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from cladapt.errors import ConfigError, DataError

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}  # unit of time -> how many make a second
LONG = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
LARGEST_SECONDS = 1e11  # the year 5138
SPARSE, RECENT = 631_152_000, 946_684_800  # 1990 and 2000: logs with times before and after have most between
MIXED = 0.01  # share of times before 1990 from which a log looks like one of two units
COMPACT_DATES = (19_000_101, 21_001_231)  # YYYYMMDD; as seconds a few weeks of 1970
ISO = (
    r"^(?P<date>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?P<minute>\d{2}:\d{2})(?P<second>:\d{2})?(?P<fraction>\.\d+)?)?"
    r" ?(?:Z|UTC|(?P<sign>[+-])(?P<zone_hours>\d{2}):?(?P<zone_minutes>\d{2})?)?$"
)


def to_ids(column: pl.Series, where: str) -> pl.Series:
    """Ids as text, null where absent; whole floats lose their `.0`, as a table with gaps makes integers float."""
    dtype = column.dtype
    if dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        odd = column.filter(column.is_not_null() & column.is_not_nan() & (whole.cast(dtype) != column).fill_null(True))
        if not odd.is_empty():
            raise DataError(f"{where}: {odd[0]} is not an id", "ids are texts or whole numbers")
        column = whole
    elif not (dtype.is_integer() or dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        raise DataError(f"{where}: a column of type {dtype} holds no ids", "ids are texts or whole numbers")
    texts = column.cast(pl.String)
    return texts.set(texts.str.strip_chars() == "", None)


def to_seconds(column: pl.Series, where: str, unit: str = "s", format: str | None = None) -> pl.Series:
    """Unix seconds, float64, null where unreadable, of numbers, dates, datetimes or texts; no zone = UTC.

    Numbers are in `unit`. Texts are numbers or ISO 8601, or with `format` (strftime's terms) that alone.
    """
    dtype = column.dtype
    if dtype in (pl.Date, pl.Datetime):
        if unit != "s" or format is not None:
            raise DataError(
                f"{where}: a column of type {dtype} holds times already", "leave out --time-unit and --time-format"
            )
        timed = column.cast(pl.Datetime("us")) if dtype == pl.Date else column
        return timed.dt.epoch("us") / 1e6
    if format is not None:
        return _formatted_seconds(column.cast(pl.String).str.strip_chars(), format)
    if dtype == pl.String:
        texts = column.str.strip_chars()
        numbers = _checked_numbers(texts.cast(pl.Float64, strict=False), where, unit)
        return (
            numbers
            if numbers.null_count() == texts.null_count() or unit != "s"
            else numbers.zip_with(numbers.is_not_null(), _iso_seconds(texts))
        )
    if dtype.is_numeric() or dtype == pl.Null:
        return _checked_numbers(column.cast(pl.Float64), where, unit)
    raise DataError(
        f"{where}: a column of type {dtype} holds no times", "use unix seconds, ISO dates or a datetime type"
    )


def check_time_format(format: str) -> None:
    """`ConfigError` when a moment that is written by `format` cannot be read back, or loses its year."""
    moment = datetime(2024, 11, 23, 13, 45, 56)
    try:
        written = pl.Series([moment]).dt.strftime(format)
        read = _formatted_seconds(written, format)[0]
    except pl.exceptions.PolarsError:
        read = None
    if read is None or datetime.fromtimestamp(read, UTC).year != moment.year:
        raise ConfigError(
            f"--time-format {format!r} does not say a moment",
            "write it as in --time-format '%d-%m-%Y %H:%M': %Y or %y year, %m month, %d day, %H hour, %M minute, "
            "%I hour of 12 with %p",
        )


def _formatted_seconds(texts: pl.Series, format: str) -> pl.Series:
    moments = texts.str.to_datetime(format, time_unit="us", strict=False)
    return (moments.dt.epoch("us") / 1e6).alias(texts.name)


def _checked_numbers(numbers: pl.Series, where: str, unit: str = "s") -> pl.Series:
    numbers = numbers.set(~numbers.is_finite(), None)
    seconds = numbers / UNITS[unit]
    large = numbers.filter(seconds.abs() > LARGEST_SECONDS)
    if not large.is_empty():
        fits = [name for name, count in UNITS.items() if abs(large[0]) / count <= LARGEST_SECONDS]
        cure = "give unix seconds, or"
        if fits:
            unit_of_it = f"--time-unit {fits[0]} where a log is imported, else divide it by {UNITS[fits[0]]:.0e}"
            cure = f"it looks like {LONG[fits[0]]}: {unit_of_it}; or give"
        raise DataError(f"{where}: {large[0]:.0f} is too large for unix {LONG[unit]}", f"{cure} ISO dates")
    known = numbers.drop_nulls()
    if unit == "s" and len(known) and known.is_between(*COMPACT_DATES).all():
        raise DataError(
            f"{where}: {known[0]:.0f} looks like a date written YYYYMMDD",
            "say so with --time-format %Y%m%d, or write dates as YYYY-MM-DD",
        )
    return seconds


def mixed_units(seconds: pl.Series) -> str | None:
    """A warning where times lie before 1990 and after 2000 with next to none between, as of rows in two units."""
    early, late = seconds.filter(seconds < SPARSE), seconds.filter(seconds > RECENT)
    between = len(seconds) - len(early) - len(late)
    if late.is_empty() or len(early) <= MIXED * len(seconds) or between > MIXED * len(seconds):
        return None
    return (
        f"{len(early)} of {len(seconds)} rows have times from {_moment(early.min())} to {_moment(early.max())}, and "
        f"{len(late)} from {_moment(late.min())} to {_moment(late.max())} UTC: if they are in different units, write "
        "all in one and name it by --time-unit, or leave some out with --where on the time column"
    )


def _moment(seconds: Any) -> str:
    return str(datetime(1970, 1, 1) + timedelta(seconds=int(seconds)))


def _iso_seconds(texts: pl.Series) -> pl.Series:
    part = pl.col("parts").struct.field
    clock = part("date") + "T" + part("minute").fill_null("00:00") + part("second").fill_null(":00")
    zone = part("zone_hours").cast(pl.Int64) * 3600 + part("zone_minutes").cast(pl.Int64).fill_null(0) * 60
    return (
        pl.DataFrame({"parts": texts.str.extract_groups(ISO)})
        .select(
            clock.str.to_datetime("%Y-%m-%dT%H:%M:%S", time_unit="us", strict=False).dt.epoch("s")
            + part("fraction").cast(pl.Float64).fill_null(0.0)
            - pl.when(part("sign") == "-").then(-zone).otherwise(zone).fill_null(0)
        )
        .to_series()
    )


def to_numbers(column: pl.Series, where: str, what: str) -> pl.Series:
    """Finite numbers, float64, null where unreadable."""
    if not (column.dtype.is_numeric() or column.dtype in (pl.String, pl.Null)):
        raise DataError(
            f"{where}: a column of type {column.dtype} holds no {what}", f"{what} are numbers: name another column"
        )
    texts = column.str.strip_chars() if column.dtype == pl.String else column
    numbers = texts.cast(pl.Float64, strict=False)
    return numbers.set(~numbers.is_finite(), None)


def to_weights(column: pl.Series, where: str) -> pl.Series:
    """Weights of events, float64, null where unreadable, not finite or not above 0."""
    numbers = to_numbers(column, where, "weights")
    return numbers.set(~(numbers > 0), None)


def join_text(columns: pl.DataFrame, where: str) -> pl.Series:
    """One text per row, `first | second | …`, from columns of any plain type; lists are joined by commas."""
    texts = []
    for column in columns:
        if column.dtype.is_nested() and column.dtype != pl.List(pl.String):
            raise DataError(
                f"{where}: column {column.name!r} of type {column.dtype} is no text", "name others by --text"
            )
        flat = column.list.join(", ", ignore_nulls=True) if column.dtype == pl.List else column.cast(pl.String)
        flat = flat.str.strip_chars()
        texts.append(flat.set(flat == "", None))
    return pl.DataFrame(texts).select(pl.concat_str(pl.all(), separator=" | ", ignore_nulls=True)).to_series()


def flatten_json(column: pl.Series) -> pl.Series:
    """A column of texts where json lists, also inside each other, become `first, second, …`."""
    lists = column.str.starts_with("[") & column.str.ends_with("]")
    if not lists.any():
        return column
    flat = [_joined(text) if is_list else text for text, is_list in zip(column, lists, strict=True)]
    return pl.Series(column.name, flat, dtype=pl.String)


def _joined(text: str) -> str:
    try:
        return ", ".join(_leaves(json.loads(text)))
    except (ValueError, RecursionError):
        return text


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    elif value not in (None, ""):
        yield str(value).strip()
