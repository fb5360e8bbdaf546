"""`cladapt compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    verb(app)(compare)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Evaluated run directories; the first is the reference.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the tables as csv and a report into this folder.")
    ] = None,
) -> dict[str, Any]:
    """Compare evaluated runs: reads their rows, pools seeds, prints paired differences against the first."""
    from cladapt.pipeline.compare import compare_runs

    return compare_runs(runs, out)
