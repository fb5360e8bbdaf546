"""Continual methods: every module of this folder without a leading underscore is one, named after its file."""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from cladapt.config import MethodConfig, resolve
from cladapt.errors import ConfigError
from cladapt.methods._base import Context, Method
from cladapt.methods._compose import Compose
from cladapt.methods._replay import Replay
from cladapt.methods._sharpness import Sharpness

__all__ = ["Compose", "Context", "Method", "Replay", "Sharpness", "available", "build"]


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
    _check_together(config.name, dict(methods))
    return methods[0][1] if len(methods) == 1 else Compose(methods)


def _check_together(name: str, methods: Mapping[str, Method]) -> None:
    """`ConfigError` for methods that cannot share an adapter."""
    special = {n: m.parameters for n, m in methods.items() if m.parameters != "factors"}
    histories = [n for n, m in methods.items() if m.history]
    if len({*special.values()}) > 1:
        listed = ", ".join(f"{n} {what}" for n, what in special.items())
        raise ConfigError(f"method.name={name!r}: different things would learn: {listed}", "use one of them")
    if len(methods) > 1 and (idle := [n for n, m in methods.items() if not m.trains]):
        raise ConfigError(f"method.name={name!r}: {idle[0]} leaves nothing to train", f"use {idle[0]} alone")
    flatten = [n for n, m in methods.items() if m.flattens]
    if len(flatten) > 1:
        raise ConfigError(
            f"method.name={name!r}: {' and '.join(flatten)} would each weigh the losses", "use one of them"
        )
    if flatten and (whole := [n for n, what in special.items() if what == "weights"]):
        raise ConfigError(
            f"method.name={name!r}: {flatten[0]} perturbs the factors of an adapter, {whole[0]} learns whole weights",
            f"use {flatten[0]} with a method that learns low-rank factors",
        )
    recast, by_entry = ([n for n, m in methods.items() if getattr(m, flag)] for flag in ("recasts", "by_entry"))
    if recast and by_entry:
        raise ConfigError(
            f"method.name={name!r}: {by_entry[0]} weighs entries of the factors against those of another block, "
            f"{recast[0]} puts others in their place between the two",
            "use one of them",
        )
    revisit = [n for n, m in methods.items() if m.revisits]
    if len(revisit) > 1:
        raise ConfigError(
            f"method.name={name!r}: {' and '.join(revisit)} would each say what is learned of earlier blocks",
            "use one of them",
        )
    if len(histories) > 1:
        raise ConfigError(
            f"method.name={name!r}: {' and '.join(histories)} would each keep the earlier blocks", "use one of them"
        )
    order = [*methods]
    for teacher in (n for n, m in methods.items() if m.distils):
        if other := [n for n, m in methods.items() if m.restarts]:
            raise ConfigError(
                f"method.name={name!r}: {other[0]} begins a block with another model than the one before it, from "
                f"which {teacher} learns",
                "use one of them",
            )
        if late := [n for n in histories if order.index(n) > order.index(teacher)]:
            raise ConfigError(
                f"method.name={name!r}: {late[0]} begins a block with other factors, when {teacher} has taken those "
                "that it learns from",
                f"write {'+'.join([*(n for n in order if n != teacher), teacher])}",
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
