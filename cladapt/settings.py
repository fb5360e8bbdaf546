"""How settings resolve: recipes and overrides are validated against a model, and every mistake is reported at once.

A recipe is YAML with the same nesting as the models of `cladapt.config`; `-o train.lr=1e-4` overrides one field.
Unknown keys are reported with the nearest known name.
"""

import copy
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from cladapt.errors import ConfigError, DataError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Width = Annotated[int, Field(ge=1, le=2**16)]
Codes = Annotated[int, Field(ge=1, le=10**6)]  # a code has at most six digits
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what numpy, scikit-learn and torch all take
PositiveFloat = Annotated[float, Field(gt=0.0)]
Weight = Annotated[float, Field(ge=0.0, le=100.0)]


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    shown_by: ClassVar[str] = "config show"
    """The command that prints every key."""

    def changed(self) -> set[str]:
        """Names of the fields whose value is not their default."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}

    def readers(self) -> Mapping[str, str]:
        """Fields that nothing reads under these settings, each with what would read it."""
        return {}

    def refuse_unread(self, asked: Iterable[str] | None = None) -> None:
        """`ConfigError` for a value that was chosen and that nothing reads; `asked`: the fields that were chosen.

        Without it those that differ from their defaults were.
        """
        chosen = self.changed() if asked is None else set(asked)
        for name, reader in self.readers().items():
            if name in chosen:
                raise ConfigError(
                    f"{name}={getattr(self, name)} changes nothing here: it is read with {reader} alone",
                    f"leave {name} out, or use {reader}",
                )


S = TypeVar("S", bound=Settings)


def resolve(model: type[S], values: Mapping[str, Any], where: str = "config", shown_by: str = "") -> S:
    """Validate `values` against `model`; one `ConfigError` lists every mistake, unknown keys with the nearest name.

    `shown_by`: the command that prints the keys, where it is not the model's own.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found: dict[str, list[str]] = {}  # what each member of a union says of a value is one mistake
        for problem in error.errors():
            what, why = _describe(model, dict(problem))
            found.setdefault(what, []).append(why)
    problems = [what + " or ".join(why) for what, why in found.items()]
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    hint = f"`cladapt {shown_by or model.shown_by}` prints every key and default"
    raise ConfigError(f"{where}: {count}: " + "; ".join(problems), hint)


def _describe(model: type[BaseModel], problem: dict[str, Any]) -> tuple[str, str]:
    """The key and value of a mistake, and what is wrong with them."""
    path = ".".join(map(str, _keys(model, problem["loc"])))
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        listed = ", ".join(known) or "none"
        return f"unknown key {path!r}", f", did you mean {near[0]!r}?" if near else f", known: {listed}"
    message = problem["msg"].removeprefix("Value error, ")
    return (f"{path}={_shown(problem['input'])}: ", message) if problem["loc"] else ("", message)


def _keys(model: type[BaseModel] | None, location: Iterable[Any]) -> list[Any]:
    """A mistake's location without the members of unions, which are none of the recipe's keys."""
    found: list[Any] = []
    of_union = False
    for part in location:
        if of_union:
            of_union = False
            continue
        found.append(part)
        if model is not None and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            members = [each for each in get_args(annotation) if each is not type(None)]
            of_union = get_origin(annotation) in (Union, UnionType) and len(members) > 1
            model = next(iter(_models_in(annotation)), None)
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    return [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]


def _shown(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _fields_at(model: type[BaseModel], path: Iterable[Any]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        nested = _models_in(annotation)
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe into a nested dict."""
    try:
        value = _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"no such recipe: {path}", "check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the recipe {path}: {error}", "expected a UTF-8 YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_reason(error)}", "mend the recipe") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping, found {type(value).__name__}", "write `key: value` lines")
    return value


class _Recipe(yaml.SafeLoader):
    """YAML without what hides a meaning: an alias (a few lines can stand for gigabytes) and a key given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"the alias *{event.anchor} is not read, write its value{event.start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    """The value of a YAML text; beside YAMLError, PyYAML raises ValueError (a date that is none) and RecursionError."""
    return yaml.load(text, _Recipe)


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())


def merge_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with each `a.b=c` of `overrides` applied; values parse as YAML (numbers, lists, booleans)."""
    merged = copy.deepcopy(dict(values))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {override!r} has no `key=value` form", "write e.g. -o train.lr=1e-4")
        target = merged
        *parents, last = key.strip().split(".")
        # a dotted method option such as method.options.peso.strength keeps its dots below `options`
        if parents[:2] == ["method", "options"]:
            parents, last = parents[:2], ".".join([*parents[2:], last])
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override {override!r}: {parent!r} is not a section", "check the key's path")
        target[last] = _parse(text)
    return merged


def _parse(text: str) -> Any:
    try:
        value = _read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if isinstance(value, str) and text.strip() == value:  # quotes say that a text is meant
        try:
            return float(value)  # YAML reads 1e-4 (no dot) as text
        except ValueError:
            return value
    return value


def describe(settings: Settings, prefix: str = "") -> list[dict[str, Any]]:
    """Every key with its value, default, allowed values and meaning, nested keys dotted."""
    rows: list[dict[str, Any]] = []
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            rows += describe(value, f"{prefix}{name}.")
        else:
            row = {"key": prefix + name, "value": value, "default": info.default, "allowed": allowed(info)}
            rows.append({**row, "meaning": info.description})
    return rows


def allowed(field: FieldInfo) -> str:
    """The values that a field takes, as `a | b` or `>= 0, < 1`; empty where its type alone says it."""
    union = get_origin(field.annotation) in (Union, UnionType)
    named: list[str] = []
    for kind in get_args(field.annotation) if union else [field.annotation]:
        kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        if get_origin(kind) is Literal:
            named += map(str, get_args(kind))
        elif kind is bool:
            named += ["yes", "no"]
        elif kind in (int, float):
            named.append("a number")
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{sign} {getattr(b, name)}" for b in field.metadata for name, sign in signs.items() if hasattr(b, name)]
    return ", ".join([*([] if named in ([], ["a number"]) else [" | ".join(named)]), *bounds])
