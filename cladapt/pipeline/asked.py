"""What a run is asked, resolved into the settings of its task."""

from collections.abc import Mapping
from typing import Any, TypeVar

from cladapt.config import MethodConfig, RunSettings, resolve
from cladapt.errors import ConfigError
from cladapt.methods import available

C = TypeVar("C", bound=RunSettings)


def resolve_run(kind: type[C], values: Mapping[str, Any], where: str) -> C:
    """As `cladapt.config.resolve`; where an unknown key is an option of the method, the hint says how that is given."""
    try:
        return resolve(kind, values, where)
    except ConfigError as error:
        written = _as_options(kind, values)
        if not written:
            raise
        raise ConfigError(error.message, f"options of a method are given as {' '.join(written)}") from error


def _as_options(kind: type[RunSettings], values: Mapping[str, Any]) -> list[str]:
    """The `-o` of every unknown key, of the run or of its section `method`, that is an option of its method."""
    section = values.get("method", {})
    if not isinstance(section, Mapping):
        return []
    stray = {key: value for key, value in values.items() if key not in kind.model_fields}
    stray |= {key: value for key, value in section.items() if key not in MethodConfig.model_fields}
    known, names = available(), str(section.get("name", kind().method.name)).split("+")
    return [
        f"-o method.options.{f'{name}.' * (len(names) > 1)}{key}={value}"
        for key, value in stray.items()
        for name in names
        if name in known and key in known[name].Config.model_fields
    ]
