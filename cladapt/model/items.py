"""Two passes over one micro-batch for item-wise SAM: which item each token works for, and what every layer keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cladapt import ops
from cladapt.model.adapter import lora_layers


class ItemPasses:
    """The items of a micro-batch's tokens, which the loss and the adapted layers share while they are `inside`.

    `owner` int64 [R, S] or [B], below `items`: the item whose loss a token, or all tokens of an image, work for.
    """

    def __init__(self, owner: Tensor, items: int) -> None:
        self.owner, self.items = owner, items
        self.of_losses = owner.flatten()
        """The item of each loss of the last forward pass, int64 [n]."""
        self._layers: dict[int, ops.ItemFactors] = {}
        self._runs: dict[tuple[int, bool], ops.Runs] = {}

    def pick(self, of_losses: Tensor) -> None:
        """The items of the losses to come, whose tokens are all that a picked layer, the head, sees."""
        self.of_losses = of_losses

    def factors(self, layer: nn.Module, rows: int, picked: bool) -> ops.ItemFactors:
        """What a layer keeps, which sees `rows` tokens: those of the losses where `picked`, else all."""
        if id(layer) not in self._layers:
            self._layers[id(layer)] = ops.ItemFactors(self._runs_of(rows, picked))
        return self._layers[id(layer)]

    def _runs_of(self, rows: int, picked: bool) -> ops.Runs:
        if (rows, picked) not in self._runs:
            owner = self.of_losses if picked else self.owner.flatten()
            if not picked and rows != len(owner):  # an image's tokens are all its label's
                owner = owner.repeat_interleave(rows // max(1, len(owner)))
            self._runs[rows, picked] = ops.Runs.of(owner, self.items)
        return self._runs[rows, picked]

    @property
    def kept(self) -> list[ops.ItemFactors]:
        """What the layers keep, in the order in which they first ran."""
        return list(self._layers.values())

    def missing(self, model: nn.Module) -> str:
        """The name of a layer of the adapter that learns and has kept nothing, empty where there is none."""
        for name, layer in lora_layers(model).items():
            learns = any(p.requires_grad for key, p in layer.named_parameters() if "lora_" in key)
            if learns and (id(layer) not in self._layers or self._layers[id(layer)].gradients is None):
                return name
        return ""

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """The layers of the adapter keep gradients by item, or are perturbed along them."""
        layers: list[Any] = [layer for layer in lora_layers(model).values() if hasattr(layer, "items")]
        for layer in layers:
            layer.items = self
        try:
            yield
        finally:
            for layer in layers:
                layer.items = None
