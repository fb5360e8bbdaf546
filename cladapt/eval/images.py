"""Class-incremental evaluation: what a model makes of every image, without being told the image's block."""

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from cladapt.data.images import ImageStream
from cladapt.model.adapter import CLASSIFIER
from cladapt.model.vit import inputs_of, pixels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = {"model": pl.Int64, "block": pl.Int64, "image": pl.Int64, "correct": pl.Int8, "probe": pl.Int8}


def image_rows(
    model: "PreTrainedModel", stream: ImageStream, model_block: int, split: str, batch_images: int
) -> pl.DataFrame:
    """One row for each image of a split and every block, of the model made after `model_block`; see `ROWS`.

    correct   the highest logit among the classes of all blocks up to `model_block` is the image's; null for later ones
    probe     the nearest class mean among the classes of the image's own block is the image's: features before the
              head, normalised, means over training images; what the features know before the head has learned
    """
    seen = torch.from_numpy(stream.seen(model_block))
    frames = []
    for block in range(1, stream.n_blocks + 1):
        rows, classes = stream.rows(block, split), torch.from_numpy(stream.classes_of(block))
        label = torch.from_numpy(stream.label[rows])
        logits, features = _outputs(model, stream, rows, batch_images)
        train = stream.rows(block, "train")
        _, known = _outputs(model, stream, train, batch_images)
        means = _class_means(known, torch.from_numpy(stream.label[train]), classes)
        probed = classes[(features @ means.mT).argmax(1)]
        correct = None
        if block <= model_block:
            correct = (seen[logits[:, seen].argmax(1)] == label).numpy().astype(np.int8)
        columns = {"image": rows, "correct": correct, "probe": (probed == label).numpy().astype(np.int8)}
        frame = pl.DataFrame(columns, schema={name: ROWS[name] for name in columns})
        frames.append(frame.select(pl.lit(model_block).alias("model"), pl.lit(block).alias("block"), pl.all()))
    return pl.concat(frames).cast(ROWS)  # type: ignore[arg-type]


def _class_means(features: Tensor, label: Tensor, classes: Tensor) -> Tensor:
    """Normalised mean of the normalised features of each class [classes, d]."""
    means = torch.stack([features[label == c].mean(0) for c in classes])
    return nn.functional.normalize(means, dim=1)


@torch.no_grad()
def _outputs(
    model: "PreTrainedModel", stream: ImageStream, rows: np.ndarray, batch_images: int
) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] and normalised features [n, d] of images, on the CPU in float32."""
    model.eval()
    device = next(model.parameters()).device
    logits, features = [], []
    with inputs_of(model.get_submodule(CLASSIFIER)) as seen:
        for first in range(0, len(rows), batch_images):
            pixels = pixels_of(stream.images[rows[first : first + batch_images]]).to(device)
            logits.append(model(pixel_values=pixels).logits.float().cpu())
            features.append(nn.functional.normalize(seen.pop().float().cpu(), dim=1))
    return torch.cat(logits), torch.cat(features)
