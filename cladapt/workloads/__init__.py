"""Workloads: what a base is adapted to do. Every module of this folder without a leading underscore is one, named after
its file; `cladapt.pipeline` writes the life of a run once for all of them."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from cladapt.errors import ConfigError

if TYPE_CHECKING:
    from cladapt.workloads._base import Workload

DEFAULT = "recommend"


def names() -> list[str]:
    """Names of the workloads, from the files of the folder alone: nothing of them is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str | None) -> "Workload[Any, Any, Any, Any]":
    """The workload of a task, None being recommending; `ConfigError` for a name that no file has."""
    name = DEFAULT if name is None else name
    if name not in names():
        raise ConfigError(f"task={name!r} is not known", f"use {' or '.join(names())}")
    from cladapt.workloads._base import Workload

    module = importlib.import_module(f"{__name__}.{name}")
    (kind,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Workload) and value.__module__ == module.__name__
    )
    return kind()
