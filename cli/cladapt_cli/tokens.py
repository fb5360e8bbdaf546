"""`cladapt tokens …`: semantic IDs of the items of a stream."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.options import Overrides, StreamDir, overrides_of

app = typer.Typer(no_args_is_help=True, help="Build, extend and inspect semantic IDs.")


@verb(app)
def build(
    stream: StreamDir,
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            help='Take the IDs of a JSON file instead, {"item": ["<a_1>", "<b_7>"], …}: a token per level, lettered '
            "a, b, …, for every item of the stream; default: none.",
        ),
    ] = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Write a semantic ID for every item into a stream: text, embedding, residual k-means fitted on block 1.

    Block 1 fixes the capacity of every level for good, so that items of later blocks get IDs (`tokens extend`) while
    the base and its adapters stay: the k-means levels have `codes` codes, the last one, which tells items with equal
    codes apart, `capacity` (512). That costs `capacity` rows of the model's embedding and as many of its head, width x
    capacity parameters each, and nothing in the trie softmax. An index's levels have the next power of two above the
    largest code of block 1, at least `codes`, the last at least `capacity`.
    """
    from cladapt.config import TokensConfig, resolve
    from cladapt.pipeline import streams

    return streams.build_tokens(stream, resolve(TokensConfig, overrides_of(override, "tokens"), "tokens build"), index)


@verb(app)
def extend(
    stream: StreamDir,
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            help="Take the IDs of the new items from a JSON file as for `tokens build`; needed where the stream's IDs "
            "came from an index. Rows of earlier items must agree.",
        ),
    ] = None,
) -> dict[str, Any]:
    """Give semantic IDs to the items that a stream has got since `tokens build`; earlier IDs and all tokens stay.

    Codes come from the frozen codebooks, numbers of equal codes in order of first appearance. Where more items have
    equal codes than the last level has capacity, they share IDs, which is counted. A warning says when the codebooks
    fit the new items badly: a quantisation error above 1.5 times block 1's, or a share of items with the codes of
    another one above block 1's + 20 %.
    """
    from cladapt.pipeline import streams

    return streams.extend_tokens(stream, index)


@verb(app)
def inspect(stream: StreamDir) -> dict[str, Any]:
    """Print the collision report of a stream's semantic IDs."""
    from cladapt.pipeline import streams

    return streams.inspect_tokens(stream)
