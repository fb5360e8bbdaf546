"""Columns of any type to ids, unix seconds and text. A unit of time is never guessed: doubtful numbers are errors."""

import polars as pl

from cladapt.errors import DataError

LARGEST_SECONDS = 1e11  # the year 5138
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


def to_seconds(column: pl.Series, where: str) -> pl.Series:
    """Unix seconds, float64, null where unreadable, of numbers, dates, datetimes or ISO 8601 texts; no zone = UTC."""
    dtype = column.dtype
    if dtype in (pl.Date, pl.Datetime):
        timed = column.cast(pl.Datetime("us")) if dtype == pl.Date else column
        return timed.dt.epoch("us") / 1e6
    if dtype == pl.String:
        texts = column.str.strip_chars()
        numbers = _checked_numbers(texts.cast(pl.Float64, strict=False), where)
        return (
            numbers
            if numbers.null_count() == texts.null_count()
            else numbers.zip_with(numbers.is_not_null(), _iso_seconds(texts))
        )
    if dtype.is_numeric() or dtype == pl.Null:
        return _checked_numbers(column.cast(pl.Float64), where)
    raise DataError(
        f"{where}: a column of type {dtype} holds no times", "use unix seconds, ISO dates or a datetime type"
    )


def _checked_numbers(numbers: pl.Series, where: str) -> pl.Series:
    numbers = numbers.set(~numbers.is_finite(), None)
    large = numbers.filter(numbers.abs() > LARGEST_SECONDS)
    if not large.is_empty():
        unit, factor = next(
            (unit, factor)
            for unit, factor, limit in (("milli", "1e3", 1e14), ("micro", "1e6", 1e17), ("nano", "1e9", float("inf")))
            if abs(large[0]) <= limit
        )
        raise DataError(
            f"{where}: {large[0]:.0f} is too large for unix seconds",
            f"it looks like {unit}seconds: divide the column by {factor}, or give ISO dates",
        )
    low, high = numbers.min(), numbers.max()
    if isinstance(low, float) and isinstance(high, float) and COMPACT_DATES[0] <= low <= high <= COMPACT_DATES[1]:
        raise DataError(f"{where}: {low:.0f} looks like a date written YYYYMMDD", "write dates as YYYY-MM-DD")
    return numbers


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


def to_weights(column: pl.Series, where: str) -> pl.Series:
    """Weights of events, float64, null where unreadable, not finite or not above 0."""
    if not (column.dtype.is_numeric() or column.dtype in (pl.String, pl.Null)):
        raise DataError(f"{where}: a column of type {column.dtype} holds no weights", "use numbers above 0")
    texts = column.str.strip_chars() if column.dtype == pl.String else column
    numbers = texts.cast(pl.Float64, strict=False)
    return numbers.set(~(numbers.is_finite() & (numbers > 0)), None)


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
