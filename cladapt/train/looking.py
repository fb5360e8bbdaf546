"""What methods see of a loss: forward passes of a step and of a share of the examples, and gradients over these."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cladapt import ranks
from cladapt.model.observe import InputWatch, Observable, Outputs, See, outputs_of, values_of
from cladapt.train.feeds import Batch, Feed


class Look:
    """What a method may see of a loss and its examples.

    `own`: this process's share of a batch, on its device; `total`: the sum of a tensor over the processes; `autocast`:
    the precision of its passes.
    """

    def __init__(
        self,
        loss: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        feed: Feed,
        own: Callable[[Batch], Batch],
        total: Callable[[Tensor], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._loss, self._parameters, self._feed = loss, parameters, feed
        self._own, self.total, self._autocast = own, total, autocast
        self._watch: InputWatch | None = None

    def at(self, loss: nn.Module, feed: Feed) -> "Look":
        """The same at another loss of the model, and its examples."""
        return Look(loss, self._parameters, feed, self._own, self.total, self._autocast)

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self._feed)

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
            batch = self._feed.sample(0.0)[0]
            with self._autocast(), self.during(lambda name, rows: None):
                outputs_of(self.loss, *self._own(batch))
        return self.watch.inputs

    @torch.no_grad()
    def outputs_with(
        self, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], batch: Batch
    ) -> Outputs:
        """Outputs of a micro-batch with other values of some parameters; those of the pass at hand are kept."""
        kept, counted = self.loss.outputs, self.loss.counted
        with values_of(parameters, values), self._autocast():
            found = outputs_of(self.loss, *batch)
        self.loss.outputs, self.loss.counted = kept, counted
        return found

    def mean_gradient(self, weights: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Gradient of the mean loss over an evenly spaced share of the examples, float32, dropout off, by name.

        `weights`: frozen tensors of the model as it stands, which learn nothing by this.
        """
        self._loss.eval()
        batches = self._feed.sample(share)
        targets = sum(map(self._feed.targets, batches))
        found = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            for batch in batches:
                with self._autocast():
                    loss = self._loss(*self._own(batch)).sum() / targets
                for total, grad in zip(found.values(), torch.autograd.grad(loss, [*weights.values()]), strict=True):
                    total += grad
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        return {name: self.total(total) for name, total in found.items()}

    def squared_gradient(self, share: float) -> dict[str, Tensor]:
        """Mean of (d l_i / d p)^2 over an evenly spaced share of the examples i, float32, dropout off, by name.

        l_i: the negative log-likelihood of an example, a document's summed over its targets. It is the diagonal of the
        empirical Fisher information of the adapter's parameters p as they stand.
        """
        self._loss.eval()
        found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._parameters.items()}
        count = 0
        for batch in self._feed.singles(share, ranks.ranks()):
            count += len(batch[0])
            with self._autocast():
                loss = self._loss(*self._own(batch)).sum()
            grads = torch.autograd.grad(loss, [*self._parameters.values()], materialize_grads=True)
            for total, grad in zip(found.values(), grads, strict=True):
                total += grad.float().square()
        return {name: self.total(total) / count for name, total in found.items()}
