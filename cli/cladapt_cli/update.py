"""`cladapt update`, `cladapt promote` and `cladapt rollback`: what happens every night, and what undoes it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.log_options import Late, NewDates, NewItems, Rejects
from cladapt_cli.options import BaseNow, DataNow, Ids, Overrides, overrides_of
from cladapt_cli.progress import Progress

RunDir = Annotated[Path | None, typer.Argument(help="Run directory; default: the latest run.")]
Rule = Annotated[
    str | None,
    typer.Option(
        "--promote",
        show_default="not-worse",
        help="When the new adapter becomes current. not-worse: on the validation targets of its block it is not shown "
        "worse than the present one, the base alone or block popularity; shown: and it is shown better than the "
        "present one; always.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (update, promote, rollback):
        verb(app)(command)


def update(
    log: Annotated[str, typer.Argument(help="The new log, whole or from the last block on: file, folder or glob.")],
    run: Annotated[Path | None, typer.Option("--run", help="Run to bring up to date; default: the latest run.")] = None,
    data: DataNow = None,
    base: BaseNow = None,
    dates: NewDates = None,
    late: Late = "reject",
    rejects: Rejects = None,
    least: Annotated[
        int,
        typer.Option(
            "--min-tested",
            min=0,
            help="Users that must be tested in the new block; with fewer its rows wait in the stream.",
        ),
    ] = 30,
    items: NewItems = None,
    index: Annotated[
        Path | None, typer.Option("--index", help="IDs of new items, as of `tokens extend`; default: the codebooks.")
    ] = None,
    held_out: Annotated[
        str,
        typer.Option(
            "--held-out", help="next: also learn what the block before was validated and tested on; never: do not."
        ),
    ] = "next",
    ids: Ids = None,
    rule: Rule = None,
    target: Annotated[
        str, typer.Option("--target", help="What to export of a language model: peft, merged or vllm.")
    ] = "peft",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where the export goes; default: inside the run. An earlier one is replaced."),
    ] = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Append a log, learn, evaluate, promote or refuse (exit code 5), export; what is done is not done again."""
    from cladapt.config import PromoteConfig, resolve
    from cladapt.pipeline import update as pipeline

    settings = {**overrides_of(override, "promote"), **({} if rule is None else {"rule": rule})}
    return pipeline.update(
        log,
        run,
        data,
        base,
        Progress(),
        dates=() if dates is None else dates.split(","),
        late=late,
        rejects=rejects,
        least=least,
        items=items,
        index=index,
        held_out=held_out,
        ids=ids,
        promotion=resolve(PromoteConfig, settings, "update", PromoteConfig.shown_by),
        target=target,
        out=out,
    )


def promote(
    run: RunDir = None,
    block: Annotated[int | None, typer.Option("--block", help="Whose adapter to judge; default: the newest.")] = None,
    rule: Rule = None,
    data: DataNow = None,
    base: BaseNow = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Judge an adapter against the current one, the base and counting; make it current, or refuse it (exit code 5)."""
    from cladapt.pipeline import promote as pipeline

    settings = {**overrides_of(override, "promote"), **({} if rule is None else {"rule": rule})}
    return pipeline.promote(run, settings, block, Progress(), data=data, base=base)


def rollback(
    run: RunDir = None,
    to: Annotated[
        int | None, typer.Option("--to", help="Block whose adapter was current before; default: the one before.")
    ] = None,
) -> dict[str, Any]:
    """Make the adapter current again that was so before the present one; nothing is removed."""
    from cladapt.pipeline import promote as pipeline

    return pipeline.rollback(run, to)
