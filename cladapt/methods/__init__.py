"""Continual methods: every module of this folder without a leading underscore is one, named after its file."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from cladapt.config import MethodConfig, resolve
from cladapt.errors import ConfigError
from cladapt.methods._base import Context, Method
from cladapt.methods._compose import Compose
from cladapt.methods._replay import Replay
from cladapt.methods._sharpness import Sharpness

__all__ = ["Compose", "Context", "Method", "Replay", "Sharpness", "available", "build", "conflicts"]

_CLAIMS = {
    "flattens": "weigh the losses",
    "revisits": "say what is learned of earlier blocks",
    "history": "keep the earlier blocks",
}
"""What a declaration of a method claims for it alone."""


def available() -> dict[str, type[Method]]:
    """Every method by name: the class of each file, found by looking into the folder."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            loaded = importlib.import_module(f"{__name__}.{module.name}")
            (found[module.name],) = (
                value
                for value in vars(loaded).values()
                if isinstance(value, type) and issubclass(value, Method) and value.__module__ == loaded.__name__
            )
    return found


def build(config: MethodConfig) -> Method:
    """The configured method, its options checked; `a+b` composes in order."""
    known = available()
    names = config.name.split("+")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"method.name={config.name!r}: no method {name!r}",
                f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}",
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"method.name={config.name!r} names a method twice", "name each method once")
    options = _split_options(config.options, names)
    configs = {n: resolve(known[n].Config, options[n], f"method.options of {n}", "methods") for n in names}
    methods = [(n, known[n](config)) for n, config in configs.items()]
    if conflict := next(conflicts(dict(methods)), None):
        raise ConfigError(f"method.name={config.name!r}: {conflict[0]}", conflict[1])
    return methods[0][1] if len(methods) == 1 else Compose(methods)


def conflicts(methods: Mapping[str, Method]) -> Iterator[tuple[str, str]]:
    """Why methods cannot share an adapter: (what, hint) for each reason."""

    def having(flag: str) -> list[str]:
        return [name for name, method in methods.items() if getattr(method, flag)]

    special = {name: m.parameters for name, m in methods.items() if m.parameters != "factors"}
    if len({*special.values()}) > 1:
        yield (
            f"different things would learn: {', '.join(f'{n} {what}' for n, what in special.items())}",
            "use one of them",
        )
    for name, method in methods.items():
        if len(methods) > 1 and not method.trains:
            yield f"{name} leaves nothing to train", f"use {name} alone"
    for flag, claim in _CLAIMS.items():
        if len(several := having(flag)) > 1:
            yield f"{' and '.join(several)} would each {claim}", "use one of them"
    for weigher in having("flattens"):
        for whole in (name for name, what in special.items() if what == "weights"):
            yield (
                f"{weigher} perturbs the factors of an adapter, {whole} learns whole weights",
                f"use {weigher} with a method that learns low-rank factors",
            )
    for weigher in having("by_entry"):
        for other in having("recasts"):
            yield (
                f"{weigher} weighs entries of the factors against those of another block, {other} puts others in "
                "their place between the two",
                "use one of them",
            )
    order = [*methods]
    for teacher in having("distils"):
        for other in having("restarts"):
            yield (
                f"{other} begins a block with another model than the one before it, from which {teacher} learns",
                "use one of them",
            )
        for late in (name for name in having("history") if order.index(name) > order.index(teacher)):
            yield (
                f"{late} begins a block with other factors, when {teacher} has taken those that it learns from",
                f"write {'+'.join([*(name for name in order if name != teacher), teacher])}",
            )


def _split_options(options: Mapping[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    if len(names) == 1:
        return {names[0]: {key.removeprefix(f"{names[0]}."): value for key, value in options.items()}}
    split: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        name, separator, field = key.partition(".")
        if not separator or name not in split:
            raise ConfigError(
                f"method.options.{key}: which of {', '.join(names)} does it belong to?", "write <method>.<field>"
            )
        split[name][field] = value
    return split
