"""`cladapt merge`, `cladapt export` and `cladapt recommend`: what leaves the tool."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb

Source = Annotated[Path | None, typer.Argument(help="Run or adapter directory; default: the latest run.")]
BaseDir = Annotated[Path | None, typer.Option("--base", help="Base+tokens directory; default: the run's own.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data", help="Stream directory, with the IDs and the items of now; default: the run's own."),
]
Block = Annotated[int | None, typer.Option("--block", help="Block whose adapter to take; default: the last.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (merge, export, recommend):
        verb(app)(command)


def merge(
    out: Annotated[Path, typer.Option("--out", help="Directory of the merged checkpoint.")],
    source: Source = None,
    base: BaseDir = None,
    block: Block = None,
    data: DataDir = None,
) -> dict[str, Any]:
    """Fold an adapter into its base; what was written is read back and its logits compared with those of both."""
    from cladapt.pipeline import ship

    return ship.export(source, "merged", out, base, block, data=data)


def export(
    source: Source = None,
    target: Annotated[str, typer.Option("--target", help="peft, merged or vllm.")] = "peft",
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write; default: inside the run.")] = None,
    base: BaseDir = None,
    block: Block = None,
    all_blocks: Annotated[bool, typer.Option("--all-blocks", help="With vllm: the adapter of every block.")] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Cut the adapter to this rank; the error is stated.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="With vllm: print what servers would refuse, write nothing.")
    ] = False,
    data: DataDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> dict[str, Any]:
    """Write an adapter for serving, with the IDs of the stream and the items that may be recommended now."""
    from cladapt.errors import ConfigError
    from cladapt.pipeline import ship

    if check:
        if target != "vllm":
            raise ConfigError(f"--check with --target {target}", "give --target vllm: the others need no server")
        if rank is not None:
            raise ConfigError(f"--check with --rank {rank}", "export first: it is the result that servers see")
        return ship.check(source, base, block, all_blocks)
    return ship.export(source, target, out, base, block, all_blocks, rank, data, overwrite)


def recommend(
    histories: Annotated[
        Path,
        typer.Argument(
            help="jsonl of {user, history: items, oldest first}, or csv/parquet rows of user, item, timestamp."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="File to write: .parquet, .csv or .jsonl. In a csv a text that a spreadsheet would take for a formula "
            "(it begins with = + - @ or a tab, and is no number) gets a leading ', which is counted.",
        ),
    ],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Run or adapter directory; default: the latest.")
    ] = None,
    base: BaseDir = None,
    block: Block = None,
    top_k: Annotated[int, typer.Option("--top-k", help="Items per user.")] = 10,
    beams: Annotated[
        int | None,
        typer.Option(
            "--beams", help="Beam width of a language model; default: the evaluation's, or top-k if more. Never less."
        ),
    ] = None,
    catalogue: Annotated[
        Path | None,
        typer.Option(
            "--catalogue",
            help="Recommend only the items of this list, an id per line; default: all items of the stream that are not "
            "withdrawn, which are never recommended.",
        ),
    ] = None,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Allow items of the user's history.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out where it exists.")] = False,
    user: Annotated[str, typer.Option("--user", help="Column of the users in HISTORIES.")] = "user",
    item: Annotated[str, typer.Option("--item", help="Column of the items in csv or parquet HISTORIES.")] = "item",
    timestamp: Annotated[
        str, typer.Option("--timestamp", help="Column that orders the rows; without it the order of the file holds.")
    ] = "timestamp",
    data: DataDir = None,
) -> dict[str, Any]:
    """Recommend items for histories and write them to a file."""
    from cladapt.pipeline import ship

    return ship.recommend(
        histories,
        out,
        adapter,
        base,
        block,
        top_k,
        beams,
        catalogue,
        exclude_seen=not include_seen,
        overwrite=overwrite,
        user=user,
        item=item,
        timestamp=timestamp,
        data=data,
    )
