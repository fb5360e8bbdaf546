"""A run over a stream of interactions: what of a block is learned, and by which loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cladapt.config import RunConfig, TrainConfig
from cladapt.data.histories import BlockSplit, split_block
from cladapt.data.schema import Stream
from cladapt.methods import build
from cladapt.model.adapter import adapted_lm
from cladapt.model.load import Base, trie_softmax
from cladapt.model.packed import PackedLoss, Softmax, TrieSoftmax
from cladapt.model.saved import adapter_provenance
from cladapt.tokens.prompts import Document, Form, PackedForm, PromptForm
from cladapt.tokens.trie import Trie
from cladapt.train.blocks import blocks_after, learn_blocks
from cladapt.train.feeds import PackedFeed
from cladapt.train.loop import FitResult
from cladapt.train.sinks import Sink

if TYPE_CHECKING:
    from peft import PeftModel


def make_form(form: str, base: Base, window: int, row_tokens: int) -> Form:
    """How histories become tokens for this base: `packed` or `prompt`."""
    tokens = base.item_tokens().numpy()
    if form == "prompt":
        return PromptForm(tokens, base.tokenizer, window=window, row_tokens=row_tokens)
    return PackedForm(tokens, bos=base.bos(), window=window, row_tokens=row_tokens)


def training_documents(split: BlockSplit, form: Form) -> list[Document]:
    """Every training event of the block as a target once."""
    return [d for i in range(len(split.user)) for d in form.documents(*split.training(i))]


def validation_documents(split: BlockSplit, form: Form) -> list[Document]:
    """One document per held-out user: the validation event after its history."""
    held_out = np.flatnonzero(split.held_out)
    documents = []
    for i, target in zip(held_out, split.targets("valid"), strict=True):
        history = split.history(int(i), before="valid")
        documents += form.documents(np.append(history, target), len(history))
    return documents


def make_feed(learned: Sequence[BlockSplit], judged: BlockSplit, form: Form, config: TrainConfig) -> PackedFeed:
    """The training events of the blocks to learn, and the validation events of one."""
    documents = [document for split in learned for document in training_documents(split, form)]
    return PackedFeed(documents, validation_documents(judged, form), config.batch_tokens, config.row_tokens)


def catalogue_softmax(base: Base, stream: Stream, block: int, softmax: Softmax) -> TrieSoftmax | None:
    """The softmax over the items known by the end of `block`; None for the one over the vocabulary."""
    if softmax == "vocabulary":
        return None
    return trie_softmax(base, Trie.build(base.sids.codes[stream.catalogue(block)]))


def train_stream(
    run: Path,
    config: RunConfig,
    stream: Stream,
    base: Base,
    sink: Sink,
    config_hash: str,
    provenance: Mapping[str, Any],
) -> dict[int, FitResult]:
    """Adapt to every block that the base has not seen; finished blocks of an interrupted run are taken as they are."""
    method = build(config.method)
    if not method.trains:
        return {}
    form = make_form(config.train.form, base, config.train.window, config.train.row_tokens)

    def task(model: "PeftModel", block: int) -> tuple[PackedLoss, PackedFeed]:
        split = split_block(stream, block)
        earlier = [split_block(stream, b) for b in range(1, block)] if method.past_data else []
        loss = PackedLoss(adapted_lm(model), catalogue_softmax(base, stream, block, config.train.softmax))
        return loss, make_feed([*earlier, split], split, form, config.train)

    blocks = blocks_to_learn(stream, learned_block(config, base))
    return learn_blocks(run, config, method, base, blocks, task, sink, config_hash, provenance)


def learned_block(config: RunConfig, base: Base) -> int:
    """The last block that the base, or the adapter a run starts from, has learned; 0 for none."""
    if not config.from_adapter:
        return base.fitted_block
    return max(base.fitted_block, int(adapter_provenance(Path(config.from_adapter)).get("block", 0)))


def blocks_to_learn(stream: Stream, learned: int) -> Sequence[int]:
    """The blocks of a stream after the last one that was learned."""
    return blocks_after(learned, stream.n_blocks)
