"""`--where`: SQL conditions on the columns of a table, by polars' SQL.

Columns of text (all columns of csv, tsv and json lines) are read as numbers where a condition compares them with a
number or calculates with them, and stay text everywhere else; `CAST(a AS DOUBLE)` says it outright.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import polars as pl

from cladapt.errors import ConfigError

EXACT = 2**53  # whole numbers from here on are not exact as floats
_PROBE = 3  # rows of the empty table that conditions are tried on


def columns_of(clauses: Sequence[str], names: Sequence[str], path: Path) -> list[str]:
    """The columns that SQL conditions read; `ConfigError` for a mistake of syntax or a column that `path` lacks."""
    found: dict[str, None] = {}
    for clause in clauses:
        wanted = _parse(clause, names, path).meta.root_names()
        missing = [name for name in wanted if name not in names]
        if missing:
            raise _refused(clause, path, f"there is no column {missing[0]!r}", names)
        found |= dict.fromkeys(wanted)
    return list(found)


def conditions(table: pl.DataFrame, clauses: Sequence[str], path: Path) -> tuple[pl.Series, pl.Series]:
    """Per row of `table` whether all conditions hold (Boolean, null = unknown), and the value that hides it.

    The value, String, is that of a text that is no number where the condition needs one; null everywhere else.
    NaN in a column of floats is null.
    """
    table = table.with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))  # NaN compares as the largest number
    holds = pl.repeat(True, table.height, dtype=pl.Boolean, eager=True)
    unreadable = pl.repeat(None, table.height, dtype=pl.String, eager=True)
    for clause in clauses:
        found, value = _condition(table, clause, path)
        holds = holds & found
        unreadable = unreadable.zip_with(unreadable.is_not_null(), value)
    return holds, unreadable.set(holds.is_not_null(), None)


def _condition(table: pl.DataFrame, clause: str, path: Path) -> tuple[pl.Series, pl.Series]:
    expression = _parse(clause, table.columns, path)
    texts = [name for name in dict.fromkeys(expression.meta.root_names()) if table.schema[name] == pl.String]
    readings = [each for n in range(len(texts) + 1) for each in combinations(texts, n)]
    problems = {each: _problem(expression, table, each) for each in readings}
    fitting = [each for each in readings if problems[each] is None]
    if not fitting:
        raise _refused(clause, path, problems[readings[-1]], _typed(table))
    first, *others = [_apply(expression, table, each, clause, path) for each in fitting]
    for other in others:
        # both readings make sense: fine as long as they agree
        if (first[0] != other[0]).fill_null(False).any():
            raise _refused(
                clause,
                path,
                "texts and numbers compare differently here",
                _typed(table),
                "say which is meant: CAST(column AS DOUBLE)",
            )
    return first


def _parse(clause: str, names: Sequence[str], path: Path) -> pl.Expr:
    try:
        return pl.sql_expr(clause)
    except pl.exceptions.PolarsError as error:
        raise _refused(clause, path, _short(error), names) from error


def _problem(expression: pl.Expr, table: pl.DataFrame, numbers: Sequence[str]) -> str | None:
    """Why the condition does not fit the columns' types with `numbers` read as numbers."""
    schema = {name: pl.Float64() if name in numbers else dtype for name, dtype in table.schema.items()}
    probe = pl.DataFrame({name: [None] * _PROBE for name in schema}, schema=schema)
    try:
        found = probe.select(expression.alias("found"))["found"]
    except pl.exceptions.PolarsError as error:
        return _short(error)
    if found.dtype != pl.Boolean:
        return f"it gives {found.dtype}, expected a condition that is true or false"
    return None if len(found) == _PROBE else "it gives one value for all rows, expected one per row"


def _apply(
    expression: pl.Expr, table: pl.DataFrame, numbers: Sequence[str], clause: str, path: Path
) -> tuple[pl.Series, pl.Series]:
    unreadable = pl.repeat(None, table.height, dtype=pl.String, eager=True)
    for name in numbers:
        texts = table[name].str.strip_chars()
        values = texts.cast(pl.Float64, strict=False)
        values = values.set(~values.is_finite(), None)
        if (values.abs() >= EXACT).any():
            whole = texts.cast(pl.Int64, strict=False)
            values = whole if whole.null_count() == values.null_count() else values
        odd = values.is_null() & (texts != "").fill_null(False)
        unreadable = unreadable.zip_with(unreadable.is_not_null() | ~odd, table[name])
        table = table.with_columns(values.alias(name))
    try:
        found = table.select(expression.alias("found"))["found"]
        parts = [(0, 1), (0, table.height // 2), (table.height // 2, table.height)]
        alone = all(
            table[start:end].select(expression.alias("found"))["found"].equals(found[start:end], null_equal=True)
            for start, end in parts
            if start < end
        )
    except pl.exceptions.PolarsError as error:
        raise _refused(clause, path, _short(error), _typed(table)) from error
    if not alone:
        raise _refused(clause, path, "it depends on other rows, expected a condition on each row alone", _typed(table))
    return found, unreadable


def _typed(table: pl.DataFrame) -> list[str]:
    return [f"{name} ({dtype})" for name, dtype in table.schema.items()]


def _refused(clause: str, path: Path, reason: str | None, names: Sequence[str], cure: str = "") -> ConfigError:
    listed = f"columns of {path.name}: {', '.join(map(repr, names))}"
    form = (
        "write SQL, such as Quantity > 0 AND Country = 'France'; names with spaces, and \"user\", in double quotes, "
        "dates as DATE '2011-01-31'"
    )
    return ConfigError(f"--where {clause!r} cannot be applied to {path}: {reason}", f"{cure or form}; {listed}")


def _short(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split())[:200]
