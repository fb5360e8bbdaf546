"""An adapter at a smaller rank: what a method has summed up over blocks, cut to its leading singular values by PEFT."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cladapt.errors import ConfigError
from cladapt.model.adapter import quiet
from cladapt.model.load import load_base
from cladapt.model.saved import adapter_provenance, load_adapter, read_factors, write_factors
from cladapt.model.spectrum import saved_scales, saved_spectra, spectra


@contextmanager
def compressed(adapter: Path, base_folder: Path, rank: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A temporary adapter directory of `rank`, and what was lost: relative Frobenius errors of delta W.

    The best approximation of that rank, module by module; `cladapt.json` beside it states the error too.
    """
    from peft import convert_to_lora

    whole = saved_spectra(adapter)
    largest = max(len(spectrum.values) for spectrum in whole.values())
    if not 1 <= rank <= largest:
        raise ConfigError(f"--rank {rank}: {adapter} has rank {largest}", f"choose a rank from 1 to {largest}")
    model = load_adapter(load_base(base_folder), adapter)
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Converting a PEFT adapter to LoRA that is already")
        config, tensors = convert_to_lora(model, rank)
    # scale 1 and factors that hold it: the difference of both is one adapter more
    norms = {module: spectrum.norm for module, spectrum in whole.items()}
    lost = {module: spectrum.norm for module, spectrum in spectra(_difference(adapter, tensors), 1.0).items()}
    total, missing = (math.hypot(*figures.values()) for figures in (norms, lost))
    worst = max(lost, key=lambda module: lost[module] / norms[module] if norms[module] else 0.0)
    report = {
        "rank": rank,
        "rank_before": largest,
        "relative_error": missing / total if total else 0.0,
        "largest_relative_error": lost[worst] / norms[worst] if norms[worst] else 0.0,
        "in_module": worst.removeprefix("base_model.model."),
    }
    with TemporaryDirectory(prefix="cladapt-") as folder:
        out = Path(folder) / adapter.name
        out.mkdir()
        config.inference_mode = True
        config.save_pretrained(str(out))
        record = {key: value for key, value in adapter_provenance(adapter).items() if key != "history_rank"}
        write_factors(out, tensors, {**record, "compressed": report})
        yield out, report


def _difference(adapter: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of the saved delta W less the compressed one, both at scale 1."""
    saved, scales = read_factors(adapter), saved_scales(adapter)
    found = {}
    for name, own in saved.items():
        if ".lora_A." in name:
            found[name] = torch.cat([own, tensors[name].to(own)])
        elif ".lora_B." in name:
            found[name] = torch.cat([scales[name.split(".lora_")[0]] * own, -tensors[name].to(own)], dim=1)
    return found
