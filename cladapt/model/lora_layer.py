"""PEFT's LoRA layers with the linear and its low-rank term as one op; what is not plain LoRA takes PEFT's own way.

Registered through `LoraConfig._register_custom_module`, so saving, loading, merging and switching stay PEFT's.
"""

import functools
import math
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from cladapt import ops

if TYPE_CHECKING:
    from cladapt.model.items import ItemPasses

    _Layer = lora.Linear
else:
    _Layer = object


class _Fused(_Layer):
    """x W^T + bias + scale dropout(x) A^T B^T for one active plain adapter on a frozen linear.

    A second one at the same scale and without dropout is a history: frozen it is more ranks of the op, and where some
    of it learns plain torch adds it to what the op gives.
    """

    epilogue: ops.Epilogue | None = None
    """What a proximal term adds to the factors' gradients in the backward pass."""
    items: "ItemPasses | None" = None
    """The items of the tokens, while gradients are kept by item or factors perturbed by it."""
    by_item_alone: bool = False
    """Whether the op is there for items alone, for no kernel runs it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()  # once a pass: a module's attributes are slow, and so is this
        if args or kwargs or self._stock_reason(x, base):
            return super().forward(x, *args, **kwargs)
        return self._fused(x, base, None)

    def fused(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """The op, for the outputs `rows` int64 [m] alone where they are given: [..., in] -> [..., out] or [..., m]."""
        return self._fused(x, self.get_base_layer(), rows)

    def _fused(self, x: Tensor, base: Any, rows: Tensor | None) -> Tensor:
        name, *others = self.active_adapters
        beside = self._factors(*others) if others else None
        if beside is not None and rows is not None:
            beside = beside[0], beside[1].index_select(0, rows)
        if beside is None or not any(factor.requires_grad for factor in beside):
            return self._op(name, x, base, rows, beside)
        down, up = beside
        y = self._op(name, x, base, rows, None)
        return y + (self.scaling[name] * F.linear(F.linear(x.to(down.dtype), down), up)).to(y.dtype)

    def _op(self, name: str, x: Tensor, base: Any, rows: Tensor | None, frozen: tuple[Tensor, Tensor] | None) -> Tensor:
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
        # drawn where x lives, without a wait for the device; a checkpoint that computes again draws it again
        seed = torch.randint(2**62, (1,), device=x.device) if p > 0 else None
        down, up = self._factors(name)
        scale, items = self.scaling[name], self.items
        if rows is None:
            if items is None:
                return self._product(base, x, down, up, scale, p, seed, frozen, self._pulls(down, up))
            return self._by_item(items, False, x, base.weight, base.bias, down, up, scale, p, seed, frozen)
        weight, up = (cast(Tensor, table).index_select(0, rows) for table in (base.weight, up))
        bias = None if base.bias is None else cast(Tensor, base.bias).index_select(0, rows)
        if items is not None:
            return self._by_item(items, True, x, weight, bias, down, up, scale, p, seed, frozen)
        return ops.lora_linear(x, weight, bias, down, up, scale, p, seed, frozen, self._pulls(down, up))

    def _pulls(self, down: Tensor, up: Tensor) -> ops.Pulls:
        return None if self.epilogue is None else self.epilogue.of(down, up)

    def _by_item(self, items: "ItemPasses", picked: bool, x: Tensor, *product: Any) -> Tensor:
        weight, bias, down, up, scale, *rest = product
        kept = items.factors(self, x.numel() // x.shape[-1], picked)
        return ops.item_linear(x, weight, bias, down, up, scale, kept, *rest)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return cast(nn.Linear, self.lora_A[name]).weight, cast(nn.Linear, self.lora_B[name]).weight

    def _product(self, base: Any, x: Tensor, *factors: Any) -> Tensor:
        return ops.lora_linear(x, base.weight, base.bias, *factors)

    def _dtype(self, base: Any) -> torch.dtype:
        """The dtype that x must have."""
        return cast(torch.dtype, base.weight.dtype)

    def stock_reason(self, x: Tensor) -> str:
        """Why PEFT's own forward runs, empty where the op does."""
        return self._stock_reason(x, self.get_base_layer())

    def _stock_reason(self, x: Tensor, base: Any) -> str:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.by_item_alone and self.items is None:
            return "no kernel runs here, and no gradients are kept by item"
        if self.disable_adapters or self.merged:
            return "adapters are disabled or merged"
        if not names or len(names) != len(self.active_adapters) or not self._is_history(names[0], names[1:]):
            return f"{len(names)} adapters are active"
        name = names[0]
        dropout, bias = self.lora_dropout[name], base.bias
        if name in self.lora_variant or self.lora_bias[name]:
            return "a variant of LoRA, or LoRA with bias"
        if not isinstance(dropout, nn.Dropout | nn.Identity):
            return f"dropout of type {type(dropout).__name__}"
        if base.weight.requires_grad or (bias is not None and bias.requires_grad):
            return "the weights themselves train"
        if x.dtype != (dtype := self._dtype(base)) and not torch.is_autocast_enabled(x.device.type):
            return f"x is {x.dtype}, the weight {dtype}"
        return ""

    def _is_history(self, name: str, others: list[str]) -> bool:
        """Whether there is at most one other adapter, and it is plain and at the scale of this one."""
        return len(others) < 2 and all(
            isinstance(self.lora_dropout[other], nn.Identity)
            and other not in self.lora_variant
            and not self.lora_bias[other]
            and math.isclose(self.scaling[other], self.scaling[name], rel_tol=1e-12)
            for other in others
        )


class LoraLinear(_Fused, lora.Linear):
    """On a plain linear."""


@functools.cache
def _four_bit_layer() -> type | None:
    """The layer on bitsandbytes' 4-bit linear; None where bitsandbytes is not installed."""
    if not is_bnb_4bit_available():
        return None
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora.bnb import Linear4bit

    class Lora4bit(_Fused, Linear4bit):
        def _product(self, base: Any, x: Tensor, *factors: Any) -> Tensor:
            def dequantise() -> Tensor:
                return cast(Tensor, dequantize_4bit(base.weight.data, base.weight.quant_state))

            return ops.lora_linear_dequantised(x, dequantise, base.bias, *factors)

        def _dtype(self, base: Any) -> torch.dtype:
            return cast(torch.dtype, base.compute_dtype)

    return Lora4bit


def fused_linear(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """What PEFT calls for a module to adapt; None lets PEFT choose: other quantised linears subclass nn.Linear too."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if config.use_dora or config.lora_bias:
        return None
    if type(base) is nn.Linear:
        return LoraLinear(target, adapter_name, config=config, **kwargs)
    layer = _four_bit_layer()
    if layer is not None and type(base).__name__ == "Linear4bit" and hasattr(base.weight, "quant_state"):
        return cast(nn.Module, layer(target, adapter_name, config=config, **kwargs))
    return None


def register(config: lora.LoraConfig) -> None:
    """Make PEFT put the fused layers on every plain or 4-bit linear; not saved with the adapter."""
    config._register_custom_module({nn.Linear: fused_linear})  # type: ignore[dict-item]  # any callable will do
