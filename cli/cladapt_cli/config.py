"""`cladapt config …`: settings as they resolve."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.options import Overrides, Task

app = typer.Typer(no_args_is_help=True, help="Show settings.")


@verb(app)
def show(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe.")] = None,
    task: Task = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Print every key of a run's configuration with its value and meaning."""
    from cladapt import workloads
    from cladapt.config import describe, load_recipe, merge_overrides, resolve

    values = merge_overrides(load_recipe(recipe) if recipe else {}, override or [])
    named = values.pop("task", None)
    kind = workloads.get(named if task is None else task).config
    return {"config": describe(resolve(kind, values, str(recipe) if recipe else "config"))}
