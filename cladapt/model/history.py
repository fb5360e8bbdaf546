"""The history of an adapter: frozen factors of earlier blocks, W + scale (B_h A_h + B A).

Both are saved as one ordinary adapter of concatenated rank, relative to the base as it is, so nothing that reads
adapters needs to know. While a block is learned the history costs no time where the weights are float32: it is folded
into them, and taken out again. Other weights would round it (in bfloat16 weights of 0.02 an update of 1e-4 loses a
third of its norm): there it is a second, frozen adapter, which the fused linear takes as further ranks. It is one as
well, whatever the weights, where they are cut over processes, and where magnitudes of its parts learn: folded in, they
have no gradient.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cladapt.errors import ConfigError
from cladapt.model.adapter import NAME, lora_config, lora_layers, quiet, scale_of
from cladapt.model.sharding import is_cut

if TYPE_CHECKING:
    from peft import PeftModel

HISTORY = "history"
FOLDED = "cladapt_folded"


@dataclass(frozen=True)
class _Folded:
    """What a weight holds beside itself."""

    plain: Tensor
    down: Tensor
    up: Tensor


class Magnitudes(nn.Module):
    """[D_1 ... D_n], n parts of equal width [out, R / n] -> [a_1 D_1 ... a_n D_n], with the numbers a [n] learned."""

    def __init__(self, a: nn.Parameter) -> None:
        super().__init__()
        self.a = a

    def forward(self, directions: Tensor) -> Tensor:
        return directions * self.a.repeat_interleave(directions.shape[1] // len(self.a))


def set_history(
    model: "PeftModel", tensors: Mapping[str, Tensor], magnitudes: Mapping[str, nn.Parameter] | None = None
) -> None:
    """Put frozen factors beside the adapter, in place of earlier ones; none when empty.

    Named like the adapter's A and B: A_h [R, in] and B_h [out, R], at the adapter's own scale. `magnitudes`: numbers
    a [n] of every module, by its name, that learn; the columns of its B_h are n parts of equal width, and part i is
    multiplied by a_i.
    """
    _drop(model)
    if not tensors:
        return
    if lora_config(model, NAME).rank_pattern:
        raise ConfigError("frozen factors beside an adapter whose modules differ in rank", "use a low-rank method")
    layers = lora_layers(model)
    weights = [layer.get_base_layer().weight for layer in layers.values()]
    if not magnitudes and all(weight.dtype == torch.float32 and not is_cut(weight) for weight in weights):
        _fold(layers, tensors, scale_of(model))
        return
    _put_beside(model, layers, tensors)
    for name, a in (magnitudes or {}).items():
        parametrize.register_parametrization(layers[name].lora_B[HISTORY], "weight", Magnitudes(a))


@torch.no_grad()
def _fold(layers: Mapping[str, Any], tensors: Mapping[str, Tensor], scale: float) -> None:
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        down, up = (tensors[f"{name}.{factor}.{NAME}.weight"].to(weight.device) for factor in ("lora_A", "lora_B"))
        setattr(layer, FOLDED, _Folded(weight.data, down, up))
        weight.data = torch.addmm(weight.data, up, down, alpha=scale)


def _put_beside(model: "PeftModel", layers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    config = lora_config(model, NAME)
    config.r = next(len(tensor) for name, tensor in tensors.items() if ".lora_A." in name)
    config.lora_alpha, config.use_rslora, config.lora_dropout = scale_of(model) * config.r, False, 0.0
    with torch.random.fork_rng(devices=[]), quiet():
        model.add_adapter(HISTORY, config)
    cast(Any, model.base_model).set_adapter([NAME, HISTORY])
    with torch.no_grad():
        for name, layer in layers.items():
            for factor in ("lora_A", "lora_B"):
                weight = getattr(layer, factor)[HISTORY].weight
                weight.copy_(tensors[f"{name}.{factor}.{NAME}.weight"])
                weight.requires_grad_(False)


def _drop(model: "PeftModel") -> None:
    """Take the history away: the weights are the base's, bit for bit."""
    if HISTORY in model.peft_config:
        model.delete_adapter(HISTORY)
        model.set_adapter(NAME)
    for layer in lora_layers(model).values():
        if (folded := getattr(layer, FOLDED, None)) is not None:
            layer.get_base_layer().weight.data = folded.plain
            delattr(layer, FOLDED)


def history_of(model: nn.Module) -> dict[str, Tensor]:
    """The frozen factors under the names of the adapter's own, none where there is no history."""
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        folded = getattr(layer, FOLDED, None)
        if folded is not None:
            pair = (folded.down, folded.up)
        elif HISTORY in layer.lora_A:
            pair = (layer.lora_A[HISTORY].weight.detach(), layer.lora_B[HISTORY].weight.detach())
        else:
            continue
        found |= {f"{name}.{factor}.{NAME}.weight": t for factor, t in zip(("lora_A", "lora_B"), pair, strict=True)}
    return found


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base: without adapter and history."""
    layers = lora_layers(model).values()
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = [layer.get_base_layer().weight for layer in layers]
    held = [weight.data for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.enable_adapters(False)
        if (folded := getattr(layer, FOLDED, None)) is not None:
            weight.data = folded.plain
    try:
        yield
    finally:
        for layer, weight, data in zip(layers, weights, held, strict=True):
            layer.enable_adapters(True)
            weight.data = data
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learning[name])


def unload(model: "PeftModel") -> None:
    """Take adapter and history off, leaving the base exactly as it was."""
    _drop(model)
    model.unload()
