"""From rows as they stand in a source to a `RawLog`: what is filtered, what is rejected and why, what is lost.

A row that cannot be used becomes a reject with its file, line and reason; nothing disappears without a number.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from cladapt.data.readers._base import DEFAULTS, NO_ITEMS, NO_REJECTS, REJECTS, NoRows, RawLog, ReadOptions
from cladapt.data.readers._parse import mixed_units, to_ids, to_numbers, to_seconds, to_weights
from cladapt.data.readers._scan import Table, exact_rejects
from cladapt.data.readers._where import conditions
from cladapt.errors import DataError

LONGEST_VALUE = 80
FILTERS = ("where", "below_min_rating")
"""Reasons that were asked for: counted, and no fault of a row."""
YEAR = 365 * 86_400
MANY = 0.2
"""Share of rejected rows from which a reason is worth a warning."""
Items = tuple[pl.DataFrame, pl.DataFrame]
CURES = {
    "time": "say how times are written: --time-format '%d-%m-%Y %H:%M', or --time-unit ms; --timestamp COL names them",
    "weight": "weights are finite and above 0: mend them, or leave out --weight",
    "rating": "ratings are numbers: mend them, or leave out --min-rating",
    "where": "texts that are no numbers stand where a condition needs one: mend them, or CAST the column in --where",
    "user": "check --user, and that the column is filled",
    "item": "check --item, and that the column is filled",
    "line": "each line is one JSON object, or one line of the format",
}


def select_rows(
    table: Table, names: Mapping[str, str], options: ReadOptions, path: Path, texts: Sequence[str] = ()
) -> pl.DataFrame:
    """The rows of a log under the names of their roles (role -> column), with the first reason to leave each out.

    `texts` are the columns that describe a row's item, joined into `text`.
    """
    data = table.data
    rows = data.select(table.line, *(pl.col(name).alias(role) for role, name in names.items()))
    reasons = [(table.malformed.is_not_null(), "malformed_line")]
    value = table.malformed
    if options.where:
        holds, unreadable = conditions(data, options.where, path)
        reasons += [(unreadable.is_not_null(), "bad_where"), (~holds.fill_null(False), "where")]
        value = value.zip_with(value.is_not_null(), unreadable)
        rows = rows.with_columns((holds.is_null() & unreadable.is_null()).alias("unknown"))
    if texts:
        rows = rows.with_columns(table.texts(texts, str(path)).alias("text"))
    reason = pl.coalesce(pl.when(applies).then(pl.lit(name)) for applies, name in reasons)
    return parse_events(rows.with_columns(reason.alias("reason"), value.alias("value")), str(path), options)


def parse_events(frame: pl.DataFrame, where: str, options: ReadOptions = DEFAULTS) -> pl.DataFrame:
    """Ids, exact unix seconds and the reason to leave a row out, from columns of any readable type.

    In: user, item, and where the source has them timestamp, weight, rating, block, file, line, reason and value
    (String). A frame without timestamp has only an order. Out: user String, item String, exact Float64, block Int32,
    file String (`where` unless given), line Int64, reason String (null = keep), value String, and weight, text and
    unknown (a condition is null) if they were in.
    """
    user = to_ids(frame["user"], f"{where}: user")
    item = to_ids(frame["item"], f"{where}: item")
    exact = pl.Series("exact", dtype=pl.Float64).extend_constant(None, frame.height)
    # reason, where it applies, the value to show; a row has the first that applies
    problems: list[tuple[str, pl.Series, str | pl.Series]] = []
    if options.min_rating is not None and "rating" in frame.columns:
        rating = to_numbers(frame["rating"], f"{where}: rating", "ratings")
        problems += _number_problems("rating", frame["rating"], rating)
        problems.append(("below_min_rating", (rating < options.min_rating).fill_null(False), ""))
    problems += [("no_user", user.is_null(), ""), ("no_item", item.is_null(), "")]
    if "timestamp" in frame.columns:
        wanted = frame["timestamp"]
        if "reason" in frame.columns:  # what is left out needs no readable time
            wanted = wanted.set(frame["reason"].is_not_null(), None)
        exact = to_seconds(wanted, f"{where}: timestamp", options.time_unit, options.time_format).alias("exact")
        problems += _number_problems("time", frame["timestamp"], exact)
    kept: list[pl.Series] = [frame[name] for name in ("text", "unknown") if name in frame.columns]
    if "weight" in frame.columns:
        weights = to_weights(frame["weight"], f"{where}: weight").alias("weight")
        problems += _number_problems("weight", frame["weight"], weights)
        kept.append(weights)
    given = {"block": None, "file": where, "line": None, "reason": None, "value": None}
    rows = frame.with_columns(pl.lit(value).alias(name) for name, value in given.items() if name not in frame.columns)
    reasons = [pl.when(applies).then(pl.lit(reason)) for reason, applies, _ in problems]
    values = [pl.when(applies).then(pl.lit(shown)) for _, applies, shown in problems]
    parsed = rows.select(
        user.alias("user"),
        item.alias("item"),
        exact,
        pl.col("block").cast(pl.Int32, strict=False).alias("block"),
        "file",
        pl.col("line").cast(pl.Int64),
        pl.coalesce("reason", *reasons).cast(pl.String),
        pl.when(pl.col("reason").is_null()).then(pl.coalesce(*values)).otherwise("value")
        .fill_null("").cast(pl.String).str.head(LONGEST_VALUE).alias("value"),
        *kept,
    )  # fmt: skip
    if "block" in frame.columns:
        _check_blocks(frame["block"], parsed, where)
    return parsed


def _number_problems(what: str, column: pl.Series, numbers: pl.Series) -> list[tuple[str, pl.Series, str | pl.Series]]:
    """Rows where a column is empty, and rows where it holds something that gave no number."""
    blank = column.is_null() | (column.str.strip_chars() == "") if column.dtype == pl.String else column.is_null()
    return [(f"no_{what}", blank, ""), (f"bad_{what}", ~blank & numbers.is_null(), column.cast(pl.String))]


def _check_blocks(given: pl.Series, parsed: pl.DataFrame, where: str) -> None:
    blocks = parsed["block"]
    whole = (
        blocks.is_not_null() & (given == blocks).fill_null(False) if given.dtype.is_float() else blocks.is_not_null()
    )
    bad = parsed["reason"].is_null() & ~whole
    if bad.any():
        raise DataError(
            f"{where}: the block column holds {given.filter(bad)[0]!r}, not a block number",
            "every row needs a whole number, and later blocks larger ones: 1, 2, 3, …",
        )


def assemble(
    source: str,
    parsed: pl.DataFrame,
    where: str,
    files: Mapping[str, str],
    items: Items = (NO_ITEMS, NO_REJECTS),
    index: Mapping[str, tuple[str, ...]] | None = None,
    notes: Mapping[str, int] | None = None,
    exact: bool = False,
) -> RawLog:
    """The `RawLog` of parsed rows: filters and rejects are taken out and counted, then exact repeats of timed rows.

    Without times a repeat may be a second visit, so it stays. The texts of the items are those of `items`, or where the
    rows have a text, which the events then keep, each item's most frequent one. `exact`: line breaks inside a csv's
    rows are counted in the lines already. `NoRows` when nothing is left.
    """
    rows = parsed.with_row_index("order")
    if "text" in rows.columns:
        rows = rows.with_columns(pl.when(pl.col("text") != "").then("text"))
    usable = rows.filter(pl.col("reason").is_null())
    left_out = rows.drop_nulls("reason")
    if usable.is_empty():
        raise _nothing_left(left_out, where, exact)
    texts = _texts_of_rows(usable) if "text" in usable.columns else None
    zero = _check_zero(usable, where)
    order = pl.col("order").cast(pl.Int64)
    if not usable["exact"].has_nulls():
        if texts:
            # the repeats of an event may be the ones with its text
            usable = usable.with_columns(pl.col("text").drop_nulls().first().over("user", "item", "exact", "block"))
        first = usable.select(pl.struct("user", "item", "exact").is_first_distinct()).to_series()
        event = pl.concat_str("user", "item", "exact", separator=" ").str.head(LONGEST_VALUE)
        repeats = usable.filter(~first).with_columns(reason=pl.lit("duplicate"), value=event)
        usable, left_out = usable.filter(first), pl.concat([left_out, repeats])
        if (usable["exact"] % 1 != 0).any():
            # timestamps are whole seconds; the order keeps what they lose
            order = pl.col("exact").rank("ordinal").cast(pl.Int64) - 1
    events = usable.select(
        "user",
        "item",
        pl.col("exact").floor().cast(pl.Int64).alias("timestamp"),
        order.alias("order"),
        "block",
        *(name for name in ("weight", "text") if name in usable.columns),
    )
    asked = pl.col("reason").is_in(FILTERS)
    filtered = dict(left_out.filter(asked).group_by("reason", maintain_order=True).len().iter_rows())
    rejects = left_out.filter(~asked).sort("order").select(*REJECTS)
    unknown = int(left_out.filter(pl.col("reason") == "where")["unknown"].sum()) if "unknown" in rows.columns else 0
    found = {"where_is_null": unknown, "time_zero": zero} | (texts[1] if texts else {})
    return RawLog(
        events,
        texts[0] if texts else items[0],
        index,
        _rejects(pl.concat([rejects, items[1]]), exact),
        files,
        source,
        {**(notes or {}), **{name: count for name, count in found.items() if count}},
        filtered,
        _losses(rows, left_out),
        _warnings(rows.height, rejects, zero) + _mixed_times(usable["exact"], zero),
        places=usable.select("file", "line"),
    )


def rejects_of(rows: pl.DataFrame, reason: str, value: pl.Expr) -> pl.DataFrame:
    """Rows with their file and line as rejects for one reason."""
    return exact_rejects(
        rows.select("file", "line", pl.lit(reason).alias("reason"), value.str.head(LONGEST_VALUE).alias("value"))
    )


def clean_items(items: pl.DataFrame, where: str) -> Items:
    """The `items` and the `rejects` of an item table: rows without an id, then all rows of an id but one.

    In: item, text, and where the source has them file, line, reason and value. Of an item's usable rows the first with
    a text stays, or where none has a text the first.
    """
    absent = [name for name in REJECTS if name not in items.columns]
    rows = items.with_columns(*(pl.lit(None, dtype=REJECTS[name]).alias(name) for name in absent))
    unnamed = pl.when(pl.col("item").is_null()).then(pl.lit("item_row_without_id"))
    rows = rows.with_columns(reason=pl.coalesce("reason", unnamed))
    usable = pl.col("reason").is_null()
    empty = pl.col("text").fill_null("").str.strip_chars() == ""
    rows = rows.with_columns(place=pl.int_range(pl.len()) + pl.when(empty).then(pl.len()).otherwise(0))
    again = pl.when(usable & (pl.col("place") > pl.col("place").min().over("item", usable))).then(
        pl.lit("item_row_repeated")
    )
    rows = rows.with_columns(reason=pl.coalesce("reason", again))
    value = pl.coalesce("value", "item", pl.lit("")).str.head(LONGEST_VALUE)
    rejects = rows.drop_nulls("reason").with_columns(value=value, file=pl.coalesce("file", pl.lit(where)))
    kept = rows.filter(pl.col("reason").is_null()).select("item", pl.col("text").fill_null(""))
    return kept, rejects.with_columns(pl.col("line").cast(pl.Int64)).select(*REJECTS)


def frequent_texts(rows: pl.DataFrame) -> pl.DataFrame:
    """Each item of `rows` (item, text, order) with its most frequent text, the first of equals, null without any."""
    best = (
        rows.drop_nulls("text")
        .group_by("item", "text")
        .agg(pl.len().alias("n"), pl.col("order").min())
        .sort("n", "order", descending=[True, False])
        .unique("item", keep="first", maintain_order=True)
        .select("item", "text")
    )
    return rows.select("item").unique(maintain_order=True).join(best, on="item", how="left", maintain_order="left")


def _texts_of_rows(usable: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Each item with its most frequent text, and how many items have several."""
    different = usable.drop_nulls("text").group_by("item").agg(pl.col("text").n_unique())
    several = int((different["text"] > 1).sum())
    items = frequent_texts(usable).with_columns(pl.col("text").fill_null(""))
    return items, {"items_with_several_texts": several}


def _mixed_times(exact: pl.Series, zero: int) -> list[str]:
    times = exact.drop_nulls()
    found = mixed_units(times.filter(times != 0) if zero else times)  # times at zero have a warning of their own
    return [found] if found else []


def _check_zero(usable: pl.DataFrame, where: str) -> int:
    """Rows at time 0 where all other times are at least a year later; `DataError` when most are."""
    times = usable["exact"].drop_nulls()
    zero, other = int((times == 0).sum()), times.filter(times != 0).min()
    if not zero or (isinstance(other, float) and other < YEAR):
        return 0
    if zero > len(times) / 2:
        raise DataError(
            f"{where}: {zero} of {len(times)} rows have the time 0, 1970-01-01",
            'fill in their times, or give --timestamp "" to take the row order as time',
        )
    return zero


def _losses(rows: pl.DataFrame, left_out: pl.DataFrame) -> list[dict[str, Any]]:
    """Events and users that each reason costs, with their shares of all rows, in the order the reasons apply."""
    if left_out.is_empty():
        return []
    counts = dict(left_out.group_by("reason").len().iter_rows())
    faults = sorted({*counts} - {*FILTERS, "duplicate"})
    users = max(rows["user"].drop_nulls().n_unique(), 1)
    # a user is lost to the last reason that leaves none of its rows
    stage = {reason: n for n, reason in enumerate((*FILTERS, *faults, "duplicate"))}
    reached = left_out.select("order", pl.col("reason").replace_strict(stage, return_dtype=pl.Int64).alias("stage"))
    last = (
        rows.select("order", "user")
        .join(reached, on="order", how="left")
        .drop_nulls("user")
        .group_by("user")
        .agg(pl.col("stage").fill_null(len(stage)).max())
    )
    lost = dict(last.group_by("stage").len().iter_rows())
    return [
        {
            "loss": f"dropped by {reason}" if reason in FILTERS else f"rejected as {reason}",
            "events": counts[reason],
            "events_share": counts[reason] / rows.height,
            "users": lost.get(n, 0),
            "users_share": lost.get(n, 0) / users,
        }
        for reason, n in stage.items()
        if reason in counts
    ]


def _warnings(height: int, rejects: pl.DataFrame, zero: int) -> list[str]:
    found = []
    for reason, count in rejects["reason"].value_counts(sort=True).iter_rows():
        if count > MANY * height and reason != "duplicate":
            value = rejects.filter(pl.col("reason") == reason)["value"][0]
            shown = f", the first {value!r}" if value else ""
            found.append(
                f"{count} of {height} rows ({count / height:.0%}) are rejected as {reason}{shown}: {_cure(reason)}"
            )
    if zero:
        found.append(
            f"{zero} rows have the time 0, 1970-01-01, and no other time is near: leave them out with --where "
            '"timestamp > 0", with the name of the time column'
        )
    return found


def _cure(reason: str) -> str:
    return CURES.get(reason.rpartition("_")[2], "see `cladapt data check SRC`")


def _rejects(rejects: pl.DataFrame, exact: bool) -> pl.DataFrame:
    return rejects if exact else exact_rejects(rejects)


def _nothing_left(left_out: pl.DataFrame, where: str, exact: bool) -> NoRows:
    counts = left_out["reason"].value_counts(sort=True).sort("count", "reason", descending=[True, False])
    listed = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.iter_rows()))
    message = f"{where}: none of the {left_out.height} rows can be used" + (f" ({listed})" if listed else "")
    hint = "check that the file is whole: it has a header and no row"
    if listed:
        most = counts["reason"][0]
        value = left_out.filter(pl.col("reason") == most)["value"][0]
        message += f"; {most}, for example {value!r}" if value else ""
        hint = f"loosen --{most.replace('below_', '').replace('_', '-')}" if most in FILTERS else _cure(most)
    rejects = left_out.filter(~pl.col("reason").is_in(FILTERS)).select(*REJECTS)
    return NoRows(message, hint, _rejects(rejects, exact))
