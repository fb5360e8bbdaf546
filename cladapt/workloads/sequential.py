"""Sequential recommending without a language model: SASRec, GRU4Rec or BERT4Rec over a table of items.

On the same streams as `recommend`, with the same rows, measures and counts-only lines: what a user would take instead.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from torch import nn

from cladapt import ops, ranks
from cladapt.config import EvalConfig, RunSettings, SimulateConfig
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError
from cladapt.eval.sequences import SequenceEvaluator
from cladapt.methods import Method, build
from cladapt.model.adapter import adapted_lm, lora_layers
from cladapt.model.geometry import Graphs
from cladapt.model.load import check_home
from cladapt.model.sequence import SequenceLoss, SequenceModel
from cladapt.model.sequence_base import SequenceBase, base_record, items_hash, load_sequence_base
from cladapt.sequential import Backbone, SequentialBaseConfig, SequentialTrainConfig
from cladapt.tokens.sequences import form_of_backbone
from cladapt.train.blocks import Examples
from cladapt.train.feeds import Feed
from cladapt.train.sequence_bases import DIAGNOSTICS, figures, make_sequence_base
from cladapt.train.sequences import first_row, make_sequence_feed
from cladapt.train.sinks import Sink
from cladapt.workloads._base import whole
from cladapt.workloads._interactions import Interactions, again_with, held_out_record, make_stream

if TYPE_CHECKING:
    from peft import PeftModel

DEFAULT: Backbone = "sasrec"


class SequentialConfig(RunSettings):
    """A whole run of `cladapt train --task sequential`."""

    task: ClassVar[str] = "sequential"
    shown_by = "config show --task sequential"
    data: str = ""
    """Stream directory, with or without semantic IDs; empty = an embedded simulated stream."""
    base: str = ""
    """Sequential base directory; empty = one by its defaults, trained once on block 1 and kept in `runs/bases`."""
    backbone: Literal["", "sasrec", "gru4rec", "bert4rec"] = ""
    """The backbone of the base; empty = the base's own, and sasrec for the embedded one."""
    train: SequentialTrainConfig = SequentialTrainConfig()
    eval: EvalConfig = EvalConfig()


class Sequential(Interactions[SequentialConfig, SequenceBase]):
    """A catalogue ranked by the products of a sequence vector with the rows of its items."""

    config = SequentialConfig
    embedded = "an embedded simulated stream and a small base of it"
    embedded_folder = "embedded-sequential"

    def open_inputs(
        self, config: SequentialConfig, choose: Callable[[Stream], Stream] = whole
    ) -> tuple[Stream, SequenceBase]:
        stream = choose(Stream.load(Path(config.data)))
        base = load_sequence_base(Path(config.base))
        if config.backbone not in ("", base.config.backbone):
            raise ConfigError(
                f"backbone={config.backbone}: {config.base} is a base of {base.config.backbone}",
                "leave out --backbone, or make a base with `cladapt base sequential --backbone NAME`",
            )
        check_home(base, stream, config.base, config.data)
        base.extend(stream)
        cast(nn.Module, base.model).to(ops.compute_device())
        return stream, base

    def meaning(self, stream: Stream, base: SequenceBase, block: int) -> str:
        return items_hash(stream, block)

    def embedded_base(self, config: SequentialConfig) -> str:
        return f"base-{config.backbone or DEFAULT}"

    def make_embedded(self, config: SequentialConfig, stream: Path, base: Path, sink: Sink) -> None:
        make_stream(stream, SimulateConfig(), sink)
        if not ranks.once(base.is_dir):
            sink.emit({"kind": "note", "text": f"training the embedded base in {base}"})
            settings = SequentialBaseConfig(backbone=config.backbone or DEFAULT)
            make_sequence_base(base, Stream.load(stream), settings, sink)

    def own_base(self, config: SequentialConfig, bases: Path, sink: Sink) -> Path:
        stream, settings = Stream.load(Path(config.data)), SequentialBaseConfig(backbone=config.backbone or DEFAULT)
        folder = bases / f"{settings.backbone}-{stream.fingerprints[0]}"
        if not ranks.once(folder.is_dir):
            sink.emit({"kind": "note", "text": f"training a base of {config.data}, by its first block, in {folder}"})
            make_sequence_base(folder, stream, settings, sink)
        return folder

    def provenance(self, config: SequentialConfig, block: int) -> dict[str, Any]:
        return {"rows": config.train.rows, **held_out_record(config, config.train.held_out, block)}

    def base_recipe(self, folder: Path) -> tuple[str, dict[str, Any]]:
        made = base_record(folder)
        apart = (
            "cladapt",
            "files",
            "items",
            "scale",
            "kept_epoch",
            "valid_log_likelihood",
            "training_loss",
            DIAGNOSTICS,
        )
        return str(made.pop("fingerprint")), {key: value for key, value in made.items() if key not in apart}

    def examples(self, config: SequentialConfig, stream: Stream, base: SequenceBase) -> Examples:
        method = build(config.method)
        form = form_of_backbone(base.config, base.config.mask)

        @lru_cache(maxsize=1)
        def graphs(block: int) -> Graphs:
            return Graphs.of(stream, block, base.texts, base.config.table, base.config.seed)

        def of_blocks(model: "PeftModel", blocks: Sequence[int]) -> tuple[nn.Module, Feed]:
            last = blocks[-1]
            feed = make_sequence_feed(stream, blocks, form, config.train, again_with(config, stream, blocks))
            loss = SequenceLoss(
                cast(SequenceModel, adapted_lm(model)),
                len(stream.known(last)),
                first_row(stream, blocks, config.train.rows),
                len(stream.known(last - 1)) if method.needs_outputs else 0,
            )
            loss.judged_by(lambda: {DIAGNOSTICS: figures(loss, feed, graphs(last))})
            return loss, feed

        return of_blocks

    def check_model(self, config: SequentialConfig, method: Method, model: "PeftModel") -> None:
        if config.train.checkpointing:
            raise ConfigError("train.checkpointing: a sequential model has no layers to compute again", "leave it out")
        shared = [name for name in lora_layers(model) if name.endswith("items.projection")]
        if method.flattens and shared:
            raise ConfigError(
                f"{config.method.name} cannot perturb {shared[0].removeprefix('base_model.model.')}, which all items "
                "go through",
                "leave projection out of adapter.targets, or use a base with table.use=initialise",
            )

    def plan(
        self, config: SequentialConfig, stream: Stream, base: SequenceBase, blocks: Sequence[int]
    ) -> list[dict[str, Any]]:
        method, form = build(config.method), form_of_backbone(base.config, base.config.mask)
        lines = []
        for block in blocks:
            learned = method.learned_with(block)
            again = again_with(config, stream, learned)
            feed = make_sequence_feed(stream, learned, form, config.train, again)
            batches = feed.epoch([config.seed, 0])
            new = len(stream.known(block)) - first_row(stream, learned, config.train.rows)
            lines.append(
                {
                    "block": block,
                    "sequences": len(feed),
                    **({"replayed": len(again)} if again else {}),
                    "targets": sum(map(feed.targets, batches)),
                    "learned_rows": new if base.extra_parameters else 0,
                    "steps": config.train.epochs * math.ceil(len(batches) / config.train.accumulation),
                }
            )
        return lines

    def evaluator(
        self, config: SequentialConfig, settings: EvalConfig, stream: Stream, base: SequenceBase
    ) -> SequenceEvaluator:
        form = form_of_backbone(base.config, base.config.mask)
        return SequenceEvaluator(stream, form, settings, config.seed)
