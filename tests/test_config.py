"""Recipes and overrides: what resolves, and how mistakes are told."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cladapt.config import (
    BlocksConfig,
    EvalConfig,
    InitConfig,
    PretrainConfig,
    RunConfig,
    Settings,
    SimulateConfig,
    TokensConfig,
    TrainConfig,
    describe,
    load_recipe,
    merge_overrides,
    resolve,
)
from cladapt.errors import ConfigError, DataError
from cladapt.methods.lsat import LsatConfig


def test_nothing_given_resolves_to_the_defaults() -> None:
    assert resolve(RunConfig, {}) == RunConfig()


def test_a_resolved_configuration_survives_its_own_json() -> None:
    config = resolve(
        RunConfig,
        {
            "adapter": {"targets": ["q_proj", "v_proj"]},
            "method": {"options": {"strength": 0.1}},
            "eval": {"top_k": [1]},
        },
    )
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert config.adapter.targets == ("q_proj", "v_proj")


def test_settings_do_not_change_after_validation() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().seed = 1


def test_what_is_changed_differs_from_its_default_however_it_was_given() -> None:
    assert BlocksConfig().changed() == set()
    assert BlocksConfig(min_events=5, k_core=0).changed() == set()
    assert BlocksConfig(min_events=6, dates=("2020-01-01",)).changed() == {"min_events", "dates"}


def test_every_mistake_is_told_at_once() -> None:
    values = {"train": {"lr": -1, "epoch": 3}, "seeed": 1, "adapter": {"rank": "four"}}
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig, values, "recipe.yaml")
    assert caught.value.message.startswith("recipe.yaml: 4 mistakes: ")
    assert "train.lr=-1: Input should be greater than 0" in caught.value.message
    assert "unknown key 'train.epoch', did you mean 'epochs'?" in caught.value.message
    assert "unknown key 'seeed', did you mean 'seed'?" in caught.value.message
    assert "adapter.rank='four': Input should be a valid integer" in caught.value.message
    assert caught.value.hint == "`cladapt config show` prints every key and default"
    assert caught.value.exit_code == 2


def test_one_mistake_is_one() -> None:
    with pytest.raises(ConfigError, match=r"^config: 1 mistake: train\.epochs=0: "):
        resolve(RunConfig, {"train": {"epochs": 0}})


def test_a_value_that_no_member_of_a_union_takes_is_one_mistake_of_its_key() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(LsatConfig, {"weight": 2.0, "fusion": "sum"})
    assert caught.value.message == (
        "config: 2 mistakes: weight=2.0: Input should be less than or equal to 1 or Input should be 'validation'; "
        "fusion='sum': Input should be 'products' or 'factors'"
    )


def test_what_was_changed_is_named() -> None:
    assert LsatConfig().changed() == set()
    assert LsatConfig(weight=0.5, fusion="products").changed() == {"weight"}


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'adapter\.zzz', known: rank, alpha, dropout, targets, rslora"):
        resolve(RunConfig, {"adapter": {"zzz": 1}})


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (BlocksConfig, {"fractions": [0.5, 0.4]}, "fractions=[0.5, 0.4]: the fractions sum to 0.9, expected 1"),
        (BlocksConfig, {"fractions": [1.5, -0.5]}, "fractions.1=-0.5: Input should be greater than 0"),
        (TrainConfig, {"row_tokens": 512, "batch_tokens": 256}, "row_tokens=512 exceeds batch_tokens=256"),
        (TrainConfig, {"schedule": "step"}, "schedule='step': Input should be 'cosine', 'linear' or 'constant'"),
        (TrainConfig, {"lr": float("nan")}, "lr=nan: Input should be a finite number"),
        (TrainConfig, {"warmup": 1.5}, "warmup=1.5: Input should be less than or equal to 1"),
        (EvalConfig, {"top_k": []}, "top_k is empty, expected at least one cut-off"),
        (EvalConfig, {"beams": 5}, "beams=5 is below the largest top_k=10"),
        (SimulateConfig, {"items": 3}, "items=3: Input should be greater than or equal to 20"),
        (TokensConfig, {"codes": 1}, "codes=1: Input should be greater than or equal to 2"),
        (PretrainConfig, {"preset": "huge"}, "preset='huge': Input should be 'tiny', 'small' or 'medium'"),
    ],
)
def test_values_out_of_range_are_quoted(model: type[Settings], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(model, values)
    assert message in caught.value.message
    assert "1 mistake" in caught.value.message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=1e-4", {"train": {"lr": 1e-4}}),
        ("train.epochs=3", {"train": {"epochs": 3}}),
        ("adapter.rslora=true", {"adapter": {"rslora": True}}),
        ("eval.top_k=[1, 5]", {"eval": {"top_k": [1, 5]}}),
        ("method.options.strength=0.5", {"method": {"options": {"strength": 0.5}}}),
        ("method.options.peso.strength=2", {"method": {"options": {"peso.strength": 2}}}),
        ("data=a=b", {"data": "a=b"}),
        ("data=[unclosed", {"data": "[unclosed"}),
        (" seed =1", {"seed": 1}),
    ],
)
def test_an_override_sets_its_key_to_the_parsed_value(override: str, expected: dict[str, Any]) -> None:
    assert merge_overrides({}, [override]) == expected


def test_overrides_apply_in_order_and_leave_the_recipe_alone() -> None:
    recipe = {"train": {"lr": 1.0, "epochs": 2}}
    merged = merge_overrides(recipe, ["train.lr=2", "train.lr=3", "seed=1"])
    assert merged == {"train": {"lr": 3, "epochs": 2}, "seed": 1}
    assert recipe == {"train": {"lr": 1.0, "epochs": 2}}


@pytest.mark.parametrize("override", ["train.lr", "=1", " =1"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="has no `key=value` form"):
        merge_overrides({}, [override])


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"override 'seed\.x=1': 'seed' is not a section"):
        merge_overrides({"seed": 0}, ["seed.x=1"])


@settings(max_examples=50, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_comes_through_an_override_exactly(value: float) -> None:
    assert merge_overrides({}, [f"train.lr={value!r}"]) == {"train": {"lr": value}}


def test_recipes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\ntrain:\n  lr: 0.1\n")
    assert load_recipe(recipe) == {"seed": 3, "train": {"lr": 0.1}}
    recipe.write_text("# only a remark\n")
    assert load_recipe(recipe) == {}
    recipe.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: expected a mapping, found list"):
        load_recipe(recipe)
    recipe.write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: not valid YAML: .*line 2"):
        load_recipe(recipe)
    recipe.write_bytes(b"a: \xff\xfe")
    with pytest.raises(DataError, match="cannot read the recipe"):
        load_recipe(recipe)
    with pytest.raises(DataError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize("model", [RunConfig, BlocksConfig, SimulateConfig, TokensConfig, PretrainConfig, InitConfig])
def test_every_key_is_described_and_can_be_overridden(model: type[Settings]) -> None:
    rows = describe(model())
    assert all(row["meaning"] for row in rows)
    assert all(row["value"] == row["default"] for row in rows)
    nested: dict[str, Any] = {}
    for row in rows:
        *parents, last = row["key"].split(".")
        target = nested
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = row["value"]
    assert resolve(model, nested) == model()


def test_a_changed_value_stands_beside_its_default() -> None:
    rows = {row["key"]: row for row in describe(RunConfig(train=TrainConfig(epochs=9)))}
    assert (rows["train.epochs"]["value"], rows["train.epochs"]["default"]) == (9, TrainConfig().epochs)


def test_a_cut_off_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"top_k=\[5, 5\] names a cut-off twice"):
        resolve(EvalConfig, {"top_k": [5, 5]}, "eval")
