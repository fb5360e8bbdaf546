"""A study: a grid of runs on one stream, several seeds, counted and compared. `python bench/study.py RECIPE.yaml`

A recipe names the source, the base, the settings common to all cells, the cells and the seeds. The stream is imported
once, the base of a (stream, seed) is trained once and shared, and every cell is cached by the hash of its resolved
configuration (evaluation settings apart), so an interrupted study goes on where it stopped and an edited recipe redoes
only what it changed. A work folder belongs to one state of the code: with another it is refused.
Tables with paired intervals over users are rebuilt from the cells and written to `bench/results/<recipe name>/`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from pydantic import Field

from cladapt.artifacts import atomic_path, hash_file, hash_value, read_json, read_tensors, write_json
from cladapt.config import (
    BaseConfig,
    BlocksConfig,
    RunConfig,
    Settings,
    SimulateConfig,
    TokensConfig,
    load_recipe,
    resolve,
)
from cladapt.data.readers import Columns
from cladapt.data.schema import Stream
from cladapt.errors import CladaptError, ConfigError
from cladapt.eval.continual import summaries
from cladapt.eval.protocol import COUNTS, matrix, model_row
from cladapt.model.saved import ADAPTER_FILE, adapter_provenance, without_history
from cladapt.pipeline import bases, runs, streams
from cladapt.pipeline.compare import Comparison, Evaluated, Group
from cladapt.pipeline.report import regulariser_log
from cladapt.run import Run
from cladapt.train.sinks import MemorySink

ROOT = Path(__file__).resolve().parent
DATA = ROOT.parent.parent / "shared" / "data"


class Recipe(Settings):
    """What a study runs."""

    source: str = ""
    """Folder of real data below the data root; empty = simulate."""
    blocks: BlocksConfig = BlocksConfig()
    simulate: SimulateConfig = SimulateConfig()
    tokens: TokensConfig = TokensConfig()
    base: BaseConfig = BaseConfig()
    run: Mapping[str, Any] = {}
    """Settings of `RunConfig` common to all cells."""
    cells: Mapping[str, Mapping[str, Any]] = {}
    """Name -> settings of `RunConfig` (and `base`, for its own base) on top of the common ones."""
    reference: str = ""
    """The cell that the others are compared with; empty = the first."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Cells to compare beside that, the first minus the second."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    seed: int
    base: BaseConfig
    config: Mapping[str, Any]


class Study:
    """A recipe with its working directory."""

    def __init__(self, name: str, recipe: Recipe, work: Path, data: Path) -> None:
        self.name, self.recipe, self.work, self.data = name, recipe, work, data
        self.stream = (
            work
            / "streams"
            / hash_value(recipe.model_dump(mode="json", include={"source", "blocks", "simulate", "tokens"}))
        )

    def cells(self) -> Iterator[Cell]:
        """The grid, seed by seed so that a stopped study has whole seeds."""
        for seed in self.recipe.seeds:
            for name, settings in self.recipe.cells.items():
                own = merge(self.recipe.run, settings)
                base = merge(self.recipe.base.model_dump(mode="json"), own.pop("base", {}))
                config = resolve(BaseConfig, {**base, "seed": seed}, f"cell {name}: base")
                yield Cell(name, seed, config, {**own, "seed": seed})

    def prepare_stream(self) -> None:
        """Import or simulate the stream and give it IDs, once."""
        refuse_other_code(self.work)
        if not (self.stream / "manifest.json").is_file():
            if self.recipe.source:
                streams.import_data(
                    str(self.data / self.recipe.source), self.stream, "auto", Columns(), self.recipe.blocks
                )
            else:
                streams.simulate_data(self.stream, self.recipe.simulate)
        if not (self.stream / streams.SIDS).is_file():
            streams.build_tokens(self.stream, self.recipe.tokens, None)

    def base(self, cell: Cell) -> Path:
        """The base of a cell, trained when it is not there yet."""
        key = hash_value([Stream.load(self.stream).fingerprint, cell.base.model_dump(mode="json")])
        folder = self.work / "bases" / key
        if not folder.is_dir():
            began = time.perf_counter()
            report = bases.pretrain_base(self.stream, folder, cell.base, MemorySink())
            say(f"base {key}: {time.perf_counter() - began:.0f} s, {report}")
        return folder

    def run(self, cell: Cell) -> Path:
        """Train and measure a cell, or take it from the cache; returns its run directory."""
        base = self.base(cell)
        values = {**cell.config, "data": str(self.stream), "base": str(base)}
        config = resolve(RunConfig, values, f"cell {cell.name}")
        folder = self.work / "cells" / Run(Path(), config).config_hash
        took = folder / "seconds.json"
        if not took.is_file():
            began = time.perf_counter()
            if (folder / "config.json").is_file():
                runs.resume(folder, MemorySink())
            else:
                runs.train(config, folder, MemorySink())
            write_json(took, {"train": time.perf_counter() - began})
            say(f"cell {cell.name}, seed {cell.seed}: trained in {time.perf_counter() - began:.0f} s")
        measured = folder / "metrics.json"
        if not measured.is_file() or read_json(measured)["config"] != config.eval.model_dump(mode="json"):
            began = time.perf_counter()
            runs.evaluate_run(Run.open(folder), config.eval, None, MemorySink())
            say(f"cell {cell.name}, seed {cell.seed}: tested in {time.perf_counter() - began:.0f} s")
        return folder


def code_hash() -> str:
    """Hash of the sources that streams, bases and cells depend on."""
    sources = [path for part in ("cladapt", "kernels") for path in sorted((ROOT.parent / part).rglob("*.py"))]
    return hash_value([[str(path.relative_to(ROOT.parent)), hash_file(path)] for path in sources])


def refuse_other_code(work: Path) -> None:
    """What other code has made would pass for the work of this one."""
    stamp, code = work / "code.json", {"code": code_hash()}
    if work.is_dir() and any(work.iterdir()) and (not stamp.is_file() or read_json(stamp) != code):
        raise ConfigError(f"{work} holds the work of other code", "name an empty --work, or remove this one")
    write_json(stamp, code)


def merge(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, `own` over `common`."""
    merged = dict(common)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def mean_distance(adapters: list[Path]) -> float | None:
    """Mean over blocks of the L2 distance between the factors that one block and the next have learned."""
    tensors = [without_history(read_tensors(f / ADAPTER_FILE), adapter_provenance(f)) for f in adapters]
    squares = [sum(float((b[n] - a[n]).square().sum()) for n in a) for a, b in pairwise(tensors)]
    return sum(s**0.5 for s in squares) / len(squares) if squares else None


def tables(study: Study, done: list[tuple[Cell, Path]]) -> dict[str, pl.DataFrame]:
    """`summary` (a line per cell name, seeds pooled), `differences` against the reference, `cells` (a line each).

    The first two also of the first events of the next block, where all cells were tested on them.
    """
    lines = []
    pooled: dict[str, dict[int, Evaluated]] = {}
    recipes: dict[str, str] = {}
    for cell, folder in done:
        each = Evaluated.read(Run.open(folder))
        pooled.setdefault(cell.name, {})[cell.seed] = each
        recipes[cell.name] = hash_value(cell.base.model_dump(mode="json", exclude={"seed"}))
        lines.append(cell_line(cell, each))
    comparison = Comparison([Group(name, recipes[name], by_seed) for name, by_seed in pooled.items()])
    own = study.recipe.reference or next(iter(study.recipe.cells))
    references = [name for name in (own, *COUNTS) if name in comparison.lines]
    models = [name for name in comparison.lines if name not in COUNTS]
    pairs = (*((name, models) for name in references), *((b, [a]) for a, b in study.recipe.pairs))
    frames: dict[str, list[dict[str, Any]]] = {"cells": lines}
    for prefix, part in (("", comparison), ("next_block_", comparison.next)):
        if part is not None:
            frames[f"{prefix}summary"] = part.summary()
            frames[f"{prefix}differences"] = [
                line for name, others in pairs for line in wide(part.differences(name, others))
            ]
    return {name: pl.DataFrame(rows, infer_schema_length=None) for name, rows in frames.items()}


def cell_line(cell: Cell, each: Evaluated) -> dict[str, Any]:
    """One run: its metrics, the summaries of its R[t][s], and what its method logged."""
    measures, run = each.measures, each.run
    line = {"cell": cell.name, "seed": cell.seed, **model_row(cell.name, measures.own, measures.config)}
    grid = matrix(measures, f"HR@{max(measures.config.top_k)}")
    line |= {name: mean.value if not mean.missing else None for name, mean in summaries(grid).items()}
    chosen = [read_json(a / "cladapt.json")["valid_log_likelihood"] for a in run.adapters.values()]
    line["valid log_likelihood"] = sum(chosen) / len(chosen) if chosen else None
    line["distance between adapters"] = mean_distance(list(run.adapters.values()))
    log = regulariser_log(run)
    for key in ("peso/distance, last", "peso/term, last", "peso/ratio, mean", "peso/cosine, mean"):
        values = [block[key] for block in log if key in block]
        line[key.replace("/", " ")] = sum(values) / len(values) if values else None
    return {k: v for k, v in line.items() if k not in ("model", "users") and "95 %" not in k}


def wide(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line per difference from its rows, one per metric."""
    for name, group in groupby(rows, key=lambda row: row["difference"]):
        line: dict[str, Any] = {"difference": name}
        for row in group:
            metric = row["metric"]
            line |= {metric: row["effect"], **{f"{metric} {end}": row[end] for end in ("low", "high", "shown")}}
        yield line


def write_tables(name: str, frames: Mapping[str, pl.DataFrame], results: Path) -> None:
    """The tables of a study as csv, and the means on stdout."""
    for table, frame in frames.items():
        with atomic_path(results / name / f"{table}.csv") as path:
            frame.write_csv(path, float_precision=6)
        brief = frame.select(c for c in frame.columns if not c.endswith((" low", " high", " 95 %")) and "NDCG" not in c)
        with pl.Config(
            tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, float_precision=4, tbl_hide_column_data_types=True
        ):
            print(f"{name}: {table}\n{brief}")


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def parser(doc: str, work: str) -> argparse.ArgumentParser:
    """The arguments of every study: a recipe, and where things lie."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("recipe", type=Path)
    made.add_argument("--work", type=Path, default=Path(work), help="where streams, bases and cells are kept")
    made.add_argument("--data", type=Path, default=DATA, help="where the real data lies")
    made.add_argument("--results", type=Path, default=ROOT / "results")
    return made


def told(study: Callable[[], None]) -> int:
    """Run a study from the command line: its exit code, an expected failure told in two lines."""
    try:
        study()
    except CladaptError as error:
        say(f"error: {error.message}\nhint: {error.hint}")
        return error.exit_code
    return 0


def main() -> None:
    """Make the cells of a recipe and its tables."""
    arguments = parser(str(__doc__), "runs/studies")
    arguments.add_argument("--only", nargs="*", default=None, help="run these cells alone")
    given = arguments.parse_args()
    recipe = resolve(Recipe, load_recipe(given.recipe), str(given.recipe))
    if not recipe.cells:
        raise ConfigError(f"{given.recipe} has no cells", "name at least one")
    study = Study(given.recipe.stem, recipe, given.work, given.data)
    study.prepare_stream()
    chosen = [cell for cell in study.cells() if given.only is None or cell.name in given.only]
    done = [(cell, study.run(cell)) for cell in chosen]
    write_tables(study.name, tables(study, done), given.results)


if __name__ == "__main__":
    sys.exit(told(main))
