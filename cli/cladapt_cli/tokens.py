"""`cladapt tokens …`: semantic IDs of the items of a stream."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.options import Overrides, StreamDir, overrides_of

app = typer.Typer(no_args_is_help=True, help="Build and inspect semantic IDs.")


@verb(app)
def build(
    stream: StreamDir,
    index: Annotated[Path | None, typer.Option("--index", help="Take the IDs of this index JSON instead.")] = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Write a semantic ID for every item into a stream: text, embedding, residual k-means fitted on block 1."""
    from cladapt.config import TokensConfig, resolve
    from cladapt.pipeline import streams

    return streams.build_tokens(stream, resolve(TokensConfig, overrides_of(override, "tokens"), "tokens build"), index)


@verb(app)
def inspect(stream: StreamDir) -> dict[str, Any]:
    """Print the collision report of a stream's semantic IDs."""
    from cladapt.pipeline import streams

    return streams.inspect_tokens(stream)
