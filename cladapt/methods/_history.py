"""Methods that keep the factors of earlier blocks frozen beside the adapter."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cladapt.methods._base import Context, Method
from cladapt.model.anchors import is_learned, joined


class WithHistory(Method):
    """Holds the frozen factors as its state, and puts them into the model when a block begins or is taken up."""

    history = True

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self.frozen: dict[str, Tensor] = {}
        self._ctx: Context | None = None
        self._begun = False

    @torch.no_grad()
    def begin_fresh(self, ctx: Context) -> None:
        """Keep the factors that the block before has learned among the frozen ones, and begin this one with fresh."""
        last = ctx.factors()
        if is_learned(last):
            self.frozen = joined(self.frozen, last)
            for name, parameter in ctx.parameters.items():
                parameter.copy_(ctx.initial[name])
        self.install(ctx)

    def install(self, ctx: Context) -> None:
        """Put the frozen factors beside the adapter of this block."""
        self._ctx, self._begun = ctx, True
        ctx.set_history(self.frozen)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.frozen)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.frozen = {name: tensor for name, tensor in state.items() if ".lora_" in name}
        if self._ctx is not None:  # inside a block; between blocks begin_block does it
            self.install(self._ctx)

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        """Bytes of `state_dict`; before the first block begins, the most that a block adds to them."""
        if not self._begun:
            return self.block_bytes(parameters)
        return sum(4 * tensor.numel() for tensor in self.state_dict().values())

    def block_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        """The most bytes that a block adds to the state: its factors, frozen."""
        return 4 * sum(p.numel() for p in parameters.values())
