"""`-o track=…` of a whole command: the tracker gets what log.jsonl has; a missing package stops it before it begins."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cladapt.run import open_run
from cladapt.train.track import QUIET
from cladapt_cli.app import run

TRAIN = "train --data stream --base base --method finetune --epochs 1 --rank 2"
CLASSIFY = "train --task classify --data classes --base eye --method finetune --epochs 1 --rank 2"


class FakeWandb(SimpleNamespace):
    """W&B's module and run in one."""

    def __init__(self) -> None:
        super().__init__(Settings=dict, rows=[], finished=0, define_metric=lambda *_, **__: None)

    def init(self, **given: Any) -> "FakeWandb":
        self.config = given["config"]
        return self

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def world(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("stream", "base", "classes", "eye"):
        shutil.copytree(small_world / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for variable in QUIET:
        monkeypatch.setenv(variable, "")
    return tmp_path


@pytest.mark.parametrize("line", [TRAIN, CLASSIFY], ids=["recommend", "classify"])
def test_a_tracker_has_the_losses_and_the_blocks_of_the_log(
    line: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert run([*line.split(), "--out", "new", "-o", "track=wandb", "--quiet"]) == 0
    events = [json.loads(text) for text in (world / "new" / "log.jsonl").read_text().splitlines()]
    steps = [(e["block"], e["step"], e["loss"]) for e in events if e["kind"] == "step"]
    tracked = [
        (int(key[6:9]), row[f"{key[:9]}/step/step"], value)
        for row in fake.rows
        for key, value in row.items()
        if key.endswith("/step/loss")
    ]
    assert steps == tracked != []
    scores = {e["block"]: e["valid_log_likelihood"] for e in events if e["kind"] == "block"}
    found = {row["block/block"]: row["block/valid_log_likelihood"] for row in fake.rows if "block/kept_epoch" in row}
    assert found == scores
    assert fake.config["adapter.rank"] == "2"
    assert fake.finished == 1
    assert run([*line.split(), "--out", "plain", "--quiet"]) == 0
    assert open_run(Path("plain")).config_hash == open_run(Path("new")).config_hash


def test_a_missing_package_is_told_before_a_run_begins(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    before = sorted(world.rglob("*"))
    assert run([*TRAIN.split(), "-o", "track=mlflow"]) == 4
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: track=mlflow: the package mlflow is not installed")
    assert hint == "hint: pip install cladapt[track]"
    assert sorted(world.rglob("*")) == before
