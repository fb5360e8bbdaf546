"""The demo: everything on a small simulated stream, PESO against fine-tuning, the frozen base and counting."""

from pathlib import Path
from typing import Any

from cladapt.config import BaseConfig, EvalConfig, MethodConfig, RunConfig, SimulateConfig, TrainConfig
from cladapt.eval.protocol import differences, table
from cladapt.export.targets import refuse_existing
from cladapt.pipeline import evaluation, runs
from cladapt.pipeline.ship import export
from cladapt.run import Run, new_run_path
from cladapt.train.sinks import Sink
from cladapt.workloads.recommend import make_world

METHODS = ("peso", "finetune")


def demo(out: Path | None, seed: int, quick: bool, sink: Sink) -> dict[str, Any]:
    """Simulate, pretrain, adapt with each method, test, compare, export; returns the table."""
    out = out or new_run_path("demo", seed)
    refuse_existing(out)
    simulate = SimulateConfig(seed=seed, users=150, items=100, blocks=3) if quick else SimulateConfig(seed=seed)
    pretrain = BaseConfig(seed=seed, epochs=4) if quick else BaseConfig(seed=seed)
    make_world(out / "stream", out / "base", simulate, pretrain, sink)
    measures, reports = [], {}
    for name in METHODS:
        config = RunConfig(
            seed=seed,
            data=str(out / "stream"),
            base=str(out / "base"),
            method=MethodConfig(name=name),
            train=TrainConfig(epochs=2) if quick else TrainConfig(),
        )
        runs.train(config, out / name, sink)
        run = Run.open(out / name)
        measured, _ = evaluation.evaluate_run(run, EvalConfig(), None, sink)
        measures.append(measured)
        reports[name] = str(run.path / "report.html")
    shipped = export(out / METHODS[0], "peft", out / "export", None, None)
    return {
        "table": table(measures),
        "differences": differences(measures),
        "reports": reports,
        "adapter": shipped["out"],
    }
