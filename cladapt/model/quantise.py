"""A frozen base in four bits: bitsandbytes' NF4 with double quantisation, as QLoRA has it (arXiv 2305.14314).

The base on disk stays as it is: it is quantised on loading, and adapters and merges know the saved weights alone.
"""

import importlib
from typing import TYPE_CHECKING, Any, Literal

import torch

from cladapt.errors import EnvironmentProblem
from cladapt.ops import compute_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Quantisation = Literal["none", "4bit"]


def packed_options(quantisation: Quantisation, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers' `from_pretrained` is told to load a base so; its layers compute in `dtype`.

    `EnvironmentProblem` where bitsandbytes is not installed, or does not load.
    """
    if quantisation == "none":
        return {}
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:  # beside ImportError, what its native library raises
        raise EnvironmentProblem(
            f"quantisation=4bit: bitsandbytes cannot be loaded: {' '.join(str(error).split())[:200]}",
            "pip install 'cladapt[quant]' (Linux, Windows or macOS with a CPU or GPU that it supports), or use "
            "quantisation=none",
        ) from error
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": compute_device()}}


def skeleton(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model before it was quantised, without memory for its weights: their names, shapes and dtypes."""
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        plain = type(model)(config)
    plain.tie_weights()
    return plain
