"""`cladapt compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import output, verb


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

    result = compare_runs(runs, out)
    return result if output.json else {name: _shown(value) for name, value in result.items()}


def _shown(value: Any) -> Any:
    """Of a table by head and tail the groups by data, all are under `--json` and in files; anything else as it is."""
    by_group = isinstance(value, list) and value and isinstance(value[0], dict) and "group" in value[0]
    return [row for row in value if row["group"] in ("data head", "data tail")] if by_group else value
