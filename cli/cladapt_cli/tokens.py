"""`cladapt tokens …`: semantic IDs of the items of a stream."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.options import Overrides, StreamDir, overrides_of

app = typer.Typer(no_args_is_help=True, help="Build, extend, refresh and inspect semantic IDs.")


@verb(app)
def build(
    stream: StreamDir,
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            help='Take the IDs of a JSON file instead, {"item": ["<a_1>", "<b_7>"], …}: a token per level, lettered '
            "a, b, …, for every item of the stream. A level gets the next power of two above the largest code of block "
            "1, at least 64 (-o codes), the last at least --capacity; default: none.",
        ),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            "--capacity",
            show_default="512",
            help="Codes of the last level, which tells items with equal codes apart; fixed for the life of the stream: "
            "where more items have equal codes, they share IDs. Costs that many rows of the model's embedding and of "
            "its head, width x capacity parameters each, and nothing in the trie softmax.",
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            "--embedding",
            show_default="tfidf",
            help="Where the items' vectors come from: `tfidf` of their texts; a sentence-transformers model (name or "
            "directory) or the directory of a causal LM, whose vectors are kept in ~/.cache/cladapt/vectors; or "
            "`cooccurrence`, what users have together in block 1, for a catalogue without texts.",
        ),
    ] = None,
    reduce: Annotated[
        str | None,
        typer.Option(
            "--reduce",
            show_default="none",
            help="How an embedding of texts is reduced, fitted on block 1 and frozen: none, pca, whiten, or rec-pca "
            "(-o smoothness, whitening, components, window, neighbours), which favours what is alike in items that "
            "users have together.",
        ),
    ] = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Write a semantic ID for every item into a stream: vectors, and residual k-means fitted on block 1."""
    from cladapt.config import TokensConfig, resolve
    from cladapt.pipeline import streams

    named = {"capacity": capacity, "embedding": embedding, "reduce": reduce}
    values = overrides_of(override, "tokens") | {key: value for key, value in named.items() if value is not None}
    return streams.build_tokens(stream, resolve(TokensConfig, values, "tokens build"), index)


@verb(app)
def extend(
    stream: Annotated[
        Path,
        typer.Argument(
            help="Stream directory. A warning says when the codebooks fit the new items badly: a quantisation error "
            "above 1.5 times block 1's, or a share of items with the codes of another one above block 1's + 20 %."
        ),
    ],
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            help="Take the IDs of the new items from a JSON file as for `tokens build`; needed where the stream's IDs "
            "came from an index. Rows of earlier items must agree.",
        ),
    ] = None,
) -> dict[str, Any]:
    """Give a stream's new items semantic IDs by the frozen codebooks; earlier IDs and all tokens stay as they are."""
    from cladapt.pipeline import streams

    return streams.extend_tokens(stream, index)


@verb(app)
def refresh(
    stream: StreamDir,
    through: Annotated[
        int | None,
        typer.Option(
            "--through",
            show_default="the last block",
            help="Fit on what is known by this block; later items are encoded as new ones are.",
        ),
    ] = None,
    align: Annotated[
        bool,
        typer.Option(
            "--align/--no-align",
            help="Name new codes so that as few items as possible move, or leave them under numbers of their own: the "
            "control of a study.",
        ),
    ] = True,
    back: Annotated[
        bool, typer.Option("--back", help="Go back to the version that the present one was refreshed from.")
    ] = False,
    override: Overrides = None,
) -> dict[str, Any]:
    """Fit semantic IDs anew in the same tokens, as the next version of the table; earlier versions stay readable."""
    from cladapt.errors import ConfigError
    from cladapt.pipeline import refresh as pipeline

    if not back:
        return pipeline.refresh_tokens(stream, overrides_of(override, "tokens"), through, align)
    if through is not None or not align or override:
        raise ConfigError("--back goes to a version that is there: other options do not fit", "leave them out")
    return pipeline.take_back(stream)


@verb(app)
def inspect(
    stream: StreamDir,
    neighbours: Annotated[
        int,
        typer.Option(
            "--neighbours",
            min=0,
            max=1000,
            help="Of how many nearest items of an item, by text and by what users have together, to count those that "
            "the IDs keep near; 0 leaves that out, with the embedding that it reads.",
        ),
    ] = 10,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            help="A version of the IDs by its number, another stream directory or a sids.parquet: the share of items "
            "that moved, by level; default: none.",
        ),
    ] = None,
) -> dict[str, Any]:
    """Print what a stream's semantic IDs keep and lose: use of each level, collisions, neighbours, what moved."""
    from cladapt.pipeline import streams

    return streams.inspect_tokens(stream, neighbours, against)
