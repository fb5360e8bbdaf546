"""`cladapt data …`: logs to stream directories, and what is in them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import output, verb
from cladapt_cli.options import Overrides, StreamDir, overrides_of

app = typer.Typer(no_args_is_help=True, help="Import, check and simulate interaction streams.")


Format = Annotated[
    str,
    typer.Option("--format", help="auto, peso, movielens, recbole, lcrec, minionerec, csv or parquet."),
]
User = Annotated[str, typer.Option("--user", help="User column.")]
Item = Annotated[str, typer.Option("--item", help="Item column.")]
Timestamp = Annotated[str, typer.Option("--timestamp", help='Time column; "" = row order.')]
Block = Annotated[str | None, typer.Option("--block", help="Column of ready-made blocks 1, 2, ….")]
Weight = Annotated[str | None, typer.Option("--weight", help="Column of event weights above 0; kept, not trained on.")]
Items = Annotated[Path | None, typer.Option("--items", help="Item table (csv or parquet).")]
Text = Annotated[list[str] | None, typer.Option("--text", help="Text column of the item table; repeatable.")]
SHOWN = 20


@verb(app, "import")
def import_(
    source: Annotated[str, typer.Argument(help="File, folder or glob of the log.")],
    out: Annotated[Path, typer.Option("--out", help="Stream directory to write.")],
    format: Format = "auto",
    user: User = "user",
    item: Item = "item",
    timestamp: Timestamp = "timestamp",
    block: Block = None,
    weight: Weight = None,
    items: Items = None,
    text: Text = None,
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
    columns = Columns(user, item, timestamp, block, weight, items, tuple(text or ()))
    return streams.import_data(source, out, format, columns, blocks)


@verb(app)
def images(
    source: Annotated[Path, typer.Argument(help="Folder or .zip of images; every inner folder is a class.")],
    out: Annotated[Path, typer.Option("--out", help="Image stream directory to write.")],
    blocks: Annotated[int | None, typer.Option("--blocks", help="Blocks of classes.")] = None,
    size: Annotated[int | None, typer.Option("--size", help="Side in pixels that images are resized to.")] = None,
    channels: Annotated[int | None, typer.Option("--channels", help="1 (grey) or 3 (colour).")] = None,
    invert: Annotated[bool, typer.Option("--invert", help="Dark drawings on white become light on black.")] = False,
    exclude: Annotated[
        list[Path] | None, typer.Option("--exclude", help="Leave out the classes of this source; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the order of classes and of the splits.")] = None,
) -> dict[str, Any]:
    """Write a stream for `train --task classify`: blocks of classes, images split into train, valid and test."""
    from cladapt.config import ImagesConfig, resolve
    from cladapt.pipeline import images

    given = {"blocks": blocks, "size": size, "channels": channels, "invert": invert, "seed": seed}
    config = resolve(ImagesConfig, {key: value for key, value in given.items() if value is not None}, "data images")
    return images.import_images(source, out, config, exclude or [])


@verb(app)
def check(
    stream: Annotated[Path, typer.Argument(help="Stream directory, or a raw log: file, folder or glob.")],
    format: Format = "auto",
    user: User = "user",
    item: Item = "item",
    timestamp: Timestamp = "timestamp",
    block: Block = None,
    weight: Weight = None,
    items: Items = None,
    text: Text = None,
    rejects: Annotated[Path | None, typer.Option("--rejects", help="Write all rejected rows to this csv file.")] = None,
) -> dict[str, Any]:
    """Verify a stream directory (hashes, time order, leakage), or explain every row of a raw log that is rejected."""
    from cladapt.data.readers import Columns
    from cladapt.errors import ConfigError
    from cladapt.pipeline import streams

    columns = Columns(user, item, timestamp, block, weight, items, tuple(text or ()))
    if not streams.is_source(stream, format):
        if columns != Columns() or format != "auto" or rejects is not None:
            raise ConfigError(
                f"{stream} is no raw log, so --format, --rejects and column options cannot apply",
                "leave these options out, or name the source of the stream",
            )
        return streams.check_data(stream)
    report = streams.check_source(str(stream), format, columns, rejects)
    if not output.json:
        if report["rejected"] > SHOWN:
            report["shown"] = f"the first {SHOWN} rejects of {report['rejected']}; all: --json, or --rejects FILE"
        report["rejects"] = report["rejects"][:SHOWN] or "none"
    return report


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
