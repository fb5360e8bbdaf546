"""Vision bases: a Hugging Face image classifier whose head has a row for every class of a stream, known or not yet.

The directory is an ordinary checkpoint beside `cladapt.json`. Blocks learn an adapter and the rows of their own
classes; the rows of others keep what they have, unless a method has a term on their logits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from pydantic import BaseModel, NonNegativeInt
from torch import Tensor, nn
from torch.nn import functional as F

from cladapt import __version__
from cladapt.artifacts import atomic_dir, hash_value, read_record, write_json
from cladapt.config import VitConfig
from cladapt.errors import ConfigError, DataError
from cladapt.model.adapter import CLASSIFIER
from cladapt.model.cosine import CosineHead
from cladapt.model.items import ItemPasses
from cladapt.model.load import PROVENANCE, RESTORE, Made, verify_weights
from cladapt.model.observe import Observable, Outputs
from cladapt.model.weights import check_finite, weights_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_WIDTH = 16


class VisionRecord(BaseModel):
    """What a vision base's `cladapt.json` must hold."""

    fingerprint: str
    fitted_block: NonNegativeInt
    classes: str
    stream: str


@dataclass(frozen=True)
class VisionBase(Made):
    """An image classifier with its provenance."""

    model: "PreTrainedModel"
    provenance: Mapping[str, Any]

    @property
    def task_type(self) -> None:
        """PEFT has no name for this task."""

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads it."""
        return "AutoModelForImageClassification"

    @property
    def identity(self) -> Mapping[str, str]:
        """What an adapter says of its base beside the fingerprint."""
        return {"classes": str(self.provenance["classes"])}

    @property
    def extra_parameters(self) -> Mapping[str, nn.Parameter]:
        """What of the classifier learns, by the names that a saved adapter has for it."""
        return {f"base_model.model.{CLASSIFIER}.{name}": p for name, p in self.classifier.named_parameters()}

    @property
    def extra_tensors(self) -> Mapping[str, Tensor]:
        """The classifier's tensors by those names."""
        return {f"base_model.model.{CLASSIFIER}.{name}": t for name, t in self.classifier.state_dict().items()}

    @property
    def classifier(self) -> nn.Linear:
        """The head, a row for each class."""
        return cast(nn.Linear, self.model.get_submodule(CLASSIFIER))

    def settle(self) -> None:
        """Rows of a cosine head get length 1: a stock linear layer of what is then saved has the same highest class."""
        if isinstance(self.classifier, CosineHead):
            self.classifier.settle()

    def take_cosine_head(self, scale: float) -> CosineHead:
        """Put a cosine head without a learned row in the place of the classifier."""
        old = self.classifier
        head = CosineHead(old.in_features, old.out_features, scale).to(old.weight.device).requires_grad_(False)
        setattr(self.model, CLASSIFIER, head)
        return head


def new_vit(config: VitConfig, side: int, channels: int, classes: int) -> "PreTrainedModel":
    """A vision transformer with random weights for square images of `side` pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    if side % config.patch:
        raise ConfigError(f"patch={config.patch} does not divide the side of {side} pixels", "choose another patch")
    settings = ViTConfig(
        hidden_size=config.hidden,
        intermediate_size=4 * config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.hidden // HEAD_WIDTH,
        hidden_dropout_prob=config.dropout,
        initializer_range=config.hidden**-0.5,  # 0.02 suits a width of 768, here it would be a long plateau
        image_size=side,
        patch_size=config.patch,
        num_channels=channels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return with_classes(ViTForImageClassification(settings), classes)


def pretrained_vit(source: str) -> "PreTrainedModel":
    """Any image classifier of transformers whose head is one linear; nothing pickled is read, no code of it runs."""
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForImageClassification.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged checkpoint makes transformers fail in every way there is
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"cannot load an image classifier from {source!r}: {reason}",
            "give a local Hugging Face checkpoint directory, or a hub id that this machine can reach",
        ) from error
    if not isinstance(getattr(model, CLASSIFIER, None), nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no linear {CLASSIFIER!r}", "use one that has, like ViT")
    return cast("PreTrainedModel", model)


def with_classes(model: "PreTrainedModel", classes: int) -> "PreTrainedModel":
    """The model with a head of `classes` rows of zeros, none of them learned yet."""
    head = nn.Linear(cast(nn.Linear, model.get_submodule(CLASSIFIER)).in_features, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    setattr(model, CLASSIFIER, head.to(next(model.parameters()).device))
    model.config.num_labels = classes
    return model


def pixels_of(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] from -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(127.5).sub_(1.0)


class ClassLoss(Observable):
    """Negative log-likelihood of labels among the `classes` of one block: other rows of the head take no part.

    `earlier`: the classes that were learned before, whose logits are the alternatives of its outputs. `start`: gives
    the rows of new classes what they start from, where that is not what they have.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        classes: np.ndarray,
        earlier: np.ndarray | None = None,
        start: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.model, self._start = model, start
        self.earlier = torch.from_numpy(np.zeros(0, np.int64) if earlier is None else earlier.astype(np.int64))
        head = cast(nn.Linear, model.get_submodule(CLASSIFIER))
        outside = torch.full((head.out_features,), -torch.inf)
        outside[torch.from_numpy(classes)] = 0.0
        self.register_buffer("outside", outside.to(head.weight.device), persistent=False)

    def begin(self) -> None:
        if self._start is not None:
            self._start()

    def forward(self, pixels: Tensor, label: Tensor, counted: Tensor, items: ItemPasses | None = None) -> Tensor:
        """float32, one per image that counts; [B, C, H, W], int64 [B], bool [B]. `items` learns whose they are."""
        if items is not None:
            items.pick(items.owner[counted])
        with inputs_of(self.model.get_submodule(CLASSIFIER)) as seen:
            if self.observed:
                self.outputs, self.counted = None, counted
            logits = self.model(pixel_values=pixels).logits.float()
        if self.observed:
            features, old = seen[0][counted], logits[counted][:, self.earlier.to(logits.device)]
            choice = torch.arange(len(old), device=old.device).repeat_interleave(old.shape[1])
            self.outputs = Outputs(features, features, label[counted], old.flatten(), choice, logits.shape[1])
        return F.cross_entropy(logits + self.outside, label, reduction="none")[counted]


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What goes into a module inside, in order."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handle = module.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def save_vision_base(folder: Path, model: "PreTrainedModel", classes: str, provenance: Mapping[str, Any]) -> None:
    """Write a base directory, whole or not at all; `classes` identifies the rows of the head."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_finite("the model to be saved", dict(model.state_dict()), "train it again with a lower lr")
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        fingerprint = hash_value([weights_hash(model), classes])
        record = {**provenance, "classes": classes, "fingerprint": fingerprint, "cladapt": __version__}
        write_json(temporary / PROVENANCE, record)


def load_vision_base(folder: Path) -> VisionBase:
    """Read a vision base; all parameters frozen, evaluation mode."""
    if not (folder / PROVENANCE).is_file():
        raise DataError(f"{folder} is not a vision base: it has no {PROVENANCE}", "make one with `cladapt base vision`")
    record = read_record(folder / PROVENANCE, VisionRecord, RESTORE)
    model = pretrained_vit(str(folder))
    verify_weights(folder, model, record["classes"], record["fingerprint"])
    model.requires_grad_(False)
    return VisionBase(model.eval(), record)
