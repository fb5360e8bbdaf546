"""Blocks of classes as examples, and the vision bases that learn them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cladapt import ops, ranks
from cladapt.config import VitConfig
from cladapt.data.images import ImageStream, make_stream, read_image_folder
from cladapt.errors import ConfigError
from cladapt.methods import Replay
from cladapt.model.vit import ClassLoss, new_vit, pixels_of, pretrained_vit, save_vision_base, with_classes
from cladapt.train.feeds import Batch, evenly
from cladapt.train.loop import FitResult
from cladapt.train.pretrain import fit_base
from cladapt.train.sinks import Sink
from cladapt.train.targets import ImageTargets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ImageFeed:
    """Labelled images: (pixels [B, C, H, W], label [B], counted [B])."""

    unit = "images"
    record: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(
        self, stream: ImageStream, train: np.ndarray, valid: np.ndarray, batch_images: int, warp: float = 0.0
    ) -> None:
        self._pixels, self._label = pixels_of(stream.images), torch.tensor(stream.label)
        self.items = ImageTargets(self._label[torch.from_numpy(train)], len(stream.classes))
        self.train, self.valid, self.per_batch, self.warp = train, valid, batch_images, warp

    def apart(self) -> "ImageFeed":
        return self  # an image is one target

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

    def singles(self, share: float, rows: int) -> Iterator[Batch]:
        return self._batches(np.array(evenly(self.train, share)), rows)  # type: ignore[arg-type]

    def validation(self) -> Iterator[Batch]:
        return self._batches(self.valid)

    def targets(self, batch: Batch) -> int:
        return int(batch[-1].sum())

    def used(self, batch: Batch) -> int:
        return len(batch[-1])

    def _batches(self, rows: np.ndarray, count: int = 0) -> Iterator[Batch]:
        """`count` rows at a time, or `per_batch`."""
        for first in range(0, len(rows), count or self.per_batch):
            piece = torch.from_numpy(rows[first : first + (count or self.per_batch)])
            yield self._pixels[piece], self._label[piece], torch.ones(len(piece), dtype=torch.bool)


def learned_rows(stream: ImageStream, blocks: Sequence[int], replay: Replay | None, seed: int) -> np.ndarray:
    """Row numbers of the images to learn: the training images of `blocks`, then those of earlier blocks again."""
    own = np.concatenate([stream.rows(block, "train") for block in blocks])
    if replay is None:
        return own
    past = [(block, str(row)) for block in range(1, blocks[0]) for row in stream.rows(block, "train")]
    again = [int(past[place][1]) for place in replay.take(past, seed)]
    return np.concatenate([own, np.array(again, dtype=own.dtype)])


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


def warped(pixels: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """Each image turned by up to `amount` radians, stretched and shifted by up to that share of it; edges repeat."""
    angle, wide, high, right, down = torch.from_numpy(rng.uniform(-amount, amount, size=(5, len(pixels)))).float()
    cos, sin = angle.cos(), angle.sin()
    rows = [(1 + wide) * cos, -sin, right, sin, (1 + high) * cos, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


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


def make_vision_base(
    stream: ImageStream, out: Path, source: Path | None, init: str | None, config: VitConfig, sink: Sink
) -> dict[str, Any]:
    """A vision base for a stream: trained on another image set, on the stream's block 1, or a given checkpoint.

    `source`: the image set, its channels and side those of the stream, all of its classes learned at once. `init`: an
    image classifier of transformers, taken as it is. Without either a small one learns block 1, and blocks begin at 2.
    """
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
