"""The only way to the kernels: one signature per op, the implementation chosen by device and recorded with its reason.

`CLADAPT_KERNELS=auto|triton|reference` overrides the configured choice. `auto` takes a Triton kernel where there is one
and a GPU to run it, else the plain-torch reference; `triton` is an error where it cannot be had.
"""

import importlib
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch

from cladapt.errors import ConfigError, EnvironmentProblem
from cladapt_kernels import reference
from cladapt_kernels.lora import ItemFactors, Runs, item_linear, lora_linear, lora_linear_dequantised
from cladapt_kernels.optim import Epilogue, Figures, ProxAdamW, Pulls, Term
from cladapt_kernels.rectify import Rectifier
from cladapt_kernels.retract import Stiefel
from cladapt_kernels.scoring import item_cross_entropy, item_places, item_top_k

__all__ = [
    "Epilogue",
    "Figures",
    "ItemFactors",
    "ProxAdamW",
    "Pulls",
    "Rectifier",
    "Runs",
    "Stiefel",
    "Term",
    "item_cross_entropy",
    "item_linear",
    "item_places",
    "item_top_k",
    "lora_linear",
    "lora_linear_dequantised",
]

Choice = Literal["auto", "triton", "reference"]
Precision = Literal["fp32", "bf16"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What a base is loaded in for each precision."""
KERNELS = ("item_sam", "lora_linear", "prox_adamw", "rectify", "retract")
"""Ops with a Triton kernel."""
REFERENCES = ("item_cross_entropy", "proximal_kl", "proximal_l2")
"""Ops without."""

group_sum = reference.group_sum
group_softmax = reference.group_softmax
proximal_kl = reference.proximal_kl
proximal_l2 = reference.proximal_l2


def compute_device() -> torch.device:
    """Where models run: this process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def precision(configured: Literal["auto", "fp32", "bf16"]) -> Precision:
    """The compute precision in force: `auto` is bf16 on a GPU that computes in it, else fp32."""
    if configured != "auto":
        return configured
    capable = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if capable else "fp32"


def requested(configured: Choice = "auto") -> Choice:
    """The choice in force: `CLADAPT_KERNELS` when set, else `configured`."""
    value = os.environ.get("CLADAPT_KERNELS", configured)
    if value not in get_args(Choice):
        raise ConfigError(f"CLADAPT_KERNELS={value!r} is not a choice", f"use one of {', '.join(get_args(Choice))}")
    return cast(Choice, value)


def backends(configured: Choice = "auto") -> Mapping[str, tuple[str, str]]:
    """For each op: which implementation runs, and why."""
    choice, obstacle = requested(configured), _obstacle()
    if choice == "triton" and obstacle:
        raise EnvironmentProblem(f"kernels=triton: {obstacle}", "use kernels=auto or kernels=reference")
    where = "CUDA" if torch.cuda.is_available() else "CPU"
    chosen = {op: ("reference", f"this op has no Triton kernel; plain torch on {where}") for op in REFERENCES}
    for op in KERNELS:
        if choice == "reference" or obstacle:
            reason = "asked for" if choice == "reference" else f"auto: {obstacle}"
            chosen[op] = ("reference", f"{reason}; plain torch on {where}")
        else:
            chosen[op] = ("triton", "asked for" if choice == "triton" else "auto: there is a GPU")
    return chosen


def uses_kernel(op: str, configured: Choice = "auto") -> bool:
    """Whether the op runs as a Triton kernel."""
    return backends(configured)[op][0] == "triton"


def compiler_problem() -> str:
    """What is known to be wrong with the code that the installed Triton makes for this GPU, empty where nothing is.

    Triton 3.4.0 to 3.7.0 give wrong gradients on Hopper where a product's result is transposed: flash-linear-attention,
    issue 640 and pull request 983.
    """
    if _obstacle() or torch.cuda.get_device_capability(compute_device())[0] != 9:
        return ""
    version = str(getattr(importlib.import_module("triton"), "__version__", ""))
    release = tuple(map(int, re.findall(r"[0-9]+", version)[:3]))
    if not (3, 4, 0) <= release < (3, 7, 1):
        return ""
    return (
        f"Triton {version} is known to compile a backward kernel of another package wrongly on Hopper GPUs: use torch"
        " 2.12.1 or later, which brings Triton 3.7.1, or see that `make gpu-test` passes here"
    )


def _obstacle() -> str:
    """Why no Triton kernel can run here, empty where one can."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"
