"""Options of `data import` and `data check`: how a log is read, which of its rows, and how it is cut into blocks."""

from pathlib import Path
from typing import Annotated, Any

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
        help="Text column of the item table, or without --items of the log: an item's most frequent text by the end "
        "of its first block. Repeatable; default: all columns of the item table but the id.",
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


def read_options(**given: Any) -> Any:
    """The options of the log, defaults where nothing is given."""
    from cladapt.data.readers import ReadOptions

    lists: dict[str, Any] = {name: tuple(given.pop(name, None) or ()) for name in ("text", "where")}
    return ReadOptions(**given, **lists)


def blocks_config(where: str, fractions: str | None, dates: str | None, **given: int | None) -> Any:
    """How the log is cut, defaults where nothing is given."""
    from cladapt.config import BlocksConfig, resolve

    lists = {
        name: value.split(",") for name, value in (("fractions", fractions), ("dates", dates)) if value is not None
    }
    return resolve(BlocksConfig, lists | {name: value for name, value in given.items() if value is not None}, where)
