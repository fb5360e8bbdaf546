"""`cladapt doctor` and `cladapt methods`."""

from typing import Any

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


def methods() -> dict[str, Any]:
    """List the continual methods with their options."""
    from cladapt.pipeline import about

    return about.list_methods()
