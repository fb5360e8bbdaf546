"""The only way to the kernels: one signature per op, the implementation chosen by device and recorded with its reason.

`CLADAPT_KERNELS=auto|triton|reference` overrides the configured choice. Where no kernel exists for an op, `auto` runs
the plain-torch reference and `triton` is an error.
"""

import os
from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch

from cladapt.errors import ConfigError, EnvironmentProblem
from cladapt_kernels import reference

Choice = Literal["auto", "triton", "reference"]
OPS = ("proximal_kl", "proximal_l2")

group_sum = reference.group_sum
group_softmax = reference.group_softmax
proximal_kl = reference.proximal_kl
proximal_l2 = reference.proximal_l2


def compute_device() -> torch.device:
    """Where models run: this process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def requested(configured: Choice = "auto") -> Choice:
    """The choice in force: `CLADAPT_KERNELS` when set, else `configured`."""
    value = os.environ.get("CLADAPT_KERNELS", configured)
    if value not in get_args(Choice):
        raise ConfigError(f"CLADAPT_KERNELS={value!r} is not a choice", f"use one of {', '.join(get_args(Choice))}")
    return cast(Choice, value)


def backends(configured: Choice = "auto") -> Mapping[str, tuple[str, str]]:
    """For each op: which implementation runs, and why."""
    choice = requested(configured)
    if choice == "triton":
        raise EnvironmentProblem(
            f"kernels=triton: no Triton kernel exists for {', '.join(OPS)}", "use kernels=auto or kernels=reference"
        )
    asked = "asked for" if choice == "reference" else "auto: this op has no Triton kernel"
    where = "CUDA" if torch.cuda.is_available() else "CPU"
    return {op: ("reference", f"{asked}; plain torch on {where}") for op in OPS}
