"""Training, evaluation and recommendation in two processes, against the same commands in one.

A start of two processes costs seconds, so one start runs many commands, one after the other.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file

from cladapt.data.schema import Stream, write_manifest
from cladapt.pipeline import runs
from cladapt.run import Run
from cladapt.train.sinks import MemorySink
from cladapt_cli.app import run

MAKE = (
    "data simulate --out stream -o users=60 -o items=40 -o topics=4 -o blocks=3",
    "tokens build stream -o dimensions=8 -o levels=2 -o codes=4 -o capacity=16",
    "base pretrain --data stream --out base -o epochs=1",
)
SHAPE = "-o train.batch_tokens=512 -o train.row_tokens=128"
# No dropout: every process draws its own masks. Seed 0 has an entry whose first gradient of block 3 is 3e-9, below the
# eps that Adam adds to it: a quarter of its step is then rounding of the sum over rows, accumulated or of processes.
TRAIN = f"train --data stream --base base --epochs 2 --rank 2 --seed 2 -o adapter.dropout=0 {SHAPE}"
METHODS = ("peso", "full", "cumulative", "retrain", "ewc", "lsat", "replay")
CUT = ("peso", "cumulative")
"""Methods that two processes also learn with the base cut over them, the second beside a history."""
SHARDED = f"{TRAIN} -o sharding=full -o train.checkpointing=true"
DROPOUT = (
    f"train --data stream --base base --epochs 4 --rank 2 -o adapter.dropout=0.3 -o train.checkpoint_steps=1 {SHAPE}"
)
EVAL = "-o bootstrap=100 -o batch_users=7"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SEVERAL = """
import contextlib, sys
from pathlib import Path
from cladapt import ranks
from cladapt_cli.app import run
for index, line in enumerate(Path(sys.argv[1]).read_text().splitlines()):
    stem = f"{sys.argv[1]}.{index}.{ranks.rank()}"
    with open(f"{stem}.out", "w") as out, open(f"{stem}.err", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(line.split())
    if code:
        sys.exit(Path(f"{stem}.err").read_text())
ranks.leave(0)
"""
LIMIT = 300
pytestmark = pytest.mark.slow


def popen(folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *TORCHRUN, *command]
    return subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def in_two(folder: Path, *command: str) -> tuple[int, str]:
    """Exit code of the launcher, and what was said on stderr."""
    with popen(folder, *command) as process:
        _, err = process.communicate(timeout=LIMIT)
    return process.returncode, err


def succeed_in_two(folder: Path, name: str, lines: list[str]) -> list[tuple[str, str]]:
    """Run command lines in two processes; what the first wrote to stdout and stderr for each."""
    (folder / "several.py").write_text(SEVERAL)
    (folder / name).write_text("\n".join(lines))
    code, err = in_two(folder, "several.py", name)
    assert code == 0, err
    assert "Warning" not in err
    said = [
        [(folder / f"{name}.{i}.{r}.{s}").read_text() for r in (0, 1) for s in ("out", "err")]
        for i in range(len(lines))
    ]
    assert not any(found[2] or found[3] for found in said)  # the second is silent
    return [(found[0], found[1]) for found in said]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream and a base; the same runs by one process (`one-*`) and by two (`two-*`), and their answers."""
    folder = tmp_path_factory.mktemp("world")
    users = [f'{{"user": "u{u}", "history": ["i{u % 40:02d}", "i{(3 * u) % 40:02d}"]}}' for u in range(300)]
    (folder / "histories.jsonl").write_text("\n".join(users))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (*MAKE, *(f"{TRAIN} --method {m} --out one-{m}" for m in METHODS)):
            assert run([*line.split(), "--quiet"]) == 0
        shutil.rmtree("runs")
    shutil.copytree(folder / "stream", folder / "short")
    # files that the manifest does not name do not count
    write_manifest(folder / "short", Stream.load(folder / "short").prefix(2).manifest)
    lines = [f"{TRAIN} --method peso --out grown".replace("--data stream", "--data short")]
    lines += ["train --continue grown --data stream"]
    lines += [f"{DROPOUT} --out whole", *(f"{SHARDED} --method {m} --out two-{m}-cut" for m in CUT)]
    lines += [f"{TRAIN} --method {m} --out two-{m}" for m in METHODS[1:]]
    lines += [f"{TRAIN} --method peso --json", f"eval {EVAL}", "recommend histories.jsonl --top-k 3 --out two.parquet"]
    *_, (trained, _), (measured, _), _ = succeed_in_two(folder, "lines", lines)
    (folder / "trained").write_text(trained)
    (folder / "measured").write_text(measured)
    (found,) = (path for path in (folder / "runs").iterdir() if path.is_dir())  # the ranks agreed on its name
    (folder / "two-peso").symlink_to(found)
    return folder


def adapters(folder: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in folder.glob("adapters/block_*/adapter_model.safetensors")}


@pytest.mark.parametrize("method", [*METHODS, *(f"{method}-cut" for method in CUT)])
def test_two_processes_learn_the_adapters_of_one(method: str, world: Path) -> None:
    one = method.removesuffix("-cut")
    for block in (2, 3):
        name = f"adapters/block_{block:03d}/adapter_model.safetensors"
        alone, together = load_file(world / f"one-{one}" / name), load_file(world / f"two-{method}" / name)
        assert alone.keys() == together.keys()
        apart = torch.cat([(together[key] - tensor).abs().flatten() for key, tensor in alone.items()])
        assert apart.max() < 2e-5
        assert (apart > 1e-6).double().mean() < 1e-3
        assert apart.mean() < 1e-7
        assert max(t.abs().max() for key, t in together.items() if "lora_B" in key) > 1e-4


def test_two_processes_continue_to_the_bits_of_a_whole_run_of_two(world: Path) -> None:
    assert adapters(world / "grown") == adapters(world / "two-peso")
    assert len(adapters(world / "grown")) == 2
    assert json.loads((world / "grown" / "config.json").read_text())["paths"]["data"] == "../stream"


def test_one_process_writes_and_speaks(world: Path) -> None:
    printed = (world / "trained").read_text().splitlines()
    assert len(printed) == 1
    two = world / "two-peso"
    assert len((two / "log.jsonl").read_text().splitlines()) == len(
        (world / "one-peso" / "log.jsonl").read_text().splitlines()
    )
    assert not [path for path in world.rglob(".*")]
    assert '"processes": 2' in (two / "environment.json").read_text()


def test_two_processes_measure_the_rows_of_one(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two, same = world / "two-peso", world / "same"
    shutil.copytree(two, same, ignore=shutil.ignore_patterns("users", "metrics.json", "report.html"))
    monkeypatch.chdir(world)
    assert run([*f"eval same {EVAL}".split(), "--quiet"]) == 0
    assert (world / "measured").read_text().count(
        "markov"
    ) == 3  # in the tables of the block and of the next, and in the differences
    files = sorted(path.name for path in (same / "users").iterdir())
    assert files == sorted(path.name for path in (two / "users").iterdir())
    for name in files:
        rows = pl.read_parquet(same / "users" / name)
        assert_frame_equal(pl.read_parquet(two / "users" / name), rows, check_exact=True)
    assert rows.height
    assert (two / "metrics.json").read_bytes() == (same / "metrics.json").read_bytes()


def test_two_processes_recommend_the_items_of_one(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    line = "recommend histories.jsonl --adapter two-peso --top-k 3 --out one.parquet --quiet"
    assert run(line.split()) == 0
    found = pl.read_parquet("two.parquet")
    assert found["user"].n_unique() == 300
    assert_frame_equal(found, pl.read_parquet("one.parquet"), check_exact=True)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (f"{TRAIN} -o train.epoch=2", 2, "unknown key 'train.epoch'"),
        (f"{TRAIN} --out one-peso", 2, "one-peso exists and is not empty"),  # only the first process looks
    ],
    ids=["on all ranks", "on the first rank"],
)
def test_a_failure_ends_all_ranks_and_is_told_once(line: str, code: int, message: str, world: Path) -> None:
    before = sorted(world.rglob("*"))
    ended, err = in_two(world, "-m", "cladapt_cli", *line.split())
    assert ended == 1  # torchrun's own
    assert told(err) == [message]
    assert re.findall(r"exitcode *: *(-?\d+)", err)[0] == str(code)
    assert "Traceback" not in err.split("error:")[0]
    assert sorted(world.rglob("*")) == before


def told(err: str) -> list[str]:
    """The known messages among the `error:` lines, each of which has its hint."""
    errors = re.findall("^error: (.*)", err, re.MULTILINE)
    assert len(re.findall("^hint: .*", err, re.MULTILINE)) == len(errors), err
    known = (
        "unknown key 'train.epoch'",
        "one-peso exists and is not empty",
        "another process of this command ended",
    )
    return [next((text for text in known if text in line), line) for line in errors]


class Stops(MemorySink):
    """Fails in the middle of block 3, as a kill would."""

    def emit(self, event: Mapping[str, Any]) -> None:
        if {"kind": "step", "block": 3, "step": 3}.items() <= event.items():
            raise KeyboardInterrupt


def steps(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count('"kind": "step"') if log.is_file() else 0


def stop(world: Path, name: str, how: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
    """Begin the run of `whole` in two processes and stop it in its last third."""
    goal = steps(world / "whole") * 2 // 3
    with popen(world, "-m", "cladapt_cli", *DROPOUT.split(), "--out", name) as process:
        deadline = time.monotonic() + LIMIT
        while steps(world / name) <= goal:
            assert process.poll() is None
            assert time.monotonic() < deadline, "the processes hang"
            time.sleep(0.001)
        how(process)
        _, err = process.communicate(timeout=LIMIT)
    return process.returncode, err


def kill_first_rank(process: subprocess.Popen[str]) -> None:
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == "0":
            child.kill()


@pytest.fixture(scope="module")
def stopped(world: Path) -> dict[str, tuple[int, str]]:
    """The run of `whole`, stopped and resumed: how each stop ended, and what each resumption said."""
    ends = {
        "killed": stop(world, "killed", kill_first_rank),
        "interrupted": stop(world, "interrupted", lambda process: process.send_signal(signal.SIGINT)),
        "terminated": stop(world, "terminated", lambda process: process.send_signal(signal.SIGTERM)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        config = Run.open(world / "whole").config
        with pytest.raises(KeyboardInterrupt):
            runs.train(config, Path("alone"), Stops())
        shutil.copytree("killed", "handed")
        for name in ("interrupted", "terminated"):
            newest = max(p.name for p in (world / name / "checkpoints").iterdir())
            (world / f"newest-{name}").write_text(newest)
        again = ("killed", "interrupted", "terminated", "alone")
        said = succeed_in_two(world, "resumed", [f"train --resume {n}" for n in again])
    return ends | {f"resumed {n}": (0, err) for n, (_, err) in zip(again, said, strict=True)}


def test_a_killed_rank_ends_the_others_and_the_run_resumes_to_the_same_adapters(
    stopped: dict[str, tuple[int, str]], world: Path
) -> None:
    code, err = stopped["killed"]
    assert code == 1
    assert told(err) in ([], ["another process of this command ended"])  # the launcher may end it before it speaks
    assert "internal" not in err
    assert "processes:" not in stopped["resumed killed"][1]
    assert adapters(world / "killed") == adapters(world / "whole")
    assert len(adapters(world / "whole")) == 2


@pytest.mark.parametrize("name", ["interrupted", "terminated"])
def test_a_signal_stops_all_ranks_at_one_step_with_a_checkpoint(
    name: str, stopped: dict[str, tuple[int, str]], world: Path
) -> None:
    _, err = stopped[name]
    assert err.count(f"{name}: what was finished is kept; continue the run: cladapt train --resume {name}") == 1, err
    assert told(err) == []
    events = [json.loads(line) for line in (world / name / "log.jsonl").read_text().splitlines()]
    resumed = next(i for i, e in enumerate(events) if i and e["kind"] == "kernels")
    last = next(e for e in reversed(events[:resumed]) if e["kind"] == "step")
    assert (world / f"newest-{name}").read_text() == f"block_{last['block']:03d}_step_{last['step']:08d}"
    assert adapters(world / name) == adapters(world / "whole")


def test_another_number_of_processes_may_continue_and_is_told(
    stopped: dict[str, tuple[int, str]],
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    assert "dropout masks and last bits may differ: " in stopped["resumed alone"][1]
    assert "processes: 1 -> 2" in stopped["resumed alone"][1]
    assert run(["train", "--resume", "handed"]) == 0
    assert "processes: 2 -> 1" in capsys.readouterr().err
    assert len(adapters(world / "alone")) == len(adapters(world / "handed")) == 2
