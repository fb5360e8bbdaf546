"""What workloads differ in. A workload is one file with one subclass of `Workload`; see `cladapt.workloads`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import polars as pl
from pydantic import BaseModel, NonNegativeInt
from torch import nn

from cladapt.config import PromoteConfig, RunSettings
from cladapt.errors import ConfigError
from cladapt.eval.cells import Candidate, Earlier
from cladapt.eval.promotion import Effects
from cladapt.eval.report import Section
from cladapt.eval.significance import Effect, describe
from cladapt.methods import Method
from cladapt.model.adapter import AdaptedBase
from cladapt.model.saved import adapter_provenance
from cladapt.train.blocks import Examples, Provenance, learn_blocks
from cladapt.train.feeds import Feed
from cladapt.train.loop import FitResult
from cladapt.train.sinks import Sink

if TYPE_CHECKING:
    from peft import PeftModel


class Blocks(Protocol):
    """A stream: data that arrives in blocks 1 to `n_blocks`."""

    @property
    def n_blocks(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Identity of its content."""


class FittedBase(AdaptedBase, Protocol):
    """A base that says how it was made, and which blocks its weights have learned."""

    @property
    def fitted_block(self) -> int: ...

    @property
    def weights(self) -> str: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...


class Measured(Protocol):
    """What was measured of a run's models."""

    @property
    def name(self) -> str:
        """The run's method."""

    @property
    def base_block(self) -> int:
        """The last block that what the run starts from has learned."""

    @property
    def config(self) -> Any:
        """Settings of the evaluation."""


class MetricsRecord(BaseModel):
    """What metrics.json must hold for every workload; evaluations of older versions do not name their stream."""

    base_block: NonNegativeInt
    config: dict[str, Any]
    stream: str | None = None


def whole(stream: Any) -> Any:
    """All of a stream."""
    return stream


C = TypeVar("C", bound=RunSettings)
S = TypeVar("S", bound=Blocks)
B = TypeVar("B", bound=FittedBase)
M = TypeVar("M", bound=Measured)


@dataclass(frozen=True)
class Group(Generic[M]):
    """Measures by seed of runs that are equal in all else; `base` identifies how their bases were made."""

    name: str
    base: str
    by_seed: Mapping[int, M]


@dataclass(frozen=True)
class Comparison(ABC, Generic[M]):
    """Groups of runs and the lines that stand with them in one table, seeds pooled."""

    tails_note: ClassVar[str] = ""
    """What the groups of `tails` are, for reports."""
    groups: Sequence[Group[M]]

    @property
    def config(self) -> Any:
        """Settings of the evaluation; those that decide the figures are the same in all runs."""
        return next(iter(self.groups[0].by_seed.values())).config

    @property
    def references(self) -> Sequence[str]:
        """Lines that no run gave, with which a study compares every run."""
        return ()

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """Every line that has rows: the groups first."""

    @abstractmethod
    def summary(self) -> list[dict[str, Any]]:
        """One row per line of the table."""

    @abstractmethod
    def effects(self, name: str, reference: str) -> Mapping[str, Effect]:
        """Paired differences of two lines by metric; nothing where they have not the same seeds."""

    def effects_by_block(self, name: str, reference: str) -> Mapping[tuple[str, str], Effect]:
        """Paired differences of two lines by (block, metric), with "slope" for their growth; nothing where unknown."""
        return {}

    def tails(self) -> list[dict[str, Any]]:
        """One row per line and group of the tests by head and tail; none where the task does not know them."""
        return []

    def effects_by_tail(self, name: str, reference: str) -> Mapping[tuple[str, str], Effect]:
        """Paired differences of two lines by (group, metric); nothing where unknown."""
        return {}

    def differences(self, reference: str, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Each other line (or `names`) minus the reference: one row per metric that both have."""
        return [
            {
                "difference": f"{name} - {reference}",
                "metric": metric,
                "effect": effect.mean,
                "low": effect.low,
                "high": effect.high,
                "shown": describe(effect),
            }
            for name in (self.names if names is None else names)
            if name != reference
            for metric, effect in self.effects(name, reference).items()
        ]

    @abstractmethod
    def charts(self) -> list[Section]:
        """Sections of the report that are no table."""

    @property
    def further(self) -> "Mapping[str, tuple[str, Comparison[M]]]":
        """More tables of the same groups, judged by something else: name -> (title, comparison)."""
        return {}


def effect_lines(pair: tuple[str, str], kind: str, effects: Mapping[tuple[str, str], Effect]) -> list[dict[str, Any]]:
    """One row per part of the tests, named in the column `kind`: the effects by (part, metric) of a pair of lines, the
    first minus the second."""
    lines: dict[str, dict[str, Any]] = {}
    for (part, metric), effect in effects.items():
        line = lines.setdefault(part, {"difference": " - ".join(pair), kind: part, "users": effect.n})
        line |= {metric: effect.mean, f"{metric} low": effect.low, f"{metric} high": effect.high}
        line[f"{metric} shown"] = describe(effect)
    return [*lines.values()]


class Workload(ABC, Generic[C, S, B, M]):
    """One task: C its settings, S its stream, B its base, M what an evaluation measures."""

    config: ClassVar[type[RunSettings]]
    """Settings of a run; `config.task` is the name of the file."""
    record: ClassVar[type[MetricsRecord]] = MetricsRecord
    """What reading an evaluation back needs of metrics.json."""
    embedded: ClassVar[str]
    """What runs without `data` and `base` are given, in words."""
    embedded_folder: ClassVar[str]
    """Where below `runs/` that is kept."""
    rows_folder: ClassVar[str]
    """Folder of a run that holds the rows of its evaluation."""
    note: ClassVar[str]
    """What the figures and intervals of its tables are, for reports."""
    language: ClassVar[bool] = False
    """Whether its bases are language models, which have a text's perplexity."""
    recommends: ClassVar[bool] = False
    """Whether its models rank items for histories."""
    one_block: ClassVar[bool] = False
    """Whether an evaluation of one block alone means something."""
    one_stream: ClassVar[bool] = True
    """Whether runs of several seeds must be on one stream; otherwise runs of one seed must."""
    same_question: ClassVar[Sequence[str]]
    """Evaluation settings that must agree between runs; the others change the effort, not the figures."""
    same_rows: ClassVar[Sequence[str]]
    """Evaluation settings that decide the rows of a cell."""
    same_cells: ClassVar[Sequence[str]] = ()
    """Evaluation settings that decide which cells there are."""

    # inputs

    @abstractmethod
    def open_inputs(self, config: C, choose: Callable[[S], S] = whole) -> tuple[S, B]:
        """The stream and the base of a configuration, checked to belong together.

        `choose`: gives the part of the stream that is meant.
        """

    def prefix(self, stream: S, fingerprint: str) -> S | None:
        """The beginning of the stream that has this fingerprint, also from before users were forgotten; None for
        another stream's."""
        return stream if stream.fingerprint == fingerprint else None

    def unchanged(self, stream: S, fingerprint: str) -> int:
        """How many of the first blocks are, bit for bit, those of the stream with this fingerprint."""
        return stream.n_blocks if stream.fingerprint == fingerprint else 0

    def fingerprint(self, stream: S, block: int) -> str:
        """Identity of the stream up to `block`, as adapters record it."""
        return stream.fingerprint

    def meaning(self, stream: S, base: B, block: int) -> str:
        """Identity of what the outputs of the base stand for in the blocks up to `block`."""
        return base.fingerprint

    def settled(self, config: C, base: B) -> C:
        """The settings of a run that begins, with what they leave to its inputs."""
        return config

    def version(self, config: C) -> int:
        """Version of the names that the stream's items have now; 0 where they never change."""
        return 0

    def base_of(self, config: C, stream: S, base: B, adapter: Path | None) -> B:
        """The base as one of its adapters reads it, or (None) alone."""
        return base

    def embedded_base(self, config: C) -> str:
        """Name of the embedded base's folder beside the embedded stream."""
        return "base"

    @abstractmethod
    def make_embedded(self, config: C, stream: Path, base: Path, sink: Sink) -> None:
        """Make the embedded stream and base where they are missing."""

    def own_base(self, config: C, bases: Path, sink: Sink) -> Path | None:
        """The base below `bases` of a stream named alone, made where it is missing; None: it has to be named."""
        return None

    def check_model(self, config: C, method: Method, model: "PeftModel") -> None:
        """`ConfigError` where a method cannot learn the adapted model by the run's settings, before a run begins."""

    def starts_from(self, config: C) -> Path | None:
        """The adapter that the first block starts from; None for a fresh one."""
        return None

    def provenance(self, config: C, block: int) -> Mapping[str, Any]:
        """What the `cladapt.json` of a block's adapter says beside stream, configuration, method and seed."""
        return {}

    def reading(self, config: C, stream: S, base: B, block: int) -> Mapping[str, Any]:
        """What a block's adapter says of how its outputs are read; mistakes in the settings show here."""
        return {}

    def check_adapter(self, config: C, adapter: Path) -> None:
        """`ConfigError` where an adapter was taught by inputs that `config` words otherwise, and so would misread."""

    @abstractmethod
    def base_recipe(self, folder: Path) -> tuple[str, Mapping[str, Any]]:
        """A base's fingerprint and how it was made, without what differs between seeds."""

    # training

    @abstractmethod
    def examples(self, config: C, stream: S, base: B) -> Examples:
        """What of a block is learned and by which loss; mistakes in the settings show when this is called."""

    def learned_block(self, config: C, base: B) -> int:
        """The last block that the base, or the adapter a run starts from, has learned; 0 for none."""
        start = self.starts_from(config)
        return max(base.fitted_block, 0 if start is None else int(adapter_provenance(start).get("block", 0)))

    def blocks(self, config: C, stream: S, base: B) -> Sequence[int]:
        """The blocks to learn; none where the stream has to grow first."""
        return range(self.learned_block(config, base) + 1, stream.n_blocks + 1)

    def learn(
        self,
        run: Path,
        config: C,
        stream: S,
        base: B,
        sink: Sink,
        config_hash: str,
        provenance: Provenance,
        config_at: Callable[[int], C] | None = None,
    ) -> dict[int, FitResult]:
        """Adapt to every block that is not learned; finished blocks of an interrupted run are taken as they are.

        `config_at`: the configuration of each block, where it is not the same for all.
        """

        def examples(model: "PeftModel", learned: Sequence[int]) -> tuple[nn.Module, Feed]:
            of_block = config if config_at is None else config_at(learned[-1])
            return self.examples(of_block, stream, base)(model, learned)

        blocks, start = self.blocks(config, stream, base), self.starts_from(config)
        return learn_blocks(run, config, base, blocks, examples, sink, config_hash, provenance, start)

    @abstractmethod
    def plan(self, config: C, stream: S, base: B, blocks: Sequence[int]) -> list[dict[str, Any]]:
        """A line per block to learn: what it holds, and its optimiser steps."""

    def activation_bytes(self, config: C, stream: S, base: B, model: "PeftModel", blocks: Sequence[int]) -> int | None:
        """Estimated memory that one micro-batch of `blocks` takes beside the adapted model; None where unknown."""
        return None

    # evaluation

    @abstractmethod
    def measure(
        self,
        config: C,
        settings: Any,
        stream: S,
        base: B,
        models: Sequence[Candidate],
        block: int | None,
        earlier: Earlier[M],
        sink: Sink,
    ) -> M:
        """Test what the run starts from, then each adapted model, on every block (or one), without the cells that an
        earlier evaluation has measured: the result has them as they are."""

    def judge(
        self,
        config: C,
        settings: PromoteConfig,
        stream: S,
        base: B,
        models: Mapping[str, Candidate],
        block: int,
    ) -> Effects:
        """The last of the named models minus each other one, and minus counting, on the validation targets of `block`.

        `ConfigError` where the task's streams do not grow.
        """
        raise ConfigError(f"runs of --task {config.task} promote nothing", "their streams do not grow")

    def on_block(self, measures: M, block: int) -> M:
        """What was measured on one block, for a workload with `one_block`."""
        return measures

    @abstractmethod
    def frames(self, measures: M) -> Mapping[str, pl.DataFrame]:
        """The rows of an evaluation by file name, without its ending."""

    @abstractmethod
    def read(self, folder: Path, metrics: Mapping[str, Any], name: str, settings: Any, again: str) -> M:
        """What `frames` and `figures` have written; `DataError` with the hint `again` where they do not fit."""

    @abstractmethod
    def figures(self, measures: M, stream: S) -> dict[str, Any]:
        """Its part of metrics.json: `table`, `differences`, `matrix` and what else it has."""

    def printed(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """What `cladapt eval` prints of metrics.json."""
        return {key: figures[key] for key in ("table", "differences")}

    @abstractmethod
    def table_names(self, method: str, settings: Any) -> tuple[Sequence[str], Sequence[str]]:
        """Names of the lines and of the columns that the table of a method may have."""

    @abstractmethod
    def sections(self, measures: M, figures: Mapping[str, Any], stream: S, base: B) -> list[Section]:
        """Its part of the report of one run."""

    # comparison

    @abstractmethod
    def question(self, measures: M) -> Mapping[str, Any]:
        """What must be the same in two runs beside `same_question`, by name."""

    @abstractmethod
    def compare(self, groups: Sequence[Group[M]]) -> Comparison[M]:
        """The lines of several groups, which answer the same question."""

    @abstractmethod
    def cell(self, measures: M) -> dict[str, Any]:
        """The figures of one run as one row of a study."""
