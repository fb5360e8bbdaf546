"""The cells R[t][s] of an evaluation: the models that are tested, and what an earlier evaluation has measured."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M")


@dataclass(frozen=True)
class Candidate:
    """A model to be tested: the last block that it has learned, and the blocks whose held-out events it has learned.

    `open`: inside, the model is loaded; one at a time. `base`: the base as the model reads it, where that differs.
    """

    block: int
    open: "Callable[[], AbstractContextManager[PreTrainedModel]]"
    learned: Collection[int] = ()
    base: Any = None


@dataclass
class Earlier(Generic[M]):
    """An earlier evaluation whose rows of `models` on `blocks` are what measuring them again gives.

    `kept` and `measured` count the cells of the evaluation that asks it.
    """

    measures: M | None = None
    models: Collection[int] = ()
    blocks: Collection[int] = ()
    kept: int = 0
    measured: int = 0

    def on(self, block: int) -> M | None:
        """Its measures where they hold for what no model decides on a block."""
        return self.measures if block in self.blocks else None

    def of(self, model: int, block: int) -> M | None:
        """Its measures where they hold for a model on a block."""
        return self.on(block) if model in self.models else None
