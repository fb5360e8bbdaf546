"""`cladapt update` as a process that is killed at any moment: stream, run and what is current are whole, and the same
command again ends where an undisturbed one does. `CLADAPT_KILLS` in the environment sets how often it is killed.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.artifacts import read_json
from cladapt.config import MethodConfig, PretrainConfig, RunConfig, SimulateConfig, TokensConfig, TrainConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.model.load import load_base
from cladapt.model.saved import read_adapter
from cladapt.pipeline import bases, runs, streams
from cladapt.pipeline.promote import current_block, judge
from cladapt.pipeline.update import PromoteConfig
from cladapt.run import Run
from cladapt.tokens.build import load_sids
from cladapt.train.sinks import MemorySink

KILLS = int(os.environ.get("CLADAPT_KILLS", "2"))
LIMIT = 120.0
UPDATE = "update next.csv --run run --items items.csv --min-tested 1 --promote always -o bootstrap=100"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* of the new items")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of two blocks with a base and a run whose adapter is current, and the log of the third block."""
    folder = tmp_path_factory.mktemp("world")
    stream = simulate(SimulateConfig(users=60, items=40, topics=4, blocks=3)).stream
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stream.prefix(2).save(Path("stream"))
        events = stream.interactions.filter(pl.col("block") == 3).sort("timestamp")
        events.select("user", "item", "timestamp").write_csv("next.csv")
        stream.items.select("item", "text").write_csv("items.csv")
        streams.build_tokens(Path("stream"), TokensConfig(dimensions=8, levels=2, codes=4, capacity=16), None)
        bases.pretrain_base(Path("stream"), Path("base"), PretrainConfig(epochs=1), MemorySink())
        train = TrainConfig(epochs=2, batch_tokens=256, row_tokens=128, checkpoint_steps=2)
        config = RunConfig(data="stream", base="base", method=MethodConfig(name="peso"), train=train)
        runs.train(config, Path("run"), MemorySink())
        judge(Path("run"), PromoteConfig(rule="always", bootstrap=100), None, MemorySink())
    return folder


def ended(process: BaseProcess) -> int | None:
    process.join(LIMIT)
    return process.exitcode


def whole(folder: Path) -> dict[str, Any]:
    """What is there, every part of which must load."""
    stream, run = Stream.load(folder / "stream"), Run.open(folder / "run")
    base = load_base(folder / "base")
    for adapter in run.adapters.values():
        read_adapter(adapter, base)
    return {"blocks": stream.n_blocks, "current": current_block(run)}


def content(folder: Path) -> dict[str, bytes]:
    """What an update is for: the stream, its IDs, the adapters and what is exported."""
    kinds = ("block_*.parquet", "sids.parquet", "catalogue.parquet", "adapter_model.safetensors")
    files = sorted(file for kind in kinds for file in folder.rglob(kind))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if "checkpoints" not in file.parts}


def test_a_killed_update_leaves_all_whole_and_is_finished_by_the_next(
    world: Path, tmp_path: Path, start: Callable[[Path, str], BaseProcess]
) -> None:
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(world, undisturbed)
    assert ended(start(world, "--version")) == 0  # the server has its imports then, which no command waits for
    began = time.monotonic()
    assert ended(start(undisturbed, UPDATE)) == 0, (undisturbed / "said.txt").read_text()
    lasts, expected = time.monotonic() - began, content(undisturbed)
    assert whole(undisturbed) == {"blocks": 3, "current": 3}
    moments, hits = random.Random(5), 0
    for kill in range(10 * KILLS):
        if kill >= KILLS and hits:
            break
        folder = tmp_path / f"killed-{kill}"
        shutil.copytree(world, folder)
        process = start(folder, UPDATE)
        if kill == 0:  # the others may come too late where the machine is quicker than before
            while process.is_alive() and not any(folder.rglob(".*.tmp")):
                time.sleep(0.0005)
        else:
            time.sleep(moments.uniform(0.0, lasts) * 0.5 ** max(0, kill - KILLS + 1))  # earlier while none is in time
        process.kill()
        hits += ended(process) == -signal.SIGKILL
        found = whole(folder)
        assert found["blocks"] in (2, 3)
        assert found["current"] in (2, 3)
        assert ended(start(folder, UPDATE)) == 0, (folder / "said.txt").read_text()
        assert content(folder) == expected
        assert whole(folder) == {"blocks": 3, "current": 3}
        assert read_json(folder / "run" / "export" / "peft" / "cladapt.json")["block"] == 3
        assert len(load_sids(folder / "stream", Stream.load(folder / "stream")).items)
        left = [p.name for p in folder.rglob("*") if p.name.endswith((".tmp", ".old")) or p.name == ".lock"]
        assert left == []
        shutil.rmtree(folder)
    assert hits > 0
