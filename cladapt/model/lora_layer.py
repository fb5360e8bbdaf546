"""PEFT's LoRA layer with the linear and its low-rank term as one op; whatever is not plain LoRA takes PEFT's own way.

Registered through `LoraConfig._register_custom_module`, so saving, loading, merging and switching stay PEFT's.
"""

from typing import Any, cast

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cladapt import ops


class LoraLinear(lora.Linear):
    """x W^T + bias + scale dropout(x) A^T B^T for one active plain adapter on a frozen linear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.stock_reason(x):
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base, dropout = cast(nn.Linear, self.get_base_layer()), self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
        # drawn where x lives, without a wait for the device; a checkpoint that computes again draws it again
        seed = torch.randint(2**62, (1,), device=x.device) if p > 0 else None
        down, up = (cast(nn.Linear, factors[name]).weight for factors in (self.lora_A, self.lora_B))
        return ops.lora_linear(x, base.weight, base.bias, down, up, self.scaling[name], p, seed)

    def stock_reason(self, x: Tensor) -> str:
        """Why PEFT's own forward runs, empty where the op does."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged:
            return "adapters are disabled or merged"
        if len(names) != 1 or len(self.active_adapters) != 1:
            return f"{len(names)} adapters are active"
        (name,) = names
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        if name in self.lora_variant or self.lora_bias[name]:
            return "a variant of LoRA, or LoRA with bias"
        if not isinstance(dropout, nn.Dropout | nn.Identity):
            return f"dropout of type {type(dropout).__name__}"
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return "the weights themselves train"
        if x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return f"x is {x.dtype}, the weight {base.weight.dtype}"
        return ""


def fused_linear(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> LoraLinear | None:
    """What PEFT calls for a module to adapt; None lets PEFT choose: a quantised linear is a subclass of nn.Linear."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if type(base) is not nn.Linear or config.use_dora or config.lora_bias:
        return None
    return LoraLinear(target, adapter_name, config=config, **kwargs)


def register(config: lora.LoraConfig) -> None:
    """Make PEFT put `LoraLinear` on every plain linear; not saved with the adapter."""
    config._register_custom_module({nn.Linear: fused_linear})  # type: ignore[dict-item]  # any callable will do
