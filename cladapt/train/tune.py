"""Tuning a pretrained base on block 1, before adapters start: the next item, and what aligns words with IDs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from torch import nn

from cladapt.config import AdapterConfig, TuneConfig
from cladapt.data.histories import BlockSplit, split_block
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.methods import Context
from cladapt.methods.finetune import Finetune
from cladapt.model.adapter import adapter_parameters, create_adapter
from cladapt.model.load import Base
from cladapt.model.packed import PackedLoss, TrieSoftmax
from cladapt.model.source import check_reach
from cladapt.tokens.alignment import ITEM_TASKS, IdsToTitle, Items
from cladapt.tokens.prompts import Document, warn_left_out
from cladapt.tokens.tokenizer import sid_token_ids
from cladapt.train.blocks import fit_settings
from cladapt.train.feeds import Feed, MixedFeed
from cladapt.train.loop import Fit, FitResult, Snapshot
from cladapt.train.pretrain import with_token_rows
from cladapt.train.sinks import Sink
from cladapt.train.stream import make_form, training_documents, validation_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lesson:
    """What a base is tuned on: documents and weight of each task, what it is judged by, and how many texts are cut."""

    tasks: Mapping[str, tuple[Sequence[Document], float]]
    validation: Sequence[Document]
    cut_texts: int

    def feed(self, config: TuneConfig) -> MixedFeed:
        """The tasks mixed by their weights, judged by the validation of the sequence task."""
        return MixedFeed([*self.tasks.values()], self.validation, config.batch_tokens, config.row_tokens)


def lesson(base: Base, stream: Stream, config: TuneConfig) -> Lesson:
    """The documents of block 1, which `stream` ends with: its training events, and its items' texts.

    `base` has the IDs of the stream's items. `DataError` where a task needs texts and no item has one.
    """
    texts, room = stream.items["text"].to_list(), (config.window, config.row_tokens)
    form = make_form(config.form, base, *room, config.history, texts, config.history_tokens, None, config.window_step)
    check_reach(base.model.config, form.reach)
    split = split_block(stream, 1)
    validation = validation_documents(split, form)
    tasks: dict[str, tuple[Sequence[Document], float]] = {}
    if config.tasks.sequence:
        tasks["sequence"] = training_documents(split, form), config.tasks.sequence
    cut_texts = 0
    if config.tasks.alignment:
        aligning, cut_texts = _alignment(base, split, texts, config)
        tasks |= aligning
    for name, (documents, _) in tasks.items():
        warn_left_out(documents, f"block 1, {name}")
    return Lesson(tasks, validation, cut_texts)


def _alignment(
    base: Base, split: BlockSplit, texts: Sequence[str], config: TuneConfig
) -> tuple[dict[str, tuple[Sequence[Document], float]], int]:
    """Documents and weight of each alignment task, and how many texts are cut."""
    weights, room = config.tasks.alignment, (config.window, config.row_tokens)
    items = Items.encode(base.tokenizer, base.sids, base.item_tokens().numpy(), texts, config.title_tokens, *room)
    if not items.longest:
        raise DataError(
            f"tasks.{next(iter(weights))} needs items' texts: no item of block 1 has one that the tokenizer knows",
            "import with texts (`cladapt data import … --text COL` or `--items TABLE`), or leave the task out",
        )
    tasks: dict[str, tuple[Sequence[Document], float]] = {}
    for name, weight in weights.items():
        if name in ITEM_TASKS:
            documents = ITEM_TASKS[name](items).documents(np.arange(len(texts)))
        elif name == "ids_to_title":
            documents = training_documents(split, IdsToTitle(items))
        else:
            documents = training_documents(split, make_form("prompt", base, *room, "titles", texts))
        tasks[name] = documents, weight
    return tasks, int(items.cut.sum())


def tune(
    base: Base,
    softmax: TrieSoftmax | None,
    feed: Feed,
    config: TuneConfig,
    sink: Sink,
    checkpoint: Callable[[Snapshot], None] | None = None,
    resume: Snapshot | None = None,
) -> tuple["PreTrainedModel", FitResult]:
    """Train the weights of the base, or a LoRA and the rows of its ID tokens, and give back the model without wrappers.

    Weight decay is on the matrices of linear layers; embedding, head, norms and biases have none, because it would pull
    at rows that no token trains. All that learns is float32.
    """
    model, wrapped = base.model, None
    if config.rank:
        lora = AdapterConfig(rank=config.rank, alpha=config.alpha, dropout=config.dropout, targets="all-linear")
        factors = adapter_parameters(create_adapter(base, lora, config.seed))
        wrapped = with_token_rows(model, sid_token_ids(base.tokenizer, base.sids).tolist())
        for factor in factors.values():  # PEFT has frozen all but the rows
            factor.requires_grad_(True)
        model = cast("PreTrainedModel", wrapped.get_base_model())
    else:
        cast(nn.Module, model).requires_grad_(True)
    settings = replace(fit_settings(config, config.seed, block=1), patience=config.patience)
    fit = Fit(PackedLoss(model, softmax), Finetune(), _context(model), feed, settings, sink)
    result = fit.run(checkpoint, config.checkpoint_steps or len(fit.steps(0)), resume)
    if wrapped is not None:
        model = cast("PreTrainedModel", wrapped.merge_and_unload())
    model.requires_grad_(False)
    return model.eval(), result


def _context(model: "PreTrainedModel") -> Context:
    """All that learns, apart by whether weights decay."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    decayed: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    matrices = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module not in tables
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if id(parameter) in matrices else others)[name] = parameter
    return Context(decayed, block=1, extra_parameters=others)
