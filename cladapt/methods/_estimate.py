"""What goes into layers while they learn, in bounded memory: a matrix W [n, q] with W W^T ~ sum of x x^T, by input.

    gram      C += X^T X; W = U sqrt(S) of C = U S U^T                         exact; n^2 entries for each input
    sketch    frequent directions (Liberty 2013): at most 2 l rows, shrunk by s_l^2 to l of them;
              ||C - W W^T||_2 <= ||X - X_k||_F^2 / (l - k)                      2 l n entries
    residual  directions that a step's inputs need beside those that are protected or collected, collected once they
              were needed in `survive` observed steps one after the other; W has them at length 1
                                                                                 at most n^2 entries

The rows of a step are put together first, those of several processes too: a Gram is their sum, and of a sketch or a
residual each process gives its share's directions, weighted. n the width of an input.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cladapt import ranks
from cladapt.errors import ConfigError
from cladapt.methods._base import Context
from cladapt.methods._subspace import Subspaces, grow_subspace, leading_inputs
from cladapt.model.anchors import factor_pairs

RUNNING = "running/"
Total = Callable[[Tensor], Tensor]


class Estimate(ABC):
    """Collects the inputs of a block: rows are added during a step, and taken in after it."""

    weighs: ClassVar[bool] = True
    """Whether directions are weighted by what the block's inputs hold of them; else all that are kept count alike."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget all of it: a block begins."""
        self.kept = {}

    @abstractmethod
    def add(self, name: str, rows: Tensor) -> None:
        """Rows [N, n] that go into an input."""

    @abstractmethod
    def take_in(self, total: Total) -> None:
        """Put what was added since the last call into what is kept; `total` adds a tensor over the processes."""

    @abstractmethod
    def weighted(self, name: str) -> Tensor:
        """W [n, q] of an input, float64."""

    @property
    def names(self) -> list[str]:
        """The inputs that anything was seen of."""
        return [*self.kept]

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept, float32."""
        return {RUNNING + name: tensor for name, tensor in self.kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave; other tensors are none of it."""
        self.kept = {k.removeprefix(RUNNING): t for k, t in state.items() if k.startswith(RUNNING)}


class Gram(Estimate):
    """The sum itself."""

    def __init__(self) -> None:
        super().__init__()
        self._added: dict[str, Tensor] = {}

    @classmethod
    def over(cls, ctx: Context, share: float) -> "Gram":
        """Of a pass over a share of the block's examples, as the model stands."""
        found = cls()
        for _ in ctx.look(share, found.add):
            pass
        found.take_in(ctx.total)
        return found

    def add(self, name: str, rows: Tensor) -> None:
        x = rows.float()
        if name in self._added:
            self._added[name].addmm_(x.mT, x)
        else:
            self._added[name] = x.mT @ x

    def take_in(self, total: Total) -> None:
        for name, added in self._added.items():
            whole = total(added)
            self.kept[name] = self.kept[name].to(whole.device) + whole if name in self.kept else whole
        self._added = {}

    def weighted(self, name: str) -> Tensor:
        values, vectors = torch.linalg.eigh(self.kept[name].double())
        return vectors * values.clamp_min(0.0).sqrt()


class _ByStep(Estimate):
    """Estimates whose step is a few weighted directions, put together over the processes."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self._added: dict[str, list[Tensor]] = {}

    def add(self, name: str, rows: Tensor) -> None:
        self._added.setdefault(name, []).append(_shrunk(rows.float(), self.most))

    def take_in(self, total: Total) -> None:
        for name, added in self._added.items():
            own = _shrunk(torch.cat(added), self.most)
            places = own.new_zeros(ranks.ranks(), self.most, own.shape[1])
            places[ranks.rank(), : len(own)] = own
            self._include(name, total(places).flatten(0, 1))
        self._added = {}

    @abstractmethod
    def _include(self, name: str, rows: Tensor) -> None:
        """Take in a step's rows [q, n]."""


class Sketch(_ByStep):
    """Frequent directions, `most` of them."""

    def _include(self, name: str, rows: Tensor) -> None:
        both = torch.cat([self.kept[name].to(rows.device), rows]) if name in self.kept else rows
        self.kept[name] = _shrunk(both, self.most)

    def weighted(self, name: str) -> Tensor:
        return self.kept[name].double().mT


class Residual(_ByStep):
    """Directions that steps need one after the other.

    `kept` [n + 1, c]: directions, and in the last row how many steps each was needed in; c counts those collected and
    those on trial. `energy`: the share of a step's inputs that directions have to hold.
    """

    weighs = False

    def __init__(self, most: int, energy: float, survive: int, protected: Mapping[str, Tensor]) -> None:
        super().__init__(most)
        self.energy, self.survive, self._protected = energy, survive, protected

    def _include(self, name: str, rows: Tensor) -> None:
        width = rows.shape[1]
        known = self.kept.get(name, rows.new_zeros(width + 1, 0)).to(rows.device)
        done = known[-1] >= self.survive
        held, trial, age = known[:-1, done], known[:-1, ~done], known[-1, ~done]
        protected = self._protected.get(name)
        base = held if protected is None else torch.cat([protected.to(held), held], 1)
        grown = grow_subspace(base if base.shape[1] else None, rows.mT, self.energy, 0)
        needed = rows.new_zeros(width, 0) if grown is None else grown[:, base.shape[1] :].to(rows)
        again = (needed.mT @ trial).square().sum(0) >= 0.5
        trial, age = trial[:, again], age[again] + 1
        # of the directions needed, what is at least half outside of those on trial and of those before it
        q, r = torch.linalg.qr(torch.cat([trial, needed], 1).double())
        fresh = q[:, trial.shape[1] :][:, r.diagonal()[trial.shape[1] :].square() >= 0.5].to(rows)
        ages = torch.cat([age, age.new_ones(fresh.shape[1])])
        found = torch.cat([torch.cat([trial, fresh], 1), ages[None]])
        self.kept[name] = torch.cat([known[:, done], found], 1)

    def weighted(self, name: str) -> Tensor:
        known = self.kept[name]
        return known[:-1, known[-1] >= self.survive].double()


def protect(subspaces: Subspaces, estimate: Estimate, ctx: Context, energy: float) -> None:
    """Protect `energy` of what a block's inputs hold, or all that was collected where directions have no weights.

    As many directions as the largest rank of their layers stay free.
    """
    free: dict[str, int] = {}
    pairs = factor_pairs(ctx.parameters)
    for module, name in ctx.inputs().items():
        free[name] = max(free.get(name, 0), len(pairs[module][0]))
    for name in estimate.names:
        subspaces.grow(name, estimate.weighted(name), energy if estimate.weighs else 1.0, free[name])


def start_outside(ctx: Context, seen: Gram, subspaces: Subspaces) -> None:
    """Let A of every module span the leading directions of its inputs outside of what is protected."""
    inputs = ctx.inputs()
    for module, (down, _) in factor_pairs(ctx.parameters).items():
        protected = subspaces.directions.get(inputs[module])
        down.copy_(leading_inputs(seen.kept[inputs[module]], protected, len(down)))


def refuse_larger_rank(ctx: Context) -> None:
    """`ConfigError` where a rank is larger than a layer's inputs are wide: A cannot be directions of them."""
    for module, (down, _) in factor_pairs(ctx.parameters).items():
        rank, width = down.shape
        if rank > width:
            raise ConfigError(
                f"adapter.rank={rank} exceeds {module} of {width} inputs",
                f"its directions are to be orthonormal: use a rank of at most {width}, or other targets",
            )


def _shrunk(rows: Tensor, most: int) -> Tensor:
    """Frequent directions of rows [N, n]: at most `most` of them, whose Gram is below theirs, as they come.

    All at once by a Gram of n^2 entries where that is no more than the rows themselves, else 2 `most` rows at a time.
    """
    while len(rows) > most:
        some, rest = (rows, rows[:0]) if len(rows) >= rows.shape[1] else (rows[: 2 * most], rows[2 * most :])
        squares, vectors = _leading(some.double(), most + 1)
        cut = squares[most] if len(squares) > most else squares.new_zeros(())
        sizes = (squares[:most] - cut).clamp_min(0.0).sqrt()
        rows = torch.cat([(sizes[:, None] * vectors[:most]).to(rows), rest])
    return rows


def _leading(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest squared singular values and right singular vectors [count, n] of rows [N, n], by the smaller Gram."""
    wide = len(rows) < rows.shape[1]
    squares, vectors = torch.linalg.eigh(rows @ rows.mT if wide else rows.mT @ rows)
    squares, vectors = squares.flip(0)[:count].clamp_min(0.0), vectors.flip(1)[:, :count].mT
    if wide:
        vectors = vectors @ rows / squares.sqrt().clamp_min(torch.finfo(rows.dtype).tiny)[:, None]
    return squares, vectors
