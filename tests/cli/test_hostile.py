"""Hostile arguments, over every command: each option gets values of its type that nothing can work with.

Commands, options and their types come from the command line itself, so a new command without a call in `CALLS` fails
here, and a new option is tried unasked, with every other value of its type in turn; with `CLADAPT_HOSTILE=full` in the
environment, with all of them. What a failure must look like is checked by `hostile` (see conftest).
"""

import inspect
import os
import random
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from cladapt_cli.app import app

Hostile = Callable[..., str]

SMALL = "-o users=40 -o items=40 -o topics=4 -o blocks=3"
CALLS = {  # one call of each command that works in the folder of `hostile`
    "bench kernels": "--runs 5 --out new.csv",
    "bench methods": "--runs 5 --out new.csv",
    "bench profile": "--runs 5 --out new.csv",
    "base init": "--from base --data stream --out new --form packed -o epochs=0",
    "base pretrain": "--data stream --out new -o epochs=0",
    "base sequential": "--data stream --out new -o epochs=1 -o hidden=8 -o layers=1",
    "base tune": "--from base --data stream --out new -o epochs=1",
    "base vision": "--data classes --out new -o epochs=1 -o hidden=16 -o layers=1",
    "compare": "run twin",
    "config show": "recipe.yaml",
    "data append": "bare next.csv --items items.csv",
    "data blocks": "stream",
    "data check": "stream",
    "data forget": "bare users.txt",
    "data images": "drawings --out new --blocks 2 --size 8",
    "data import": "log.csv --out new --fractions 0.5,0.5 --min-events 3",
    "data retire": "bare catalogue.txt",
    "data simulate": f"--out new {SMALL}",
    "data stats": "stream",
    "demo": "--quick --out new",
    "doctor": "",
    "eval": "run -o bootstrap=100",
    "export": "run --out new",
    "merge": "run --out new",
    "methods": "",
    "promote": "twin --promote always -o bootstrap=100",
    "recommend": "histories.jsonl --adapter run --out new.csv",
    "rollback": "run",
    "tokens build": "bare -o dimensions=8 -o levels=2 -o codes=4 -o capacity=16",
    "tokens extend": "grown",
    "tokens inspect": "stream",
    "tokens refresh": "bare",
    "train": "--data stream --base base --epochs 1 --out new",
    "update": "next.csv --run run --min-tested 9 -o bootstrap=100",
}
SLOW = {"bench kernels", "bench methods", "bench profile", "demo"}
NUMBER = ["abc", "1.5x", "", "-1", "9" * 30]
VALUES = {
    int: NUMBER,
    float: ["abc", "", "-1", "nan", "inf"],
    Path: ["", "a\0b", "x" * 300, "loop", "loop/x", "file/x", "\udcff", "nowhere/2024", "binary"],
    str: ["", "a\0b", "x" * 5000, "\udcff", "../../etc/passwd", "{", "ünïcode \U0001f4a5"],
}
OVERRIDES = [
    "",
    "seed",
    "=1",
    "a.b.c=1",
    "seed=",
    "seed=abc",
    "seed=-1",
    "seed=" + "9" * 30,
    "seed=.nan",
    "seed={a: 1}",
]
OVERRIDES += ["seed=2024-99-99", "seed=0b_", "seed=" + "[" * 3000, "seed=&a [*a]", "seed.x=1", "sede=1", "\0=1", "ö=1"]
FINE = {  # hostile to look at, but meaningful
    ("update", "--rejects", "nowhere/2024"),
    ("update", "--min-tested", "9" * 30),
    ("update", "--out", "nowhere/2024"),
    ("data import", "--timestamp", ""),
    ("data append", "--rejects", "nowhere/2024"),
    ("data append", "--min-tested", "9" * 30),
    *((command, "--out", "nowhere/2024") for command in CALLS),
}
CODES = {2, 3, 4}
STEP = 1 if os.environ.get("CLADAPT_HOSTILE") == "full" else 3


def commands(group: Any = None, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its words."""
    found: Any = group or typer.main.get_command(app)
    for name, command in found.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def kind_of(command: Any, parameter: Any) -> type | None:
    """The type of a parameter's values, None where there is nothing to choose."""
    if parameter.name not in (known := inspect.signature(command.callback).parameters):
        return None
    return next((kind for kind in _parts(known[parameter.name].annotation) if kind in VALUES), None)


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def with_value(command: str, parameter: Any, value: str) -> list[str]:
    """The call of a command with one option or argument replaced."""
    words = shlex.split(CALLS[command])
    if parameter.param_type_name == "argument":
        words = [value, *words[1:]] if words and not words[0].startswith("-") else [value, *words]
    else:
        for option in parameter.opts:
            while not parameter.multiple and option in words:
                del words[words.index(option) : words.index(option) + 2]
        words += [parameter.opts[-1] if parameter.opts[-1].startswith("--") else parameter.opts[0], value]
    return [*command.split(), *words]


def argument_cases() -> list[Any]:
    """(arguments, exit codes) of every command, parameter and hostile value."""
    draw = random.Random(0)
    cases = []
    for name, command in commands():
        if name not in CALLS:
            continue
        words = name.split()
        usage = [["--nope"], ["--json=5"], *([] if command.params[0].nargs == -1 else [["a", "b", "c"]])]
        cases += [pytest.param([*words, *more], {2}, id=f"{name} {more}") for more in usage]
        for parameter in command.params:
            kind = kind_of(command, parameter)
            option = parameter.opts[0]
            if "--override" in parameter.opts:
                values = OVERRIDES
            elif kind is not None:
                values = [*VALUES[kind], *([] if kind is Path else [str(draw.randrange(-(2**70), -1))])]
            else:
                continue
            for value in values[len(cases) % STEP :: STEP]:
                fine = (name, option, value) in FINE
                if fine and name in SLOW:
                    continue
                shown = value if len(value) < 20 else f"{value[:8]}…"
                case = with_value(name, parameter, value), CODES | {0} if fine else CODES
                cases.append(pytest.param(*case, id=f"{name} {option} {shown!r}"))
    return cases


def test_every_command_has_a_call() -> None:
    assert {name for name, _ in commands()} == set(CALLS)


@pytest.mark.parametrize(("arguments", "codes"), argument_cases())
def test_a_value_that_nothing_can_work_with(arguments: list[str], codes: set[int], hostile: Hostile) -> None:
    hostile(arguments, codes)
