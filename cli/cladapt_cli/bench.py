"""`cladapt bench`: measure this machine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.progress import Progress

app = typer.Typer(no_args_is_help=True, help="Measure throughput on this machine.")


@verb(app)
def methods(
    runs: Annotated[int, typer.Option("--runs", help="Interleaved runs behind each median.")] = 21,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the rows to this .csv file.")] = None,
    llm: Annotated[
        Path | None,
        typer.Option("--llm", help="Measure a pretrained causal LM too: a checkpoint; skipped where it is not there."),
    ] = None,
) -> dict[str, Any]:
    """Measure training and decoding against transformers and PEFT, and every method's step against fine-tuning."""
    from cladapt.pipeline import bench

    return bench.methods(runs, out, Progress(), llm)


@verb(app)
def kernels(
    runs: Annotated[int, typer.Option("--runs", help="Interleaved runs behind each median.")] = 51,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the rows to this .csv file.")] = None,
) -> dict[str, Any]:
    """In a checkout, measure each kernel against its peers on a GPU; on a CPU ratios and a model of an H200."""
    from cladapt.pipeline import kernels as pipeline

    return pipeline.kernels(runs, out, Progress())


@verb(app)
def profile(
    method: Annotated[str, typer.Option("--method", help="Method whose training steps are measured.")] = "peso",
    runs: Annotated[int, typer.Option("--runs", help="Epochs and decoding batches behind each median.")] = 21,
    base: Annotated[Path | None, typer.Option("--base", help="A base; default: a tiny one is trained.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="The base's stream; default: one is simulated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the rows to this .csv file.")] = None,
) -> dict[str, Any]:
    """Print where the time of training steps and of a decoding batch goes: shares of passes, method, optimiser, log."""
    from cladapt.pipeline import bench_profile

    return bench_profile.profile(method, runs, base, data, out, Progress())
