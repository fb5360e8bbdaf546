"""Recommending: a causal LM generates semantic IDs, and a block is the interactions of a span of time."""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import polars as pl
from torch import nn

from cladapt import ops, ranks
from cladapt.artifacts import atomic_dir
from cladapt.config import EvalConfig, PretrainConfig, PromoteConfig, RunConfig, SimulateConfig, TokensConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import ceiling, load_truth, simulate
from cladapt.errors import ConfigError, DataError
from cladapt.eval import tails
from cladapt.eval.cells import Candidate, Earlier
from cladapt.eval.continual import summaries
from cladapt.eval.evaluate import Evaluator
from cladapt.eval.promotion import LOG_LIKELIHOOD
from cladapt.eval.protocol import (
    CEILING,
    COUNTS,
    FROZEN,
    Measures,
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
from cladapt.eval.report import KeyValues, Section, rows_table
from cladapt.eval.significance import Effect
from cladapt.methods import Method, build
from cladapt.model.adapter import adapted_lm, adapted_weights, lora_layers
from cladapt.model.load import Base, base_provenance, check_form, check_home, load_base
from cladapt.model.packed import PackedLoss
from cladapt.model.saved import LEARNED, IdsRecord, adapter_provenance, ids_version, read_by
from cladapt.model.sharding import refuse_one_process
from cladapt.model.source import check_reach
from cladapt.tokens.build import load_sids, save_sids
from cladapt.tokens.prompts import Form, LeftOut, one_target_each, pack
from cladapt.tokens.versions import versions_of
from cladapt.train.bases import make_base
from cladapt.train.blocks import Examples
from cladapt.train.feeds import PackedFeed, shard
from cladapt.train.memory import MicroBatch, activation_bytes
from cladapt.train.prompting import check_prompt, prompt_record
from cladapt.train.sharpness import buffer_bytes, policy_of
from cladapt.train.sinks import Sink
from cladapt.train.stream import (
    Example,
    catalogue_softmax,
    learned_documents,
    make_feed,
    make_form,
    packed_targets,
    passed,
    replayed,
)
from cladapt.workloads._base import Group, Workload, whole
from cladapt.workloads._recommend_compare import Lines, block_curves, heat_map, next_block_tables
from cladapt.workloads._recommend_rows import RecommendRecord, frames_of, read_measures

if TYPE_CHECKING:
    from peft import PeftModel


class Recommend(Workload[RunConfig, Stream, Base, Measures]):
    """Full ranking of a catalogue for the users of every block, with the counts-only models in every table."""

    config = RunConfig
    record = RecommendRecord
    embedded = "the embedded stream and its tiny base"
    embedded_folder = "embedded"
    rows_folder = "users"
    note = (
        "Means over the blocks after the base's. Intervals are 95 %, bootstrap over users. Hits are of items, ties "
        "broken at random in expectation; a target that may not be recommended is a miss for every line. (ID): of the "
        "semantic ID alone. log_likelihood: of the item."
    )
    language = True
    one_block = True
    same_question = ("top_k", "beams", "exclude_seen", "targets", "max_users", "next_block")
    same_rows = ("beams", "exclude_seen", "targets", "max_users")
    same_cells = ("scope", "next_block")

    def open_inputs(self, config: RunConfig, choose: Callable[[Stream], Stream] = whole) -> tuple[Stream, Base]:
        if config.sharding != "none":
            refuse_one_process()
        stream = choose(Stream.load(Path(config.data)))
        base = load_base(Path(config.base), ops.DTYPES[ops.precision(config.train.precision)], config.quantisation)
        if config.sharding == "none":  # a base that is to be cut may not fit one device
            cast(nn.Module, base.model).to(ops.compute_device())
        check_home(base, stream, config.base, config.data)
        if start := self.starts_from(config):
            check_start(start, stream, config.data)
            self.check_adapter(config, start)
        check_form(base, config.train.form, config.train.history)
        made, now = (base.version if start is None else ids_version(start)), self.version(config)
        if not config.ids and made != now:
            raise other_version(str(start or config.base), made, config.data, now)
        base = base.with_sids(load_sids(Path(config.data), stream, base.version))
        return stream, self._by_version(config.model_copy(update={"ids": config.ids or now}), stream, base)

    def _by_version(self, config: RunConfig, stream: Stream, base: Base) -> Base:
        """The base with the version of the IDs that a configuration names, if any."""
        if config.ids in (0, base.sids.version):
            return base
        return base.with_version(load_sids(Path(config.data), stream, config.ids))

    def settled(self, config: RunConfig, base: Base) -> RunConfig:
        return config.model_copy(update={"ids": base.sids.version})

    def version(self, config: RunConfig) -> int:
        return versions_of(Path(config.data)).current

    def base_of(self, config: RunConfig, stream: Stream, base: Base, adapter: Path | None) -> Base:
        version = base.version if adapter is None else ids_version(adapter)
        known = self._by_version(config.model_copy(update={"ids": version}), stream, base)
        return known if adapter is None else read_by(base, known.sids, adapter)

    def reading(self, config: RunConfig, stream: Stream, base: Base, block: int) -> dict[str, Any]:
        table = self._by_version(config, stream, base).sids
        return {"ids": IdsRecord.of(table.first(len(stream.known(block)))).model_dump()}

    def prefix(self, stream: Stream, fingerprint: str) -> Stream | None:
        home = stream.home_of(fingerprint)
        return None if home is None else stream.prefix(home)

    def unchanged(self, stream: Stream, fingerprint: str) -> int:
        return stream.fingerprints.index(fingerprint) + 1 if fingerprint in stream.fingerprints else 0

    def fingerprint(self, stream: Stream, block: int) -> str:
        return stream.fingerprints[block - 1]

    def meaning(self, stream: Stream, base: Base, block: int) -> str:
        return base.sids.align([base.sids.items[i] for i in stream.known(block)]).fingerprint

    def make_embedded(self, stream: Path, base: Path, sink: Sink) -> None:
        make_world(stream, base, SimulateConfig(), PretrainConfig(), sink)

    def starts_from(self, config: RunConfig) -> Path | None:
        return Path(config.from_adapter) if config.from_adapter else None

    def provenance(self, config: RunConfig, block: int) -> dict[str, Any]:
        learned = build(config.method).learned_with(block)
        return {
            "form": config.train.form,
            "window": config.train.window,
            **prompt_record(config.train),
            "softmax": config.train.softmax,
            "held_out": config.train.held_out,
            LEARNED: [*passed(learned)] if config.train.held_out == "next" else [],
            "from_adapter": config.from_adapter or None,
            "beams": config.eval.beams,
        }

    def check_adapter(self, config: RunConfig, adapter: Path) -> None:
        check_prompt(adapter, config.train)

    def base_recipe(self, folder: Path) -> tuple[str, dict[str, Any]]:
        made = base_provenance(folder)
        return str(made.pop("fingerprint")), {key: value for key, value in made.items() if key != "cladapt"}

    def examples(self, config: RunConfig, stream: Stream, base: Base) -> Examples:
        base = self._by_version(config, stream, base)
        form, by_item = form_of(config, base, stream), build(config.method).flattens

        def of_blocks(model: "PeftModel", blocks: Sequence[int]) -> tuple[PackedLoss, PackedFeed]:
            warn_of_later(config, base, blocks[-1])
            loss = PackedLoss(adapted_lm(model), catalogue_softmax(base, stream, blocks[-1], config.train.softmax))
            again = again_with(config, stream, blocks)
            return loss, make_feed(stream, blocks, form, config.train, by_item, again)

        return of_blocks

    def check_model(self, config: RunConfig, method: Method, model: "PeftModel") -> None:
        head = adapted_lm(model).get_output_embeddings()
        adapted = any(layer is head for layer in lora_layers(model).values())
        if method.flattens and adapted and config.train.softmax == "vocabulary":
            raise ConfigError(
                f"train.softmax=vocabulary: {config.method.name} cannot perturb an adapted head over all tokens",
                "use train.softmax=trie, or leave the head out of adapter.targets",
            )
        if method.needs_outputs and config.train.softmax == "vocabulary":
            raise ConfigError(
                f"train.softmax=vocabulary: {config.method.name} compares what the model makes of the choices among "
                "items, which the softmax over all tokens does not tell apart",
                "use train.softmax=trie",
            )

    def plan(self, config: RunConfig, stream: Stream, base: Base, blocks: Sequence[int]) -> list[dict[str, Any]]:
        form, train = form_of(config, base, stream), config.train
        method = build(config.method)
        lines = []
        for block in blocks:
            learned = method.learned_with(block)
            again = again_with(config, stream, learned)
            documents = learned_documents(stream, learned, form, train, again)
            policy = policy_of(method, block, packed_targets(stream, block, form)) if method.flattens else None
            if policy is not None and policy.exact:
                documents = [each for d in documents for each in one_target_each(d, base.sids.levels)]
            found = LeftOut.of(documents)
            left_out = {"items_left_out": found.items, "titles_cut": found.titles} if found.shortened else {}
            rows = pack(documents, train.row_tokens, None)
            batches = math.ceil(len(rows.tokens) / max(1, train.batch_tokens // train.row_tokens))
            lines.append(
                {
                    "block": block,
                    "documents": len(documents),
                    **({"replayed": len(again)} if again else {}),
                    "targets": int(sum(d.loss.sum() for d in documents)) // base.sids.levels,
                    "tokens_per_epoch": int((rows.document > 0).sum()),
                    "filled": float((rows.document > 0).mean()),
                    "steps": train.epochs * math.ceil(batches / train.accumulation),
                    **left_out,
                }
            )
        return lines

    def activation_bytes(
        self, config: RunConfig, stream: Stream, base: Base, model: "PeftModel", blocks: Sequence[int]
    ) -> int:
        method, train = build(config.method), config.train
        learned = method.learned_with(blocks[-1] if blocks else stream.n_blocks)
        loss = PackedLoss(adapted_lm(model), catalogue_softmax(base, stream, learned[-1], train.softmax))
        form, again = form_of(config, base, stream), again_with(config, stream, learned)
        feed = make_feed(stream, learned, form, train, method.flattens, again)
        policy = None if feed.items is None else policy_of(method, learned[-1], feed.items)
        if policy is not None and policy.exact:
            feed = feed.apart()
        batches = feed.epoch([config.seed, 0])
        largest = max(batches, key=lambda batch: batch[0].numel())
        size = MicroBatch.of(loss, shard(largest, 0, ranks.ranks()))
        precision = ops.precision(train.precision)
        peak = activation_bytes(loss.lm, size, precision, train.checkpointing)
        if policy is not None and feed.items is not None:
            peak += buffer_bytes(policy, feed.items, largest, model)
        if method.weight_gradients:  # its pass before the first step, which adds up the gradients in float32
            weights = [*adapted_weights(model).values()]
            added = sum(4 * weight.numel() for weight in weights)
            peak = max(peak, added + activation_bytes(loss.lm, size, precision, False, weights))
        return peak

    def measure(
        self,
        config: RunConfig,
        settings: EvalConfig,
        stream: Stream,
        base: Base,
        models: Sequence[Candidate],
        block: int | None,
        earlier: Earlier[Measures],
        sink: Sink,
    ) -> Measures:
        evaluators = self._evaluators(config, settings, stream, base, models)
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

    def _evaluators(
        self, config: RunConfig, settings: EvalConfig, stream: Stream, base: Base, models: Sequence[Candidate]
    ) -> dict[int, Evaluator]:
        """The evaluator of each model by its block; models that read the same IDs share one."""
        by_version: dict[int, Evaluator] = {}
        found = {}
        for model in models:
            known = model.base or base
            if known.sids.version not in by_version:
                form = form_of(config, known, stream)
                made = Evaluator(stream, known, form, settings, config.train.softmax, config.seed)
                by_version[known.sids.version] = made
            found[model.block] = by_version[known.sids.version]
        return found

    def judge(
        self,
        config: RunConfig,
        settings: PromoteConfig,
        stream: Stream,
        base: Base,
        models: Mapping[str, Candidate],
        block: int,
    ) -> dict[str, dict[str, Effect]]:
        changes = {"targets": "valid", "next_block": False, "bootstrap": settings.bootstrap}
        asked = config.eval.model_copy(update=changes)
        evaluators = self._evaluators(config, asked, stream, base, [*models.values()])
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

    def sections(self, measures: Measures, figures: Mapping[str, Any], stream: Stream, base: Base) -> list[Section]:
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
            KeyValues("Semantic IDs", {"version": base.sids.version, **base.sids.collisions()}),
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


def check_start(adapter: Path, stream: Stream, data: str) -> None:
    """`DataError` where an adapter has learned another stream than the one that it is to go on with."""
    record = adapter_provenance(adapter)
    made_of = record.get("stream")
    if made_of and stream.home_of(made_of) is None:
        raise DataError(
            f"{adapter} has learned up to block {record.get('block')} of the stream {made_of}, {data} is the stream "
            f"{stream.fingerprint}, which does not begin with it",
            "use the stream that it has learned, so that no test event is in its training data",
        )


def other_version(made: str, version: int, data: str, now: int) -> ConfigError:
    """The error of a base or an adapter that was made with other IDs than the stream has now."""
    return ConfigError(
        f"{made} was made with version {version} of the IDs, {data} is at version {now}",
        f"-o ids={version} goes on by the IDs it knows, -o ids={now} learns the new ones from it; or make a base for "
        f"them, or go back: cladapt tokens refresh {data} --back",
    )


def warn_of_later(config: RunConfig, base: Base, block: int) -> None:
    """Warn where a block is learned by IDs that were fitted on later ones."""
    version = base.sids.version
    fitted = 1 if version == 1 else versions_of(Path(config.data)).through(version)
    if fitted > block:
        warnings.warn(
            f"block {block} is learned by version {version} of the IDs, which was fitted on blocks 1 to {fitted}: its "
            "figures know what came later",
            stacklevel=3,
        )


def form_of(config: RunConfig, base: Base, stream: Stream) -> Form:
    """How a run's histories become tokens; `stream` has the items of the base's IDs."""
    train = config.train
    texts = None if train.history == "ids" else stream.items["text"].to_list()
    form = make_form(
        train.form,
        base,
        train.window,
        train.row_tokens,
        train.history,
        texts,
        train.history_tokens,
        window_step=train.window_step,
    )
    check_reach(base.model.config, form.reach)
    return form


def again_with(config: RunConfig, stream: Stream, blocks: Sequence[int]) -> list[Example]:
    """The examples of earlier blocks that a run's method learns again with `blocks`."""
    replay = build(config.method).replay
    return [] if replay is None else replayed(stream, blocks[0], replay, config.seed)


def truth_of(folder: Path) -> pl.DataFrame | None:
    """The true next-item distribution of a simulated stream directory, None for a real one."""
    return load_truth(folder) if os.path.lexists(folder / "truth.parquet") else None


def make_world(
    stream: Path, base: Path, simulated: SimulateConfig, pretrain: PretrainConfig, sink: Sink, blocks: int | None = None
) -> None:
    """A simulated stream with semantic IDs and a base trained on its block 1; what exists is kept.

    `blocks`: how many of the simulated blocks the stream has so far; None for all.
    """

    def make_stream() -> None:
        sink.emit({"kind": "note", "text": f"simulating the embedded stream in {stream}"})
        with atomic_dir(stream) as folder:
            simulation = simulate(simulated)
            known = simulation.stream.prefix(blocks or simulation.stream.n_blocks)
            replace(simulation, stream=known).save(folder)
            save_sids(folder, known, TokensConfig())

    if not ranks.once(stream.is_dir):
        ranks.once(make_stream)
    if not ranks.once(base.is_dir):  # all processes train it
        sink.emit({"kind": "note", "text": f"training the embedded base in {base}"})
        found = Stream.load(stream)
        make_base(base, found, load_sids(stream, found), pretrain, sink)
