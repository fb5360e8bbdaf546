"""`cladapt train` and `cladapt eval`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt.errors import ConfigError
from cladapt_cli._verb import verb
from cladapt_cli.options import Ids, Overrides, Task, method_names, overrides_of
from cladapt_cli.progress import Progress


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    verb(app)(train)
    verb(app, "eval")(evaluate)


def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe.")] = None,
    task: Task = None,
    method: Annotated[
        str | None,
        typer.Option("--method", show_default="peso", help=f"{', '.join(method_names())}; join several with +."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", show_default="sasrec", help="With --task sequential: sasrec, gru4rec or bert4rec."),
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Stream directory; default: the embedded one.")] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="Base+tokens directory; default: the embedded one.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", show_default="0", help="Seed of everything random.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", show_default="0.002", help="Peak learning rate.")] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", show_default="6; of images 20", help="Epochs per block.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", show_default="8", help="LoRA rank.")] = None,
    override: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run directory; default: a new one under runs/.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Continue this interrupted run exactly; settings given with it must equal the run's."
        ),
    ] = None,
    continued: Annotated[
        Path | None,
        typer.Option(
            "--continue",
            help="Learn the blocks that the stream of this run has got since, by the run's own settings; --data and "
            "--base say where things are now.",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            show_default="never",
            help="When validation and test events are learned: never, or with the next block; with --continue for the "
            "new blocks.",
        ),
    ] = None,
    ids: Ids = None,
    from_adapter: Annotated[
        Path | None, typer.Option("--from-adapter", show_default="a fresh adapter", help="Start from this adapter.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Validate and estimate; write nothing.")] = False,
) -> dict[str, Any]:
    """Adapt a base to every new block of a stream; reads both, writes a run with one LoRA adapter per block."""
    from cladapt import workloads
    from cladapt.config import load_recipe, merge_overrides
    from cladapt.pipeline import runs
    from cladapt.pipeline.asked import resolve_run

    flags = {
        "method.name": method,
        "backbone": backbone,
        "seed": seed,
        "train.lr": lr,
        "train.epochs": epochs,
        "adapter.rank": rank,
        "train.held_out": held_out,
        "ids": ids,
    }
    if continued is not None:
        if held_out not in (None, "never", "next"):
            raise ConfigError(f"--held-out {held_out}: expected never or next", "give one of these")
        others = {
            "RECIPE": recipe,
            "--task": task,
            "--method": method,
            "--backbone": backbone,
            "--seed": seed,
            "--lr": lr,
            "--epochs": epochs,
            "--rank": rank,
            "--override": override or None,
            "--out": out,
            "--resume": resume,
            "--from-adapter": from_adapter,
            "--dry-run": dry_run or None,
        }
        _refuse("--continue goes on with a run as it is configured, where it lies", others)
        return runs.continue_run(continued, Progress(), data=data, base=base, held_out=held_out, ids=ids)
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    named = {"data": data, "base": base, "from_adapter": from_adapter}
    folders = {key: str(folder) for key, folder in named.items() if folder is not None}
    # a folder's name is no YAML: `--data 2024` means the folder, not the number
    values = {**merge_overrides(load_recipe(recipe) if recipe else {}, given), **folders}
    values = merge_overrides(values, override or [])
    named = values.pop("task", None)
    task = named if task is None else task
    kind = workloads.get(task).config
    if resume is not None:
        elsewhere = out is not None and os.path.realpath(out) != os.path.realpath(resume)
        others = {"--from-adapter": from_adapter, "--dry-run": dry_run or None, "--out": elsewhere or None}
        _refuse("--resume continues a run as it was configured, where it lies", others)
        places = {key: Path(values.pop(key)) for key in ("data", "base") if values.get(key)}
        return runs.resume(resume, Progress(), values, task, **places)
    config = resolve_run(kind, values, str(recipe) if recipe else "train")
    return runs.plan(config) if dry_run else runs.train(config, out, Progress())


def _refuse(what: str, others: Mapping[str, Any]) -> None:
    """`ConfigError` that names the first option given beside one that takes everything from a run."""
    for option, given in others.items():
        if given is not None:
            raise ConfigError(f"{what}: {option} does not fit", f"leave out {option}, or start a new run")


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Run directory; default: the latest run.")] = None,
    block: Annotated[
        int | None,
        typer.Option(
            "--block",
            show_default="every block",
            help="Test on this block alone and print its figures; what was measured of the others stays.",
        ),
    ] = None,
    top_k: Annotated[
        str | None, typer.Option("--top-k", show_default="the run's own", help="Cut-offs, e.g. 5,10.")
    ] = None,
    beams: Annotated[int | None, typer.Option("--beams", show_default="the run's own", help="Beam width.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Measure everything anew, also what an earlier evaluation has measured.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option("--data", show_default="the run's own", help="Where its stream is now.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", show_default="the run's own", help="Where its base is now.")
    ] = None,
    override: Overrides = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Also measure the perplexity of this text file under base and adapters."),
    ] = None,
    expect: Annotated[
        Path | None,
        typer.Option("--expect", help="YAML or JSON {line: {metric: [low, high]}}; exit 5 when a value is outside."),
    ] = None,
) -> dict[str, Any]:
    """Test a run's adapters on the blocks that they were not tested on yet; writes rows, metrics.json, report.html."""
    from cladapt.config import merge_overrides
    from cladapt.pipeline import evaluation

    flags = {"top_k": None if top_k is None else f"[{top_k}]", "beams": beams}
    given = merge_overrides({}, [f"{key}={value}" for key, value in flags.items() if value is not None])
    settings = {**given, **overrides_of(override, "eval")}
    return evaluation.evaluate(run, settings, block, Progress(), expect, data, base, everything, text)
