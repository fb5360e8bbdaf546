"""LoRA adapters through PEFT: one adapter learns, and of the base nothing."""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cladapt import ops
from cladapt.config import AdapterConfig
from cladapt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NAME = "default"
CLASSIFIER = "classifier"
ITEMS = "items"
BESIDE = (CLASSIFIER, ITEMS)
"""Modules of bases that may learn beside an adapter: a head's rows of classes, a table's rows of items."""
_SHOWN = 3
Parameters = Literal["factors", "weights", "directions"]


class AdaptedBase(Protocol):
    """A base that adapters are put on."""

    @property
    def model(self) -> "PreTrainedModel": ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def task_type(self) -> str | None:
        """PEFT's name of its task."""

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads it; empty where none does."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What an adapter's `cladapt.json` says of it beside the fingerprint."""

    @property
    def extra_parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns with an adapter and is no part of it, such as a classifier, by its names in a saved adapter."""

    @property
    def extra_tensors(self) -> Mapping[str, Tensor]:
        """What is saved with an adapter for that, by the same names: what learns, and what goes with it."""

    def settle(self) -> None:
        """Bring what learned beside the adapter into the form in which it is saved; its outputs stay what they are."""


class Scaled(nn.Module):
    """U [out, r] -> s U, with the number s learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, directions: Tensor) -> Tensor:
        return self.scale * directions


def create_adapter(
    base: AdaptedBase,
    config: AdapterConfig,
    seed: int,
    learns: Parameters = "factors",
    kernels: ops.Choice = "auto",
    by_item: bool = False,
) -> "PeftModel":
    """Put a fresh LoRA adapter (B = 0) on the base; its initial values depend on `seed` alone.

    `learns`. `factors`: A and B. `directions`: A, U and a number s for each module, B = s U. `weights`: delta W, which
    is one factor of every module; the other is the frozen identity. At scale 1 and without dropout the gradient is
    that of W and the result is still a LoRA adapter. `by_item`: its layers can keep gradients by item; see
    `cladapt.model.items`.
    """
    from peft import LoraConfig, get_peft_model

    full_rank = learns == "weights"
    try:
        lora = LoraConfig(
            task_type=base.task_type,
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT computes with floats
            lora_dropout=0.0 if full_rank else config.dropout,
            use_rslora=config.rslora and not full_rank,
            target_modules=_targets(base.model, config.targets),
        )
        if not full_rank:
            use_kernel(lora, kernels, by_item)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            model: PeftModel = get_peft_model(base.model, lora, adapter_name=NAME)
            if full_rank:
                model = _with_full_rank(model, lora)
    except (ValueError, re.error) as error:
        raise ConfigError(
            f"adapter.targets={config.targets!r}: {str(error).splitlines()[0]}",
            f"linear modules of this model end in: {', '.join(_linearnames_module(base.model))}",
        ) from error
    adapter_parameters(model)
    if by_item and not ops.uses_kernel("lora_linear", kernels):
        for layer in lora_layers(model).values():
            layer.by_item_alone = True
    if learns == "directions":
        for module in lora_layers(model).values():
            parametrize.register_parametrization(module.lora_B[NAME], "weight", Scaled())
    return model


def use_kernel(lora: Any, kernels: ops.Choice, by_item: bool = False) -> None:
    """Make PEFT put the fused linear where a kernel runs it, or where it keeps gradients by item.

    Full rank is a dense product and gains nothing.
    """
    if by_item or ops.uses_kernel("lora_linear", kernels):
        from cladapt.model.lora_layer import register

        register(lora)


def _targets(lm: "PreTrainedModel", targets: str | tuple[str, ...]) -> str | list[str]:
    """The target modules as PEFT takes them; a head that shares the embedding's weights is refused.

    Merging an adapter of a shared head would change the embedding as well. A classifier is no language model's head:
    it learns new rows, and is never adapted.
    """
    if targets not in ("auto", "all-linear"):
        _check_targets(lm, targets)
    head = lm.get_output_embeddings()
    if head is None:
        if targets in ("auto", "all-linear"):
            return [name for name in _linearnames_module(lm) if name != CLASSIFIER]
        if names_module(targets, CLASSIFIER):
            raise ConfigError("adapter.targets names the classifier, which learns as a whole", "leave it out")
        return targets if isinstance(targets, str) else list(targets)
    shared = head.weight is lm.get_input_embeddings().weight
    (name,) = (n for n, module in lm.named_modules() if module is head)
    if targets == "auto":
        return "all-linear" if shared else _linearnames_module(lm)
    if shared and targets != "all-linear" and names_module(targets, name):
        raise ConfigError(
            f"adapter.targets names the head {name!r}, which shares its weights with the embedding",
            "leave it out, or use a base with a head of its own",
        )
    return targets if isinstance(targets, str) else list(targets)


def _check_targets(lm: nn.Module, targets: str | tuple[str, ...]) -> None:
    """`ConfigError` for a target that names no module, or one that is no linear layer."""
    hint = f"linear modules of this model end in: {', '.join(_linearnames_module(lm))}"
    modules = dict(lm.named_modules())
    chosen: dict[str, list[str]] = {}
    for target in [targets] if isinstance(targets, str) else targets:
        named = target if isinstance(targets, str) else (target,)
        chosen[target] = [name for name in modules if name and names_module(named, name)]
    if nothing := [target for target, names in chosen.items() if not names]:
        raise ConfigError(f"adapter.targets={targets!r}: no module is named by {', '.join(map(repr, nothing))}", hint)
    strange = {name: type(modules[name]).__name__ for names in chosen.values() for name in names}
    strange = {name: kind for name, kind in strange.items() if not isinstance(modules[name], nn.Linear)}
    if strange:
        found = ", ".join(f"{name} ({kind})" for name, kind in list(strange.items())[:_SHOWN])
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        raise ConfigError(f"adapter.targets={targets!r} names what is no linear layer: {found}{more}", hint)


def names_module(targets: str | Sequence[str], module: str) -> bool:
    """Whether PEFT takes `module` for one of the targets."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _with_full_rank(model: "PeftModel", lora: Any) -> "PeftModel":
    """The same modules with rank min(in, out): the factor on the narrow side is the identity, the other zero."""
    from peft import get_peft_model

    sizes = {}
    for name, module in lora_layers(model).items():
        sizes[name.removeprefix("base_model.model.")] = min(module.in_features, module.out_features)
    lora.rank_pattern, lora.alpha_pattern = sizes, dict(sizes)
    model = get_peft_model(cast("PreTrainedModel", model.unload()), lora, adapter_name=NAME)
    for module in lora_layers(model).values():
        down, up = module.lora_A[NAME].weight, module.lora_B[NAME].weight
        identity, delta = (down, up) if module.in_features <= module.out_features else (up, down)
        nn.init.eye_(identity)
        nn.init.zeros_(delta)
        identity.requires_grad_(False)
    return model


def lora_config(model: "PeftModel", adapter: str) -> Any:
    """A copy of an adapter's LoraConfig."""
    return copy.deepcopy(model.peft_config[adapter])


def scale_of(model: nn.Module) -> float:
    """alpha / r of the adapter, the same in every module."""
    return float(next(iter(lora_layers(model).values())).scaling[NAME])


def lora_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's tensors that learn, by name; an error if anything else would, what may learn beside it apart."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name: p for name, p in learning.items() if ".lora_" in name}
    beside = tuple(f"base_model.model.{module}." for module in BESIDE)
    strange = [name for name in learning if name not in own and not name.startswith(beside)]
    if strange:
        raise ConfigError(f"{strange[0]} would train beside the adapter", "adapters touch linear layers only")
    return own


def epilogue_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> ops.Epilogue | None:
    """Where a proximal term of these parameters can join what the fused linears' backward passes write.

    It takes the place of an earlier one; None where no layer is a fused linear.
    """
    layers = [layer for layer in lora_layers(model).values() if hasattr(layer, "epilogue")]
    if not layers:
        return None
    found = ops.Epilogue([*parameters.values()])
    for layer in layers:
        layer.epilogue = found
    return found


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A detached copy of the adapter's A and B, frozen and computed ones too, under the names of LoRA's weights."""
    return {
        f"{name}.{factor}.{NAME}.weight": getattr(module, factor)[NAME].weight.detach().clone()
        for name, module in lora_layers(model).items()
        for factor in ("lora_A", "lora_B")
    }


def adapted_weights(model: nn.Module) -> dict[str, Tensor]:
    """The frozen weight [out, in] of every adapted module, by the module's name."""
    return {name: module.get_base_layer().weight for name, module in lora_layers(model).items()}


def set_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy A and B into the adapter; names and shapes must match exactly. Where B = s U, s becomes 1."""
    own = adapter_tensors(model)
    wrong = sorted(set(own) ^ set(tensors)) or [n for n, t in own.items() if t.shape != tensors[n].shape]
    if wrong:
        raise DataError(
            f"the adapter does not fit this model: {len(wrong)} tensors differ, the first {wrong[0]}",
            "use the base and the adapter settings it was trained with",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            linear = model.get_submodule(name.removesuffix(".weight"))
            if parametrize.is_parametrized(linear):
                cast(Any, linear).parametrizations.weight.original.copy_(tensor)
                cast(Any, linear).parametrizations.weight[0].scale.fill_(1.0)
            else:
                cast(nn.Linear, linear).weight.copy_(tensor)


def adapted_lm(model: "PeftModel") -> "PreTrainedModel":
    """The causal LM itself, with the adapter's layers inside it."""
    return cast("PreTrainedModel", model.get_base_model())


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PEFT warns about that does not concern a local base: hub look-ups, tied heads, renamed names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
        yield


def _linearnames_module(model: nn.Module) -> list[str]:
    return sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
