"""Class-incremental learning with a vision transformer: streams of classes, bases, runs and what they show."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import polars as pl
from torch import nn

from cladapt import ops, ranks
from cladapt.artifacts import atomic_dir, atomic_path, write_json, write_parquet
from cladapt.config import ClassEvalConfig, ClassifyConfig, ImagesConfig, VitConfig, resolve
from cladapt.data.images import ImageStream, digits_stream, make_stream, read_image_folder
from cladapt.errors import ConfigError, DataError
from cladapt.eval.images import image_rows
from cladapt.export.place import refuse_existing
from cladapt.methods import build
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter
from cladapt.model.anchors import module_of
from cladapt.model.history import unload
from cladapt.model.saved import load_adapter
from cladapt.model.vit import VisionBase, load_vision_base, new_vit, pretrained_vit, save_vision_base, with_classes
from cladapt.pipeline.classify_report import class_report
from cladapt.pipeline.lifecycle import Workload, begin, names_inputs, refuse_unfinished, refuse_unnamed
from cladapt.pipeline.lifecycle import resume as continue_run
from cladapt.run import RUNS, Run, locked
from cladapt.train.blocks import blocks_after
from cladapt.train.classes import fit_vision, train_classes
from cladapt.train.loop import FitResult
from cladapt.train.sinks import Sink

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = RUNS / "embedded-digits"


def import_images(source: Path, out: Path, config: ImagesConfig, exclude: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a folder or zip of images, a class for each inner folder, and write it as a stream of blocks of classes.

    `exclude`: sources whose classes, known by name, are left out.
    """
    refuse_existing(out)
    found = read_image_folder(source, config.size, config.channels, config.invert)
    known = {name for other in exclude for name in read_image_folder(other, 1).classes}
    if exclude and not known & {*found.classes}:
        own, theirs = found.classes[0], min(known)
        raise ConfigError(
            f"--exclude names no class of {source}: its classes are like {own!r}, theirs like {theirs!r}",
            "give sources whose folders are named alike, or leave out --exclude",
        )
    stream = make_stream(found, config.blocks, config.seed, exclude=known)
    stream.save(out, source=source.name)
    return {
        "stream": str(out),
        "images": len(stream.images),
        "classes": len(stream.classes),
        "excluded": len(set(found.classes) & known),
        "ignored_files": found.ignored,
        "blocks": describe_blocks(stream),
    }


def describe_blocks(stream: ImageStream) -> list[dict[str, Any]]:
    """One line per block: classes and images by split."""
    return [
        {
            "block": block,
            "classes": len(stream.classes_of(block)),
            **{split: len(stream.rows(block, split)) for split in ("train", "valid", "test")},
        }
        for block in range(1, stream.n_blocks + 1)
    ]


def make_base(
    data: Path, out: Path, source: Path | None, init: str | None, config: VitConfig, sink: Sink
) -> dict[str, Any]:
    """A vision base for a stream: trained on another image set, on the stream's block 1, or a given checkpoint.

    `source`: the image set, its channels and side those of the stream, all of its classes learned at once. `init`: an
    image classifier of transformers, taken as it is. Without either a small one learns block 1, and blocks begin at 2.
    """
    refuse_existing(out)
    if source is not None and init is not None:
        raise ConfigError("--source and --init both say what the base is", "give one of them")
    stream = ImageStream.load(data)
    result: FitResult | None = None
    fitted = 0
    if init is not None:
        model = with_classes(pretrained_vit(init), len(stream.classes))
        _check_images(model, stream, init)
    else:
        known = stream if source is None else _other_images(source, stream, config.seed)
        model = new_vit(config, stream.images.shape[1], stream.images.shape[3], len(known.classes))
        cast(nn.Module, model).to(ops.compute_device())
        result = fit_vision(model, known, [1], config, sink)
        if source is None:
            fitted = 1
        else:
            model = with_classes(model, len(stream.classes))
    record = {
        "stream": stream.fingerprint,
        "fitted_block": fitted,
        "config": config.model_dump(mode="json"),
        "source": None if source is None else source.name,
        "init": init,
    }
    ranks.once(lambda: save_vision_base(out, model, stream.fingerprint, record))
    report = {"base": str(out), "parameters": sum(p.numel() for p in model.parameters()), "fitted_block": fitted}
    if result is not None:
        report |= {"kept_epoch": result.epoch, "valid_log_likelihood": result.score, "seconds": round(result.seconds)}
    return report


def _other_images(source: Path, stream: ImageStream, seed: int) -> ImageStream:
    """An image set in the form of the stream's images, all classes in one block; its own test images stay unused."""
    _, size, _, channels = stream.images.shape
    return make_stream(read_image_folder(source, size, channels, stream.inverted), 1, seed, test=0.0)


def _check_images(model: "PreTrainedModel", stream: ImageStream, source: str) -> None:
    wanted = (getattr(model.config, "num_channels", None), getattr(model.config, "image_size", None))
    found = (stream.images.shape[3], stream.images.shape[1])
    if wanted != found:
        raise ConfigError(
            f"{source} takes {wanted[0]} channels of {wanted[1]} pixels, the stream has {found[0]} of {found[1]}",
            f"import the images with --size {wanted[1]} --channels {wanted[0]}",
        )


def train(config: ClassifyConfig, out: Path | None, sink: Sink) -> dict[str, Any]:
    """Start a run: adapt the base to every block of classes that it has not learned."""
    if out is not None:
        ranks.once(lambda: Run.refuse_existing(out))
    config = with_embedded(config, sink)
    stream, base = open_inputs(config)
    prepare(config, base)
    return begin(workload(), config, stream, base, out, sink)


def resume(run: Run[ClassifyConfig], sink: Sink, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Continue an interrupted run; see `cladapt.pipeline.lifecycle.resume`."""
    return continue_run(workload(), run, sink, asked)


def workload() -> Workload[ClassifyConfig]:
    """Classifying, as the life of a run sees it."""
    return Workload(
        open_inputs,
        lambda _, stream, base: blocks_after(base.fitted_block, stream.n_blocks),
        train_classes,
        lambda _: {},
    )


def prepare(config: ClassifyConfig, base: VisionBase) -> dict[str, nn.Parameter]:
    """Adapter parameters of a run: mistakes in its settings show before anything is written."""
    method = build(config.method)
    model = create_adapter(base, config.adapter, config.seed, method.parameters, config.kernels)
    parameters = adapter_parameters(model)
    unload(model)
    return parameters


def plan(config: ClassifyConfig) -> dict[str, Any]:
    """What a run would do: everything validated, images and parameters counted, nothing written."""
    refuse_unnamed(config)
    stream, base = open_inputs(config)
    parameters = prepare(config, base)
    blocks = set(blocks_after(base.fitted_block, stream.n_blocks))
    lines = [line for line in describe_blocks(stream) if line["block"] in blocks]
    for line in lines:
        batches = math.ceil(line["train"] / config.train.batch_images)
        line["steps"] = config.train.epochs * math.ceil(batches / config.train.accumulation)
    return {
        "method": config.method.name,
        "base_parameters": sum(p.numel() for p in base.model.parameters()),
        "trained_parameters": sum(p.numel() for p in parameters.values()),
        "adapted_modules": len({module_of(name) for name in parameters}),
        "method_state_bytes": build(config.method).state_bytes(parameters),
        "kernels": {op: implementation for op, (implementation, _) in ops.backends(config.kernels).items()},
        "blocks": lines,
    }


def open_inputs(config: ClassifyConfig) -> tuple[ImageStream, VisionBase]:
    """The stream and the base of a configuration, checked to belong together."""
    stream, base = ImageStream.load(Path(config.data)), load_vision_base(Path(config.base))
    if base.provenance["stream"] != stream.fingerprint:
        raise DataError(
            f"{config.base} was made for the stream {base.provenance['stream']}, {config.data} is {stream.fingerprint}",
            "make a base for this stream with `cladapt base vision`: its head has a row for each of the classes",
        )
    cast(nn.Module, base.model).to(ops.compute_device())
    return stream, base


def with_embedded(config: ClassifyConfig, sink: Sink) -> ClassifyConfig:
    """Fill in the digits and their small base where the configuration names none, making them once."""
    if names_inputs(config, "scikit-learn's digits and their small base"):
        return config
    stream, base = EMBEDDED / "stream", EMBEDDED / "base"
    if not ranks.once(stream.is_dir):
        ranks.once(lambda: digits_stream(0).save(stream, source="scikit-learn digits", license_note="BSD-3-Clause"))
    if not ranks.once(base.is_dir):
        sink.emit({"kind": "note", "text": f"training the embedded base in {base}"})
        make_base(stream, base, None, None, VitConfig(patch=2), sink)
    return config.model_copy(update={"data": str(stream), "base": str(base)})


def evaluate(run: Run[ClassifyConfig], settings: Mapping[str, Any], sink: Sink) -> dict[str, Any]:
    """Test every adapter of a run on the images of every block, and write rows, metrics.json and report.html."""
    config = resolve(ClassEvalConfig, {**run.config.eval.model_dump(), **settings}, "eval")
    stream, base = open_inputs(run.config)
    run.environment()  # the report tells of it: what is damaged shows now
    with locked(run.path):
        rows = pl.concat(_rows(run, stream, base, config, sink))
        result = ranks.once(lambda: _write(run, rows, stream, base, config))
    return {
        "run": str(run.path),
        "method": run.config.method.name,
        "report": str(run.path / "report.html"),
        "table": result["table"],
        "matrix": result["matrix"],
    }


def _rows(
    run: Run[ClassifyConfig], stream: ImageStream, base: VisionBase, config: ClassEvalConfig, sink: Sink
) -> Iterator[pl.DataFrame]:
    """Rows of the base and of every adapter."""
    trains = build(run.config.method).trains
    refuse_unfinished(run, blocks_after(base.fitted_block, stream.n_blocks) if trains else ())
    yield image_rows(base.model, stream, base.fitted_block, config.targets, config.batch_images)
    for block, folder in run.adapters.items():
        model = load_adapter(base, folder)
        yield image_rows(adapted_lm(model), stream, block, config.targets, config.batch_images)
        unload(model)
        sink.emit({"kind": "note", "text": f"tested the model of block {block}"})


def _write(
    run: Run[ClassifyConfig], rows: pl.DataFrame, stream: ImageStream, base: VisionBase, config: ClassEvalConfig
) -> dict[str, Any]:
    html, result = class_report(run, rows, stream, base, config)
    with atomic_dir(run.path / "images") as folder:
        write_parquet(folder / "rows.parquet", rows)
    write_json(run.path / "metrics.json", {"schema_version": 1, **result})
    with atomic_path(run.path / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return result
