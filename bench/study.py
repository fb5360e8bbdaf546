"""A study: a grid of runs of one task, several seeds, counted and compared. `python bench/study.py RECIPE.yaml`

A recipe names the task, its sources, the settings common to all cells, the cells and the seeds (`bench/inputs.py` has
every key). A stream and a base are made once and shared by the cells of a seed, and every cell is cached by the hash of
its resolved configuration (evaluation settings apart), so an interrupted study goes on where it stopped and an edited
recipe redoes only what it changed. A work folder belongs to one state of the code: with another it is refused.
Tables with paired intervals are rebuilt from the cells and written to `bench/results/<recipe name>/`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import polars as pl

from cladapt import workloads
from cladapt.artifacts import atomic_path, hash_file, hash_value, read_json, read_tensors, write_json
from cladapt.config import RunSettings, Settings, load_recipe, resolve
from cladapt.errors import CladaptError, ConfigError
from cladapt.model.adapter import ITEMS
from cladapt.model.saved import ADAPTER_FILE, adapter_provenance, without_history
from cladapt.model.spectrum import FIGURES
from cladapt.pipeline import evaluation, runs
from cladapt.pipeline.compare import Pooled, comparison_of
from cladapt.pipeline.evaluation import Evaluated
from cladapt.pipeline.report import METRICS, regulariser_log
from cladapt.run import open_run
from cladapt.tokens.versions import versions_of
from cladapt.train.interference import FIGURES as CHANGES
from cladapt.train.sinks import MemorySink
from cladapt.workloads._base import effect_lines
from inputs import Recipe, merge, recipe_of

ROOT = Path(__file__).resolve().parent
DATA = ROOT.parent.parent / "shared" / "data"
LOGGED = ("peso/distance, last", "peso/term, last", "peso/ratio, mean", "peso/cosine, mean")


@dataclass(frozen=True)
class Cell:
    """One run of a study; `base`: how its base was made, the seed apart."""

    name: str
    seed: int
    config: RunSettings
    base: str


class Study:
    """A recipe with its working directory."""

    def __init__(self, name: str, recipe: Recipe, work: Path, data: Path) -> None:
        self.name, self.recipe, self.work, self.data = name, recipe, work, data

    def cells(self, only: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> Iterator[Cell]:
        """The grid (or the cells of some names or seeds), seed by seed so that a stopped study has whole seeds.

        The stream and the base of a cell are made where they are missing.
        """
        if strange := sorted({*(only or ())} - {*self.recipe.cells}):
            raise ConfigError(f"--only {' '.join(strange)}: no such cell", f"cells: {', '.join(self.recipe.cells)}")
        if strange := sorted({*(seeds or ())} - {*self.recipe.seeds}):
            raise ConfigError(
                f"--seeds {' '.join(map(str, strange))}: no such seed",
                f"seeds: {', '.join(map(str, self.recipe.seeds))}",
            )
        refuse_other_code(self.work)
        for seed in self.recipe.seeds if seeds is None else seeds:
            for name in self.recipe.cells:
                if only is None or name in only:
                    yield self.cell(name, seed)

    def cell(self, name: str, seed: int) -> Cell:
        """A cell with its inputs."""
        own = merge(self.recipe.run, self.recipe.cells[name])
        recipe = self.recipe.of_cell(own)
        stream = recipe.make_stream(self.work, self.data, seed)
        made = self.recipe.base_settings(own, seed)
        base = self.base(stream, made)
        values = {**own, "seed": seed, "data": str(stream), "base": str(base)}
        identity = hash_value(made.model_dump(mode="json", exclude={"seed"}))
        if (beginning := self.recipe.start_stream(stream)) is not None:
            common = {key: value for key, value in self.recipe.run.items() if key != "base"}
            first = resolve(self.kind, {**common, "seed": seed, "data": str(beginning), "base": str(base)}, "run")
            learned = open_run(self.train(Cell(f"before {name}", seed, first, identity))).adapters
            values["from_adapter"] = str(learned[max(learned)])
        return Cell(name, seed, resolve(self.kind, values, f"cell {name}"), identity)

    @property
    def kind(self) -> type[RunSettings]:
        """The settings of a run of its task."""
        return workloads.get(self.recipe.task).config

    def base(self, stream: Path, settings: Settings) -> Path:
        """The base of a stream and settings, made when it is not there yet."""
        sources = self.recipe.model_dump(mode="json", include={"pretrain"})
        folder = self.work / "bases" / hash_value([stream.name, sources, settings.model_dump(mode="json")])
        if not folder.is_dir():
            began = time.perf_counter()
            report = self.recipe.make_base(folder, self.data, stream, settings)
            say(f"base {folder.name}: {time.perf_counter() - began:.0f} s, {report}")
        return folder

    def train(self, cell: Cell) -> Path:
        """Train a cell, or take it from the cache; returns its run directory."""
        folder = self.work / "cells" / hash_value(cell.config.model_dump(mode="json", exclude={"eval", "track"}))
        took = folder / "seconds.json"
        if not took.is_file():
            began = time.perf_counter()
            if (folder / "config.json").is_file():
                runs.resume(folder, MemorySink())
            else:
                runs.train(cell.config, folder, MemorySink())
            write_json(took, {"train": time.perf_counter() - began})
            say(f"cell {cell.name}, seed {cell.seed}: trained in {time.perf_counter() - began:.0f} s")
        return folder

    def run(self, cell: Cell) -> Path:
        """Train and measure a cell, or take it from the cache; returns its run directory."""
        folder = self.train(cell)
        measured = folder / METRICS
        if not measured.is_file() or read_json(measured)["config"] != cell.config.eval.model_dump(mode="json"):
            began = time.perf_counter()
            evaluation.evaluate_run(open_run(folder), cell.config.eval, None, MemorySink())
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


def mean_distance(adapters: list[Path]) -> float | None:
    """Mean over blocks of the L2 distance between the factors that one block and the next have learned."""
    tensors = [without_history(read_tensors(f / ADAPTER_FILE), adapter_provenance(f)) for f in adapters]
    squares = [
        sum(float((b[n] - a[n]).square().sum()) for n in a if f".{ITEMS}." not in n) for a, b in pairwise(tensors)
    ]
    return sum(s**0.5 for s in squares) / len(squares) if squares else None


def tables(recipe: Recipe, done: Sequence[tuple[Cell, Path]]) -> dict[str, pl.DataFrame]:
    """`summary` (a line per cell name, seeds pooled), `differences` from every reference, `cells` (a line each), and
    `blocks` (the difference of each pair block by block); `tails` (a line per cell name and group of the items by head
    and tail) and `tails_differences` (of each pair) where the task has them.

    `ids`, what each cell name's IDs are, where the recipe has several versions of them.
    The first two also of what else the runs are judged by, such as the next block, where all cells have it.
    """
    lines = []
    pooled: dict[str, dict[int, Evaluated]] = {}
    made: dict[str, str] = {}
    for cell, folder in done:
        each = pooled.setdefault(cell.name, {})[cell.seed] = Evaluated.read(open_run(folder))
        made[cell.name] = cell.base
        lines.append(cell_line(cell, each))
    comparison = comparison_of([Pooled(name, made[name], by_seed) for name, by_seed in pooled.items()])
    models = [name for name in comparison.names if name not in comparison.references]
    own = [name for name in recipe.references if name in pooled] or [next(iter(pooled))]
    against = [(name, models) for name in (*own, *comparison.references)]
    against += [(two, [one]) for one, two in recipe.pairs if {one, two} <= pooled.keys()]
    frames: dict[str, list[dict[str, Any]]] = {"cells": lines}
    parts = {"": comparison, **{f"{name}_": part for name, (_, part) in comparison.further.items()}}
    for prefix, part in parts.items():
        frames[f"{prefix}summary"] = part.summary()
        frames[f"{prefix}differences"] = [
            line for name, others in against for line in wide(part.differences(name, others))
        ]
        pairs = [pair for pair in recipe.pairs if {*pair} <= {*part.names}]
        if by_block := [line for pair in pairs for line in effect_lines(pair, "block", part.effects_by_block(*pair))]:
            frames[f"{prefix}blocks"] = by_block
    pairs = [pair for pair in recipe.pairs if {*pair} <= {*comparison.names}]
    by_tail = [line for pair in pairs for line in effect_lines(pair, "group", comparison.effects_by_tail(*pair))]
    more = (("tails", comparison.tails()), ("tails_differences", by_tail), ("ids", ids_lines(done)))
    frames |= {name: rows for name, rows in more if rows}
    return {name: pl.DataFrame(rows, infer_schema_length=None) for name, rows in frames.items()}


def cell_line(cell: Cell, each: Evaluated) -> dict[str, Any]:
    """One run: its figures, what its method logged, and what its last adapter is like."""
    run = each.run
    line = {"cell": cell.name, "seed": cell.seed, **run.workload.cell(each.measures)}
    chosen = [adapter_provenance(folder)["valid_log_likelihood"] for folder in run.adapters.values()]
    line["valid log_likelihood"] = sum(chosen) / len(chosen) if chosen else None
    line["distance between adapters"] = mean_distance(list(run.adapters.values()))
    log = regulariser_log(run)
    for key in LOGGED:
        values = [block[key] for block in log if block.get(key) is not None]
        line |= {key.replace("/", " "): sum(values) / len(values)} if values else {}
    spectrum = read_json(run.path / METRICS)["spectrum"]
    last = spectrum[-1] if spectrum else {}
    line |= {figure: last.get(f"own_{figure}", last.get(figure)) for figure in FIGURES}
    for figure in CHANGES:
        values = [block[figure] for block in read_json(run.path / METRICS)["interference"]]
        line[figure] = sum(values) / len(values) if values else None
    diagnostics = read_json(run.path / METRICS).get("diagnostics", [])
    for when, found in (("base", diagnostics[:1]), ("last", diagnostics[1:][-1:])):
        line |= {f"{when} {figure}": value for each in found for figure, value in each.items() if figure != "block"}
    return {**line, "seconds": read_json(run.path / "seconds.json")["train"]}


def ids_lines(done: Sequence[tuple[Cell, Path]]) -> list[dict[str, Any]]:
    """The version of the IDs behind each cell name, the share of items that moved, and what the refresh changed."""
    lines = {}
    for cell, _ in done:
        known = versions_of(Path(cell.config.data))
        if known.newest > 1:
            version = int(getattr(cell.config, "ids", 0)) or known.current
            line: dict[str, Any] = {"cell": cell.name, "ids": version, "through": known.through(version)}
            if (made := known.get(version)) is not None:
                report = made.report
                line |= {"aligned": made.aligned, "moved": report["moved"]}
                line |= {f"moved at {level['level']}": level["moved"] for level in report["levels"]}
                for figure in ("shared_items", "quantisation_error"):
                    line |= {f"{figure} {when}": report[figure][when] for when in ("before", "after")}
            lines[cell.name] = line
    return [*lines.values()]


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


def exit_code(study: Callable[[], None]) -> int:
    """Run a study from the command line; an expected failure is two lines and its exit code."""
    try:
        study()
    except CladaptError as error:
        say(f"error: {error.message}\nhint: {error.hint}")
        return error.exit_code
    return 0


def main() -> None:
    """Make the cells of a recipe and its tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="where all that is made is kept")
    parser.add_argument("--data", type=Path, default=DATA, help="where the real data lies")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--only", nargs="*", default=None, metavar="CELL", help="run these cells alone")
    parser.add_argument("--seeds", nargs="*", type=int, default=None, metavar="SEED", help="run these seeds alone")
    given = parser.parse_args()
    study = Study(given.recipe.stem, recipe_of(load_recipe(given.recipe), str(given.recipe)), given.work, given.data)
    done = [(cell, study.run(cell)) for cell in study.cells(given.only, given.seeds)]
    write_tables(study.name, tables(study.recipe, done), given.results)


if __name__ == "__main__":
    sys.exit(exit_code(main))
