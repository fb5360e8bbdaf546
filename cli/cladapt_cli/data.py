"""`cladapt data …`: logs to stream directories, and what is in them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import output, verb
from cladapt_cli.log_options import Late, LogChoice, NewDates, NewItems, Rejects, log_options
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
@log_options("data import")
def import_(
    source: Annotated[str, typer.Argument(help="File, folder or glob of the log.")],
    out: Annotated[Path, typer.Option("--out", help="Stream directory to write; required.")],
    log: LogChoice,
) -> dict[str, Any]:
    """Read a log, cut it into time blocks and write a stream directory; print what was dropped and what is lost."""
    from cladapt.pipeline import streams

    return _warn(streams.import_data(source, out, log.format, log.options, log.config))


@verb(app)
def append(
    stream: StreamDir,
    log: Annotated[str, typer.Argument(help="File, folder or glob of the log: the whole one, or what came since.")],
    dates: NewDates = None,
    late: Late = "reject",
    min_tested: Annotated[
        int,
        typer.Option(
            "--min-tested", min=0, help="A new block tests at least this many users; fewer rows wait for the next log."
        ),
    ] = 0,
    items: NewItems = None,
    rejects: Rejects = None,
) -> dict[str, Any]:
    """Append what is new in a log to a stream as its next block; the log is read as the stream's import was."""
    from cladapt.pipeline import growth

    starts = () if dates is None else dates.split(",")
    return _warn(
        growth.append_data(stream, log, dates=starts, late=late, rejects=rejects, least=min_tested, items=items)
    )


@verb(app)
def retire(
    stream: StreamDir,
    items: Annotated[Path, typer.Argument(help="Text file with one item id a line.")],
    undo: Annotated[bool, typer.Option("--undo", help="Offer the items again, from the next block on.")] = False,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Leave out ids that the stream does not have.")
    ] = False,
) -> dict[str, Any]:
    """Withdraw items: they stay in histories, leave the catalogues of later blocks and are not recommended."""
    from cladapt.pipeline import growth

    return growth.retire_items(stream, items, undo=undo, ignore_unknown=ignore_unknown)


@verb(app)
def forget(
    stream: StreamDir,
    users: Annotated[Path, typer.Argument(help="Text file with one user id a line.")],
    runs: Annotated[
        list[Path] | None,
        typer.Option("--runs", help="Look here too for what has learned from them; repeatable; default: runs/ alone."),
    ] = None,
) -> dict[str, Any]:
    """Remove all events of users from a stream, and name the runs and bases that have learned from them."""
    from cladapt.pipeline import forget

    return _warn(forget.forget_users(stream, users, runs or []))


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
@log_options("data check")
def check(
    stream: Annotated[Path, typer.Argument(help="Stream directory, or a raw log: file, folder or glob.")],
    log: LogChoice,
    rejects: Rejects = None,
) -> dict[str, Any]:
    """Verify a stream directory, or say of a raw log what its import would keep, drop and reject; writes no stream."""
    from cladapt.errors import ConfigError
    from cladapt.pipeline import streams

    if not streams.is_source(stream, log.format):
        if log.given or rejects is not None:
            raise ConfigError(
                f"{stream} is no raw log, so --format, --rejects, column and block options cannot apply",
                "leave these options out, or name the source of the stream",
            )
        return streams.check_data(stream)
    report = streams.check_source(str(stream), log.format, log.options, log.config, rejects)
    if not output.json:
        if report["rejected"] > SHOWN:
            report["shown"] = f"the first {SHOWN} rejects of {report['rejected']}; all: --json, or --rejects FILE"
        report["rejects"] = report["rejects"][:SHOWN] or "none"
    return _warn(report)


@verb(app)
def blocks(stream: StreamDir) -> dict[str, Any]:
    """Print what each block holds: users, items, interactions, new and returning ones, time range."""
    from cladapt.pipeline import streams

    report = streams.check_data(stream)
    return {name: report[name] for name in ("pending", "blocks") if name in report}


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
