"""`cladapt demo`: the whole path on the embedded stream."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.progress import Progress


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    verb(app)(demo)


def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write; default: a new one in runs/.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of data, base and runs.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller stream and fewer epochs: a smoke test.")] = False,
) -> dict[str, Any]:
    """Simulate drifting users, train a tiny base, adapt it with PESO and fine-tuning, compare; writes one folder."""
    from cladapt.pipeline import demo

    return demo.demo(out, seed, quick, Progress())
