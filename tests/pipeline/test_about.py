"""What the installation says about itself agrees with the installation."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from cladapt import __version__, ops
from cladapt.errors import ConfigError
from cladapt.methods import available
from cladapt.methods.peso import PesoConfig
from cladapt.pipeline import about


def test_doctor_names_versions_kernels_and_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = about.doctor()
    json.dumps(found)  # open to any reader
    assert found["cladapt"] == __version__
    versions = {row["package"]: row["version"] for row in found["packages"]}
    assert versions["torch"] == importlib.metadata.version("torch")
    assert found["free_disk_gib"] > 0
    rows = [(row["op"], row["implementation"], row["reason"]) for row in found["kernels"]]
    assert rows == [(op, implementation, reason) for op, (implementation, reason) in ops.backends().items()]
    assert all(reason for _, _, reason in rows)
    attention = found["attention_of_packed_rows"]
    assert [row["precision"] for row in attention] == ["bfloat16", "float32"]
    assert all(row["implementation"] in ("dense", "varlen") and row["reason"] for row in attention)
    assert attention[1]["implementation"] == "dense"


def test_doctor_warns_of_a_compiler_that_is_known_to_be_wrong_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiler_problem", lambda: "Triton 3.7.0 is wrong")
    with pytest.warns(UserWarning, match=r"^Triton 3\.7\.0 is wrong$"):
        about.doctor()


def test_every_method_of_the_folder_is_listed_with_its_first_line() -> None:
    listed = {row["method"]: row for row in about.list_methods()["methods"]}
    assert list(listed) == list(available())
    assert listed["peso"]["what"].startswith("PESO: a proximal term")
    assert (listed["peso"]["trains"], listed["frozen"]["trains"]) == (True, False)
    assert all(row["what"] for row in listed.values())


def test_one_method_is_listed_alone_and_several_by_what_joins_them() -> None:
    whole = about.list_methods()
    for asked in ("janus", "peso+eisam"):
        found, names = about.list_methods(asked), asked.split("+")
        assert [row["method"] for row in found["methods"]] == names
        for key in ("methods", "options"):
            assert found[key] == [row for name in names for row in whole[key] if row["method"] == name]


@pytest.mark.parametrize(
    ("asked", "name", "hint"),
    [("januss", "januss", "did you mean 'janus'?"), ("peso+zzz", "zzz", "known: cumulative, ")],
)
def test_a_method_that_no_file_has_is_named_with_the_nearest(asked: str, name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        about.list_methods(asked)
    assert caught.value.message == f"no method '{name}'"
    assert caught.value.hint.startswith(hint)


def test_every_option_has_its_default_and_meaning() -> None:
    options = [row for row in about.list_methods()["options"] if row["method"] == "peso"]
    assert [row["key"] for row in options] == list(PesoConfig.model_fields)
    defaults = PesoConfig()
    for row in options:
        assert row["default"] == getattr(defaults, row["key"])
        assert row["meaning"]
    # a text is read alone: neither the file's equations nor its neighbours are there
    texts = {(row["method"], row["key"]): row for row in about.list_methods()["options"]}
    assert not [key for key, row in texts.items() if re.search("see (above|below)", row["meaning"])]
    for option in ("form", "gauge", "estimate", "memory", "rectify", "factors", "start"):
        row = texts["janus", option]
        assert all(f"`{value}`" in row["meaning"] for value in row["allowed"].split(" | "))
    allowed = {(row["method"], row["key"]): row["allowed"] for row in about.list_methods()["options"]}
    assert allowed["peso", "regulariser"] == "literal | code | scaled | l2"
    assert allowed["peso", "strength"] == ">= 0.0"
    assert allowed["eisam", "perturb"] == "yes | no"
    assert allowed["eisam", "warmup"] == ">= 0.0, < 1.0"
    assert allowed["eblora", "step_multiplier"] == "a number | released"
    assert allowed["eblora", "start"] == ""
