"""Singular values of delta W = scale * B A of every adapted module, from the factors alone.

With B = Q_B R_B and A^T = Q_A R_A they are those of the small core scale * R_B R_A^T, so delta W is never formed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cladapt.artifacts import read_tensors
from cladapt.errors import DataError
from cladapt.model.anchors import is_up, module_of
from cladapt.model.saved import (
    ADAPTER_FILE,
    CONFIG_FILE,
    RESTORE,
    adapter_provenance,
    adapter_settings,
    without_history,
)

FIGURES = ("norm", "effective_rank", "imbalance", "largest", "smallest")
"""What `summary` tells of a spectrum."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one module's delta W, descending: min(rank, in, out) of them, 0 where rounding hides them."""

    values: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The spectral norm."""
        return self.values[0]

    @property
    def smallest(self) -> float:
        """The last of the values, 0 where delta W has a smaller rank than its factors."""
        return self.values[-1]

    @property
    def norm(self) -> float:
        """Frobenius norm of delta W."""
        return math.hypot(*self.values)

    @property
    def effective_rank(self) -> float:
        """exp(-sum p_i ln p_i), p_i = sigma_i / sum sigma (Roy & Vetterli 2007); 0 where delta W = 0."""
        total = sum(self.values)
        shares = [value / total for value in self.values if value > 0]
        return math.exp(-sum(p * math.log(p) for p in shares if p > 0)) if shares else 0.0

    @property
    def imbalance(self) -> float | None:
        """Largest over mean of the values above 0: 1 where all are equal; None where delta W = 0."""
        nonzero = [value for value in self.values if value > 0]
        return max(nonzero) * len(nonzero) / sum(nonzero) if nonzero else None


@torch.no_grad()
def spectra(tensors: Mapping[str, Tensor], scale: float | Mapping[str, float]) -> dict[str, Spectrum]:
    """The spectrum of every module of LoRA factors A [r, in] and B [out, r], named as by PEFT, in float64.

    `scale` is one for all or by module. Modules of equal shape are one batch, on the device of their factors.
    """
    pairs = _pairs(tensors)
    alike: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for module, (down, up) in pairs.items():
        alike.setdefault((down.shape, up.shape), []).append(module)
    found = {}
    for modules in alike.values():
        batch = _singular_values(*(torch.stack(each).double() for each in zip(*map(pairs.get, modules), strict=True)))
        for module, values in zip(modules, batch.tolist(), strict=True):
            factor = abs(scale if isinstance(scale, int | float) else scale[module])
            found[module] = Spectrum(tuple(factor * value for value in values))
    return {module: found[module] for module in pairs}


def saved_spectra(folder: Path, own: bool = False) -> dict[str, Spectrum]:
    """The spectra of an adapter directory; `own`: of what its block has learned, without the history saved with it."""
    tensors = _saved_factors(folder)
    scales = saved_scales(folder)  # alpha / r has the rank of the whole
    return spectra(without_history(tensors, adapter_provenance(folder)) if own else tensors, scales)


def saved_scales(folder: Path) -> dict[str, float]:
    """alpha / r of every module of an adapter directory."""
    return _scales(folder / CONFIG_FILE, adapter_settings(folder), _saved_factors(folder))


def _saved_factors(folder: Path) -> dict[str, Tensor]:
    """A and B; a classifier may lie beside them."""
    return {name: tensor for name, tensor in read_tensors(folder / ADAPTER_FILE).items() if ".lora_" in name}


def summary(found: Mapping[str, Spectrum]) -> dict[str, float | None]:
    """Means of `FIGURES` over the modules, each over those that have it; None where none has."""
    return {figure: _mean([getattr(spectrum, figure) for spectrum in found.values()]) for figure in FIGURES}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@torch.no_grad()
def product_svd(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, q], singular values [q] and V^T [q, in] of up @ down, q = min(r, in, out), in float64.

    down [r, in] and up [out, r], also batches of them. Values are descending, 0 where rounding hides them.
    """
    (right, right_core), (left, left_core) = (torch.linalg.qr(factor.double()) for factor in (down.mT, up))
    u, values, vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    return left @ u, _above_noise(values, down.double(), up.double()), vh @ right.mT


def _singular_values(down: Tensor, up: Tensor) -> Tensor:
    """Of up @ down for float64 [n, r, in] and [n, out, r] -> [n, min(r, in, out)], rounding errors set to 0."""
    (_, right), (_, left) = torch.linalg.qr(down.mT, mode="r"), torch.linalg.qr(up, mode="r")
    return _above_noise(torch.linalg.svdvals(left @ right.mT), down, up)


def _above_noise(values: Tensor, down: Tensor, up: Tensor) -> Tensor:
    noise = torch.finfo(down.dtype).eps * max(down.shape[-1], up.shape[-2])
    floor = noise * torch.linalg.matrix_norm(down) * torch.linalg.matrix_norm(up)
    return values.where(values > floor[..., None], 0.0)


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every module, checked."""
    downs = {module_of(name): tensor for name, tensor in tensors.items() if ".lora_A." in name}
    ups = {module_of(name): tensor for name, tensor in tensors.items() if is_up(name)}
    pairs = {}
    for module in dict.fromkeys(map(module_of, tensors)):
        down, up = downs.get(module), ups.get(module)
        if down is None or up is None or not down.ndim == up.ndim == 2 or not 0 < len(down) == up.shape[1]:
            shapes = ["none" if factor is None else list(factor.shape) for factor in (down, up)]
            raise DataError(f"{module}: A is {shapes[0]} and B is {shapes[1]}, expected [r, in] and [out, r]", RESTORE)
        if not (down.isfinite().all() and up.isfinite().all()):
            raise DataError(f"{module}: the factors are not finite", "train the adapter again with a lower train.lr")
        pairs[module] = down, up
    return pairs


def _scales(file: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """alpha / r of every module, or alpha / sqrt(r), as PEFT applies them; `DataError` where r is not the factors'."""
    from peft.utils.other import get_pattern_key

    def stated(module: str, pattern: Mapping[str, Any], default: Any) -> Any:
        return pattern.get(get_pattern_key(list(pattern), module.removeprefix("base_model.model.")), default)

    scales = {}
    for name, down in tensors.items():
        if ".lora_A." not in name:
            continue
        module = module_of(name)
        try:
            rank = stated(module, settings.get("rank_pattern", {}), settings["r"])
            alpha = stated(module, settings.get("alpha_pattern", {}), settings["lora_alpha"])
        except re.error as error:
            raise DataError(f"{file}: a pattern is no regular expression: {error}", RESTORE) from error
        if rank != len(down):
            raise DataError(f"{file} states rank {rank} for {module}, its factors have {len(down)}", RESTORE)
        scales[module] = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return scales
