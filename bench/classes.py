"""A study of class-incremental learning: a grid of runs over several seeds. `python bench/classes.py RECIPE.yaml`

A seed draws the order of the classes, the splits and the base; all cells of a seed share its stream and its base, so
they are paired by image. Cells are cached like those of `bench/study.py`, whose rules on work folders and code hold.
Tables with intervals over images and seeds go to `bench/results/<recipe name>/`.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from cladapt.pipeline.classify_report import class_comparison, read_rows
from pydantic import Field
from study import merge, parser, refuse_other_code, say, told, write_tables

from cladapt.artifacts import hash_value, read_json, write_json
from cladapt.config import ClassifyConfig, ImagesConfig, Settings, VitConfig, load_recipe, resolve
from cladapt.model.spectrum import FIGURES
from cladapt.pipeline import classify
from cladapt.run import Run, open_run
from cladapt.train.sinks import MemorySink


class Recipe(Settings):
    """What a study runs."""

    source: str
    """Folder or archive of images below the data root."""
    exclude: tuple[str, ...] = ()
    """Sources whose classes are left out."""
    images: ImagesConfig = ImagesConfig()
    """How they become a stream; the seed is the cell's."""
    pretrain: str
    """Folder or archive of images that the base learns."""
    vision: VitConfig = VitConfig()
    run: Mapping[str, Any] = {}
    """Settings of `ClassifyConfig` common to all cells."""
    cells: Annotated[Mapping[str, Mapping[str, Any]], Field(min_length=1)]
    """Name -> settings of `ClassifyConfig` on top of the common ones."""
    references: tuple[str, ...] = ()
    """Cells that all others are compared with; empty = the first."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)


def prepare(recipe: Recipe, seed: int, work: Path, data: Path) -> tuple[Path, Path]:
    """Stream and base of a seed, made when they are not there yet."""
    made = recipe.model_dump(mode="json", exclude={"run", "cells", "references", "seeds"})
    folder = work / hash_value([made, seed])
    stream, base = folder / "stream", folder / "base"
    if not stream.is_dir():
        excluded = [data / name for name in recipe.exclude]
        images = recipe.images.model_copy(update={"seed": seed})
        classify.import_images(data / recipe.source, stream, images, excluded)
    if not base.is_dir():
        began = time.perf_counter()
        settings = recipe.vision.model_copy(update={"seed": seed})
        report = classify.make_base(stream, base, data / recipe.pretrain, None, settings, MemorySink())
        say(f"base of seed {seed}: {time.perf_counter() - began:.0f} s, {report}")
    return stream, base


def run_cell(config: ClassifyConfig, work: Path, name: str) -> Path:
    """Train and measure a cell, or take it from the cache; returns its run directory."""
    folder = work / "cells" / Run(Path(), config).config_hash
    took = folder / "seconds.json"
    if not took.is_file():
        began = time.perf_counter()
        if (folder / "config.json").is_file():
            classify.resume(_opened(folder), MemorySink())
        else:
            classify.train(config, folder, MemorySink())
        write_json(took, {"train": time.perf_counter() - began})
        say(f"cell {name}, seed {config.seed}: trained in {time.perf_counter() - began:.0f} s")
    measured = folder / "metrics.json"
    if not measured.is_file() or read_json(measured)["config"] != config.eval.model_dump(mode="json"):
        classify.evaluate(_opened(folder), config.eval.model_dump(mode="json"), MemorySink())
    return folder


def _opened(folder: Path) -> Run[ClassifyConfig]:
    run = open_run(folder)
    return Run(run.path, resolve(ClassifyConfig, run.config.model_dump(mode="json")), run.inputs)


def tables(done: Mapping[str, Mapping[int, Path]], references: tuple[str, ...]) -> dict[str, pl.DataFrame]:
    """`summary`, `differences` from every reference, `cells` (a line each, with the spectrum after the last block)."""
    rows = {name: {seed: read_rows(_opened(path)) for seed, path in by_seed.items()} for name, by_seed in done.items()}
    compared = [class_comparison(rows, reference=name) for name in references or (next(iter(rows)),)]
    lines = []
    for name, by_seed in done.items():
        for seed, path in by_seed.items():
            metrics = read_json(path / "metrics.json")
            last = metrics["spectrum"][-1] if metrics["spectrum"] else {}
            spectrum = {figure: last.get(f"own_{figure}", last.get(figure)) for figure in FIGURES}
            measures = {line["measure"]: line["mean"] for line in metrics["table"]}
            seconds = read_json(path / "seconds.json")["train"]
            lines.append({"cell": name, "seed": seed, **measures, **spectrum, "seconds": seconds})
    found = {
        "summary": compared[0]["summary"],
        "differences": [line for each in compared for line in each["differences"]],
        "cells": lines,
    }
    return {name: pl.DataFrame(each, infer_schema_length=None) for name, each in found.items()}


def main() -> None:
    """Make the cells of a recipe and its tables."""
    given = parser(str(__doc__), "runs/classes").parse_args()
    recipe = resolve(Recipe, load_recipe(given.recipe), str(given.recipe))
    refuse_other_code(given.work)
    done: dict[str, dict[int, Path]] = {}
    for seed in recipe.seeds:
        stream, base = prepare(recipe, seed, given.work, given.data)
        for name, settings in recipe.cells.items():
            values = {**merge(recipe.run, settings), "seed": seed, "data": str(stream), "base": str(base)}
            config = resolve(ClassifyConfig, values, f"cell {name}")
            done.setdefault(name, {})[seed] = run_cell(config, given.work, name)
    write_tables(given.recipe.stem, tables(done, recipe.references), given.results)


if __name__ == "__main__":
    sys.exit(told(main))
