"""What a run is asked: an option of its method outside of the method's options is answered by how it is given."""

from typing import Any

import pytest

from cladapt.config import RunConfig
from cladapt.errors import ConfigError
from cladapt.pipeline.asked import resolve_run
from cladapt.workloads.classify import ClassifyConfig

SHOW = "`cladapt config show` prints every key and default"


@pytest.mark.parametrize(
    ("values", "unknown", "hint"),
    [
        ({"method": {"name": "replay"}, "size": 100}, ["size"], "-o method.options.size=100"),
        ({"method": {"name": "replay", "size": 100}}, ["method.size"], "-o method.options.size=100"),
        ({"strength": 0.5}, ["strength"], "-o method.options.strength=0.5"),  # of the default method
        (
            {"method": {"name": "peso+eisam"}, "radius": 1, "regulariser": "l2"},
            ["radius", "regulariser"],
            "-o method.options.eisam.radius=1 -o method.options.peso.regulariser=l2",
        ),
        (
            {"method": {"name": "peso+eisam"}, "strength": 1},
            ["strength"],
            "-o method.options.peso.strength=1 -o method.options.eisam.strength=1",
        ),
    ],
)
@pytest.mark.parametrize("kind", [RunConfig, ClassifyConfig])
def test_a_stray_option_of_the_method_is_answered_by_how_it_is_given(
    values: dict[str, Any], unknown: list[str], hint: str, kind: type[Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_run(kind, values, "train")
    assert all(f"unknown key '{key}'" in caught.value.message for key in unknown)
    assert caught.value.hint == f"options of a method are given as {hint}"


@pytest.mark.parametrize(
    "values",
    [
        {"method": {"name": "finetune"}, "size": 100},
        {"method": {"name": "repplay"}, "size": 1},
        {"method": 3},
        {"x": 1},
    ],
)
def test_other_mistakes_are_answered_as_ever(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_run(RunConfig, values, "train")
    assert caught.value.hint == SHOW


def test_what_is_right_resolves() -> None:
    values = {"method": {"name": "replay", "options": {"size": 100}}}
    assert resolve_run(RunConfig, values, "train") == RunConfig.model_validate(values)
