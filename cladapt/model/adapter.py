"""LoRA adapters through PEFT: create, load, save; one adapter learns, and only its tensors train.

Beside it there may be a *history*: frozen factors of earlier blocks, W + scale (B_h A_h + B A). Both are saved as one
ordinary adapter of concatenated rank, so nothing that reads adapters needs to know.
"""

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from cladapt import __version__, ops
from cladapt.artifacts import atomic_dir, read_record, read_tensors, write_json, write_tensors
from cladapt.config import AdapterConfig
from cladapt.errors import ConfigError, DataError
from cladapt.model.load import PROVENANCE, Base
from cladapt.model.packed import Softmax

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NAME = "default"
HISTORY = "history"
ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
RESTORE = "restore the adapter directory, or export it again"


class AdapterRecord(BaseModel):
    """What an adapter's `cladapt.json` must hold; the others where they are known, and then meaningful."""

    base: str
    block: NonNegativeInt = 0
    history_rank: NonNegativeInt = 0
    form: Literal["packed", "prompt"] = "packed"
    window: PositiveInt = 1
    softmax: Softmax = "trie"
    stream: str = ""


class LoraRecord(BaseModel):
    """What PEFT's `adapter_config.json` must hold: each of these would else be made up, or fail somewhere inside."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    target_modules: str | list[str]
    use_rslora: bool = False
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}


def create_adapter(
    base: Base, config: AdapterConfig, seed: int, full_rank: bool = False, kernels: ops.Choice = "auto"
) -> "PeftModel":
    """Put a fresh LoRA adapter (B = 0) on the base; its initial values depend on `seed` alone.

    `full_rank`: the weights themselves learn. One factor of every module is the frozen identity and the other is
    delta W, at scale 1 and without dropout, so the gradient is that of W and the result is still a LoRA adapter.
    """
    from peft import LoraConfig, get_peft_model

    try:
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT computes with floats
            lora_dropout=0.0 if full_rank else config.dropout,
            use_rslora=config.rslora and not full_rank,
            target_modules=_targets(base.model, config.targets),
        )
        if not full_rank:
            _use_kernel(lora, kernels)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            model: PeftModel = get_peft_model(base.model, lora, adapter_name=NAME)
            if full_rank:
                model = _with_full_rank(model, lora)
    except (ValueError, re.error) as error:
        raise ConfigError(
            f"adapter.targets={config.targets!r}: {str(error).splitlines()[0]}",
            f"linear modules of this model end in: {', '.join(_linear_names(base.model))}",
        ) from error
    adapter_parameters(model)
    return model


def _use_kernel(lora: Any, kernels: ops.Choice) -> None:
    """Make PEFT put the fused linear where a kernel runs it; full rank is a dense product and gains nothing."""
    if ops.uses_kernel("lora_linear", kernels):
        from cladapt.model.lora_layer import register

        register(lora)


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


def _names(targets: str | Sequence[str], module: str) -> bool:
    """Whether PEFT takes `module` for one of the targets."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _with_full_rank(model: "PeftModel", lora: Any) -> "PeftModel":
    """The same modules with rank min(in, out): the factor on the narrow side is the identity, the other zero."""
    from peft import get_peft_model

    sizes = {}
    for name, module in _lora_layers(model).items():
        sizes[name.removeprefix("base_model.model.")] = min(module.in_features, module.out_features)
    lora.rank_pattern, lora.alpha_pattern = sizes, dict(sizes)
    model = get_peft_model(cast("PreTrainedModel", model.unload()), lora, adapter_name=NAME)
    for module in _lora_layers(model).values():
        down, up = module.lora_A[NAME].weight, module.lora_B[NAME].weight
        identity, delta = (down, up) if module.in_features <= module.out_features else (up, down)
        nn.init.eye_(identity)
        nn.init.zeros_(delta)
        identity.requires_grad_(False)
    return model


def _config(model: "PeftModel", adapter: str) -> Any:
    """A copy of an adapter's LoraConfig."""
    return copy.deepcopy(model.peft_config[adapter])


def _scale(model: nn.Module) -> float:
    """alpha / r of the adapter, the same in every module."""
    return float(next(iter(_lora_layers(model).values())).scaling[NAME])


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable tensors by name; an error if anything but LoRA factors would train."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    strange = [name for name in trainable if ".lora_" not in name]
    if strange:
        raise ConfigError(f"{strange[0]} would train beside the adapter", "adapters touch linear layers only")
    return trainable


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A detached copy of the adapter's factors, frozen ones included, under the parameters' own names."""
    return {name: p.detach().clone() for name, p in _factors(model, NAME).items()}


def _factors(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if re.search(rf"\.lora_[AB]\.{adapter}\.", n)}


def set_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the adapter; names and shapes must match exactly."""
    parameters = _factors(model, NAME)
    wrong = sorted(set(parameters) ^ set(tensors)) or [n for n, p in parameters.items() if p.shape != tensors[n].shape]
    if wrong:
        raise DataError(
            f"the adapter does not fit this model: {len(wrong)} tensors differ, the first {wrong[0]}",
            "use the base and the adapter settings it was trained with",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def set_history(model: "PeftModel", tensors: Mapping[str, Tensor]) -> None:
    """Put frozen factors beside the adapter, in place of earlier ones; none when empty.

    Named like the adapter's parameters: A_h [R, in] and B_h [out, R], at the adapter's own scale.
    """
    if HISTORY in model.peft_config:
        model.delete_adapter(HISTORY)
    if not tensors:
        model.set_adapter(NAME)
        return
    config = _config(model, NAME)
    if config.rank_pattern:
        raise ConfigError("frozen factors beside an adapter whose modules differ in rank", "use a low-rank method")
    config.r = next(t.shape[0] for n, t in tensors.items() if ".lora_A." in n)
    config.lora_alpha, config.use_rslora, config.lora_dropout = _scale(model) * config.r, False, 0.0
    with torch.random.fork_rng(devices=[]), quiet():
        model.add_adapter(HISTORY, config)
    cast(Any, model.base_model).set_adapter([NAME, HISTORY])
    with torch.no_grad():
        for name, parameter in _factors(model, HISTORY).items():
            parameter.copy_(tensors[name.replace(f".{HISTORY}.", f".{NAME}.")])
            parameter.requires_grad_(False)


def save_adapter(folder: Path, model: "PeftModel", base: Base, provenance: Mapping[str, Any]) -> None:
    """Write PEFT's own files and, beside them, `cladapt.json`; a history becomes the first ranks of the adapter."""
    with atomic_dir(folder) as temporary, quiet():
        model.save_pretrained(str(temporary), selected_adapters=[NAME], save_embedding_layers=False)
        record = {**provenance, "base": base.fingerprint, "sids": base.provenance["sids"], "cladapt": __version__}
        if HISTORY in model.peft_config:
            record["history_rank"] = _config(model, HISTORY).r
            _write_concatenated(temporary, model)
        write_json(temporary / PROVENANCE, record)


def _write_concatenated(folder: Path, model: "PeftModel") -> None:
    """Replace PEFT's files by those of one adapter: s (B_h A_h + B A) = s [B_h B] [A_h; A]."""
    history = _factors(model, HISTORY)
    joined = {}
    for name, own in _factors(model, NAME).items():
        earlier = history[name.replace(f".{NAME}.", f".{HISTORY}.")]
        joined[name.replace(f".{NAME}.", ".")] = torch.cat([earlier, own], dim=1 if ".lora_B." in name else 0)
    write_tensors(folder / ADAPTER_FILE, joined, {"format": "pt"})
    config = _config(model, NAME)
    config.r += _config(model, HISTORY).r
    config.lora_alpha, config.use_rslora, config.inference_mode = _scale(model) * config.r, False, True
    config.save_pretrained(str(folder))


def read_adapter(folder: Path, base: Base) -> dict[str, Tensor]:
    """Tensors of a saved adapter under parameter names, after checking that it belongs to `base`."""
    record = adapter_provenance(folder)
    if record.get("base") != base.fingerprint:
        raise DataError(
            f"{folder} was trained on the base {record.get('base')}, this base is {base.fingerprint}",
            "give the base directory that the adapter was trained on",
        )
    settings, tensors = adapter_settings(folder), read_tensors(folder / ADAPTER_FILE)
    _check_settings(folder / CONFIG_FILE, settings, tensors)
    return {re.sub(r"(\.lora_[AB])\.", rf"\1.{NAME}.", name): tensor for name, tensor in tensors.items()}


def _check_settings(file: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """`DataError` when the configuration is not that of these factors: PEFT would make others of it."""
    downs = {name.split(".lora_A.")[0]: tensor for name, tensor in tensors.items() if ".lora_A." in name}
    ranks = {name.removeprefix("base_model.model."): len(tensor) for name, tensor in downs.items()}
    stated = max((settings.get("rank_pattern") or {}).values(), default=settings["r"])
    largest = max(ranks.values(), default=0)
    if stated > largest:
        raise DataError(f"{file} states rank {stated}, the factors have at most {largest}", RESTORE)
    targets = settings["target_modules"]
    try:
        strange = [] if targets == "all-linear" else [module for module in ranks if not _names(targets, module)]
    except re.error as error:
        raise DataError(f"{file}: target_modules={targets!r} is no regular expression: {error}", RESTORE) from error
    if strange:
        raise DataError(f"{file}: target_modules={targets!r} does not name {strange[0]}, which has factors", RESTORE)


def start_from(model: "PeftModel", folder: Path, base: Base) -> None:
    """Give the adapter the factors of a saved one; `DataError` where its scale differs: the start would be another."""
    set_adapter_tensors(model, read_adapter(folder, base))
    settings = adapter_settings(folder)
    if not settings.get("rank_pattern"):
        rank = settings["r"]
        scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        if not math.isclose(scale, _scale(model), rel_tol=1e-6):
            raise DataError(
                f"{folder} was trained at the scale alpha / r = {scale:g}, this adapter has {_scale(model):g}",
                f"use adapter.alpha={scale * rank:g} with adapter.rank={rank}, or start from the base",
            )


def read_own_factors(folder: Path, base: Base) -> dict[str, Tensor]:
    """As `read_adapter`, without the history that was saved with it: what the next block goes on from."""
    return without_history(read_adapter(folder, base), adapter_provenance(folder))


def without_history(tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> dict[str, Tensor]:
    """The factors of a saved adapter that its own block has learned."""
    rank = provenance.get("history_rank", 0)
    return {n: (t[:, rank:] if ".lora_B." in n else t[rank:]).contiguous() for n, t in tensors.items()}


def adapter_provenance(folder: Path) -> dict[str, Any]:
    """The `cladapt.json` of an adapter directory."""
    if not (folder / CONFIG_FILE).is_file():
        raise DataError(f"{folder} is not an adapter directory: it has no {CONFIG_FILE}", "check the path")
    if not (folder / PROVENANCE).is_file():
        raise DataError(f"{folder} has no {PROVENANCE}", "give an adapter directory that cladapt wrote")
    return read_record(folder / PROVENANCE, AdapterRecord, RESTORE)


def adapter_block(folder: Path) -> int:
    """The block that an adapter has learned; without it, learning the block again would be testing on training data."""
    record = adapter_provenance(folder)
    if "block" not in record:
        raise DataError(f"{folder / PROVENANCE} lacks block: what it has learned is not known", RESTORE)
    return int(record["block"])


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter directory."""
    return read_record(folder / CONFIG_FILE, LoraRecord, RESTORE)


def load_adapter(base: Base, folder: Path) -> "PeftModel":
    """The base with a saved adapter on it, as it was configured when saved."""
    from peft import LoraConfig, get_peft_model

    tensors = read_adapter(folder, base)
    try:
        with quiet():
            config = LoraConfig.from_pretrained(str(folder))
            config.inference_mode = False
            if not config.rank_pattern:
                _use_kernel(config, "auto")
            model = get_peft_model(base.model, config, adapter_name=NAME)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged configuration makes PEFT fail in every way there is
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{folder / CONFIG_FILE}: PEFT cannot apply it to this base: {reason}", RESTORE) from error
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
