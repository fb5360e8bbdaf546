"""What goes into adapted layers and what a loss computes on its way, for methods that look at a forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cladapt.model.adapter import lora_layers
from cladapt.model.anchors import module_of

See = Callable[[str, Tensor], None]
"""Takes the name of an input and its rows [N, in] of one micro-batch, detached; rows of padding are zero."""


@dataclass(frozen=True)
class Outputs:
    """What a forward pass computed before and behind the head, gradients included where it had them."""

    hidden: Tensor
    """What went into the head [m, d]: a row for each loss that has an alternative."""
    features: Tensor
    """Those rows of it [n, d] that have a class."""
    label: Tensor
    """The class of each feature, int64 [n]: of an image its label, of an item the first code of its ID."""
    scores: Tensor
    """Logits [e] of alternatives that may have been learned before, the choices one after the other."""
    choice: Tensor
    """The choice that each of them belongs to, int64 [e]."""
    classes: int
    """How many classes there can be."""

    @classmethod
    def without_choices(cls, hidden: Tensor) -> "Outputs":
        """Of a softmax over the whole vocabulary, which has no classes and keeps no logits."""
        nothing = torch.zeros(0, dtype=torch.int64, device=hidden.device)
        return cls(hidden, hidden[:0], nothing, hidden[:0, 0].float(), nothing, 0)


class Observable(nn.Module):
    """A loss that can keep what it computed, `outputs`, while it is `observed`."""

    observed = False
    outputs: Outputs | None = None
    counted: Tensor | None = None
    """Tokens, or images with all their tokens, that are no padding: bool [R, S] or [B]."""

    @property
    def head(self) -> nn.Module | None:
        """The layer that takes `Outputs.hidden`, where adapters may be on it."""
        return None

    def begin(self) -> None:
        """Before the first step of a block, when the method has begun it: the model is what the block starts from."""

    def end(self) -> Mapping[str, Any]:
        """What the block's `cladapt.json` and its line in the log say of the model as the block leaves it."""
        return {}


class InputWatch:
    """Sees the inputs of a loss's adapted layers; layers that are given the same tensor have one input.

    `parameters`: the adapter's, by the names that its modules go by. An input has the name of its first layer.
    """

    def __init__(self, loss: Observable, parameters: Mapping[str, nn.Parameter]) -> None:
        names = {id(p): module_of(name) for name, p in parameters.items()}
        self._loss = loss
        self._layers: dict[str, nn.Module] = {}
        for layer in lora_layers(loss).values():
            name = next((names[id(p)] for p in layer.parameters() if id(p) in names), None)
            if name is not None:
                self._layers[name] = layer
        self._head = next((name for name, layer in self._layers.items() if layer is loss.head), None)
        self.inputs: dict[str, str] = {}
        """The name of every layer's input, by the layer's, once a pass was seen."""

    @contextmanager
    def watching(self, see: See) -> Iterator[None]:
        """Inside, one forward pass of the loss shows each of its inputs once."""
        last: list[Any] = ["", None]

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def before(_layer: nn.Module, given: tuple[Any, ...]) -> None:
                if given[0] is not last[1]:
                    last[:] = name, given[0]
                    see(name, self._rows(given[0]))
                self.inputs[name] = last[0]

            return before

        # a head with hooks would be run for the whole vocabulary
        watched = {name: layer for name, layer in self._layers.items() if name != self._head}
        handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in watched.items()]
        observed, self._loss.observed = self._loss.observed, True
        try:
            yield
        finally:
            self._loss.observed = observed
            for handle in handles:
                handle.remove()
        if self._head is not None and self._loss.outputs is not None:
            see(self._head, self._loss.outputs.hidden.detach())
            self.inputs[self._head] = self._head

    def _rows(self, given: Tensor) -> Tensor:
        rows, counted = given.detach().flatten(0, -2), self._loss.counted
        if counted is None:
            return rows
        if given.ndim <= counted.ndim:  # the rows of a table, which are no tokens
            return rows
        mask = counted.flatten()
        return rows * mask.repeat_interleave(len(rows) // len(mask))[:, None].to(rows.dtype)


@contextmanager
def values_of(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, parameters have other values; a graph made before is unharmed, for no tensor is written to."""
    held = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(held[name])
        yield
    finally:
        for name, data in held.items():
            parameters[name].data = data


def outputs_of(loss: Observable, *batch: Tensor) -> Outputs:
    """One pass without gradients and without dropout; the modes of all modules are what they were."""
    modes, observed = [(module, module.training) for module in loss.modules()], loss.observed
    loss.eval()
    loss.observed = True
    try:
        with torch.no_grad():
            loss(*batch)
    finally:
        loss.observed = observed
        for module, training in modes:
            module.training = training
    if loss.outputs is None:
        raise RuntimeError(f"{type(loss).__name__} kept no outputs")
    return loss.outputs
