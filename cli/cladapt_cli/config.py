"""`cladapt config …`: settings as they resolve."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.options import Overrides

app = typer.Typer(no_args_is_help=True, help="Show settings.")


@verb(app)
def show(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="recommend (default) or classify.")] = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Print every key of a run's configuration with its value and meaning."""
    from cladapt.config import describe, load_recipe, merge_overrides, resolve, task_of

    values = merge_overrides(load_recipe(recipe) if recipe else {}, override or [])
    kind = task_of(values.pop("task", None) if task is None else task)
    return {"config": describe(resolve(kind, values, str(recipe) if recipe else "config"))}
