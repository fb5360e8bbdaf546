"""Gradient checkpointing: of each layer its input alone is kept, and the backward pass computes the layer again."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from cladapt.errors import ConfigError


def set_checkpointing(module: nn.Module, on: bool) -> None:
    """Turn the checkpointing of every layer of the transformers model inside `module` on or off.

    It works in training mode alone. Gradients are those of `loss.backward()` without it, dropout included: the state
    of the generators is kept with a layer's input. `ConfigError` where there is no layer to checkpoint.
    """
    from transformers import PreTrainedModel

    model = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)
    able = model is not None and model.supports_gradient_checkpointing
    if able:
        # the public switch makes the embedding's output need a gradient too, for reentrant checkpoints: adapters do not
        model._set_gradient_checkpointing(on, partial(checkpoint, use_reentrant=False))  # type: ignore[union-attr]
    elif on:
        name = type(module if model is None else model).__name__
        raise ConfigError(f"train.checkpointing: {name} has no layers that can be computed again", "leave it out")
