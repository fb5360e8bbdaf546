"""`cladapt doctor` and `cladapt methods`."""

from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    verb(app)(doctor)
    verb(app)(methods)


def doctor() -> dict[str, Any]:
    """Print what this machine offers: versions, devices, kernels in use and why, free space."""
    from cladapt.pipeline import about

    return about.doctor()


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Print this one alone, or several joined by +; default: all.")
    ] = None,
) -> dict[str, Any]:
    """List the continual methods with their options, each set by `train -o method.options.KEY=VALUE`."""
    from cladapt.pipeline import about

    return about.list_methods(name)
