"""Layers computed again against layers kept: the same losses and gradients, bit for bit, from less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, ViTConfig, ViTForImageClassification

from cladapt.config import AdapterConfig
from cladapt.errors import ConfigError
from cladapt.model.adapter import adapter_parameters, create_adapter
from cladapt.model.checkpointing import set_checkpointing
from cladapt.model.packed import PackedLoss

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.2,
}


class Plain:
    """A base of random weights."""

    fingerprint, task_type, identity, extra_parameters = "", "CAUSAL_LM", {}, {}

    def __init__(self, config: Any) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)


def make_loss(config: Any) -> PackedLoss:
    model = create_adapter(Plain(config), AdapterConfig(rank=4, dropout=0.3), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return PackedLoss(model.get_base_model())


def rows() -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    tokens = torch.randint(1, 40, (3, 24))
    document = torch.ones_like(tokens)
    document[:, 10:] = 2
    return tokens, document, torch.arange(24).repeat(3, 1), torch.rand(tokens.shape) < 0.5


def passed(module: nn.Module, seed: int, training: bool = True) -> tuple[Tensor, dict[str, Tensor], int]:
    """Losses, gradients by name, and the bytes that the forward pass keeps for the backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = rows()
    module.train(training)
    module.zero_grad()
    torch.manual_seed(seed)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = module(*batch)
    losses.sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return losses.detach(), grads, sum(kept.values())


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SIZES), Qwen3Config(**SIZES, head_dim=16)], ids=lambda c: c.model_type
)
def test_losses_and_gradients_are_those_of_kept_layers_dropout_included(config: Any) -> None:
    module = make_loss(config)
    losses, grads, kept = passed(module, seed=3)
    set_checkpointing(module, True)
    again, regrads, less = passed(module, seed=3)
    assert torch.equal(losses, again)
    assert grads.keys() == regrads.keys()
    assert len(grads) == 2 * (7 * 3 + 1)
    assert all(torch.equal(grads[name], regrads[name]) for name in grads)
    assert less < kept / 2
    other, _, _ = passed(module, seed=4)
    assert not torch.equal(losses, other)  # there is dropout to be drawn again


def test_it_can_be_turned_off_and_does_nothing_in_evaluation() -> None:
    module = make_loss(LlamaConfig(**SIZES))
    before = passed(module, seed=0)[2]
    evaluated = passed(module, seed=0, training=False)
    set_checkpointing(module, True)
    assert passed(module, seed=0)[2] < before
    assert passed(module, seed=0, training=False)[2] == evaluated[2]
    set_checkpointing(module, False)
    assert passed(module, seed=0)[2] == before


def test_the_embedding_needs_no_gradient() -> None:
    module = make_loss(LlamaConfig(**SIZES))
    set_checkpointing(module, True)
    module.train()
    assert not module.lm.get_input_embeddings()(rows()[0]).requires_grad


def test_images_have_it_too_and_what_has_no_layers_is_refused() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    set_checkpointing(nn.ModuleDict({"vit": vision}), True)
    assert all(layer.gradient_checkpointing for layer in vision.modules() if type(layer).__name__ == "ViTLayer")
    set_checkpointing(nn.Linear(2, 2), False)
    with pytest.raises(ConfigError, match=r"^train.checkpointing: Linear has no layers that can be computed again"):
        set_checkpointing(nn.Linear(2, 2), True)
