"""Class-incremental evaluation: what a model makes of every image, without being told the image's block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cladapt.data.images import ImageStream
from cladapt.errors import DataError
from cladapt.eval.biases import fit_biases
from cladapt.model.features import block_means, outputs_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "correct"
FURTHER = {
    "biased": "The head with a bias for each block, fitted on validation images",
    "prototype": "The nearest prototype, the class mean that each block left",
}
"""Columns of `ROWS` that judge other classifiers of the same model, and what those are."""
ROWS = {
    "model": pl.Int64,
    "block": pl.Int64,
    "image": pl.Int64,
    HEAD: pl.Int8,
    **dict.fromkeys(FURTHER, pl.Int8),
    "probe": pl.Int8,
}
PROTOTYPES: Mapping[str, Any] = {"class": pl.Int64, "vector": pl.List(pl.Float32)}
BIASES: Mapping[str, Any] = {"model": pl.Int64, "block": pl.Int64, "bias": pl.Float64}


@dataclass(frozen=True)
class Answers:
    """Rows of a model on all images, see `image_rows`, and what classifies beside its head.

    `prototypes`: of the classes of all blocks up to its own, float32 [classes, d]. `biases`: of these blocks, as
    `BIASES`; none where they cannot be fitted.
    """

    rows: pl.DataFrame
    prototypes: Tensor
    biases: pl.DataFrame


def image_rows(
    model: "PreTrainedModel",
    stream: ImageStream,
    model_block: int,
    split: str,
    batch_images: int,
    prototypes: Tensor,
) -> Answers:
    """One row for each image of a split and every block, of the model made after `model_block`; see `ROWS`.

    correct    the highest logit among the classes of all blocks up to `model_block` is the image's; null for later ones
    biased     the same of logits with a bias for each block, see `cladapt.eval.biases`; null where the split is the
               validation images, which biases are fitted on, and where a block has none
    prototype  the nearest prototype among these classes is the image's: class means of features before the head, both
               of length 1, over training images, made once, by the first model that has learned the class (nearest mean
               of iCaRL, Rebuffi et al. 2017, without its stored images)
    probe      the nearest class mean among the classes of the image's own block is the image's, means by this model:
               what the features know before the head has learned

    `prototypes`: those of earlier models, float32 [classes, d], of the first classes of the stream.
    """
    blocks = range(1, stream.n_blocks + 1)
    seen = torch.from_numpy(stream.seen(model_block))

    def outputs(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return outputs_on(model, stream.images[rows], batch_images)

    means = [block_means(model, stream, block, batch_images) for block in blocks]
    own_prototypes = torch.cat(means)[: len(seen)]  # classes are numbered in the order of their blocks
    if len(prototypes):
        own_prototypes[: len(prototypes)] = prototypes
    biases = None
    held_out = [stream.rows(block, "valid") for block in blocks[:model_block]]
    if split != "valid" and held_out and all(map(len, held_out)):
        rows = np.concatenate(held_out)
        block_of_image = stream.block_of_class[stream.label[rows]]
        biases = fit_biases(outputs(rows)[0][:, seen].numpy(), stream.block_of_class[seen], block_of_image)
    frames = []
    for block, own_means in zip(blocks, means, strict=True):
        rows, classes = stream.rows(block, split), torch.from_numpy(stream.classes_of(block))
        label = torch.from_numpy(stream.label[rows])
        logits, features = outputs(rows)
        answers = {"probe": classes[(features @ own_means.mT).argmax(1)]}
        if block <= model_block:
            known = logits[:, seen]
            answers[HEAD] = seen[known.argmax(1)]
            answers["prototype"] = seen[(features @ own_prototypes.mT).argmax(1)]
            if biases is not None:
                added = torch.from_numpy(biases[stream.block_of_class[seen] - 1])
                answers["biased"] = seen[(known.double() + added).argmax(1)]
        right = {name: (answer == label).numpy().astype(np.int8) for name, answer in answers.items()}
        columns = {"image": rows, **{name: right.get(name) for name in (HEAD, *FURTHER, "probe")}}
        frame = pl.DataFrame(columns, schema={name: ROWS[name] for name in columns})
        frames.append(frame.select(pl.lit(model_block).alias("model"), pl.lit(block).alias("block"), pl.all()))
    fitted = [] if biases is None else [(model_block, j, float(bias)) for j, bias in enumerate(biases, 1)]
    return Answers(
        pl.concat(frames).cast(ROWS),  # type: ignore[arg-type]
        own_prototypes,
        pl.DataFrame(fitted, schema=BIASES, orient="row"),
    )


def prototype_frame(prototypes: Tensor) -> pl.DataFrame:
    """Prototypes [classes, d] as `PROTOTYPES`."""
    return pl.DataFrame({"class": range(len(prototypes)), "vector": prototypes.tolist()}, schema=PROTOTYPES)


def prototypes_of(frame: pl.DataFrame) -> Tensor:
    """Float32 [classes, d] of `PROTOTYPES`; `DataError` unless they are of classes 0, 1, … and of one width."""
    widths = frame["vector"].list.len().unique().to_list()
    if frame["class"].to_list() != list(range(frame.height)) or len(widths) > 1 or frame["vector"].null_count():
        raise DataError(
            f"prototypes of the classes {frame['class'].to_list()} with {widths} numbers each",
            "expected one of each class from 0 on, all of one width",
        )
    return torch.tensor(frame["vector"].to_list(), dtype=torch.float32).reshape(frame.height, *widths[:1])
