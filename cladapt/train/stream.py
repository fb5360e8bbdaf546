"""A block of interactions as examples: histories as documents, and the softmax over the items known by then."""

from collections.abc import Sequence

import numpy as np

from cladapt.config import TrainConfig
from cladapt.data.histories import BlockSplit
from cladapt.data.schema import Stream
from cladapt.model.load import Base, trie_softmax
from cladapt.model.packed import Softmax, TrieSoftmax
from cladapt.tokens.prompts import Document, Form, PackedForm, PromptForm
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import PackedFeed


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
    return trie_softmax(base, Trie.build(base.sids.codes[stream.known(block)]))
