"""Forward passes that methods look at: those of a step, of a share of the examples, of other values of the adapter."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from cladapt.model.observe import InputWatch, Observable, Outputs, See, outputs_of, values_of
from cladapt.train.feeds import Batch, Feed


class Look:
    """What a method may see of a loss and its examples.

    `own`: this process's share of a batch, on its device; `autocast`: the precision of its passes.
    """

    def __init__(
        self,
        loss: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        feed: Feed,
        own: Callable[[Batch], Batch],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._loss, self._parameters, self._feed = loss, parameters, feed
        self._own, self._autocast = own, autocast
        self._watch: InputWatch | None = None

    @property
    def loss(self) -> Observable:
        """The loss, of a kind that can be looked at; `TypeError` for another."""
        if not isinstance(self._loss, Observable):
            raise TypeError(f"{type(self._loss).__name__} keeps no outputs: make it an Observable")
        return self._loss

    @property
    def watch(self) -> InputWatch:
        """The inputs of its layers."""
        if self._watch is None:
            self._watch = InputWatch(self.loss, self._parameters)
        return self._watch

    def during(self, see: See | None) -> AbstractContextManager[None]:
        """Inside, one forward pass shows its inputs to `see`."""
        return nullcontext() if see is None else self.watch.watching(see)

    def outputs(self) -> Outputs:
        """Those of the last pass; `RuntimeError` where none were kept."""
        if self.loss.outputs is None:
            raise RuntimeError("the last forward pass kept no outputs: set needs_outputs")
        return self.loss.outputs

    def over(self, share: float, see: See | None = None) -> Iterator[Outputs]:
        """Outputs for an evenly spaced share of the examples, this process's, as the model stands; dropout off."""
        for batch in self._feed.sample(share):
            with self._autocast(), self.during(see):
                found = outputs_of(self.loss, *self._own(batch))
            yield found

    def inputs(self) -> Mapping[str, str]:
        """The name of every layer's input, from a pass over the first batch where none was seen yet."""
        if not self.watch.inputs:
            batch = next(iter(islice(self._feed.sample(1e-9), 1)))
            with self._autocast(), self.during(lambda name, rows: None):
                outputs_of(self.loss, *self._own(batch))
        return self.watch.inputs

    @torch.no_grad()
    def outputs_with(self, values: Mapping[str, Tensor], batch: Batch) -> Outputs:
        """Outputs of a micro-batch under other values of parameters; those of the pass at hand stay what they are."""
        kept, counted = self.loss.outputs, self.loss.counted
        with values_of(self._parameters, values), self._autocast():
            found = outputs_of(self.loss, *batch)
        self.loss.outputs, self.loss.counted = kept, counted
        return found
