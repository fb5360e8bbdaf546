"""Options of commands that read a log: how it is read, which of its rows, and how it is cut into blocks."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

FORMATS = (
    "peso",
    "movielens",
    "recbole",
    "lcrec",
    "minionerec",
    "amazon2018",
    "amazon2023",
    "mind",
    "steam",
    "csv",
    "jsonl",
    "parquet",
    "arrow",
)
"""The names of `cladapt.data.readers.READERS`, which a help text must not import: it would load polars."""
_COLUMNS, _ROWS, _BLOCKS = "Columns of the log", "Rows of the log", "Blocks"

Format = Annotated[str, typer.Option("--format", help=f"auto (recognised), {', '.join(FORMATS)}.")]
User = Annotated[str, typer.Option("--user", help="User column.", rich_help_panel=_COLUMNS)]
Item = Annotated[
    str, typer.Option("--item", help="Item column, in the log and in the item table.", rich_help_panel=_COLUMNS)
]
Timestamp = Annotated[str, typer.Option("--timestamp", help='Time column; "" = row order.', rich_help_panel=_COLUMNS)]
TimeUnit = Annotated[
    str,
    typer.Option("--time-unit", help="Unit of times that are numbers: s, ms, us or ns.", rich_help_panel=_COLUMNS),
]
TimeFormat = Annotated[
    str | None,
    typer.Option(
        "--time-format",
        help="How times are written, e.g. '%d-%m-%Y %H:%M'; default: none, they are unix times or ISO 8601.",
        rich_help_panel=_COLUMNS,
    ),
]
Block = Annotated[
    str | None,
    typer.Option(
        "--block",
        help="Column of ready-made blocks, increasing whole numbers; default: none.",
        rich_help_panel=_COLUMNS,
    ),
]
Weight = Annotated[
    str | None,
    typer.Option(
        "--weight",
        help="Column of event weights; one that is not above 0 is a reject; kept, not trained on; default: none.",
        rich_help_panel=_COLUMNS,
    ),
]
Items = Annotated[
    Path | None,
    typer.Option(
        "--items",
        help="Item table, a file or a folder; may be the log itself; default: none.",
        rich_help_panel=_COLUMNS,
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="Text column of the item table, or without --items of the log: an item's most frequent text in its first "
        "block. Repeatable; default: all columns of the item table but the id.",
        rich_help_panel=_COLUMNS,
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        help="SQL condition on the log's columns, e.g. 'Quantity > 0'; rows where it is not true are dropped and "
        "counted. Columns of csv and json lines are text, read as numbers where they are compared or calculated with "
        "numbers: a value that is none is a reject. Repeatable, all must hold; default: none.",
        rich_help_panel=_ROWS,
    ),
]
Rating = Annotated[
    str | None,
    typer.Option(
        "--rating",
        help="Rating column for --min-rating; default: none, or the format's own.",
        rich_help_panel=_ROWS,
    ),
]
MinRating = Annotated[
    float | None,
    typer.Option(
        "--min-rating",
        help="Rows with a lower rating are dropped and counted; default: none, every rating is an interaction.",
        rich_help_panel=_ROWS,
    ),
]
Fractions = Annotated[
    str | None,
    typer.Option(
        "--fractions", help="Share of the events in each block; default: 0.6,0.1,0.1,0.1,0.1.", rich_help_panel=_BLOCKS
    ),
]
Dates = Annotated[
    str | None,
    typer.Option("--dates", help="First day of block 2, 3, …: 2024-01-01,…; default: none.", rich_help_panel=_BLOCKS),
]
NewDates = Annotated[
    str | None,
    typer.Option("--dates", help="First days of new blocks: 2024-05-01,…; default: none, one block."),
]
Late = Annotated[
    str,
    typer.Option(
        "--late",
        help="Rows that are not after the end of the stream and not in it: reject, or keep them in the new block.",
    ),
]
NewItems = Annotated[
    Path | None,
    typer.Option("--items", help="Item table with the texts of new items; default: that of the import, if any."),
]
Rejects = Annotated[
    Path | None, typer.Option("--rejects", help="Write all rejected rows to this csv file; default: none.")
]
MinEvents = Annotated[
    int | None,
    typer.Option(
        "--min-events",
        help="A user is tested in a block with at least this many events there; nothing is dropped; default: 5.",
        rich_help_panel=_BLOCKS,
    ),
]
KCore = Annotated[
    int | None,
    typer.Option(
        "--k-core",
        help="In each block, drop events whose user or item has fewer than this up to that block; default: 0, none.",
        rich_help_panel=_BLOCKS,
    ),
]


OPTIONS: dict[str, tuple[Any, Any]] = {
    "format": (Format, "auto"),
    "user": (User, "user"),
    "item": (Item, "item"),
    "timestamp": (Timestamp, "timestamp"),
    "time_unit": (TimeUnit, "s"),
    "time_format": (TimeFormat, None),
    "block": (Block, None),
    "weight": (Weight, None),
    "items": (Items, None),
    "text": (Text, None),
    "where": (Where, None),
    "rating": (Rating, None),
    "min_rating": (MinRating, None),
    "fractions": (Fractions, None),
    "dates": (Dates, None),
    "min_events": (MinEvents, None),
    "k_core": (KCore, None),
}
"""Name -> annotation and default of each option that `log_options` adds."""
_CUT = ("fractions", "dates", "min_events", "k_core")


class LogChoice(NamedTuple):
    """What a command line says about a log."""

    format: str
    options: Any  # ReadOptions
    config: Any  # BlocksConfig
    given: bool  # any of it is said at all


def log_options(command: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of a log to a command, which gets them as `log`, a `LogChoice`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(**arguments: Any) -> Any:
            values = {name: arguments.pop(name) for name in OPTIONS}
            given = any(value != OPTIONS[name][1] for name, value in values.items())
            config = _blocks_config(command, **{name: values.pop(name) for name in _CUT})
            return function(**arguments, log=LogChoice(values.pop("format"), _read_options(**values), config, given))

        signature = inspect.signature(function)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in OPTIONS.items()
        ]
        own = [parameter for name, parameter in signature.parameters.items() if name != "log"]
        wrapped.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return wrapped

    return decorate


def _read_options(**given: Any) -> Any:
    """The options of the log, defaults where nothing is given."""
    from cladapt.data.readers import ReadOptions

    lists: dict[str, Any] = {name: tuple(given.pop(name, None) or ()) for name in ("text", "where")}
    return ReadOptions(**given, **lists)


def _blocks_config(where: str, fractions: str | None, dates: str | None, **given: int | None) -> Any:
    """How the log is cut, defaults where nothing is given."""
    from cladapt.config import BlocksConfig, resolve

    lists = {
        name: value.split(",") for name, value in (("fractions", fractions), ("dates", dates)) if value is not None
    }
    return resolve(BlocksConfig, lists | {name: value for name, value in given.items() if value is not None}, where)
