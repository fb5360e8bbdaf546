"""What an image classifier makes of images before and behind its head, and where classes lie there."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cladapt.data.images import ImageStream
from cladapt.errors import DataError
from cladapt.model.adapter import CLASSIFIER
from cladapt.model.vit import inputs_of, pixels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def outputs_on(model: "PreTrainedModel", images: np.ndarray, batch_images: int) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] and features of length 1 [n, d] of images uint8 [n, H, W, C], on the CPU in float32."""
    model.eval()
    device = next(model.parameters()).device
    logits, features = [], []
    with inputs_of(model.get_submodule(CLASSIFIER)) as seen:
        for first in range(0, len(images), batch_images):
            pixels = pixels_of(images[first : first + batch_images]).to(device)
            logits.append(model(pixel_values=pixels).logits.float().cpu())
            features.append(F.normalize(seen.pop().float().cpu(), dim=1))
    return torch.cat(logits), torch.cat(features)


def block_means(model: "PreTrainedModel", stream: ImageStream, block: int, batch_images: int) -> Tensor:
    """`class_means` of a block's classes over its training images, as the model has them: float32 [classes, d]."""
    rows = stream.rows(block, "train")
    _, features = outputs_on(model, stream.images[rows], batch_images)
    return class_means(features, torch.from_numpy(stream.label[rows]), torch.from_numpy(stream.classes_of(block)))


def class_means(features: Tensor, label: Tensor, classes: Tensor) -> Tensor:
    """`normalize(mean of the features of the class)`, a row for each of `classes`: float [n, d], int64 [n] -> [c, d].

    `DataError` for a class without a feature.
    """
    for c in classes[~torch.isin(classes, label)].tolist():
        raise DataError(f"class {c} has no training image: it has no mean", "import the images anew, or without it")
    return F.normalize(torch.stack([features[label == c].mean(0) for c in classes]), dim=1)
