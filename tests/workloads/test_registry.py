"""The registry of workloads: what is a file is a task, everywhere a task is named."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cladapt import workloads
from cladapt.artifacts import write_json
from cladapt.config import ImagesConfig, RunConfig, RunSettings, VitConfig
from cladapt.errors import ConfigError, DataError
from cladapt.pipeline import images
from cladapt.pipeline.compare import compare_runs
from cladapt.run import open_run
from cladapt.train.sinks import MemorySink
from cladapt_cli.app import run as command

TOY = '''
"""Classes under another name: all that one more workload needs."""

from typing import ClassVar

from cladapt.workloads.classify import Classify, ClassifyConfig


class ToyConfig(ClassifyConfig):
    """A run of the toy."""

    task: ClassVar[str] = "toy"


class Toy(Classify):
    """Digits, as in classify."""

    config = ToyConfig
'''


def draw(folder: Path) -> None:
    """Six classes of five images each."""
    rng = np.random.default_rng(0)
    for c in range(6):
        (folder / f"c{c}").mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 40, (8, 8)) + 40 * c
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"c{c}" / f"{i}.png")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which `cladapt.workloads` has one file more."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(TOY)
    monkeypatch.setattr(workloads, "__path__", [*workloads.__path__, str(tmp_path / "more")])
    monkeypatch.delitem(sys.modules, "cladapt.workloads.toy", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_is_a_task_whose_settings_name_it() -> None:
    assert workloads.names() == ["classify", "recommend", "sequential"]
    for name in workloads.names():
        work = workloads.get(name)
        assert type(work).__module__ == f"cladapt.workloads.{name}"
        assert work.config.task == name
        assert issubclass(work.config, RunSettings)
    assert workloads.get(None).config is RunConfig


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"task='rank' is not known \(use classify or recommend or sequential\)"):
        workloads.get("rank")


def test_the_names_cost_no_import_of_the_workloads() -> None:
    code = "import sys; from cladapt import workloads; workloads.names(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "polars", "numpy", "cladapt.workloads.recommend"} & {*loaded}


def test_a_run_record_of_an_unknown_task_is_damaged(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"schema_version": 1, "task": "rank", "config": {}})
    with pytest.raises(
        DataError, match=r"config\.json has task='rank': .*expected classify or recommend or sequential"
    ):
        open_run(tmp_path)
    write_json(tmp_path / "config.json", {"schema_version": 1, "config": {}})
    assert open_run(tmp_path).task == "recommend"  # what runs of older versions are


def test_one_more_workload_is_one_file(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workloads.names() == ["classify", "recommend", "sequential", "toy"]
    assert command(["config", "show", "--task", "toy", "--json"]) == 0
    assert "train.batch_images" in capsys.readouterr().out
    draw(toy / "drawings")
    images.import_images(Path("drawings"), Path("stream"), ImagesConfig(blocks=3, size=8))
    settings = VitConfig(hidden=16, layers=1, epochs=1, warp=0.0)
    images.make_base(Path("stream"), Path("base"), None, None, settings, MemorySink())
    given = "train --task toy --data stream --base base --method finetune --epochs 1 --rank 1 --quiet"
    for seed in (0, 1):
        assert command([*given.split(), "--seed", str(seed), "--out", f"toy-{seed}"]) == 0
    run = open_run(toy / "toy-0")
    assert (run.task, sorted(run.adapters)) == ("toy", [2, 3])
    capsys.readouterr()
    assert command([*given.split(), "--dry-run", "--json"]) == 0
    assert [line["block"] for line in json.loads(capsys.readouterr().out)["blocks"]] == [2, 3]
    for line in ("train --resume toy-0 --quiet", *(f"eval toy-{seed} -o bootstrap=100 --quiet" for seed in (0, 1))):
        assert command(line.split()) == 0
    capsys.readouterr()
    assert command(["compare", "toy-0", "toy-1", "--json", "--out", "compared"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["seeds"] for group in found["groups"]] == [[0, 1]]
    assert (toy / "compared" / "report.html").is_file()


def test_runs_of_two_tasks_are_not_compared(tmp_path: Path) -> None:
    for task in ("recommend", "classify"):
        config = workloads.get(task).config().model_dump(mode="json")
        write_json(tmp_path / task / "config.json", {"schema_version": 1, "task": task, "config": config})
    with pytest.raises(ConfigError, match=r"is a run of --task recommend, .* of --task classify \(compare runs of one"):
        compare_runs([tmp_path / "recommend", tmp_path / "classify"])
