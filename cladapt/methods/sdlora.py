"""SD-LoRA: directions of earlier blocks stay, how far the model goes along each of them is learned with every block.

    W_t = W_0 + s (sum_{i<t} a_i Bhat_i Ahat_i + B_t A_t),   Ahat = A / ||A||_F,  Bhat = B / ||B||_F  (arXiv 2501.13198)
    learned    A_t, B_t from a fresh start (B = 0), and a_i, a number for each module and earlier block, without decay
    start      kept: a_i as block t-1 left it, a_{t-1} = ||B_{t-1}||_F ||A_{t-1}||_F, so that nothing jumps

s is the adapter's scale. A block's own direction is not normalised while it learns, for B = 0 has none: of the paper's
a_t Bhat_t Ahat_t the magnitude is a_t = ||B_t||_F ||A_t||_F. The released code has a number before B_t A_t, which adds
nothing to what they can be; it has one a_i for all modules, not offered here, and sets each to .8 in every block at
s = 1: start=0.8. Its variants with a falling rank, or that drop a direction, are not built. The adapter of block t is
saved as one of rank r t, its a_i multiplied in.
Log: `sdlora/magnitude` = mean |a_i| over modules and earlier blocks.
State: the directions, 4 bytes per adapter parameter and earlier block, and the magnitudes, 4 bytes per module and
earlier block.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cladapt.config import Settings
from cladapt.methods._base import Context
from cladapt.methods._history import WithHistory
from cladapt.model.anchors import is_learned, joined, module_of, unit

MAGNITUDE = "magnitude/"


class SdloraConfig(Settings):
    """Options of SD-LoRA."""

    start: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | Literal["kept"] = "kept"
    """Magnitude of every earlier direction as a block begins: what the block before left, or this number."""


class Sdlora(WithHistory):
    """A sum of earlier directions at learned magnitudes and the current adapter."""

    Config = SdloraConfig
    config: SdloraConfig
    recasts = True

    def __init__(self, config: SdloraConfig | None = None) -> None:
        super().__init__(config)
        self.magnitudes: dict[str, nn.Parameter] = {}
        """a [t - 1] of every module."""

    @property
    def restarts(self) -> bool:  # type: ignore[override]
        return self.config.start != "kept"

    @torch.no_grad()
    def begin_block(self, ctx: Context) -> None:
        last = ctx.factors()
        found = {module: a.detach() for module, a in self.magnitudes.items()}
        if is_learned(last):
            self.frozen = joined(self.frozen, unit(last))
            found = {
                module: torch.cat([found[module].to(size.device), size]) if module in found else size
                for module, size in sizes(last).items()
            }
            for name, parameter in ctx.parameters.items():
                parameter.copy_(ctx.initial[name])
        if self.config.start != "kept":
            found = {module: torch.full_like(a, self.config.start) for module, a in found.items()}
        device = next(iter(ctx.parameters.values())).device
        self.magnitudes = {module: nn.Parameter(a.to(device, copy=True)) for module, a in found.items()}
        self.install(ctx)

    def install(self, ctx: Context) -> None:
        self._ctx, self._begun = ctx, True
        ctx.set_history(self.frozen, self.magnitudes)
        ctx.learn({f"{module}.magnitudes": a for module, a in self.magnitudes.items()})

    def after_step(self, ctx: Context) -> None:
        if self.magnitudes:
            ctx.log["sdlora/magnitude"] = torch.cat([*self.magnitudes.values()]).abs().mean().item()

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **{MAGNITUDE + module: a.detach() for module, a in self.magnitudes.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        found = {key.removeprefix(MAGNITUDE): t for key, t in state.items() if key.startswith(MAGNITUDE)}
        if self._ctx is None:
            self.magnitudes = {module: nn.Parameter(a.clone()) for module, a in found.items()}
        else:  # the loop learns these
            for module, a in self.magnitudes.items():
                a.copy_(found[module])
        super().load_state_dict(state)

    def block_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return super().block_bytes(parameters) + 4 * len({*map(module_of, parameters)})


def sizes(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """||A||_F ||B||_F [1] of every module, by module."""
    found: dict[str, Tensor] = {}
    for name, tensor in factors.items():
        size = torch.linalg.vector_norm(tensor).view(1)
        found[module_of(name)] = found[module_of(name)] * size if module_of(name) in found else size
    return found
