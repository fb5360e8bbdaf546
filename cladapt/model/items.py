"""Two passes over one micro-batch for item-wise SAM: which group each token is of, and what every layer keeps."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cladapt import ops
from cladapt.errors import ConfigError
from cladapt.model.adapter import lora_layers


class ItemPasses:
    """The groups of a micro-batch's tokens, which the loss and the adapted layers share while they are `inside`.

    `owner` int64 [R, S] or [B], below `items`: the group of a token, or of all tokens of an image. `layers`: how many
    of the last layers keep gradients and are perturbed, 0 for all; what comes behind them, the head, is of them.
    """

    def __init__(self, owner: Tensor, items: int, layers: int = 0) -> None:
        self.owner, self.items, self.layers = owner, items, layers
        self.of_losses = owner.flatten()
        """The group of each loss of the last forward pass, int64 [n]."""
        self.rows: Tensor | None = None
        """The rows or images of the micro-batch that take part, bool [R] or [B]; None: all."""
        self._kept: dict[int, ops.ItemFactors] = {}
        self._runs: dict[tuple[int, bool], ops.Runs] = {}

    def pick(self, of_losses: Tensor) -> None:
        """The groups of the losses to come, whose tokens are all that a picked layer, the head, sees."""
        self.of_losses = of_losses

    def leave_out(self, groups: Tensor) -> None:
        """Rows of nothing but some groups, bool [items], take no part any more; one row always does."""
        rows = ~groups[self.owner].view(len(self.owner), -1).all(1)
        rows[0] |= ~rows.any()
        if not bool(rows.all()):
            self.rows, self.owner = rows, self.owner[rows]
            self._runs.clear()

    def factors(self, layer: nn.Module, rows: int, picked: bool) -> ops.ItemFactors:
        """What a layer keeps, which sees `rows` tokens: those of the losses where `picked`, else all."""
        runs = self._runs_of(rows, picked)
        kept = self._kept.setdefault(id(layer), ops.ItemFactors(runs))
        kept.runs = runs
        return kept

    def _runs_of(self, rows: int, picked: bool) -> ops.Runs:
        if (rows, picked) not in self._runs:
            owner = self.of_losses if picked else self.owner.flatten()
            if not picked and rows % max(1, len(owner)):
                raise ConfigError(
                    f"a layer sees {rows} of {len(owner)} tokens: the adapted head, over the whole vocabulary",
                    "with eisam use train.softmax=trie, or leave the head out of adapter.targets",
                )
            if not picked and rows != len(owner):  # an image's tokens are all its own
                owner = owner.repeat_interleave(rows // max(1, len(owner)))
            self._runs[rows, picked] = ops.Runs.of(owner, self.items)
        return self._runs[rows, picked]

    @property
    def kept(self) -> list[ops.ItemFactors]:
        """What the layers keep, in the order in which they first ran."""
        return list(self._kept.values())

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Backward passes inside add nothing to what the layers keep."""
        for kept in self.kept:
            kept.recording = False
        yield
        for kept in self.kept:
            kept.recording = True

    def missing(self, model: nn.Module) -> str:
        """The name of a layer that learns, is to be perturbed and has kept nothing, empty where there is none."""
        for name, layer in perturbed_layers(model, self.layers).items():
            learns = any(p.requires_grad for key, p in layer.named_parameters() if "lora_" in key)
            if learns and (id(layer) not in self._kept or self._kept[id(layer)].gradients is None):
                return name
        return ""

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """The layers of the adapter keep gradients by group, or are perturbed along them."""
        layers: list[Any] = [
            layer for layer in perturbed_layers(model, self.layers).values() if hasattr(layer, "items")
        ]
        for layer in layers:
            layer.items = self
        try:
            yield
        finally:
            for layer in layers:
                layer.items = None


def perturbed_layers(model: nn.Module, last: int) -> dict[str, nn.Module]:
    """The adapted layers by name: of the `last` blocks, or of all where it is 0, and those outside of blocks."""
    found = dict(lora_layers(model))
    block = blocks_of(found)
    first = max(block.values(), default=0) + 1 - last if last else 0
    return {name: layer for name, layer in found.items() if block.get(name, first) >= first}


def blocks_of(names: Iterable[str]) -> dict[str, int]:
    """The transformer block, from 0, of each module or parameter that is inside one, by its name."""
    return {name: int(number[1]) for name in names if (number := re.search(r"\.(\d+)\.", name))}
