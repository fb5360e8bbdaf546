"""LoRA adapters through PEFT: create, load, save; always exactly one adapter, and only its tensors train."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cladapt import __version__
from cladapt.artifacts import atomic_dir, read_json, read_tensors, write_json
from cladapt.config import AdapterConfig
from cladapt.errors import ConfigError, DataError
from cladapt.model.load import PROVENANCE, Base

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NAME = "default"


def create_adapter(base: Base, config: AdapterConfig, seed: int) -> "PeftModel":
    """Put a fresh LoRA adapter (B = 0) on the base; its initial values depend on `seed` alone."""
    from peft import LoraConfig, get_peft_model

    try:
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT computes with floats
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            target_modules=_targets(base.model, config.targets),
        )
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            model = get_peft_model(base.model, lora, adapter_name=NAME)
    except (ValueError, re.error) as error:
        raise ConfigError(
            f"adapter.targets={config.targets!r}: {str(error).splitlines()[0]}",
            f"linear modules of this model end in: {', '.join(_linear_names(base.model))}",
        ) from error
    adapter_parameters(model)
    return model


def _targets(lm: "PreTrainedModel", targets: str | tuple[str, ...]) -> str | list[str]:
    """The target modules as PEFT takes them; a head that shares the embedding's weights is refused.

    Merging an adapter of a shared head would change the embedding as well.
    """
    head = lm.get_output_embeddings()
    shared = head.weight is lm.get_input_embeddings().weight
    (name,) = (n for n, module in lm.named_modules() if module is head)
    if targets == "auto":
        return "all-linear" if shared else _linear_names(lm)
    if shared and targets != "all-linear" and _names(targets, name):
        raise ConfigError(
            f"adapter.targets names the head {name!r}, which shares its weights with the embedding",
            "leave it out, or use a base with a head of its own",
        )
    return targets if isinstance(targets, str) else list(targets)


def _names(targets: str | tuple[str, ...], module: str) -> bool:
    """Whether PEFT takes `module` for one of the targets."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable tensors by name; an error if anything but LoRA factors would train."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    strange = [name for name in trainable if ".lora_" not in name]
    if strange:
        raise ConfigError(f"{strange[0]} would train beside the adapter", "adapters touch linear layers only")
    return trainable


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A detached copy of the adapter, under the parameters' own names."""
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}


def set_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the adapter; names and shapes must match exactly."""
    parameters = adapter_parameters(model)
    wrong = sorted(set(parameters) ^ set(tensors)) or [n for n, p in parameters.items() if p.shape != tensors[n].shape]
    if wrong:
        raise DataError(
            f"the adapter does not fit this model: {len(wrong)} tensors differ, the first {wrong[0]}",
            "use the base and the adapter settings it was trained with",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def save_adapter(folder: Path, model: "PeftModel", base: Base, provenance: Mapping[str, Any]) -> None:
    """Write PEFT's own files and, beside them, `cladapt.json`."""
    with atomic_dir(folder) as temporary, quiet():
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        record = {**provenance, "base": base.fingerprint, "sids": base.provenance["sids"], "cladapt": __version__}
        write_json(temporary / PROVENANCE, record)


def read_adapter(folder: Path, base: Base) -> dict[str, Tensor]:
    """Tensors of a saved adapter under parameter names, after checking that it belongs to `base`."""
    record = adapter_provenance(folder)
    if record.get("base") != base.fingerprint:
        raise DataError(
            f"{folder} was trained on the base {record.get('base')}, this base is {base.fingerprint}",
            "give the base directory that the adapter was trained on",
        )
    tensors = read_tensors(folder / "adapter_model.safetensors")
    return {re.sub(r"(\.lora_[AB])\.", rf"\1.{NAME}.", name): tensor for name, tensor in tensors.items()}


def adapter_provenance(folder: Path) -> dict[str, Any]:
    """The `cladapt.json` of an adapter directory."""
    if not (folder / "adapter_config.json").is_file():
        raise DataError(f"{folder} is not an adapter directory: it has no adapter_config.json", "check the path")
    if not (folder / PROVENANCE).is_file():
        raise DataError(f"{folder} has no {PROVENANCE}", "give an adapter directory that cladapt wrote")
    return dict(read_json(folder / PROVENANCE))


def load_adapter(base: Base, folder: Path) -> "PeftModel":
    """The base with a saved adapter on it, as it was configured when saved."""
    from peft import LoraConfig, get_peft_model

    tensors = read_adapter(folder, base)
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    with quiet():
        model = get_peft_model(base.model, config, adapter_name=NAME)
    set_adapter_tensors(model, tensors)
    return model.eval()


def adapted_lm(model: "PeftModel") -> "PreTrainedModel":
    """The causal LM itself, with the adapter's layers inside it."""
    return cast("PreTrainedModel", model.get_base_model())


def unload(model: "PeftModel") -> None:
    """Take the adapter off, leaving the base exactly as it was."""
    model.unload()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PEFT warns about that does not concern a local base: hub look-ups, tied heads, renamed names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
        yield


def _linear_names(model: nn.Module) -> list[str]:
    return sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
