"""What workloads share whose blocks are the interactions of a span of time: how they are measured, judged and compared.

The model of a workload ranks the catalogue; what ranks it, and how, is its own.
"""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import polars as pl

from cladapt import ranks
from cladapt.artifacts import atomic_dir
from cladapt.config import EvalConfig, PromoteConfig, RunSettings, SimulateConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import ceiling, load_truth, simulate
from cladapt.errors import DataError
from cladapt.eval import tails
from cladapt.eval.cells import Candidate, Earlier
from cladapt.eval.continual import summaries
from cladapt.eval.promotion import LOG_LIKELIHOOD
from cladapt.eval.protocol import (
    CEILING,
    COUNTS,
    FROZEN,
    Measures,
    Tester,
    cells,
    continual_summary,
    differences,
    effects,
    headline,
    matrix,
    measure_counts,
    measure_run,
    model_row,
    on_block,
    rows_by_line,
    slice_table,
    table,
    table_columns,
)
from cladapt.eval.report import Section, rows_table
from cladapt.eval.significance import Effect
from cladapt.methods import build
from cladapt.model.saved import LEARNED
from cladapt.train.sinks import Sink
from cladapt.train.stream import Example, passed, replayed
from cladapt.workloads._base import FittedBase, Group, Workload
from cladapt.workloads._recommend_compare import Lines, block_curves, heat_map, next_block_tables
from cladapt.workloads._recommend_rows import RecommendRecord, frames_of, read_measures

C = TypeVar("C", bound=RunSettings)
B = TypeVar("B", bound=FittedBase)


class Interactions(Workload[C, Stream, B, Measures]):
    """Full ranking of a catalogue for the users of every block, with the counts-only models in every table."""

    record = RecommendRecord
    rows_folder = "users"
    note = (
        "Means over the blocks after the base's. Intervals are 95 %, bootstrap over users. Hits are of items, ties "
        "broken at random in expectation; a target that may not be recommended is a miss for every line. "
        "log_likelihood: of the item."
    )
    recommends = True
    one_block = True
    same_question = ("top_k", "beams", "exclude_seen", "targets", "max_users", "next_block")
    same_rows = ("beams", "exclude_seen", "targets", "max_users")
    same_cells = ("scope", "next_block")

    @abstractmethod
    def evaluator(self, config: C, settings: EvalConfig, stream: Stream, base: B) -> Tester:
        """What tests the models of a base on the blocks of a stream."""

    def named_by(self, base: B) -> int:
        """Version of the names by which a base knows the items; models that know one version share what tests them."""
        return 0

    def evaluators(
        self, config: C, settings: EvalConfig, stream: Stream, base: B, models: Iterable[Candidate]
    ) -> dict[int, Tester]:
        """What tests each model, by the model's block."""
        by_version: dict[int, Tester] = {}
        found = {}
        for model in models:
            known = cast(B, model.base or base)
            version = self.named_by(known)
            if version not in by_version:
                by_version[version] = self.evaluator(config, settings, stream, known)
            found[model.block] = by_version[version]
        return found

    def prefix(self, stream: Stream, fingerprint: str) -> Stream | None:
        home = stream.home_of(fingerprint)
        return None if home is None else stream.prefix(home)

    def unchanged(self, stream: Stream, fingerprint: str) -> int:
        return stream.fingerprints.index(fingerprint) + 1 if fingerprint in stream.fingerprints else 0

    def fingerprint(self, stream: Stream, block: int) -> str:
        return stream.fingerprints[block - 1]

    def measure(
        self,
        config: C,
        settings: EvalConfig,
        stream: Stream,
        base: B,
        models: Sequence[Candidate],
        block: int | None,
        earlier: Earlier[Measures],
        sink: Sink,
    ) -> Measures:
        evaluators = self.evaluators(config, settings, stream, base, models)
        evaluator = evaluators[models[0].block]
        blocks = range(1, stream.n_blocks + 1)
        asked = blocks if block is None else [block]
        rows, first = measure_run(
            evaluator,
            models,
            blocks,
            lambda text: sink.emit({"kind": "note", "text": text}),
            earlier,
            asked,
            evaluators,
        )
        name, after, learned = config.method.name, None, models[0].block
        later = [b for b in sorted(rows["block"].unique()) if b > learned]
        truth = truth_of(Path(config.data)) if settings.targets == "test" else None
        best = {}
        for b in later if truth is not None else ():
            try:
                best[b] = ceiling(truth, stream, b, settings.top_k)  # type: ignore[arg-type]
            except DataError as error:  # a log that was not simulated was appended
                sink.emit({"kind": "note", "text": f"block {b} has no ceiling: {error.message}"})
        if first.height:
            counts = measure_counts(evaluator, [b for b in later if b > learned + 1], 1, earlier)
            after = Measures(name, first, counts, learned, settings, lag=1)
        leaks = frozenset((model.block, s) for model in models for s in model.learned)
        counts = measure_counts(evaluator, later, earlier=earlier)
        places = tails.measure_places(evaluator, later, earlier)
        return Measures(name, rows, counts, learned, settings, best, next=after, learned=leaks, places=places)

    def judge(
        self,
        config: C,
        settings: PromoteConfig,
        stream: Stream,
        base: B,
        models: Mapping[str, Candidate],
        block: int,
    ) -> dict[str, dict[str, Effect]]:
        changes = {"targets": "valid", "next_block": False, "bootstrap": settings.bootstrap}
        asked = cast(EvalConfig, config.eval).model_copy(update=changes)
        evaluators = self.evaluators(config, asked, stream, base, models.values())
        rows = {}
        for name, model in models.items():
            with model.open() as lm:
                rows[name] = evaluators[model.block].rows(lm, block, block)
        *others, challenger = rows
        popularity = COUNTS[0]
        rows[popularity] = measure_counts(evaluators[block], [block])[popularity]
        metrics = (f"HR@{max(asked.top_k)}", LOG_LIKELIHOOD)
        found = {name: effects(rows[challenger], rows[name], asked, metrics) for name in (*others, popularity)}
        return {name: {m: e for m, e in by_metric.items() if e is not None} for name, by_metric in found.items()}

    def on_block(self, measures: Measures, block: int) -> Measures:
        return on_block(measures, block)

    def frames(self, measures: Measures) -> dict[str, pl.DataFrame]:
        return frames_of(measures)

    def read(self, folder: Path, metrics: Mapping[str, Any], name: str, settings: EvalConfig, again: str) -> Measures:
        return read_measures(folder, metrics, name, settings, again)

    def figures(self, measures: Measures, stream: Stream) -> dict[str, Any]:
        return {
            "table": table([measures]),
            "differences": differences([measures]),
            "matrix": cells(measures),
            "continual": continual_summary(measures, headline(measures.config)),
            "slices": slice_table(measures, stream),
            "tails": tails.tail_table(measures),
            "ceiling": {str(block): dict(values) for block, values in measures.ceiling.items()},
            "next_block": {
                "table": table([measures.next]) if measures.next else [],
                "differences": differences([measures.next]) if measures.next else [],
            },
        }

    def printed(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        own = [row for row in figures["tails"] if row["model"] == figures["table"][0]["model"]]
        more = {"continual": figures["continual"], "next_block": figures["next_block"]["table"], "tails": own}
        return {**super().printed(figures), **more}

    def table_names(self, method: str, settings: EvalConfig) -> tuple[Sequence[str], Sequence[str]]:
        return (method, FROZEN, *COUNTS, CEILING), table_columns(settings)

    def sections(self, measures: Measures, figures: Mapping[str, Any], stream: Stream, base: B) -> list[Section]:
        known = [m for m in headline(measures.config) if all(cell[m] is not None for cell in figures["matrix"])]
        return [
            rows_table("Mean over the later blocks", figures["table"], self.note),
            rows_table("Paired differences", figures["differences"]),
            *(heat_map(measures, metric) for metric in known),
            *block_curves(rows_by_line(measures), measures.config, measures.ceiling),
            rows_table("Summaries of R[t][s]", figures["continual"]),
            rows_table("Slices of the current blocks", figures["slices"]),
            rows_table("Head and tail of the items", figures["tails"], tails.NOTE),
            *next_block_tables(figures["next_block"]),
        ]

    def question(self, measures: Measures) -> dict[str, Any]:
        return {"blocks": measures.own["block"].unique().sort().to_list()}

    def compare(self, groups: Sequence[Group[Measures]]) -> Lines:
        return Lines(groups)

    def cell(self, measures: Measures) -> dict[str, Any]:
        row = model_row(measures.name, measures.own, measures.config)
        grid = matrix(measures, headline(measures.config)[0])
        found = {key: value for key, value in row.items() if key not in ("model", "users") and "95 %" not in key}
        means = summaries(grid).items()
        return found | {name: mean.value if mean.used and not mean.missing else None for name, mean in means}


def held_out_record(config: RunSettings, held_out: str, block: int) -> dict[str, Any]:
    """What the `cladapt.json` of a block's adapter says of the held-out events that it has learned."""
    learned = build(config.method).learned_with(block)
    return {"held_out": held_out, LEARNED: [*passed(learned)] if held_out == "next" else []}


def again_with(config: RunSettings, stream: Stream, blocks: Sequence[int]) -> list[Example]:
    """The examples of earlier blocks that a run's method learns again with `blocks`."""
    replay = build(config.method).replay
    return [] if replay is None else replayed(stream, blocks[0], replay, config.seed)


def truth_of(folder: Path) -> pl.DataFrame | None:
    """The true next-item distribution of a simulated stream directory, None for a real one."""
    return load_truth(folder) if os.path.lexists(folder / "truth.parquet") else None


def make_stream(
    out: Path,
    config: SimulateConfig,
    sink: Sink,
    add: Callable[[Path, Stream], Any] = lambda folder, stream: None,
    blocks: int | None = None,
) -> None:
    """Write a simulated stream where there is none yet; `add` writes what goes with it.

    `blocks`: how many of the simulated blocks the stream has so far; None for all.
    """

    def make() -> None:
        sink.emit({"kind": "note", "text": f"simulating the embedded stream in {out}"})
        with atomic_dir(out) as folder:
            simulation = simulate(config)
            known = simulation.stream.prefix(blocks or simulation.stream.n_blocks)
            replace(simulation, stream=known).save(folder)
            add(folder, known)

    if not ranks.once(out.is_dir):
        ranks.once(make)
