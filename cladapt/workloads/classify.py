"""Classifying: an image transformer meets classes block by block, and a head that is not told the block."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import polars as pl
import torch
from pydantic import model_validator
from torch import nn

from cladapt import ops, ranks
from cladapt.artifacts import read_parquet, read_record
from cladapt.config import ClassEvalConfig, ImageTrainConfig, PositiveFloat, RunSettings, VitConfig
from cladapt.data.images import ImageStream, digits_stream
from cladapt.errors import ConfigError, DataError, ExampleWarning
from cladapt.eval import classes
from cladapt.eval.cells import Candidate, Earlier
from cladapt.eval.classes import MEASURES, OF_CLASSIFIERS, known_further
from cladapt.eval.images import BIASES, FURTHER, PROTOTYPES, ROWS, Answers, image_rows, prototype_frame, prototypes_of
from cladapt.eval.report import Section, rows_table
from cladapt.methods import build
from cladapt.model.adapter import CLASSIFIER, adapted_lm
from cladapt.model.cosine import CosineHead
from cladapt.model.features import block_means
from cladapt.model.load import PROVENANCE
from cladapt.model.saved import adapter_provenance
from cladapt.model.vit import ClassLoss, VisionBase, VisionRecord, load_vision_base
from cladapt.train.blocks import Examples
from cladapt.train.classes import ImageFeed, describe_blocks, learned_rows, make_vision_base
from cladapt.train.feeds import Feed
from cladapt.train.sinks import Sink
from cladapt.workloads._base import Group, Workload, whole
from cladapt.workloads._classify_compare import (
    Accuracies,
    ClassMeasures,
    classifier_lines,
    finite,
    matrix_lines,
    matrix_of,
    measure_line,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FORMULAS = (
    "R: accuracy among all classes of the blocks up to the model's. FWT: of a nearest-class-mean probe on blocks to "
    "come, minus that of the base. Intervals are 95 %, bootstrap over the images of each block. No head and tail: an "
    "item is a class here, which has all of its training images in one block."
)
HEAD_SCALE = 16.0
CLASSIFIERS = (
    "Among all classes of the blocks up to the model's. biased: the head's logits and a bias for each block, fitted on "
    "the validation images of these blocks. prototype: the nearest mean of a class's training images in feature space, "
    "as the model after the class's own block had it. ACC - head: paired over images."
)


MATRIX = (
    "Framed: a block when it was just learned, from where forgetting is counted; the last has none yet. A dash: the "
    "head does not know the block's classes. The validation log-likelihood of a run's log is among the block's own "
    "classes alone: it chooses epochs and does not compare methods or classifiers, which ACC does."
)


class ClassifyConfig(RunSettings):
    """A whole run of `cladapt train --task classify`."""

    task: ClassVar[str] = "classify"
    shown_by = "config show --task classify"
    data: str = ""
    """Image stream directory; empty = scikit-learn's digits in 5 blocks."""
    base: str = ""
    """Vision base directory; empty = a small one trained on block 1."""
    head: Literal["linear", "cosine"] = "linear"
    """`cosine`: a logit is `head_scale` times the cosine between features and the class's row, which starts at the mean
    of the class's features, also for classes that the base has learned; there is no bias."""
    head_scale: PositiveFloat = HEAD_SCALE
    """Scale of the logits of a cosine head."""
    train: ImageTrainConfig = ImageTrainConfig()
    eval: ClassEvalConfig = ClassEvalConfig()

    @model_validator(mode="after")
    def _only_cosines_are_scaled(self) -> "ClassifyConfig":
        if self.head == "linear" and self.head_scale != HEAD_SCALE:
            raise ValueError(f"head_scale={self.head_scale:g} needs head=cosine, head is linear")
        return self


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
        if config.head == "cosine":
            base.take_cosine_head(config.head_scale)
            for block in range(1, base.fitted_block + 1):
                imprint(base.model, stream, block, config.train.batch_images)
        return stream, base

    def make_embedded(self, config: ClassifyConfig, stream: Path, base: Path, sink: Sink) -> None:
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
        replay = build(config.method).replay

        def of_blocks(model: "PeftModel", blocks: Sequence[int]) -> tuple[nn.Module, Feed]:
            train = learned_rows(stream, blocks, replay, config.seed)
            own = np.unique(np.concatenate([stream.label[train], *map(stream.classes_of, blocks)]))
            if len(own) == 1:
                warnings.warn(
                    f"block {blocks[-1]} has the class {stream.classes[own[0]]!r} alone: a softmax over one class "
                    "teaches nothing; cut blocks of two classes and more",
                    ExampleWarning,
                    stacklevel=2,
                )
            feed = ImageFeed(stream, train, stream.rows(blocks[-1], "valid"), config.train.batch_images)
            start = None
            if config.head == "cosine":
                start = partial(imprint, adapted_lm(model), stream, blocks[-1], config.train.batch_images)
            return ClassLoss(adapted_lm(model), own, stream.seen(blocks[-1] - 1), start), feed

        return of_blocks

    def provenance(self, config: ClassifyConfig, block: int) -> dict[str, Any]:
        return {"head": config.head, **({"head_scale": config.head_scale} if config.head == "cosine" else {})}

    def check_adapter(self, config: ClassifyConfig, adapter: Path) -> None:
        taught = adapter_provenance(adapter).get("head", "linear")
        if taught != config.head:
            raise ConfigError(
                f"{adapter} was taught with head={taught}, the run has head={config.head}: it would be misread",
                f"use head={taught}",
            )

    def plan(
        self, config: ClassifyConfig, stream: ImageStream, base: VisionBase, blocks: Sequence[int]
    ) -> list[dict[str, Any]]:
        method = build(config.method)
        lines = [line for line in describe_blocks(stream) if line["block"] in blocks]
        for line in lines:
            learned = method.learned_with(line["block"])
            line["train"] = len(learned_rows(stream, learned, method.replay, config.seed))
            if again := line["train"] - len(learned_rows(stream, learned, None, config.seed)):
                line["replayed"] = again
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
        found: list[Answers] = []
        prototypes = torch.empty(0)
        for candidate in models:
            after = candidate.block
            # what a model is judged by comes from the models before it too
            known = None if earlier.measured else earlier.of(after, stream.n_blocks)
            if known is not None:
                found.append(_kept(known, after, len(stream.seen(after))))
                earlier.kept += stream.n_blocks
            else:
                with candidate.open() as model:
                    batch = settings.batch_images
                    found.append(image_rows(model, stream, after, settings.targets, batch, prototypes))
                earlier.measured += stream.n_blocks
                sink.emit({"kind": "note", "text": f"tested the model of block {after}"})
            prototypes = found[-1].prototypes
        rows, biases = (pl.concat([getattr(each, name) for each in found]) for name in ("rows", "biases"))
        if lacking := [name for name in FURTHER if name not in known_further(rows)]:
            why = "eval.targets=valid tests these" if settings.targets == "valid" else "a block has none"
            text = f"{', '.join(lacking)}: left out, for biases are fitted on validation images, and {why}"
            sink.emit({"kind": "note", "text": text})
        return ClassMeasures(config.method.name, rows, prototype_frame(prototypes), biases, models[0].block, settings)

    def frames(self, measures: ClassMeasures) -> dict[str, pl.DataFrame]:
        return {"rows": measures.rows, "prototypes": measures.prototypes, "biases": measures.biases}

    def read(
        self, folder: Path, metrics: Mapping[str, Any], name: str, settings: ClassEvalConfig, again: str
    ) -> ClassMeasures:
        forms = (("rows", ROWS), ("prototypes", PROTOTYPES), ("biases", BIASES))
        try:
            rows, prototypes, biases = (read_parquet(folder / f"{file}.parquet", form) for file, form in forms)
            prototypes_of(prototypes)
        except DataError as error:
            raise DataError(error.message, again) from error
        return ClassMeasures(name, rows, prototypes, biases, metrics["base_block"], settings)

    def figures(self, measures: ClassMeasures, stream: ImageStream) -> dict[str, Any]:
        found = classes.effects({0: measures.rows}, measures.config.bootstrap)
        return {
            "table": [measure_line(measures.name, found)],
            "differences": [],
            "classifiers": classifier_lines(measures),
            "matrix": matrix_lines(measures.rows),
        }

    def printed(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        grid = matrix_of(figures, "accuracy")
        lines = [
            {"model": model, **dict(zip(map(str, grid.column_labels), values, strict=True))}
            for model, values in zip(grid.row_labels, grid.values, strict=True)
        ]
        return {"table": figures["table"], "classifiers": figures["classifiers"], "matrix": lines}

    def table_names(self, method: str, settings: ClassEvalConfig) -> tuple[Sequence[str], Sequence[str]]:
        return (method,), MEASURES

    def sections(
        self, measures: ClassMeasures, figures: Mapping[str, Any], stream: ImageStream, base: VisionBase
    ) -> list[Section]:
        return [
            rows_table("Measures", figures["table"], self.note),
            rows_table("Classifiers of the same models", figures["classifiers"], CLASSIFIERS),
            matrix_of(figures, "accuracy", "R[t][s]: accuracy after block t on block s", MATRIX),
            *(matrix_of(figures, name, f"R[t][s]: {name}") for name in known_further(measures.rows)),
            matrix_of(figures, "probe", "P[t][s]: accuracy of the probe"),
        ]

    def question(self, measures: ClassMeasures) -> dict[str, Any]:
        named = {"blocks": "block", "models after the blocks": "model"}
        return {name: measures.rows[column].unique().sort().to_list() for name, column in named.items()}

    def compare(self, groups: Sequence[Group[ClassMeasures]]) -> Accuracies:
        return Accuracies(groups)

    def cell(self, measures: ClassMeasures) -> dict[str, Any]:
        by_seed, resamples = {0: measures.rows}, measures.config.bootstrap
        found = classes.effects(by_seed, resamples)
        for name in known_further(measures.rows):
            judged = classes.effects_of(by_seed, name, resamples)
            found |= {f"{name} {measure}": judged[measure] for measure in OF_CLASSIFIERS}
        return {name: finite(effect.mean) for name, effect in found.items()}


def imprint(model: "PreTrainedModel", stream: ImageStream, block: int, batch_images: int) -> None:
    """The rows of a block's classes in a cosine head become the means of their features, as the model has them."""
    head = cast(CosineHead, model.get_submodule(CLASSIFIER))
    head.imprint(torch.from_numpy(stream.classes_of(block)), block_means(model, stream, block, batch_images))


def _kept(known: ClassMeasures, after: int, seen: int) -> Answers:
    """What an earlier evaluation has of the model after a block, which had learned `seen` classes."""
    rows, biases = (frame.filter(pl.col("model") == after) for frame in (known.rows, known.biases))
    return Answers(rows, prototypes_of(known.prototypes)[:seen], biases)
