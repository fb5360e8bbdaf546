"""The command as a user has it: run in an empty folder, away from the checkout.

`CLADAPT_COMMAND` names an installed `cladapt`, as CI does for the wheel; otherwise this interpreter's own is run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cladapt import __version__

INSTALLED = os.environ.get("CLADAPT_COMMAND")


def cladapt(cwd: Path, *arguments: str) -> str:
    """Run the command and return its stdout."""
    command = [INSTALLED] if INSTALLED else [sys.executable, "-m", "cladapt_cli.app"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if not INSTALLED:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run([*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_version_is_the_source_s(tmp_path: Path) -> None:
    assert cladapt(tmp_path, "--version").strip() == __version__


def test_help_names_the_first_commands(tmp_path: Path) -> None:
    text = cladapt(tmp_path, "--help")
    assert [name for name in ("demo", "train", "eval", "export", "methods", "doctor") if name not in text] == []


def test_methods_are_found_in_the_installed_folder(tmp_path: Path) -> None:
    result = json.loads(cladapt(tmp_path, "methods", "--json"))
    assert result["schema_version"] == 1
    assert {"frozen", "finetune", "peso"} <= {row["method"] for row in result["methods"]}


def test_doctor_says_which_kernels_run_and_why(tmp_path: Path) -> None:
    result = json.loads(cladapt(tmp_path, "doctor", "--json"))
    assert result["schema_version"] == 1
    assert {row["implementation"] for row in result["kernels"]} <= {"reference", "triton"}
    assert all(row["reason"] for row in result["kernels"])


@pytest.mark.skipif(not INSTALLED, reason="the checkout has what a wheel has not")
def test_the_wheel_brings_no_benchmarks_of_kernels(tmp_path: Path) -> None:
    command = [INSTALLED or "", "bench", "kernels"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the benchmarks of kernels are not installed: no bench/registry in ")
    assert "\nhint: clone the repository" in result.stderr


@pytest.mark.slow
def test_quick_demo_adapts_measures_and_writes_open_formats(tmp_path: Path) -> None:
    result = json.loads(cladapt(tmp_path, "demo", "--quick", "--out", "demo", "--json"))
    assert result["schema_version"] == 1
    written = [path for path in (tmp_path / "demo").rglob("*") if path.is_file()]
    names = {path.name for path in written}
    expected = {
        "manifest.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
        "report.html",
    }
    assert expected - names == set()
    assert [path for path in written if path.stat().st_size == 0 or path.name.endswith(".tmp")] == []
    assert [path for path in written if path.suffix in (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")] == []
    for path in written:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
