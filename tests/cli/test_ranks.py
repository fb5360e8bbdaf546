"""Training, evaluation and recommendation in two processes, against the same commands in one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file

from cladapt_cli.app import run

MAKE = (
    "data simulate --out stream -o users=60 -o items=40 -o topics=4 -o blocks=3",
    "tokens build stream -o dimensions=8 -o levels=2 -o codes=4",
    "base pretrain --data stream --out base -o epochs=1",
)
# no dropout: every process draws its own masks
TRAIN = (
    "train --data stream --base base --method peso --epochs 2 --rank 2 -o adapter.dropout=0"
    " -o train.batch_tokens=512 -o train.row_tokens=128"
)
EVAL = "-o bootstrap=100 -o batch_users=7"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cladapt_cli")


def in_two(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TORCHRUN, *line.split()]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def succeed_in_two(folder: Path, line: str) -> str:
    done = in_two(folder, line)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream, a base, and the same run learned by one process (`one`) and by two (below `runs/`)."""
    folder = tmp_path_factory.mktemp("world")
    users = [f'{{"user": "u{u}", "history": ["i{u % 40:02d}", "i{(3 * u) % 40:02d}"]}}' for u in range(300)]
    (folder / "histories.jsonl").write_text("\n".join(users))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (*MAKE, f"{TRAIN} --out one"):
            assert run([*line.split(), "--quiet"]) == 0
        shutil.rmtree("runs")
        (folder / "printed").write_text(succeed_in_two(folder, f"{TRAIN} --json"))
    return folder


@pytest.fixture(scope="module")
def two(world: Path) -> Path:
    (found,) = (path for path in (world / "runs").iterdir() if path.is_dir())  # the ranks agreed on its name
    return found


def test_two_processes_learn_the_adapters_of_one(world: Path, two: Path) -> None:
    for block in (2, 3):
        name = f"adapters/block_{block:03d}/adapter_model.safetensors"
        alone, together = load_file(world / "one" / name), load_file(two / name)
        assert alone.keys() == together.keys()
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=0, atol=1e-5)
        assert max(t.abs().max() for key, t in together.items() if "lora_B" in key) > 1e-4


def test_one_process_writes_and_speaks(world: Path, two: Path) -> None:
    printed = (world / "printed").read_text().splitlines()
    assert len(printed) == 1
    lines = (two / "log.jsonl").read_text().splitlines()
    assert len(lines) == len((world / "one" / "log.jsonl").read_text().splitlines())
    assert not [path for path in world.rglob(".*")]
    assert '"processes": 2' in (two / "environment.json").read_text()


def test_two_processes_measure_the_rows_of_one(world: Path, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(two, world / "same")
    monkeypatch.chdir(world)
    assert run([*f"eval same {EVAL}".split(), "--quiet"]) == 0
    shown = succeed_in_two(world, f"eval {two.relative_to(world)} {EVAL}")
    assert shown.count("markov") == 2  # a line of the table, a line of the differences
    files = sorted(path.name for path in (world / "same" / "users").iterdir())
    assert files == sorted(path.name for path in (two / "users").iterdir())
    for name in files:
        rows = pl.read_parquet(world / "same" / "users" / name)
        assert_frame_equal(pl.read_parquet(two / "users" / name), rows, check_exact=True)
    assert rows.height
    assert (two / "metrics.json").read_bytes() == (world / "same" / "metrics.json").read_bytes()


def test_two_processes_recommend_the_items_of_one(world: Path, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    line = f"recommend histories.jsonl --adapter {two.relative_to(world)} --top-k 3 --out"
    assert run([*line.split(), "alone.parquet", "--quiet"]) == 0
    succeed_in_two(world, f"{line} together.parquet")
    found = pl.read_parquet("together.parquet")
    assert found["user"].n_unique() == 300
    assert_frame_equal(found, pl.read_parquet("alone.parquet"), check_exact=True)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (f"{TRAIN} -o train.epoch=2", 2, "unknown key 'train.epoch'"),
        (f"{TRAIN} --out one", 2, "one exists and is not empty"),  # only the first process looks
        ("base pretrain --data stream --out other", 2, "`pretrain` was started in 2 processes"),
    ],
    ids=["on all ranks", "on the first rank", "a command for one process"],
)
def test_a_failure_ends_all_ranks_and_is_told_once(line: str, code: int, message: str, world: Path) -> None:
    before = sorted(world.rglob("*"))
    done = in_two(world, line)
    assert done.returncode != 0
    assert len(re.findall("^error: .*", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert message in done.stderr
    assert len(re.findall("^hint: .*", done.stderr, re.MULTILINE)) == 1
    assert re.findall(r"exitcode *: *(-?\d+)", done.stderr)[0] == str(code)
    assert "Traceback" not in done.stderr.split("error:")[0]
    assert sorted(world.rglob("*")) == before
