"""`cladapt config show`: every key of every command, where the hints of errors send people."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from cladapt.config import (
    BlocksConfig,
    ClassEvalConfig,
    EvalConfig,
    ImagesConfig,
    InitConfig,
    PretrainConfig,
    RunConfig,
    Settings,
    SimulateConfig,
    TokensConfig,
    VitConfig,
    describe,
)
from cladapt.errors import ConfigError
from cladapt_cli.app import run
from cladapt_cli.options import overrides_of

Capture = pytest.CaptureFixture[str]


def test_config_show_has_every_key_with_its_meaning(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["config", "show", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["config"]
    assert [row["key"] for row in rows] == [row["key"] for row in describe(RunConfig())]
    assert all(row["meaning"] for row in rows)
    Path("recipe.yaml").write_text("seed: 5\ntrain:\n  lr: 1e-3\n")
    assert run(["config", "show", "recipe.yaml", "-o", "train.lr=0.5", "--json"]) == 0
    values = {row["key"]: row["value"] for row in json.loads(capsys.readouterr().out)["config"]}
    assert (values["seed"], values["train.lr"], values["train.epochs"]) == (5, 0.5, 6)


def shown(line: str, capsys: Capture) -> list[dict[str, Any]]:
    assert run([*shlex.split(line), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["config"]


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("--for eval", EvalConfig),
        ("--for eval --task classify", ClassEvalConfig),
        ("--for pretrain", PretrainConfig),
        ("--for init", InitConfig),
        ("--for vision", VitConfig),
        ("--for tokens", TokensConfig),
        ("--for import", BlocksConfig),
        ("--for images", ImagesConfig),
        ("--for simulate", SimulateConfig),
    ],
)
def test_every_command_has_its_settings_shown_with_default_and_meaning(
    line: str, settings: type[Settings], capsys: Capture
) -> None:
    rows = shown(f"config show {line}", capsys)
    assert rows == json.loads(json.dumps(describe(settings())))
    assert all(row["meaning"] for row in rows)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("--for eval -o max_users=3", "max_users", 3),
        ("--for eval -o eval.max_users=3", "max_users", 3),
        ("--for tokens -o tokens.levels=2", "levels", 2),
        ("--for pretrain -o base.epochs=1", "epochs", 1),
        ("-o eval.max_users=3", "eval.max_users", 3),
    ],
)
def test_overrides_are_shown(line: str, key: str, value: int, capsys: Capture) -> None:
    assert {row["key"]: row["value"] for row in shown(f"config show {line}", capsys)}[key] == value


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        ("--for nothing", "--for nothing: no such settings", "use one of train, eval, pretrain, init"),
        ("--for eval recipe.yaml", "--for eval recipe.yaml: a recipe holds the settings of train", "leave out one"),
        ("--for init --task classify", "its settings are the same for every task", "leave out --task"),
        ("--for eval -o max_user=1", "unknown key 'max_user', did you mean 'max_users'", "config show --for eval`"),
        ("--for init -o base.epoch=1", "unknown key 'epoch', did you mean 'epochs'", "config show --for init`"),
        ("-o eval.max_user=1", "unknown key 'eval.max_user', did you mean 'max_users'", "`cladapt config show`"),
        ("--task classify -o sed=1", "unknown key 'sed', did you mean 'seed'", "`cladapt config show --task classify`"),
    ],
)
def test_a_mistake_is_two_lines_with_the_command_that_shows_the_keys(
    line: str, error: str, hint: str, capsys: Capture
) -> None:
    assert run(["config", "show", *line.split()]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert error in first
    assert hint in second


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("tokens build x -o level=2", "config show --for tokens"),
        ("base init --from x --data x --out y -o epoch=2", "config show --for init"),
        ("base init --from x --data x --out y -o preset=medium", "config show --for init"),
        ("base init --from x --data x --out y -o dropout=0.1", "config show --for init"),
        ("base pretrain --data x --out y -o epoch=2", "config show --for pretrain"),
        ("base pretrain --data x --out y -o weights=random", "config show --for pretrain"),
        ("base vision --data x --out y -o epoch=2", "config show --for vision"),
        ("data simulate --out y -o user=2", "config show --for simulate"),
        ("data import x --out y --min-events 0", "config show --for import"),
        ("data images x --out y --blocks 0", "config show --for images"),
        ("train -o train.epoch=2", "config show"),
        ("train --task classify -o train.epoch=2", "config show --task classify"),
    ],
)
def test_hints_name_the_command_that_shows_the_keys_and_it_shows_them(line: str, hint: str, capsys: Capture) -> None:
    assert run(line.split()) == 2
    assert capsys.readouterr().err.endswith(f"hint: `cladapt {hint}` prints every key and default\n")
    assert shown(hint, capsys)


def test_a_section_before_a_key_means_the_same_and_the_last_one_wins() -> None:
    assert overrides_of(["max_users=3", "eval.max_users=5", " eval.beams=7"], "eval") == {"max_users": 5, "beams": 7}
    assert overrides_of(["eval.max_users=5"]) == {"eval": {"max_users": 5}}
    with pytest.raises(ConfigError, match=r"override 'max_users' has no `key=value` form"):
        overrides_of(["eval.max_users"], "eval")
