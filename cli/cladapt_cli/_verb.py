"""What all commands share: `--json`, `--quiet`, `--debug`, one way to print results and one way to fail.

Results go to stdout (tables, or one JSON object), progress and errors to stderr. A command function returns a dict.
"""

import functools
import inspect
import json as jsonlib
import math
import os
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cladapt import ranks
from cladapt.errors import CheckFailed, CladaptError, ConfigError
from cladapt.train.interrupt import Terminated
from cladapt_cli._help import documented, plain

SCHEMA_VERSION = 1
INTERRUPTED, TERMINATED = 130, 143
SEVERAL_PROCESSES = ("train", "eval", "recommend")
KEPT = {
    "eval": "the run keeps its adapters; this evaluation has to start again",
    "init": "no base is written",
    "tune": "no base is written; the same command goes on from its last checkpoint, where it has written one",
    "vision": "no base is written",
    "pretrain": "no base is written",
    "update": "what was finished is kept; give the same command again",
}
"""What is left when these are stopped; `train` names the run to resume."""
Command = Callable[..., dict[str, Any] | None]

_SHARED = {
    "json": (bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel="Output")),
    "quiet": (
        bool,
        typer.Option(
            "--quiet", "-q", help="No progress on stderr; warnings and errors are shown.", rich_help_panel="Output"
        ),
    ),
    "debug": (bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")),
}


class Output:
    """How the running command speaks; set by the shared options."""

    json = False
    quiet = False
    debug = False
    run: str | None = None
    """The run that is being trained, once there is one."""
    progress: Any = None
    """What shows progress now; it is closed however a command ends, or the terminal would keep its hidden cursor."""


output = Output()


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended the running command: its exit code, and what is left of the work."""

    def __init__(self, command: str, error: KeyboardInterrupt) -> None:
        self.exit_code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        if command != "train":
            kept = KEPT.get(command, "what was finished is kept, and no file is half written")
        elif output.run is None:
            kept = "no run was begun"
        else:
            kept = f"what was finished is kept; continue the run: cladapt train --resume {shlex.quote(output.run)}"
        super().__init__(f"{'terminated' if self.exit_code == TERMINATED else 'interrupted'}: {kept}")


def verb(app: typer.Typer, name: str | None = None) -> Callable[[Command], Command]:
    """Register a function as a command with the shared options; its returned dict is the result."""

    def decorate(function: Command) -> Command:
        signature = inspect.signature(function)
        command = name or function.__name__

        @functools.wraps(function)
        def wrapped(**arguments: Any) -> None:
            output.json, output.quiet, output.debug = (arguments.pop(key) for key in _SHARED)
            output.quiet = output.quiet or not ranks.is_main()
            output.run = None
            if ranks.ranks() > 1 and command not in SEVERAL_PROCESSES:
                raise ConfigError(
                    f"`{command}` was started in {ranks.ranks()} processes, it works in one",
                    f"start it without torchrun; {', '.join(SEVERAL_PROCESSES)} work in several",
                )
            try:
                if command in SEVERAL_PROCESSES:
                    ranks.start()
                result = function(**arguments)
            except CheckFailed as error:
                if error.result is not None and ranks.is_main():
                    show(error.result)
                raise
            except KeyboardInterrupt as error:  # typer would make one exit code of all that stops
                raise Stopped(command, error) from error
            finally:
                if output.progress is not None:
                    output.progress.close()
                    output.progress = None
            if result is not None and ranks.is_main():
                show(result)

        shared = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[kind, option])
            for key, (kind, option) in _SHARED.items()
        ]
        parameters = [documented(p) for p in (*signature.parameters.values(), *shared)]
        wrapped.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, help=plain(inspect.getdoc(function) or ""))(wrapped)
        return function

    return decorate


def say(text: str) -> None:
    """Write a line to stderr; where nobody reads it any more, the work goes on unheard."""
    try:
        typer.echo(text, err=True)
    except BrokenPipeError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - stays open until the interpreter ends


def show(result: dict[str, Any]) -> None:
    """Print a result: one JSON object under `--json`, else key-value lines and a table for every list of dicts."""
    if output.json:
        found = _finite({"schema_version": SCHEMA_VERSION, **result})
        typer.echo(jsonlib.dumps(found, ensure_ascii=False, default=str, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    wide = None if sys.stdout.isatty() else 160  # a pipe has no width of its own
    console = Console(width=wide, soft_wrap=False)
    grid = Table.grid(padding=(0, 2))
    for key, value in result.items():
        if not _is_rows(value):
            grid.add_row(f"[bold]{key}[/bold]", _text(value))
    if grid.row_count:
        console.print(grid)
    for key, value in result.items():
        if _is_rows(value):
            columns = list(dict.fromkeys(column for row in value for column in row))
            table = Table(title=key, title_justify="left", title_style="bold", header_style="bold")
            for column in columns:
                numeric = all(isinstance(row.get(column), int | float | None) for row in value)
                table.add_column(column, justify="right" if numeric else "left", overflow="fold")
            for row in value:
                table.add_row(*(_text(row.get(column)) for column in columns))
            console.print(table)


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        value = 0.0 if abs(value) < 1e-12 else value  # what rounding leaves of a 0, its sign too
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    from rich.markup import escape

    return escape(str(value))


def fail(error: CladaptError) -> int:
    """Print the two lines of an expected failure; returns its exit code."""
    say(f"error: {' '.join(error.message.split())}")
    say(f"hint: {' '.join(error.hint.split())}")
    return error.exit_code
