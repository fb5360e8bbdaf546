"""Where models come from: a hub id, a checkpoint folder, or a `.gguf` file. Nothing pickled is read, no code runs.

transformers reads them all; a GGUF file's blocks are unpacked to floating point, and what is saved of it afterwards is
an ordinary checkpoint.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from cladapt.errors import ConfigError, DataError, EnvironmentProblem
from cladapt.model.weights import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Unloadable(Exception):
    """A checkpoint that transformers cannot load, or not whole."""


def open_source(
    source: str, seed: int, weights: Literal["pretrained", "random"] = "pretrained"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A causal LM in float32 and its tokenizer; `weights="random"` draws all weights anew by `seed`.

    Warnings count the tensors that the model has no place for, and name a config that denies the head its own values.
    `DataError` for what is no causal LM, or has weights that are not finite, `ConfigError` for one whose logits are
    more than head(hidden).
    """
    left_out: list[str] = []
    try:
        if weights == "random":
            model, tokenizer = draw(source, seed)
        else:
            model, tokenizer, left_out = read(source, torch.float32)
    except Unloadable as error:
        raise DataError(
            f"cannot load a causal LM from {source!r}: {error}",
            "give a local Hugging Face checkpoint directory, a .gguf file, or a hub id that this machine can reach",
        ) from error
    check_supported(model)
    check_finite(source, dict(model.state_dict()), "give another checkpoint: this one is damaged")
    if left_out:
        warnings.warn(
            f"{source}: {len(left_out)} of its tensors are left out, the first {left_out[0]}: a {type(model).__name__} "
            "has no place for them",
            stacklevel=3,
        )
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if model.config.tie_word_embeddings and head is not table:  # as transformers loads it; servers go by the config
        record_untied(model)
        warnings.warn(
            f"{source}: its config says tie_word_embeddings=true, but its head has values of its own, which are used; "
            "what is made of it says tie_word_embeddings=false",
            stacklevel=3,
        )
    return model, tokenizer


def read(
    source: str | Path, dtype: torch.dtype, **loading: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]":
    """Model, tokenizer and the names of tensors that the model has no place for; `loading`: more for transformers.

    No tensor that the checkpoint lacks is made up. `Unloadable` where it cannot be read, a `Path` never from the hub.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place, options = _place(source)
    packed = "gguf_file" in options
    try:
        with _quiet_unpacking() if packed else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
                **(_unpacked() if packed else {}),
                **loading,
                **options,
            )
        model, found = loaded
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged checkpoint makes transformers fail in every way there is
        raise _unloadable(error) from error
    if missing := sorted(found["missing_keys"]):
        raise Unloadable(f"it lacks {len(missing)} tensors, the first {missing[0]}")
    if packed:
        _forget_packing(model)
    return model, tokenizer, sorted(found["unexpected_keys"])


def draw(source: str | Path, seed: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model of a checkpoint's architecture whose float32 weights depend on `seed` alone, and the tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place, options = _place(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        config = AutoConfig.from_pretrained(place, **options)
        config.__dict__.pop("quantization_config", None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unloadable(error) from error
    return model, tokenizer


def record_untied(model: "PreTrainedModel") -> None:
    """Let the config, and what is saved, say that the head has weights of its own."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def check_supported(model: torch.nn.Module) -> None:
    """Refuse a model that packed rows and their head cannot stand for.

    Its logits are more than head(hidden), which loss and decoder call directly; or a token sees others by more than
    attention under the mask that it is given: convolutions, states, distances in a row.
    """
    config: Any = model.config
    if strange := {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{type(model).__name__} has layers of {', '.join(sorted(strange))}, whose tokens see those of other "
            "documents in a packed row",
            "use a model of attention layers alone (the Llama, Qwen and Mistral families)",
        )
    if getattr(config, "alibi", False):
        raise ConfigError(
            f"{type(model).__name__} adds a bias by the distance in a row to its attention (alibi)",
            "use a model with rotary or learned positions",
        )
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(config, key, None)
        if value not in (None, 1, 1.0):
            raise ConfigError(
                f"{type(model).__name__} transforms its logits ({key}={value})",
                "use a model without it (the Llama, Qwen and Mistral families have none)",
            )


def check_reach(config: Any, reach: int) -> None:
    """`ConfigError` where documents of `reach` tokens are longer than the model sees: its sliding window, its table of
    positions, or the length from which LongRoPE turns by other factors."""
    rope, kinds = getattr(config, "rope_parameters", None) or {}, getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    long = rope.get("rope_type") == "longrope"
    limits = {
        "sliding window": getattr(config, "sliding_window", None) if slides else None,
        "table of positions": None if rope else getattr(config, "max_position_embeddings", None),
        "LongRoPE": rope.get("original_max_position_embeddings") if long else None,
    }
    for what, most in limits.items():
        if most and reach > most:
            raise ConfigError(
                f"histories become documents of up to {reach} tokens, the model's {what} has {most}",
                "use a smaller window, row_tokens or history_tokens",
            )


def _place(source: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """What transformers is to load from, and how."""
    if not str(source).endswith(".gguf"):
        return source, {"local_files_only": isinstance(source, Path), "trust_remote_code": False}
    file = Path(source)
    if not file.is_file():
        raise Unloadable("there is no such file")
    if find_spec("gguf") is None:
        raise EnvironmentProblem(
            f"{source} is a GGUF file, and the package that reads them is not installed", "pip install 'cladapt[gguf]'"
        )
    return file.absolute().parent, {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}


@contextmanager
def _quiet_unpacking() -> Iterator[None]:
    """Without the progress bar of a GGUF file's tensors, which transformers' own switch leaves on."""
    from transformers import modeling_gguf_pytorch_utils as unpacking

    shown = unpacking.tqdm
    unpacking.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        unpacking.tqdm = shown


def _unpacked() -> dict[str, Any]:
    """Options by which transformers unpacks a GGUF file, also where it has kernels for its blocks."""
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


def _forget_packing(model: "PreTrainedModel") -> None:
    """Make an unpacked model an ordinary one: its config would say that the saved weights are in a GGUF file."""
    packed = [name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()]
    if packed:
        raise Unloadable(f"transformers did not unpack {len(packed)} tensors, the first {packed[0]}")
    cast(Any, model).hf_quantizer = None
    for key in ("quantization_config", "_name_or_path"):
        model.config.__dict__.pop(key, None)


def _unloadable(error: Exception) -> Unloadable:
    return Unloadable(" ".join(str(error).split())[:300] or type(error).__name__)
