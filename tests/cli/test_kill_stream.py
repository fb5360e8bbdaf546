"""Commands that change a stream, as processes of their own that are killed at any moment: it stays whole.

Moments are drawn from a fixed seed and spread over the time that the command takes when nothing stops it; some are
aimed at the first file that is half written. `CLADAPT_KILLS` in the environment sets how many there are.
"""

import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from cladapt.config import BlocksConfig
from cladapt.data.readers import ReadOptions
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.pipeline import streams

KILLS = int(os.environ.get("CLADAPT_KILLS", "2"))
LIMIT = 60.0
pytestmark = pytest.mark.slow
Start = Callable[[Path, str], BaseProcess]
CALLS = {
    "append": "data append stream next.csv",
    "append several": "data append stream next.csv --dates 1970-01-03,1970-01-04 --min-tested 3",
    "wait": "data append stream next.csv --min-tested 100",
    "retire": "data retire stream items.txt",
    "forget": "data forget stream users.txt",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Path:
    """A stream of a day where rows wait, the log of four days, and lists of items and users."""
    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(3)
    rows = sorted((draw.randrange(4 * 86_400), draw.randrange(30), draw.randrange(200)) for _ in range(4000))
    lines = [f"u{user},i{item},{time}" for time, user, item in rows]
    day = sum(row[0] < 86_400 for row in rows)
    for name, end in (("log.csv", day), ("more.csv", day + 50), ("next.csv", len(rows))):
        (folder / name).write_text("\n".join(["user,item,timestamp", *lines[:end]]) + "\n")
    (folder / "items.txt").write_text("i1\ni2\n")
    (folder / "users.txt").write_text("u1\nu2\n")
    one = BlocksConfig(fractions=(0.5, 0.5), min_events=3)
    streams.import_data(str(folder / "log.csv"), folder / "stream", "csv", ReadOptions(), one)
    assert ended(start(folder, "data append stream more.csv --min-tested 100")) == 0
    return folder


def ended(process: BaseProcess) -> int | None:
    process.join(LIMIT)
    return process.exitcode


def state(folder: Path) -> dict[str, Any]:
    """What a stream directory says of itself, and the content that its manifest names."""
    stream = Stream.load(folder / "stream")
    report = streams.check_data(folder / "stream")
    return {**report, "stream": "", "rows": stream.interactions.rows(), "withdrawn": stream.withdrawn}


def half_written(folder: Path) -> list[Path]:
    return [*folder.rglob(".*.tmp")]


def until(process: BaseProcess, reached: Callable[[], bool]) -> None:
    while process.is_alive() and not reached():
        time.sleep(0.0002)


@pytest.mark.parametrize("name", CALLS)
def test_a_stream_is_the_old_one_or_the_new_one(name: str, world: Path, tmp_path: Path, start: Start) -> None:
    old, whole, line = state(world), tmp_path / "whole", CALLS[name]
    shutil.copytree(world, whole)
    began = time.monotonic()
    assert ended(start(whole, line)) == 0, (whole / "said.txt").read_text()
    lasts, new = time.monotonic() - began, state(whole)
    assert (new["fingerprint"] != old["fingerprint"]) == (name in ("append", "append several", "forget"))
    moments, torn = random.Random(name), 0
    for kill in range(10 * KILLS):
        if kill >= KILLS and torn:
            break
        folder = tmp_path / f"killed-{kill}"
        shutil.copytree(world, folder)
        process = start(folder, line)
        if kill % 2 or kill >= KILLS:  # until one has come while a file was half written
            until(process, lambda folder=folder: any(half_written(folder)))  # type: ignore[misc]
            time.sleep(moments.uniform(0.0, 0.01) if kill < KILLS else 0.0)
        else:
            time.sleep(moments.uniform(0.0, lasts))
        process.kill()
        ended(process)
        torn += any(half_written(folder))
        try:
            found = state(folder)
            assert found in (old, new)
        except DataError:  # a folder that is replaced is away for the time between two renamings
            assert name == "forget"
            assert not (folder / "stream").exists()
        assert ended(start(folder, line)) == 0, (folder / "said.txt").read_text()
        assert state(folder) == new
        left = [p.name for p in folder.rglob("*") if p.name.endswith((".tmp", ".old")) or p.name == ".lock"]
        assert left == []
        shutil.rmtree(folder)
    assert torn > 0
