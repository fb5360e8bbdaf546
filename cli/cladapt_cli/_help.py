"""Help texts that mean what they say: square brackets are no markup, and every option shows its default."""

import copy
import inspect
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import ParameterInfo


def plain(text: str) -> str:
    """The text with what Rich would take for markup escaped."""
    from rich.markup import escape

    return escape(text)


def documented(parameter: inspect.Parameter) -> inspect.Parameter:
    """A keyword parameter of a command as Typer gets it: its help plain, its default shown, no empty path taken."""
    kind, *notes = _parts(parameter.annotation)
    own = [_with_help(copy.copy(note), parameter.default) for note in notes if isinstance(note, ParameterInfo)]
    if Path in _kinds(kind):
        for information in own:
            information.parser = path
    annotation = Annotated[(kind, *own)] if own else kind
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


def path(text: str) -> Path:
    """A path as it is written; the help shows this function's name as the kind of value."""
    if not text:  # it would be this folder: an unset variable of a script more often than it is meant
        raise typer.BadParameter("the path is empty; write . for this folder")
    return Path(text)


def _with_help(information: ParameterInfo, default: Any) -> ParameterInfo:
    text = information.help or ""
    said = "default: " in text or "(default)" in text
    if information.show_default is True and not said:
        if default is None or default == "":
            information.show_default = "none"
        elif default is False:
            information.show_default = "off"
    information.help = plain(text)
    return information


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if hasattr(annotation, "__metadata__") else (annotation,)


def _kinds(kind: Any) -> set[Any]:
    """A type and those that it is made of."""
    return {kind}.union(*(_kinds(part) for part in get_args(kind)))
