"""A block of interactions as examples: histories as documents, and the softmax over the items known by then."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from cladapt.config import TrainConfig
from cladapt.data.histories import FROM_END, BlockSplit, split_block, training_sequences
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError
from cladapt.methods import Replay
from cladapt.model.load import Base, trie_softmax
from cladapt.model.packed import Softmax, TrieSoftmax
from cladapt.tokens.prompts import Form, PackedForm, PromptForm, Template, warn_left_out
from cladapt.tokens.titles import TitleForm
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import PackedFeed
from cladapt.train.targets import PackedTargets

Example = tuple[BlockSplit, int]
"""What one user did in a block: its split and the user's row there."""


D = TypeVar("D")


class Learned(Protocol[D]):
    """What training reads of a form."""

    def documents(self, items: np.ndarray, first_target: int) -> list[D]:
        """Documents about items[first_target:]; see `Form`."""


class HoldsOut(Protocol):
    """Settings that say when held-out events are learned."""

    @property
    def held_out(self) -> str: ...


def make_form(
    form: str,
    base: Base,
    window: int,
    row_tokens: int,
    history: str = "ids",
    texts: Sequence[str] | None = None,
    history_tokens: int = 0,
    template: Template | None = None,
    window_step: int = 1,
) -> Form:
    """How histories become tokens for this base: `packed` or `prompt`.

    A worded prompt names items by `history`: `ids`, `titles` or `both`, of which the last two need `texts`, one per
    item of the base's ID table; `history_tokens`: its budget. `template`: the words around, the default where None.
    `window_step`: items by which the window moves on from target to target in training.
    """
    tokens = base.item_tokens().numpy()
    if form != "prompt":
        if history != "ids" or history_tokens or window_step > 1:
            raise ConfigError(
                f"history={history}, history_tokens={history_tokens}, window_step={window_step} with form={form}",
                "use train.form=prompt",
            )
        return PackedForm(tokens, bos=base.bos(), window=window, row_tokens=row_tokens)
    worded: dict[str, Any] = {
        "window": window,
        "row_tokens": row_tokens,
        "history_tokens": history_tokens,
        "template": template,
        "window_step": window_step,
    }
    if history == "ids":
        return PromptForm(tokens, base.tokenizer, **worded)
    if texts is None:
        raise ConfigError(f"history={history} without the items' texts", "name the stream with --data DIR")
    return TitleForm(tokens, base.tokenizer, texts, ids=history == "both", **worded)


def training_documents(split: BlockSplit, form: Learned[D]) -> list[D]:
    """Every training event of the block as a target once, or at most once where the form says so."""
    return [d for i in range(len(split.user)) for d in form.documents(*split.training(i))]


def validation_documents(split: BlockSplit, form: Learned[D]) -> list[D]:
    """One document per held-out user: the validation event after its history."""
    held_out = np.flatnonzero(split.held_out)
    documents: list[D] = []
    for i, target in zip(held_out, split.targets("valid"), strict=True):
        history = split.history(int(i), before="valid")
        documents += form.documents(np.append(history, target), len(history))
    return documents


def held_out_documents(split: BlockSplit, form: Learned[D]) -> list[D]:
    """The validation and the test event of every held-out user as targets once, after all that came before them."""
    documents: list[D] = []
    for i in split.test_users:
        events = split.events[split.offsets[i] : split.offsets[i + 1]]
        documents += form.documents(events, len(events) - FROM_END["valid"])
    return documents


def learned_documents(
    stream: Stream, blocks: Sequence[int], form: Learned[D], config: HoldsOut, again: Sequence[Example] = ()
) -> list[D]:
    """What is learned of `blocks`, which end with the newest: their training events, and with `held_out=next` the
    held-out events of those before the newest, or of the block before where it stands alone.

    `again`: examples of earlier blocks that are learned with them.
    """
    documents = [d for block in blocks for d in training_documents(split_block(stream, block), form)]
    if config.held_out == "next":
        for block in passed(blocks):
            documents += held_out_documents(split_block(stream, block), form)
    return documents + [d for split, i in again for d in form.documents(*split.training(i))]


def replayed(stream: Stream, before: int, replay: Replay, seed: int) -> list[Example]:
    """The examples of the blocks before `before` that are learned again: each has a user's training events there.

    A user is named by the source's id, which stays when others are forgotten.
    """
    splits = [split_block(stream, block) for block in range(1, before)]
    examples = [(split, i) for split in splits for i in range(len(split.user))]
    names = [(split.block, stream.users[split.user[i]]) for split, i in examples]
    return [examples[place] for place in replay.take(names, seed)]


def passed(blocks: Sequence[int]) -> range:
    """The blocks whose held-out events are past when the last of `blocks` is learned, and learned with it."""
    return range(max(1, min(blocks[0], blocks[-1] - 1)), blocks[-1])


def make_feed(
    stream: Stream,
    blocks: Sequence[int],
    form: Form,
    config: TrainConfig,
    by_item: bool = False,
    again: Sequence[Example] = (),
) -> PackedFeed:
    """What is learned of `blocks` and `again`, judged by the validation events of the last of them.

    `by_item`: its items are known.
    """
    validation = validation_documents(split_block(stream, blocks[-1]), form)
    documents = learned_documents(stream, blocks, form, config, again)
    warn_left_out(documents, f"block {blocks[-1]}")
    items = packed_targets(stream, blocks[-1], form) if by_item else None
    return PackedFeed(documents, validation, config.batch_tokens, config.row_tokens, items)


def packed_targets(stream: Stream, block: int, form: Form) -> PackedTargets:
    """The items behind targets, with their training events in the stream up to a block."""
    frequency = np.bincount(training_sequences(stream, block).item, minlength=stream.n_items)
    return PackedTargets(form.item_tokens, frequency[: len(form.item_tokens)])


def catalogue_softmax(base: Base, stream: Stream, block: int, softmax: Softmax) -> TrieSoftmax | None:
    """The softmax over the items known by the end of `block`; None for the one over the vocabulary."""
    if softmax == "vocabulary":
        return None
    return trie_softmax(base, Trie.build(base.sids.codes[stream.known(block)]))
