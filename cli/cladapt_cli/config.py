"""`cladapt config …`: settings as they resolve."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.options import Overrides, Task, overrides_of

app = typer.Typer(no_args_is_help=True, help="Show settings.")
COMMANDS = {
    "train": "",
    "eval": "EvalConfig",
    "pretrain": "PretrainConfig",
    "init": "InitConfig",
    "tune": "TuneConfig",
    "vision": "VitConfig",
    "sequential": "SequentialBaseConfig",
    "tokens": "TokensConfig",
    "import": "BlocksConfig",
    "images": "ImagesConfig",
    "simulate": "SimulateConfig",
    "promote": "PromoteConfig",
}
"""Commands by the class of their settings; those of `train` depend on the task."""
SECTIONS = {"pretrain": "base", "init": "base", "vision": "base", "sequential": "base"}
"""Sections that the keys may be written in, where it is not the command's name."""


@verb(app)
def show(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe of `train`; default: none.")] = None,
    command: Annotated[str, typer.Option("--for", help=f"Settings of {', '.join(COMMANDS)}.")] = "train",
    task: Task = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Print every setting of a command with its value, default and meaning."""
    from cladapt import config, sequential, workloads
    from cladapt.errors import ConfigError

    if command not in COMMANDS:
        raise ConfigError(f"--for {command}: no such settings", f"use one of {', '.join(COMMANDS)}")
    if command == "train":
        values = config.merge_overrides(config.load_recipe(recipe) if recipe else {}, override or [])
        named = values.pop("task", None)
        kind: Any = workloads.get(named if task is None else task).config
        return {"config": config.describe(config.resolve(kind, values, str(recipe) if recipe else "config"))}
    if recipe is not None:
        raise ConfigError(f"--for {command} {recipe}: a recipe holds the settings of train", "leave out one of them")
    if task is not None and command != "eval":
        raise ConfigError(
            f"--for {command} --task {task}: its settings are the same for every task", "leave out --task"
        )
    module = sequential if command == "sequential" else config
    kind = type(workloads.get(task).config().eval) if command == "eval" else getattr(module, COMMANDS[command])
    values = overrides_of(override, SECTIONS.get(command, command))
    shown_by = "" if command == "eval" else f"config show --for {command}"
    return {"config": config.describe(config.resolve(kind, values, command, shown_by))}
