"""What this installation offers: the machine, the kernels in use, the methods."""

import difflib
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cladapt import ops
from cladapt.config import describe
from cladapt.errors import ConfigError
from cladapt.methods import available
from cladapt.run import environment

if TYPE_CHECKING:
    import torch


def doctor() -> dict[str, Any]:
    """Versions, devices, kernels and why, free space here; warns of a Triton that is known to be wrong on this GPU."""
    import torch

    if problem := ops.compiler_problem():
        warnings.warn(problem, stacklevel=2)
    found = environment()
    packages = found.pop("packages")
    usage = shutil.disk_usage(Path.cwd())
    return {
        **found,
        "cuda": torch.cuda.is_available(),
        "bf16_on_device": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "free_disk_gib": round(usage.free / 2**30, 1),
        "deterministic": "bit for bit on CPU with the same thread count; not promised on CUDA",
        "packages": [{"package": name, "version": version} for name, version in packages.items()],
        "kernels": [
            {"op": op, "implementation": implementation, "reason": reason}
            for op, (implementation, reason) in ops.backends().items()
        ],
        "attention_of_packed_rows": [_attention(dtype) for dtype in (torch.bfloat16, torch.float32)],
    }


def _attention(dtype: "torch.dtype") -> dict[str, str]:
    """Which attention packed rows take in a precision, and why."""
    from cladapt.model.attention import packed_attention

    kind, reason = packed_attention(ops.compute_device(), dtype)
    return {"precision": str(dtype).removeprefix("torch."), "implementation": kind, "reason": reason}


def list_methods(asked: str | None = None) -> dict[str, Any]:
    """Every method, or those of `asked` joined by +, with summary and options; `ConfigError` for an unknown name."""
    known = available()
    methods, options = [], []
    for name in known if asked is None else asked.split("+"):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"no method {name!r}", f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            )
        kind = known[name]
        doc = (sys.modules[kind.__module__].__doc__ or "").strip().splitlines()[0]
        methods.append({"method": name, "trains": kind.trains, "what": doc})
        shown = ("key", "default", "allowed", "meaning")
        options += [{"method": name, **{key: row[key] for key in shown}} for row in describe(kind.Config())]
    return {"methods": methods, "options": options}
