"""The demo: everything on a small simulated stream, then a night on which its next block comes in.

PESO against fine-tuning, the frozen base and counting on the blocks so far; then the last block arrives as a log, and
`update` appends it, learns it, judges the new adapter and exports the one that is current.
"""

from pathlib import Path
from typing import Any

import polars as pl

from cladapt.artifacts import atomic_path
from cladapt.config import (
    EvalConfig,
    MethodConfig,
    PretrainConfig,
    PromoteConfig,
    RunConfig,
    SimulateConfig,
    TrainConfig,
)
from cladapt.data.simulate import simulate
from cladapt.errors import CheckFailed
from cladapt.eval.protocol import differences, table
from cladapt.export.targets import refuse_existing
from cladapt.pipeline import evaluation, runs
from cladapt.pipeline.promote import judge
from cladapt.pipeline.update import update
from cladapt.run import Run, new_run_path
from cladapt.train.sinks import Sink
from cladapt.workloads.recommend import make_world

METHODS = ("peso", "finetune")


def demo(out: Path | None, seed: int, quick: bool, sink: Sink) -> dict[str, Any]:
    """Simulate, pretrain, adapt with each method, test, compare; then a night of `update`; returns the table."""
    out = out or new_run_path("demo", seed)
    refuse_existing(out)
    config = SimulateConfig(seed=seed, users=150, items=100, blocks=4) if quick else SimulateConfig(seed=seed)
    pretrain = PretrainConfig(seed=seed, epochs=4) if quick else PretrainConfig(seed=seed)
    make_world(out / "stream", out / "base", config, pretrain, sink, blocks=config.blocks - 1)
    measures, reports = [], {}
    for name in METHODS:
        asked = RunConfig(
            seed=seed,
            data=str(out / "stream"),
            base=str(out / "base"),
            method=MethodConfig(name=name),
            train=TrainConfig(epochs=2) if quick else TrainConfig(),
        )
        runs.train(asked, out / name, sink)
        run = Run.open(out / name)
        measured, _ = evaluation.evaluate_run(run, EvalConfig(), None, sink)
        measures.append(measured)
        reports[name] = str(run.path / "report.html")
    judge(out / METHODS[0], PromoteConfig(), None, sink)
    return {
        "table": table(measures),
        "differences": differences(measures),
        "reports": reports,
        "night": _night(out, config, sink),
    }


def _night(out: Path, config: SimulateConfig, sink: Sink) -> dict[str, Any]:
    """The last block comes in as a log: what `cladapt update` made of it."""
    log, items = out / f"block_{config.blocks}.csv", out / "items.csv"
    stream = simulate(config).stream
    events = stream.interactions.filter(pl.col("block") == config.blocks).sort("timestamp")
    for path, frame in (
        (log, events.select("user", "item", "timestamp")),
        (items, stream.items.select("item", "text")),
    ):
        with atomic_path(path) as temporary:
            frame.write_csv(temporary)
    sink.emit({"kind": "note", "text": f"a night later: cladapt update {log} --items {items}"})
    try:
        report = update(str(log), out / METHODS[0], None, None, sink, items=items, out=out / "export")
    except CheckFailed as refused:  # the current adapter stays, which is no failure of a demo
        report = refused.result or {}
    return {
        "log": str(log),
        "outcome": report["outcome"],
        "new_rows": report["append"]["new_rows"],
        "new_items": report["extend"]["new_items"],
        "learned": report["learn"],
        "current": report["decide"]["current"],
        "why": report["decide"]["reasons"],
        "adapter": report["export"]["out"] if report["export"] else None,
    }
