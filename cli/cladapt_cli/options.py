"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt import workloads

StreamDir = Annotated[Path, typer.Argument(help="Stream directory.")]
OVERRIDE = "Override a setting, repeatable; `cladapt config show --for COMMAND` prints all with their defaults."
Overrides = Annotated[list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE", help=OVERRIDE)]

DataNow = Annotated[
    Path | None, typer.Option("--data", help="Where the run's stream is now; default: where the run says.")
]
BaseNow = Annotated[
    Path | None, typer.Option("--base", help="Where the run's base is now; default: where the run says.")
]

Ids = Annotated[
    int | None,
    typer.Option(
        "--ids",
        min=1,
        show_default="the run's own",
        help="Version of the stream's IDs that new blocks are learned by, after `tokens refresh`.",
    ),
]

Task = Annotated[
    str | None,
    typer.Option("--task", help=f"What is learned: {', '.join(workloads.names())}.", show_default=workloads.DEFAULT),
]


def overrides_of(override: list[str] | None, section: str = "") -> dict[str, Any]:
    """`KEY=VALUE` options as a nested dict; `SECTION.KEY=VALUE`, as in a recipe, means the same."""
    from cladapt.config import merge_overrides

    prefix = f"{section}." if section else ""
    return merge_overrides({}, [text.lstrip().removeprefix(prefix) for text in override or []])


def method_names() -> list[str]:
    """Names of the methods, from the files of the folder alone: no import of torch."""
    import cladapt

    folder = Path(cladapt.__file__).parent / "methods"
    return sorted(path.stem for path in folder.glob("[!_]*.py"))
