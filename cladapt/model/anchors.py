"""Adapter tensors by name: which module and side each belongs to, one flat vector in groups, a sum of adapters."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cladapt.errors import ConfigError

Grouping = Literal["factor", "module", "rank"]


class AdapterVector:
    """Flatten named LoRA factors into one vector of groups, and back.

    `factor`: each A and each B is a group (the paper's). `module`: A and B of a module together. `rank`: each row of A
    and each column of B. B is laid out transposed, so that every group is contiguous.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], grouping: Grouping) -> None:
        if not parameters:
            raise ConfigError("the adapter has no trainable tensors", "check adapter.targets")
        self.names = tuple(parameters)
        self._shapes = [parameters[name].shape for name in self.names]
        # a module may have a number s as well, B = s U
        self._transposed = [is_up(name) and parameters[name].dim() == 2 for name in self.names]
        self._sizes = [parameters[name].numel() for name in self.names]
        self.lengths = torch.tensor(self._lengths(grouping), dtype=torch.int64)

    def _lengths(self, grouping: Grouping) -> list[int]:
        if grouping == "factor":
            return self._sizes
        if grouping == "rank":
            ranks = [s[1] if up else s[0] for s, up in zip(self._shapes, self._transposed, strict=True)]
            return [size // rank for size, rank in zip(self._sizes, ranks, strict=True) for _ in range(rank)]
        by_module: dict[str, int] = {}
        for name, size in zip(self.names, self._sizes, strict=True):
            by_module[module_of(name)] = by_module.get(module_of(name), 0) + size
        return list(by_module.values())

    @property
    def modules(self) -> list[int]:
        """The module of each tensor, numbered as they come."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(module_of(name), len(numbers)) for name in self.names]

    @property
    def n_modules(self) -> int:
        return len({*self.modules})

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors in the order of `names` -> float32 (or float64) vector [n]."""
        parts = [(t.t() if up else t).reshape(-1) for t, up in zip(tensors, self._transposed, strict=True)]
        flat = torch.cat(parts)
        return flat if flat.dtype == torch.float64 else flat.float()

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Vector [n] -> tensors of the original shapes, views where possible."""
        parts = flat.split(self._sizes)
        return [
            part.view(shape[1], shape[0]).t() if up else part.view(shape)
            for part, shape, up in zip(parts, self._shapes, self._transposed, strict=True)
        ]


def is_up(name: str) -> bool:
    """Whether a PEFT parameter name is the up-projection B [out, r]."""
    return ".lora_B." in name


def module_of(name: str) -> str:
    """The adapted module that a PEFT parameter name belongs to."""
    return name.split(".lora_")[0]


def factor_pairs(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A [r, in] and B [out, r] of every module, or U where B = s U; modules that learn one factor are left out."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            found.setdefault(module_of(name), []).append(parameter)
    return {module: (pair[0], pair[1]) for module, pair in found.items() if len(pair) == 2}


def scales(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The learned number s [1] of every module where B = s U, by module."""
    return {module_of(name): p for name, p in parameters.items() if name.endswith(".scale")}


def is_learned(factors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter changes anything: some B is not zero."""
    return any(bool(tensor.any()) for name, tensor in factors.items() if is_up(name))


def unit(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor over its Frobenius norm; zeros stay zeros."""
    return {n: t / torch.linalg.vector_norm(t).clamp_min(torch.finfo(t.dtype).tiny) for n, t in factors.items()}


def joined(history: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of the sum of two adapters: [A_h; A] and [B_h B]; the history may be empty."""
    if not history:
        return dict(factors)
    return {name: torch.cat([history[name].to(t.device), t], int(is_up(name))) for name, t in factors.items()}
