"""Adapter directories: PEFT's own files and, beside them, `cladapt.json`, which says what the adapter belongs to."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from cladapt import __version__
from cladapt.artifacts import atomic_dir, hash_file, read_record, read_tensors, write_json, write_tensors
from cladapt.errors import DataError
from cladapt.model.adapter import (
    BESIDE,
    ITEMS,
    NAME,
    AdaptedBase,
    adapted_lm,
    adapter_tensors,
    lora_config,
    names_module,
    quiet,
    scale_of,
    set_adapter_tensors,
    use_kernel,
)
from cladapt.model.anchors import joined
from cladapt.model.card import CARD, short_card
from cladapt.model.history import history_of, unload
from cladapt.model.load import PROVENANCE, Base
from cladapt.model.packed import Softmax
from cladapt.model.weights import check_finite
from cladapt.tokens.sids import SidTable

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
LEARNED = "held_out_blocks"
"""The key of an adapter's `cladapt.json` for the blocks whose held-out events it, or one before it, has learned."""
RESTORE = "restore the adapter directory, or export it again"
LOWER = "train the adapter again with a lower train.lr"


class TemplateRecord(BaseModel, extra="forbid"):
    """The words around a history; see `cladapt.tokens.prompts.Template`."""

    history: str
    empty: str
    separator: str


class PromptRecord(BaseModel):
    """How the worded prompts of an adapter were made: what names items, its budget, the rows that 0 stands for."""

    history: Literal["ids", "titles", "both"]
    history_tokens: NonNegativeInt
    row_tokens: PositiveInt
    template: TemplateRecord


class IdsRecord(BaseModel):
    """The IDs that an adapter has learned by: the version, and the content of the rows of the items known then."""

    version: PositiveInt
    items: PositiveInt
    fingerprint: str

    @classmethod
    def of(cls, table: SidTable) -> "IdsRecord":
        """What a table of the items known by a block is recorded as."""
        return cls(version=table.version, items=len(table.items), fingerprint=table.fingerprint)


class AdapterRecord(BaseModel):
    """What an adapter's `cladapt.json` must hold; the others where they are known, and then meaningful."""

    base: str
    block: NonNegativeInt = 0
    history_rank: NonNegativeInt = 0
    form: Literal["packed", "prompt"] = "packed"
    window: PositiveInt = 1
    prompt: PromptRecord | None = None
    softmax: Softmax = "trie"
    stream: str = ""
    beams: PositiveInt = 1
    weights: str = ""
    held_out_blocks: list[PositiveInt] = []
    head: Literal["linear", "cosine"] = "linear"
    ids: IdsRecord | None = None


class LoraRecord(BaseModel):
    """What PEFT's `adapter_config.json` must hold: each of these would else be made up, or fail somewhere inside."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    target_modules: str | list[str]
    use_rslora: bool = False
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}


def save_adapter(folder: Path, model: "PeftModel", base: AdaptedBase, provenance: Mapping[str, Any]) -> None:
    """Write PEFT's own files and, beside them, `cladapt.json` and a card.

    A history becomes the first ranks of the adapter. What has learned beside it, a classifier or rows of an item table,
    goes with it in the same file.
    """
    with atomic_dir(folder) as temporary, quiet():
        model.save_pretrained(str(temporary), selected_adapters=[NAME], save_embedding_layers=False)
        history, config = history_of(model), lora_config(model, NAME)
        # s (B_h A_h + B A) = s [B_h B] [A_h; A]
        tensors = {n.replace(f".{NAME}.", "."): t for n, t in joined(history, adapter_tensors(model)).items()}
        record = {**provenance, "base": base.fingerprint, **base.identity, "cladapt": __version__}
        if history:
            record["history_rank"] = next(len(t) for n, t in history.items() if ".lora_A." in n)
            config.r += record["history_rank"]
            config.lora_alpha, config.use_rslora = scale_of(model) * config.r, False
        if base.extra_tensors:
            config.modules_to_save = [m for m in BESIDE if any(f".{m}." in name for name in base.extra_tensors)]
            tensors |= {name: tensor.detach() for name, tensor in base.extra_tensors.items()}
        config.inference_mode = True
        config.save_pretrained(str(temporary))
        write_factors(temporary, tensors, record)
        (temporary / CARD).write_text(short_card(record, base.auto_class), encoding="utf-8")


def write_factors(folder: Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    """Write an adapter's tensors and its `cladapt.json`, which holds the hash of their file as `weights`."""
    check_finite("the adapter to be saved", tensors, LOWER)
    write_tensors(folder / ADAPTER_FILE, tensors, {"format": "pt"})
    write_json(folder / PROVENANCE, {**provenance, "weights": hash_file(folder / ADAPTER_FILE)})


def read_factors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter under PEFT's names.

    `DataError` where their file is not the one that was written, or a number is not finite; a warning where its hash
    was not recorded, as in older adapters. Costs 1.2 s of one core per GB.
    """
    file, recorded = folder / ADAPTER_FILE, adapter_provenance(folder).get("weights")
    tensors = read_tensors(file)
    check_finite(str(file), tensors, RESTORE)
    if recorded is None:
        warnings.warn(f"{folder / PROVENANCE} has no hash of {ADAPTER_FILE}: it is not compared", stacklevel=2)
    elif (found := hash_file(file)) != recorded:
        raise DataError(
            f"{file} has the hash {found}, {PROVENANCE} has recorded {recorded}: one of them was changed after the "
            "adapter was saved",
            RESTORE,
        )
    return tensors


def read_adapter(folder: Path, base: AdaptedBase) -> dict[str, Tensor]:
    """Tensors of a saved adapter under parameter names, after checking that it belongs to `base`."""
    record = adapter_provenance(folder)
    if record.get("base") != base.fingerprint:
        raise DataError(
            f"{folder} was trained on the base {record.get('base')}, this base is {base.fingerprint}",
            "give the base directory that the adapter was trained on",
        )
    settings, tensors = adapter_settings(folder), read_factors(folder)
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
        strange = [] if targets == "all-linear" else [module for module in ranks if not names_module(targets, module)]
    except re.error as error:
        raise DataError(f"{file}: target_modules={targets!r} is no regular expression: {error}", RESTORE) from error
    if strange:
        raise DataError(f"{file}: target_modules={targets!r} does not name {strange[0]}, which has factors", RESTORE)


def start_from(model: "PeftModel", folder: Path, base: AdaptedBase) -> None:
    """Give the adapter the factors of a saved one; `DataError` where its scale differs: the start would be another."""
    place(model, base, read_adapter(folder, base))
    settings = adapter_settings(folder)
    if not settings.get("rank_pattern"):
        rank = settings["r"]
        scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        if not math.isclose(scale, scale_of(model), rel_tol=1e-6):
            raise DataError(
                f"{folder} was trained at the scale alpha / r = {scale:g}, this adapter has {scale_of(model):g}",
                f"use adapter.alpha={scale * rank:g} with adapter.rank={rank}, or start from the base",
            )


def read_own_factors(folder: Path, base: AdaptedBase) -> dict[str, Tensor]:
    """As `read_adapter`, without the history that was saved with it: what the next block goes on from."""
    return without_history(read_adapter(folder, base), adapter_provenance(folder))


def without_history(tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> dict[str, Tensor]:
    """The factors of a saved adapter that its own block has learned."""
    rank = provenance.get("history_rank", 0)
    own = {n: (t[:, rank:] if ".lora_B." in n else t[rank:]).contiguous() for n, t in tensors.items() if ".lora_" in n}
    return {**tensors, **own}


def adapter_provenance(folder: Path) -> dict[str, Any]:
    """The `cladapt.json` of an adapter directory."""
    if not (folder / CONFIG_FILE).is_file():
        raise DataError(f"{folder} is not an adapter directory: it has no {CONFIG_FILE}", "check the path")
    if not (folder / PROVENANCE).is_file():
        raise DataError(f"{folder} has no {PROVENANCE}", "give an adapter directory that cladapt wrote")
    return read_record(folder / PROVENANCE, AdapterRecord, RESTORE)


def ids_version(folder: Path) -> int:
    """The version of the IDs that an adapter has learned by; adapters that do not say have known the first alone."""
    return int((adapter_provenance(folder).get("ids") or {"version": 1})["version"])


def read_by(base: Base, table: SidTable, folder: Path) -> Base:
    """The base with the IDs that an adapter has learned by; `DataError` where `table` is not of that content."""
    record = adapter_provenance(folder).get("ids")
    if record is None:
        return base.with_sids(table)
    found = IdsRecord.of(table.first(record["items"])).model_dump()
    if found != record:
        raise DataError(
            f"{folder} has learned by version {record['version']} of the IDs with the hash {record['fingerprint']}, "
            f"these are of version {found['version']} with the hash {found['fingerprint']}",
            "name the stream that it has learned, with all versions of its IDs",
        )
    return base.with_version(table)


def read_alone(base: Base, folder: Path) -> Base:
    """The base with its own IDs, for an adapter that came without any; `DataError` where it has learned by others."""
    if (version := ids_version(folder)) != base.sids.version:
        raise DataError(
            f"{folder} has learned by version {version} of the IDs and came without them, its base has version "
            f"{base.sids.version}",
            "name the stream with --data DIR, or export the adapter again",
        )
    return base


def adapter_block(folder: Path) -> int:
    """The block that an adapter has learned; without it, learning the block again would be testing on training data."""
    record = adapter_provenance(folder)
    if "block" not in record:
        raise DataError(f"{folder / PROVENANCE} lacks block: what it has learned is not known", RESTORE)
    return int(record["block"])


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter directory."""
    return read_record(folder / CONFIG_FILE, LoraRecord, RESTORE)


def load_adapter(base: AdaptedBase, folder: Path) -> "PeftModel":
    """The base with a saved adapter on it, as it was configured when saved."""
    from peft import LoraConfig, get_peft_model

    tensors = read_adapter(folder, base)
    try:
        with quiet():
            config = LoraConfig.from_pretrained(str(folder))
            config.inference_mode, config.modules_to_save = False, None
            if not config.rank_pattern:
                use_kernel(config, "auto")
            model = get_peft_model(base.model, config, adapter_name=NAME)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged configuration makes PEFT fail in every way there is
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{folder / CONFIG_FILE}: PEFT cannot apply it to this base: {reason}", RESTORE) from error
    place(model, base, tensors)
    return model.eval()


@contextmanager
def adapted(base: AdaptedBase, folder: Path) -> "Iterator[PreTrainedModel]":
    """The base with a saved adapter, loaded anew: ranks may differ; at the end the base is as it was."""
    beside = {name: tensor.detach().clone() for name, tensor in base.extra_tensors.items()}
    model = load_adapter(base, folder)
    try:
        yield adapted_lm(model)
    finally:
        unload(model)
        with torch.no_grad():
            for name, own in base.extra_tensors.items():
                own.copy_(beside[name])


def place(model: "PeftModel", base: AdaptedBase, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a saved adapter into the adapter, and what has learned beside it into the base's own.

    Of an item table an adapter has the rows of the items known to it; those of later items stay what they are.
    """
    set_adapter_tensors(model, {name: t for name, t in tensors.items() if name not in base.extra_tensors})
    with torch.no_grad():
        for name, own in base.extra_tensors.items():
            saved = tensors.get(name)
            rows = len(own) if saved is None or f".{ITEMS}." not in name else min(len(own), len(saved))
            if saved is None or saved.shape != own[:rows].shape:
                raise DataError(f"the adapter has no {name} of shape {tuple(own.shape)}", RESTORE)
            own[:rows].copy_(saved)
