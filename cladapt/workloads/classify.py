"""Classifying: an image transformer meets classes block by block, and a head that is not told the block."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
from torch import nn

from cladapt import ops, ranks
from cladapt.artifacts import read_parquet, read_record
from cladapt.config import ClassEvalConfig, ClassifyConfig, VitConfig
from cladapt.data.images import ImageStream, digits_stream
from cladapt.errors import DataError
from cladapt.eval import classes
from cladapt.eval.cells import Candidate, Earlier
from cladapt.eval.classes import MEASURES, Outcomes
from cladapt.eval.images import ROWS, image_rows
from cladapt.eval.report import Curves, HeatMap, Section, Series, rows_table
from cladapt.eval.significance import Effect
from cladapt.model.adapter import adapted_lm
from cladapt.model.load import PROVENANCE
from cladapt.model.vit import ClassLoss, VisionBase, VisionRecord, load_vision_base
from cladapt.train.blocks import Examples
from cladapt.train.classes import ImageFeed, describe_blocks, make_vision_base
from cladapt.train.feeds import Feed
from cladapt.train.sinks import Sink
from cladapt.workloads._base import Comparison, Group, Workload, whole

if TYPE_CHECKING:
    from peft import PeftModel

FORMULAS = (
    "R: accuracy among all classes of the blocks up to the model's. FWT: of a nearest-class-mean probe on blocks to "
    "come, minus that of the base. Intervals are 95 %, bootstrap over the images of each block. No head and tail: an "
    "item is a class here, which has all of its training images in one block."
)


@dataclass(frozen=True)
class ClassMeasures:
    """Rows of every model of a run on every test image; see `cladapt.eval.images.ROWS`."""

    name: str
    rows: pl.DataFrame
    base_block: int
    config: ClassEvalConfig


class Classify(Workload[ClassifyConfig, ImageStream, VisionBase, ClassMeasures]):
    """Class-incremental learning: one adapter, and the head's rows of a block's own classes."""

    config = ClassifyConfig
    embedded = "scikit-learn's digits and their small base"
    embedded_folder = "embedded-digits"
    rows_folder = "images"
    note = FORMULAS
    one_stream = False
    same_question = ("targets",)
    same_rows = ("targets",)

    def open_inputs(
        self, config: ClassifyConfig, choose: Callable[[ImageStream], ImageStream] = whole
    ) -> tuple[ImageStream, VisionBase]:
        stream, base = choose(ImageStream.load(Path(config.data))), load_vision_base(Path(config.base))
        if base.provenance["stream"] != stream.fingerprint:
            raise DataError(
                f"{config.base} was made for the stream {base.provenance['stream']}, "
                f"{config.data} is {stream.fingerprint}",
                "make a base for this stream with `cladapt base vision`: its head has a row for each of the classes",
            )
        cast(nn.Module, base.model).to(ops.compute_device())
        return stream, base

    def make_embedded(self, stream: Path, base: Path, sink: Sink) -> None:
        if not ranks.once(stream.is_dir):
            ranks.once(lambda: digits_stream(0).save(stream, source="scikit-learn digits", license_note="BSD-3-Clause"))
        if not ranks.once(base.is_dir):
            sink.emit({"kind": "note", "text": f"training the embedded base in {base}"})
            make_vision_base(ImageStream.load(stream), base, None, None, VitConfig(patch=2), sink)

    def base_recipe(self, folder: Path) -> tuple[str, dict[str, Any]]:
        made = read_record(folder / PROVENANCE, VisionRecord, "restore this file, or make the base again")
        apart = ("cladapt", "stream", "classes")  # every seed may have its own order of the classes
        return str(made.pop("fingerprint")), {key: value for key, value in made.items() if key not in apart}

    def examples(self, config: ClassifyConfig, stream: ImageStream, base: VisionBase) -> Examples:
        def of_blocks(model: "PeftModel", blocks: Sequence[int]) -> tuple[nn.Module, Feed]:
            train = np.concatenate([stream.rows(block, "train") for block in blocks])
            own = np.concatenate([stream.classes_of(block) for block in blocks])
            feed = ImageFeed(stream, train, stream.rows(blocks[-1], "valid"), config.train.batch_images)
            return ClassLoss(adapted_lm(model), own, stream.seen(blocks[-1] - 1)), feed

        return of_blocks

    def plan(
        self, config: ClassifyConfig, stream: ImageStream, base: VisionBase, blocks: Sequence[int]
    ) -> list[dict[str, Any]]:
        lines = [line for line in describe_blocks(stream) if line["block"] in blocks]
        for line in lines:
            batches = math.ceil(line["train"] / config.train.batch_images)
            line["steps"] = config.train.epochs * math.ceil(batches / config.train.accumulation)
        return lines

    def measure(
        self,
        config: ClassifyConfig,
        settings: ClassEvalConfig,
        stream: ImageStream,
        base: VisionBase,
        models: Sequence[Candidate],
        block: int | None,
        earlier: Earlier[ClassMeasures],
        sink: Sink,
    ) -> ClassMeasures:
        rows = []
        for candidate in models:
            after = candidate.block
            if known := earlier.of(after, stream.n_blocks):
                rows.append(known.rows.filter(pl.col("model") == after))
                earlier.kept += stream.n_blocks
                continue
            with candidate.open() as model:
                rows.append(image_rows(model, stream, after, settings.targets, settings.batch_images))
            earlier.measured += stream.n_blocks
            sink.emit({"kind": "note", "text": f"tested the model of block {after}"})
        return ClassMeasures(config.method.name, pl.concat(rows), models[0].block, settings)

    def frames(self, measures: ClassMeasures) -> dict[str, pl.DataFrame]:
        return {"rows": measures.rows}

    def read(
        self, folder: Path, metrics: Mapping[str, Any], name: str, settings: ClassEvalConfig, again: str
    ) -> ClassMeasures:
        return ClassMeasures(name, read_parquet(folder / "rows.parquet", ROWS), metrics["base_block"], settings)

    def figures(self, measures: ClassMeasures, stream: ImageStream) -> dict[str, Any]:
        outcomes = Outcomes.of(measures.rows)
        accuracy, probe = outcomes.matrices()
        cells = [(i, j) for i in range(len(outcomes.models)) for j in range(len(outcomes.blocks))]
        found = classes.effects({0: measures.rows}, measures.config.bootstrap)
        return {
            "table": [measure_line(measures.name, found)],
            "differences": [],
            "matrix": [
                {
                    "model_block": outcomes.models[i],
                    "block": outcomes.blocks[j],
                    "images": len(outcomes.images[j]),
                    "accuracy": _known(float(accuracy[i, j])),
                    "probe": _known(float(probe[i, j])),
                }
                for i, j in cells
            ],
        }

    def printed(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        grid = matrix_of(figures, "accuracy")
        lines = [
            {"model": model, **dict(zip(map(str, grid.column_labels), values, strict=True))}
            for model, values in zip(grid.row_labels, grid.values, strict=True)
        ]
        return {"table": figures["table"], "matrix": lines}

    def table_names(self, method: str, settings: ClassEvalConfig) -> tuple[Sequence[str], Sequence[str]]:
        return (method,), MEASURES

    def sections(
        self, measures: ClassMeasures, figures: Mapping[str, Any], stream: ImageStream, base: VisionBase
    ) -> list[Section]:
        return [
            rows_table("Measures", figures["table"], self.note),
            matrix_of(figures, "accuracy", "R[t][s]: accuracy after block t on block s"),
            matrix_of(figures, "probe", "P[t][s]: accuracy of the probe"),
        ]

    def question(self, measures: ClassMeasures) -> dict[str, Any]:
        named = {"blocks": "block", "models after the blocks": "model"}
        return {name: measures.rows[column].unique().sort().to_list() for name, column in named.items()}

    def compare(self, groups: Sequence[Group[ClassMeasures]]) -> "Accuracies":
        return Accuracies(groups)

    def cell(self, measures: ClassMeasures) -> dict[str, Any]:
        found = classes.effects({0: measures.rows}, measures.config.bootstrap)
        return {name: _known(effect.mean) for name, effect in found.items()}


@dataclass(frozen=True)
class Accuracies(Comparison[ClassMeasures]):
    """One line per group; images and seeds are drawn together for every line."""

    @property
    def names(self) -> Sequence[str]:
        return [group.name for group in self.groups]

    def rows(self, name: str) -> dict[int, pl.DataFrame]:
        """Rows of a group by seed."""
        (group,) = (group for group in self.groups if group.name == name)
        return {seed: each.rows for seed, each in group.by_seed.items()}

    def summary(self) -> list[dict[str, Any]]:
        lines = [(name, self.rows(name)) for name in self.names]
        return [
            measure_line(name, classes.effects(rows, self.config.bootstrap), seeds=len(rows)) for name, rows in lines
        ]

    def effects(self, name: str, reference: str) -> dict[str, Effect]:
        found = classes.differences(self.rows(name), self.rows(reference), self.config.bootstrap)
        return {measure: effect for measure, effect in found.items() if math.isfinite(effect.mean)}

    def charts(self) -> list[Section]:
        """The accuracy among all classes known so far, after every block; seeds averaged."""
        series = []
        for name in self.names:
            found = [Outcomes.of(rows) for rows in self.rows(name).values()]
            after = [i for i, model in enumerate(found[0].models) if model in found[0].blocks]
            means = np.mean([[np.nanmean(each.matrices()[0][i]) for i in after] for each in found], axis=0)
            series.append(Series(name, [float(mean) for mean in means]))
        blocks = [found[0].models[i] for i in after]
        return [Curves("Accuracy on the classes of all blocks so far", blocks, series, y_name="accuracy")]


def measure_line(name: str, found: Mapping[str, Effect], **more: Any) -> dict[str, Any]:
    """A line of the table: each measure with its interval, null where it has no term."""
    line: dict[str, Any] = {"model": name, **more}
    for measure, effect in found.items():
        known = math.isfinite(effect.mean)
        line[measure] = effect.mean if known else None
        line[f"{measure} 95 %"] = f"[{effect.low:.4f}, {effect.high:.4f}]" if known else None
    return line


def matrix_of(figures: Mapping[str, Any], name: str, title: str = "") -> HeatMap:
    """One figure of `matrix` with a row per model and a column per block."""
    models, blocks = (list(dict.fromkeys(cell[key] for cell in figures["matrix"])) for key in ("model_block", "block"))
    found = {(cell["model_block"], cell["block"]): cell[name] for cell in figures["matrix"]}
    return HeatMap(title, models, blocks, [[found[m, b] for b in blocks] for m in models], "model / block")


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
