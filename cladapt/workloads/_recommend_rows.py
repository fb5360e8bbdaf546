"""Rows of recommendations on disk: which file holds what, and reading an evaluation back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from pydantic import BaseModel, StringConstraints

from cladapt.artifacts import read_parquet
from cladapt.config import EvalConfig
from cladapt.errors import DataError
from cladapt.eval.metrics import ROWS
from cladapt.eval.protocol import COUNTS, Measures
from cladapt.eval.tails import PLACES
from cladapt.workloads._base import MetricsRecord

NEXT = "next_block"
TAILS = "tails"


class CellRecord(BaseModel):
    """A row of R[t][s]: the block that the model was tested on, and whether it had learned the test events."""

    model_block: int = 0
    block: int
    learned: bool = False


class RecommendRecord(MetricsRecord):
    """What metrics.json must hold of an evaluation of recommendations."""

    ceiling: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], dict[str, float]]
    matrix: list[CellRecord]


def frames_of(measures: Measures) -> dict[str, pl.DataFrame]:
    """Rows by file name: a file per tested block, one per counts-only model, the same of the next block, and where the
    targets stand among the items."""
    tested = measures.rows["block"].unique().sort().to_list()
    blocks = {block_file(s): measures.rows.filter(pl.col("block") == s) for s in tested}
    frames = {**blocks, **{counts_file(name): rows for name, rows in measures.references.items()}}
    if after := measures.next:
        frames |= {NEXT: after.rows, **{counts_file(name, "next_"): rows for name, rows in after.references.items()}}
    return frames if measures.places is None else {**frames, TAILS: measures.places}


def read_measures(folder: Path, metrics: Mapping[str, Any], name: str, settings: EvalConfig, again: str) -> Measures:
    """What `frames_of` gave; `DataError` with the hint `again` where files are missing or of two evaluations."""
    tested = sorted(folder.glob("block_*.parquet"))
    written = {f"{block_file(cell['block'])}.parquet" for cell in metrics["matrix"]}
    if apart := sorted(written ^ {path.name for path in tested}):
        raise DataError(
            f"{folder} and {folder.parent / 'metrics.json'} are of two evaluations: {', '.join(apart)} in one alone",
            again,
        )
    base_block, first, after = metrics["base_block"], folder / f"{NEXT}.parquet", None
    if first.is_file():
        rows = read_parquet(first, ROWS)
        after = Measures(name, rows, read_counts(folder, "next_"), base_block, settings, lag=1)
    at = folder / f"{TAILS}.parquet"
    places = read_parquet(at, PLACES) if at.is_file() else None
    if places is not None and places.select("block", "item").is_duplicated().any():
        raise DataError(f"{at} has a target of a block twice", again)
    measures = Measures(
        name,
        pl.concat([read_parquet(path, ROWS) for path in tested]),
        read_counts(folder),
        base_block,
        settings,
        {int(block): values for block, values in metrics["ceiling"].items()},
        next=after,
        learned=frozenset((cell["model_block"], cell["block"]) for cell in metrics["matrix"] if cell.get("learned")),
        places=places,
    )
    if measures.own.is_empty():
        raise DataError(
            f"{folder.parent} is evaluated on the blocks {measures.rows['block'].unique().sort().to_list()} alone, "
            f"its base has seen block {measures.base_block}",
            again,
        )
    return measures


def block_file(block: int) -> str:
    """Name of the file with the rows of a block."""
    return f"block_{block:03d}"


def counts_file(name: str, prefix: str = "") -> str:
    """Name of the file with the rows of a counts-only model."""
    return f"{prefix}counts_{name.replace(' ', '_')}"


def read_counts(folder: Path, prefix: str = "") -> dict[str, pl.DataFrame]:
    """Rows of the counts-only models that an evaluation wrote."""
    found = {name: folder / f"{counts_file(name, prefix)}.parquet" for name in COUNTS}
    return {name: read_parquet(path, ROWS) for name, path in found.items() if path.is_file()}
