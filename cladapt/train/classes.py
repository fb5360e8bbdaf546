"""Class-incremental learning: blocks of classes, and the training of a small vision base."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cladapt.config import ClassifyConfig, VitConfig
from cladapt.data.images import ImageStream
from cladapt.methods import build
from cladapt.model.adapter import adapted_lm
from cladapt.model.vit import ClassLoss, VisionBase, pixels_of
from cladapt.train.blocks import blocks_after, learn_blocks
from cladapt.train.feeds import Batch, evenly
from cladapt.train.loop import FitResult
from cladapt.train.pretrain import fit_base
from cladapt.train.sinks import Sink

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class ImageFeed:
    """Labelled images: (pixels [B, C, H, W], label [B], counted [B])."""

    unit = "images"

    def __init__(
        self, stream: ImageStream, train: np.ndarray, valid: np.ndarray, batch_images: int, warp: float = 0.0
    ) -> None:
        self._pixels, self._label = pixels_of(stream.images), torch.tensor(stream.label)
        self.train, self.valid, self.per_batch, self.warp = train, valid, batch_images, warp

    def __len__(self) -> int:
        return len(self.train)

    @property
    def validation_targets(self) -> int:
        return len(self.valid)

    def epoch(self, seed: Sequence[int]) -> list[Batch]:
        rng = np.random.default_rng(seed)
        batches = list(self._batches(rng.permutation(self.train)))
        return [(warped(pixels, self.warp, rng), *rest) for pixels, *rest in batches] if self.warp else batches

    def sample(self, share: float) -> list[Batch]:
        return list(self._batches(np.array(evenly(self.train, share))))  # type: ignore[arg-type]

    def validation(self) -> Iterator[Batch]:
        return self._batches(self.valid)

    def targets(self, batch: Batch) -> int:
        return int(batch[-1].sum())

    def used(self, batch: Batch) -> int:
        return len(batch[-1])

    def _batches(self, rows: np.ndarray) -> Iterator[Batch]:
        for first in range(0, len(rows), self.per_batch):
            piece = torch.from_numpy(rows[first : first + self.per_batch])
            yield self._pixels[piece], self._label[piece], torch.ones(len(piece), dtype=torch.bool)


def warped(pixels: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """Each image turned by up to `amount` radians, stretched and shifted by up to that share of it; edges repeat."""
    angle, wide, high, right, down = torch.from_numpy(rng.uniform(-amount, amount, size=(5, len(pixels)))).float()
    cos, sin = angle.cos(), angle.sin()
    rows = [(1 + wide) * cos, -sin, right, sin, (1 + high) * cos, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def train_classes(
    run: Path,
    config: ClassifyConfig,
    stream: ImageStream,
    base: VisionBase,
    sink: Sink,
    config_hash: str,
    provenance: Mapping[str, Any],
) -> dict[int, FitResult]:
    """Adapt to every block of classes that the base has not learned.

    A method that learns on past data has the images of all blocks, and the softmax over all their classes.
    """
    method = build(config.method)
    if not method.trains:
        return {}

    def task(model: "PeftModel", block: int) -> tuple[ClassLoss, ImageFeed]:
        learned = range(1, block + 1) if method.past_data else (block,)
        train = np.concatenate([stream.rows(b, "train") for b in learned])
        classes = np.concatenate([stream.classes_of(b) for b in learned])
        feed = ImageFeed(stream, train, stream.rows(block, "valid"), config.train.batch_images)
        return ClassLoss(adapted_lm(model), classes), feed

    blocks = blocks_after(base.fitted_block, stream.n_blocks)
    return learn_blocks(run, config, method, base, blocks, task, sink, config_hash, provenance)


def fit_vision(
    model: "PreTrainedModel", stream: ImageStream, blocks: Sequence[int], config: VitConfig, sink: Sink
) -> FitResult:
    """Train all weights on the images of some blocks, stopping by the validation log-likelihood."""
    train, valid, classes = (
        np.concatenate([part(block) for block in blocks])
        for part in (
            lambda block: stream.rows(block, "train"),
            lambda block: stream.rows(block, "valid"),
            stream.classes_of,
        )
    )
    feed = ImageFeed(stream, train, valid, config.batch_images, config.warp)
    return fit_base(ClassLoss(model, classes), dict(model.named_parameters()), feed, config, sink)
