"""`cladapt data …`: logs to stream directories, and what is in them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import output, verb
from cladapt_cli.log_options import (
    Block,
    Dates,
    Format,
    Fractions,
    Item,
    Items,
    KCore,
    MinEvents,
    MinRating,
    Rating,
    Text,
    TimeFormat,
    Timestamp,
    TimeUnit,
    User,
    Weight,
    Where,
    blocks_config,
    read_options,
)
from cladapt_cli.options import Overrides, StreamDir, overrides_of

app = typer.Typer(no_args_is_help=True, help="Import, check and simulate interaction streams.")


SHOWN = 20
"""Rejects in the tables of `data check`."""


def _warn(report: dict[str, Any]) -> dict[str, Any]:
    """Warnings of a report as lines on stderr, unless the report is one JSON object."""
    if not output.json:
        for text in report.pop("warnings"):
            typer.echo(f"warning: {text}", err=True)
    return report


@verb(app, "import")
def import_(
    source: Annotated[str, typer.Argument(help="File, folder or glob of the log.")],
    out: Annotated[Path, typer.Option("--out", help="Stream directory to write; required.")],
    format: Format = "auto",
    user: User = "user",
    item: Item = "item",
    timestamp: Timestamp = "timestamp",
    time_unit: TimeUnit = "s",
    time_format: TimeFormat = None,
    block: Block = None,
    weight: Weight = None,
    items: Items = None,
    text: Text = None,
    where: Where = None,
    rating: Rating = None,
    min_rating: MinRating = None,
    fractions: Fractions = None,
    dates: Dates = None,
    min_events: MinEvents = None,
    k_core: KCore = None,
) -> dict[str, Any]:
    """Read a log, cut it into time blocks and write a stream directory; print what was dropped and what is lost."""
    from cladapt.pipeline import streams

    config = blocks_config("data import", fractions, dates, min_events=min_events, k_core=k_core)
    options = read_options(
        user=user, item=item, timestamp=timestamp, time_unit=time_unit, time_format=time_format, block=block,
        weight=weight, items=items, text=text, where=where, rating=rating, min_rating=min_rating,
    )  # fmt: skip
    return _warn(streams.import_data(source, out, format, options, config))


@verb(app)
def images(
    source: Annotated[Path, typer.Argument(help="Folder or .zip of images; every inner folder is a class.")],
    out: Annotated[Path, typer.Option("--out", help="Image stream directory to write.")],
    blocks: Annotated[int | None, typer.Option("--blocks", help="Blocks of classes; default: 10.")] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Side in pixels that images are resized to; default: 28.")
    ] = None,
    channels: Annotated[int | None, typer.Option("--channels", help="1 (grey) or 3 (colour); default: 1.")] = None,
    invert: Annotated[bool, typer.Option("--invert", help="Dark drawings on white become light on black.")] = False,
    exclude: Annotated[
        list[Path] | None,
        typer.Option("--exclude", help="Leave out the classes of this source; repeatable; default: none."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the order of classes and of the splits; default: 0.")
    ] = None,
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
    time_unit: TimeUnit = "s",
    time_format: TimeFormat = None,
    block: Block = None,
    weight: Weight = None,
    items: Items = None,
    text: Text = None,
    where: Where = None,
    rating: Rating = None,
    min_rating: MinRating = None,
    fractions: Fractions = None,
    dates: Dates = None,
    min_events: MinEvents = None,
    k_core: KCore = None,
    rejects: Annotated[
        Path | None, typer.Option("--rejects", help="Write all rejected rows to this csv file; default: none.")
    ] = None,
) -> dict[str, Any]:
    """Verify a stream directory, or say of a raw log what its import would keep, drop and reject; writes no stream."""
    from cladapt.errors import ConfigError
    from cladapt.pipeline import streams

    config = blocks_config("data check", fractions, dates, min_events=min_events, k_core=k_core)
    options = read_options(
        user=user, item=item, timestamp=timestamp, time_unit=time_unit, time_format=time_format, block=block,
        weight=weight, items=items, text=text, where=where, rating=rating, min_rating=min_rating,
    )  # fmt: skip
    if not streams.is_source(stream, format):
        given = [options != read_options(), format != "auto", rejects is not None]
        if any(given) or any(value is not None for value in (fractions, dates, min_events, k_core)):
            raise ConfigError(
                f"{stream} is no raw log, so --format, --rejects, column and block options cannot apply",
                "leave these options out, or name the source of the stream",
            )
        return streams.check_data(stream)
    report = streams.check_source(str(stream), format, options, config, rejects)
    if not output.json:
        if report["rejected"] > SHOWN:
            report["shown"] = f"the first {SHOWN} rejects of {report['rejected']}; all: --json, or --rejects FILE"
        report["rejects"] = report["rejects"][:SHOWN] or "none"
    return _warn(report)


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

    return streams.simulate_data(out, resolve(SimulateConfig, overrides_of(override, "simulate"), "data simulate"))
