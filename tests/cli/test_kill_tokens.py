"""`cladapt tokens extend` as a process of its own, killed at any moment: the old IDs stand, or all new ones.

Moments are drawn from a fixed seed over the time that the command takes; some are aimed at a table that is half
written. The killed processes are forks of a server that has the slow imports.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cladapt.config import TokensConfig
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.pipeline import streams

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("CLADAPT_KILLS", "4"))
AIMED = 3  # every so many
LIMIT = 120.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, a stream with IDs, and `grown`, the same with the IDs of its first block alone."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    words = np.array([f"word{n}" for n in range(300)])
    items = pl.DataFrame(
        {
            "item": [f"i{n}" for n in range(4000)],
            "text": [" ".join(rng.choice(words, 4)) for _ in range(4000)],
            "first_block": [1] * 1000 + [2] * 3000,
        },
        schema=ITEMS,
    )
    events = items.select(
        user=pl.lit("u"),
        item="item",
        timestamp=pl.lit(None, pl.Int64),
        position=pl.int_range(pl.len(), dtype=pl.Int64),
        block="first_block",
    )
    config = TokensConfig(dimensions=8, levels=2, codes=16, capacity=64)
    stream = Stream(events.cast(INTERACTIONS), items, {"config": {}})
    stream.save(folder / "whole")
    streams.build_tokens(folder / "whole", config, None)
    stream.prefix(1).save(folder / "grown")
    streams.build_tokens(folder / "grown", config, None)
    manifest = Stream.load(folder / "grown").manifest
    Stream(stream.interactions, items, manifest).save_after(folder / "grown", 1)
    return folder


def until(alive: Callable[[], bool], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while alive() and not reached():
        assert time.monotonic() < deadline, "the process hangs"
        time.sleep(0.0002)


EXTEND = "tokens extend grown"


def test_ids_are_the_old_ones_or_all_new_ones_whenever_the_command_is_killed(
    world: Path, start: Callable[[Path, str], BaseProcess]
) -> None:
    file, said = world / "grown" / "sids.parquet", world / "said.txt"
    old, new = file.read_bytes(), (world / "whole" / "sids.parquet").read_bytes()
    began = time.monotonic()
    process = start(world, EXTEND)
    process.join(LIMIT)
    assert process.exitcode == 0, said.read_text()
    took = time.monotonic() - began
    assert file.read_bytes() == new
    draw, halves = random.Random(0), 0
    for kill in range(10 * KILLS):
        if kill >= KILLS and halves:
            break
        file.write_bytes(old)
        process = start(world, EXTEND)
        if kill % AIMED == 0:
            until(process.is_alive, lambda: any(file.parent.glob(".sids.parquet.*.tmp")))
        else:
            time.sleep(draw.uniform(0.0, took))
        process.kill()
        process.join(LIMIT)
        assert process.exitcode in (0, -signal.SIGKILL), said.read_text()
        halves += any(file.parent.glob(".sids.parquet.*.tmp"))
        assert file.read_bytes() in (old, new)
    assert halves > 0
    process = start(world, EXTEND)
    process.join(LIMIT)
    assert process.exitcode == 0, said.read_text()
    assert file.read_bytes() == new
    assert {p.name for p in file.parent.iterdir()} == {p.name for p in (world / "whole").iterdir()}
