"""`cladapt data …`: logs to stream directories, and what is in them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.options import Overrides, StreamDir, overrides_of

app = typer.Typer(no_args_is_help=True, help="Import, check and simulate interaction streams.")


@verb(app, "import")
def import_(
    source: Annotated[str, typer.Argument(help="File, folder or glob of the log.")],
    out: Annotated[Path, typer.Option("--out", help="Stream directory to write.")],
    format: Annotated[
        str, typer.Option("--format", help="auto, peso, movielens, recbole, lcrec, minionerec, csv or parquet.")
    ] = "auto",
    user: Annotated[str, typer.Option("--user", help="User column.")] = "user",
    item: Annotated[str, typer.Option("--item", help="Item column.")] = "item",
    timestamp: Annotated[str, typer.Option("--timestamp", help='Time column; "" = row order.')] = "timestamp",
    block: Annotated[str | None, typer.Option("--block", help="Column of ready-made blocks 1, 2, ….")] = None,
    items: Annotated[Path | None, typer.Option("--items", help="Item table (csv or parquet).")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="Text column of the item table; repeatable.")] = None,
    fractions: Annotated[str | None, typer.Option("--fractions", help="Block sizes, e.g. 0.6,0.1,0.1,0.1,0.1.")] = None,
    dates: Annotated[str | None, typer.Option("--dates", help="First day of block 2, 3, …: 2024-01-01,….")] = None,
    min_events: Annotated[int | None, typer.Option("--min-events", help="Least events of a user in a block.")] = None,
    k_core: Annotated[int | None, typer.Option("--k-core", help="Drop rarer users and items first.")] = None,
) -> dict[str, Any]:
    """Read a log, cut it into time blocks and write a stream directory."""
    from cladapt.config import BlocksConfig, resolve
    from cladapt.data.readers import Columns
    from cladapt.pipeline import streams

    given: dict[str, Any] = {
        "fractions": None if fractions is None else fractions.split(","),
        "dates": None if dates is None else dates.split(","),
        "min_events": min_events,
        "k_core": k_core,
    }
    blocks = resolve(BlocksConfig, {key: value for key, value in given.items() if value is not None}, "data import")
    columns = Columns(user=user, item=item, timestamp=timestamp, block=block, items=items, text=tuple(text or ()))
    return streams.import_data(source, out, format, columns, blocks)


@verb(app)
def check(stream: StreamDir) -> dict[str, Any]:
    """Verify a stream directory: hashes, order in time, leakage between blocks."""
    from cladapt.pipeline import streams

    return streams.check_data(stream)


@verb(app)
def blocks(stream: StreamDir) -> dict[str, Any]:
    """Print what each block holds: users, items, interactions, new and returning ones, time range."""
    from cladapt.pipeline import streams

    return {"blocks": streams.check_data(stream)["blocks"]}


@verb(app)
def stats(stream: StreamDir) -> dict[str, Any]:
    """Print totals of a stream: sizes, lengths, popularity skew, repeats, text."""
    from cladapt.pipeline import streams

    return streams.data_stats(stream)


@verb(app)
def simulate(
    out: Annotated[Path, typer.Option("--out", help="Stream directory to write.")], override: Overrides = None
) -> dict[str, Any]:
    """Generate a stream of drifting preferences whose best reachable score is known."""
    from cladapt.config import SimulateConfig, resolve
    from cladapt.pipeline import streams

    return streams.simulate_data(out, resolve(SimulateConfig, overrides_of(override), "data simulate"))
