"""Protected directions of inputs: the fewest that hold a share of the energy, as orthonormal columns V [n, k].

    V <- [V, leading left singular vectors of (I - V V^T) W] until V holds `energy` of ||W||_F^2        (GPM, DualGPM)

W [n, q] are directions weighted by their size: inputs as columns, a sketch of them, or the gradient G^T of a weight.
Of V and its complement the smaller one is kept, min(k, n - k) columns (DualGPM, arXiv 2404.00228): where it is the
complement, V is computed from it, here and wherever the state is read, and so is the same to the last bit.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from cladapt.config import Settings
from cladapt.errors import ConfigError
from cladapt.methods._base import Context
from cladapt.model.anchors import factor_pairs, module_of, scales

PROTECTED, COMPLEMENT = "protected/", "complement/"
ROUNDING = 1e-6  # share of the energy of float32 inputs from which directions are rounding


class EnergySettings(Settings):
    """How much of what goes into a layer is protected."""

    energy: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    """Share of the energy of a block's inputs that is protected after it; 0 protects nothing."""
    energy_blocks: NonNegativeInt = 0
    """Blocks over which the share rises in a line from `energy` towards 1; 0: it stays."""

    def energy_after(self, blocks: int) -> float:
        """The share after a block that `blocks` others came before: e + (1 - e) blocks / energy_blocks."""
        if not self.energy_blocks:
            return self.energy
        return self.energy + (1.0 - self.energy) * min(1.0, blocks / self.energy_blocks)


class Subspaces:
    """Protected directions by name, float32 [n, k]."""

    def __init__(self) -> None:
        self.directions: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    def grow(self, name: str, weighted: Tensor, energy: float, rank: int) -> None:
        """Protect what is missing of the energy of `weighted` [n, q]; `rank`: directions that must stay free."""
        before = self.directions.get(name)
        grown = grow_subspace(before, weighted, energy, rank)
        if grown is None or grown is before:
            return
        n, k = grown.shape
        for kind in (PROTECTED, COMPLEMENT):
            self._kept.pop(kind + name, None)
        if 2 * k > n:
            self._take_in(COMPLEMENT, name, _complement(grown))
        else:
            self._take_in(PROTECTED, name, grown)

    def _take_in(self, kind: str, name: str, kept: Tensor) -> None:
        self._kept[kind + name] = kept = kept.contiguous()
        self.directions[name] = kept if kind == PROTECTED else _complement(kept).contiguous()

    def share(self, inputs: Mapping[str, str]) -> float:
        """The mean share of the input side that is protected, over modules with the names of their inputs."""
        sides = {name: v.shape[1] / v.shape[0] for name, v in self.directions.items()}
        return sum(sides.get(name, 0.0) for name in inputs.values()) / max(1, len(inputs))

    def state_dict(self) -> dict[str, Tensor]:
        """min(k, n - k) columns of each, 4 bytes an entry."""
        return dict(self._kept)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave; other tensors are none of it."""
        self.directions.clear()  # estimates look into it
        self._kept = {}
        for kind in (PROTECTED, COMPLEMENT):
            for key, kept in state.items():
                if key.startswith(kind):
                    self._take_in(kind, key.removeprefix(kind), kept)


def most_protected_bytes(parameters: Mapping[str, nn.Parameter]) -> int:
    """The most bytes of the protected directions of all adapted modules, each with an input of its own."""
    widths = [down.shape[1] for down, _ in factor_pairs(parameters).values()]
    return sum(4 * n * (n // 2) for n in widths)


def refuse_other_parameters(ctx: Context, does: str) -> None:
    """`ConfigError` unless an adapter learns A and B of every module; `does`: what a method does with them."""
    pairs = factor_pairs(ctx.parameters)
    if scales(ctx.parameters) or {module_of(name) for name in ctx.parameters} != pairs.keys():
        raise ConfigError(
            f"{does}, another method has its own parameters in their place",
            "use it with methods that learn plain LoRA factors",
        )


def grow_subspace(protected: Tensor | None, weighted: Tensor, energy: float, rank: int) -> Tensor | None:
    """V with the fewest further directions after which it holds `energy` of ||W||_F^2, at 1 all but its rounding.

    At most n - rank columns; None while there is nothing to protect.
    """
    wide = weighted.double()
    rest = outside(protected, wide)
    total, left_over = wide.square().sum(), rest.square().sum()
    missing = min(energy, 1.0 - ROUNDING) * total - (total - left_over)
    if missing <= 0 or total == 0:
        return protected
    vectors, values, _ = torch.linalg.svd(rest, full_matrices=False)
    held = values.square().cumsum(0)
    count = int((held < missing).sum()) + 1
    room = len(wide) - rank - (0 if protected is None else protected.shape[1])
    count = min(count, room, len(values))
    if count <= 0:
        return protected
    new = vectors[:, :count]
    if protected is None:
        return new.float().contiguous()
    new = torch.linalg.qr(outside(protected, new))[0]
    return torch.cat([protected, new.float()], dim=1)


def outside(protected: Tensor | None, directions: Tensor) -> Tensor:
    """(I - V V^T) X"""
    if protected is None:
        return directions
    v = protected.to(directions)
    return directions - v @ (v.mT @ directions)


def leading_inputs(gram: Tensor, protected: Tensor | None, rank: int) -> Tensor:
    """The leading eigenvectors [r, n] of (I - V V^T) C (I - V V^T), outside of V [n, k], times 1 / sqrt(3).

    Their largest entries are positive. `ValueError` where fewer than r directions are outside of V.
    """
    width = len(gram)
    if rank + (0 if protected is None else protected.shape[1]) > width:
        raise ValueError(f"{rank} directions outside of {0 if protected is None else protected.shape[1]} of {width}")
    rest = outside(protected, outside(protected, gram.double()).mT)
    if protected is not None:  # its directions come last, even where the inputs have fewer than r outside of it
        v = protected.to(rest)
        rest = rest - rest.diagonal().sum().clamp_min(1.0) * v @ v.mT
    found = torch.linalg.eigh(0.5 * (rest + rest.mT))[1].flip(1)[:, :rank]
    found = torch.linalg.qr(outside(protected, found))[0]
    found = found * found.gather(0, found.abs().argmax(dim=0, keepdim=True)).sign()
    return (found.mT / 3.0**0.5).float()


def _complement(directions: Tensor) -> Tensor:
    """Orthonormal columns [n, n - k] of the complement of [n, k], in float32."""
    return torch.linalg.qr(directions.double(), mode="complete")[0][:, directions.shape[1] :].float()
