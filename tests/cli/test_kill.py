"""`cladapt train` as a process of its own, killed at any moment: what resumes ends in the bits of what never stopped.

Moments are drawn from a fixed seed and told by the run's own log, so that they spread over the work on a machine of any
speed; some are aimed at a checkpoint that is half written. Ten starts would be ten imports of torch: the killed
processes are forks of a server that has them.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from cladapt.config import PretrainConfig, SimulateConfig, TokensConfig
from cladapt.data.schema import Stream, write_manifest
from cladapt.pipeline import bases, streams
from cladapt.train.sinks import MemorySink
from cladapt_cli.app import run as cladapt

pytestmark = pytest.mark.slow

METHODS = ("peso",)
KILLS = 10
AIMED = (2, 5, 8)
LIMIT = 120.0
SETTINGS = {"epochs": 4, "batch_tokens": 256, "row_tokens": 128, "checkpoint_steps": 2}
COMMAND = """
import os, sys
os.chdir(cwd)
for stream in (1, 2):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
sys.argv = ["cladapt", "train", *arguments]
from cladapt_cli.app import main
main()
"""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["accelerate", "peft", "polars", "transformers.models.llama.modeling_llama", "cladapt.pipeline.runs"]
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stream of three blocks and a base that knows the first."""
    folder = tmp_path_factory.mktemp("world")
    streams.simulate_data(folder / "stream", SimulateConfig(users=60, items=40, topics=4, blocks=3))
    streams.build_tokens(folder / "stream", TokensConfig(dimensions=8, levels=2, codes=4, capacity=16), None)
    bases.pretrain_base(folder / "stream", folder / "base", PretrainConfig(epochs=1), MemorySink())
    return folder


@pytest.fixture(scope="module", params=METHODS)
def whole(request: pytest.FixtureRequest, world: Path) -> Path:
    """The run of a method that nothing interrupts."""
    run = world / str(request.param)
    assert ended(start(run, fresh(run))) == 0, said(run)
    assert len(adapters(run)) == 2
    return run


def fresh(run: Path) -> list[str]:
    overrides = [word for key, value in SETTINGS.items() for word in ("-o", f"train.{key}={value}")]
    method = run.name.split("-")[0]
    return ["--method", method, "--data", "stream", "--base", "base", *overrides, "--out", str(run)]


def start(run: Path, arguments: list[str]) -> BaseProcess:
    """`cladapt train ARGUMENTS` beside the run, its output appended to `<run>.txt`."""
    scope = {"cwd": str(run.parent), "output": str(run.with_suffix(".txt")), "arguments": arguments}
    process = SERVER.Process(target=exec, args=(COMMAND, scope))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    process.join(LIMIT)
    return process.exitcode


def said(run: Path) -> str:
    return run.with_suffix(".txt").read_text()


def adapters(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("adapters/block_*/*.safetensors"))}


def steps(run: Path) -> int:
    """Optimiser steps that the log has seen, each counted once."""
    log, seen = run / "log.jsonl", set()
    for line in log.read_text().splitlines() if log.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a line may be half written while it is read
            event = json.loads(line)
            if event["kind"] == "step":
                seen.add((event["block"], event["step"]))
    return len(seen)


def passed(run: Path, goal: int) -> bool:
    return steps(run) > goal


def until(alive: Callable[[], bool], reached: Callable[[], bool]) -> bool:
    """Wait for a condition; False when the process ended before."""
    deadline = time.monotonic() + LIMIT
    while alive():
        if reached():
            return True
        assert time.monotonic() < deadline, "the process hangs"
        time.sleep(0.0005)
    return False


def torn(run: Path) -> bool:
    return any((run / "checkpoints").glob(".*.tmp"))


def test_a_run_killed_at_any_moment_ends_in_the_same_adapters(whole: Path) -> None:
    run = whole.with_name(f"{whole.name}-killed")
    moments, every = random.Random(0), steps(whole) / KILLS
    inside = 0
    for kill in range(KILLS):
        process = start(run, ["--resume", str(run)] if (run / "config.json").is_file() else fresh(run))
        if kill == 0:
            until(process.is_alive, run.exists)
        else:
            goal = int((kill - 1 + moments.random()) * every)
            until(process.is_alive, partial(passed, run, goal))
            time.sleep(moments.uniform(0.0, 0.02))
        if kill in AIMED:
            until(process.is_alive, lambda: torn(run))
        process.kill()
        assert ended(process) == -signal.SIGKILL, said(run)
        inside += torn(run)
    assert inside > 0
    assert ended(start(run, ["--resume", str(run)])) == 0, said(run)
    assert adapters(run) == adapters(whole)
    assert [p for p in run.rglob("*") if p.name.endswith((".tmp", ".old"))] == []
    assert list((run / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_signal_to_stop_ends_after_a_checkpoint_and_changes_nothing(
    number: int, code: int, word: str, whole: Path
) -> None:
    run = whole.with_name(f"{whole.name}-{word}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "cladapt_cli.app", "train", *fresh(run)]
    with subprocess.Popen(command, cwd=run.parent, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert until(lambda: process.poll() is None, lambda: steps(run) > steps(whole) * 2 // 3)
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == code, err
    assert err.startswith(f"run: {run}\n")
    assert err.endswith(f"{word}: what was finished is kept; continue the run: cladapt train --resume {run}\n")
    assert {p.name[:9] for p in (run / "checkpoints").iterdir()} == {"block_003"}
    assert ended(start(run, ["--resume", str(run)])) == 0, said(run)
    assert adapters(run) == adapters(whole)


def test_a_continuation_killed_at_any_moment_ends_in_the_same_adapters(whole: Path) -> None:
    run, stream = whole.with_name(f"{whole.name}-continued"), whole.with_name("growing")
    shutil.copytree(whole.with_name("stream"), stream)
    grown = Stream.load(stream)
    write_manifest(stream, grown.prefix(2).manifest)
    assert ended(start(run, [word.replace("stream", "growing") for word in fresh(run)])) == 0, said(run)
    assert len(adapters(run)) == 1
    write_manifest(stream, grown.manifest)
    asked, before, moments = (run / "config.json").read_bytes(), steps(run), random.Random(1)
    for kill in range(5):
        process = start(run, ["--continue", str(run)])
        if kill == 0:  # when it has just been told of the new block
            until(process.is_alive, lambda: (run / "config.json").read_bytes() != asked)
        else:
            goal = before + int((kill - 1 + moments.random()) * (steps(whole) - before) / 4)
            until(process.is_alive, partial(passed, run, goal))
        if kill == 3:
            until(process.is_alive, lambda: torn(run))
        process.kill()
        ended(process)
    assert ended(start(run, ["--continue", str(run)])) == 0, said(run)
    assert adapters(run) == adapters(whole)
    assert [p for p in run.rglob("*") if p.name.endswith((".tmp", ".old"))] == []
    assert list((run / "checkpoints").iterdir()) == []


def test_a_run_in_use_is_refused_by_a_second_resume_and_by_eval_until_its_holder_is_killed(whole: Path) -> None:
    run = whole.with_name(f"{whole.name}-held")
    process = start(run, fresh(run))
    assert until(process.is_alive, partial(passed, run, 1))
    os.kill(process.pid or 0, signal.SIGSTOP)
    log = (run / "log.jsonl").read_bytes()
    again = ["train", "--resume", str(run)], ["eval", str(run)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parent)
        for arguments in again:
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                assert cladapt(arguments) == 4
            assert f"{run} is in use: process {process.pid} on " in err.getvalue()
    assert (run / "log.jsonl").read_bytes() == log
    process.kill()
    assert ended(process) == -signal.SIGKILL
    assert ended(start(run, ["--resume", str(run)])) == 0, said(run)
    assert adapters(run) == adapters(whole)
    assert not (run / ".lock").exists()
