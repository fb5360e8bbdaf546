"""Recommending: a causal LM generates semantic IDs, and a block is the interactions of a span of time."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from cladapt import ops, ranks
from cladapt.config import EvalConfig, PretrainConfig, RunConfig, SimulateConfig, TokensConfig
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError, ExampleWarning
from cladapt.eval.evaluate import Evaluator
from cladapt.eval.protocol import Measures
from cladapt.eval.report import KeyValues, Section
from cladapt.methods import Method, build
from cladapt.model.adapter import adapted_lm, adapted_weights, lora_layers
from cladapt.model.load import Base, base_provenance, check_form, check_home, load_base
from cladapt.model.packed import PackedLoss
from cladapt.model.saved import IdsRecord, adapter_provenance, ids_version, read_by
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
    catalogue_softmax,
    learned_documents,
    make_feed,
    make_form,
    packed_targets,
)
from cladapt.workloads._base import whole
from cladapt.workloads._interactions import Interactions, again_with, held_out_record, make_stream

if TYPE_CHECKING:
    from peft import PeftModel


class Recommend(Interactions[RunConfig, Base]):
    """A catalogue ranked by trie-constrained beam search over the semantic IDs of its items."""

    config = RunConfig
    embedded = "the embedded stream and its tiny base"
    embedded_folder = "embedded"
    note = (
        "Means over the blocks after the base's. Intervals are 95 %, bootstrap over users. Hits are of items, ties "
        "broken at random in expectation; a target that may not be recommended is a miss for every line. (ID): of the "
        "semantic ID alone. log_likelihood: of the item."
    )
    language = True

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

    def meaning(self, stream: Stream, base: Base, block: int) -> str:
        return base.sids.align([base.sids.items[i] for i in stream.known(block)]).fingerprint

    def make_embedded(self, config: RunConfig, stream: Path, base: Path, sink: Sink) -> None:
        make_world(stream, base, SimulateConfig(), PretrainConfig(), sink)

    def starts_from(self, config: RunConfig) -> Path | None:
        return Path(config.from_adapter) if config.from_adapter else None

    def provenance(self, config: RunConfig, block: int) -> dict[str, Any]:
        return {
            "form": config.train.form,
            "window": config.train.window,
            **prompt_record(config.train),
            "softmax": config.train.softmax,
            **held_out_record(config, config.train.held_out, block),
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
            feed = PackedFeed(documents, [], train.batch_tokens, train.row_tokens)
            # an epoch's own order decides into how many rows its documents go
            batches = [len(feed.epoch([config.seed, epoch])) for epoch in range(train.epochs)]
            lines.append(
                {
                    "block": block,
                    "documents": len(documents),
                    **({"replayed": len(again)} if again else {}),
                    "targets": int(sum(d.loss.sum() for d in documents)) // base.sids.levels,
                    "tokens_per_epoch": int((rows.document > 0).sum()),
                    "filled": float((rows.document > 0).mean()),
                    "steps": sum(math.ceil(count / train.accumulation) for count in batches),
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

    def evaluator(self, config: RunConfig, settings: EvalConfig, stream: Stream, base: Base) -> Evaluator:
        form = form_of(config, base, stream)
        return Evaluator(stream, base, form, settings, config.train.softmax, config.seed)

    def named_by(self, base: Base) -> int:
        return base.sids.version

    def sections(self, measures: Measures, figures: Mapping[str, Any], stream: Stream, base: Base) -> list[Section]:
        return [
            *super().sections(measures, figures, stream, base),
            KeyValues("Semantic IDs", {"version": base.sids.version, **base.sids.collisions()}),
        ]


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
            ExampleWarning,
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


def make_world(
    stream: Path, base: Path, simulated: SimulateConfig, pretrain: PretrainConfig, sink: Sink, blocks: int | None = None
) -> None:
    """A simulated stream with semantic IDs and a base trained on its block 1; what exists is kept.

    `blocks`: how many of the simulated blocks the stream has so far; None for all.
    """
    make_stream(stream, simulated, sink, lambda folder, known: save_sids(folder, known, TokensConfig()), blocks)
    if not ranks.once(base.is_dir):  # all processes train it
        sink.emit({"kind": "note", "text": f"training the embedded base in {base}"})
        found = Stream.load(stream)
        make_base(base, found, load_sids(stream, found), pretrain, sink)
