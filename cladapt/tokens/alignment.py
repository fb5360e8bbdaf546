"""Alignment tasks: items' texts beside their semantic IDs, so that a language model's words and the IDs mean the same.

The tasks of the LC-Rec family (Zheng et al., "Adapting Large Language Models by Integrating Collaborative Semantics
for Recommendation", ICDE 2024, section 3.3; MiniOneRec, 2025, aligns in the same way). Histories of titles that lead to
an ID are read by `cladapt.tokens.titles`; the other tasks are here. What a text holds, categories too, is what the
stream was imported with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cladapt.errors import ConfigError
from cladapt.tokens.prompts import Document, Prompt, PromptForm, Template, respond, share_prefixes
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DESCRIBED = Template(
    history="Someone picked these items, from the oldest to the most recent.\n"
    "Picked so far: {items}\n"
    "Which item will they pick next?\n"
    "It is described as:",
    empty="Someone has not picked any item yet.\nWhich item will they pick first?\nIt is described as:",
)


@dataclass(frozen=True, eq=False)
class Items:
    """What the tasks know of the items, and the room that a document has.

    `ids`: int64 [n, levels]; `titles`: the first tokens of each item's text, empty where it has none; `cut`: bool [n],
    the text is longer.
    """

    tokenizer: "PreTrainedTokenizerBase"
    ids: np.ndarray
    titles: Sequence[np.ndarray]
    cut: np.ndarray
    window: int
    row_tokens: int

    @classmethod
    def encode(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        sids: SidTable,
        ids: np.ndarray,
        texts: Sequence[str],
        title_tokens: int,
        window: int,
        row_tokens: int,
    ) -> "Items":
        """The items of `sids`, whose tokens are `ids`, by the first `title_tokens` tokens of their texts."""
        words = encode_texts(tokenizer, texts, sids)
        cut = np.array([len(tokens) > title_tokens for tokens in words])
        return cls(tokenizer, ids, [tokens[:title_tokens] for tokens in words], cut, window, row_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest title."""
        return max(map(len, self.titles), default=0)

    def words(self, text: str) -> np.ndarray:
        """Token ids of a wording, int64."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    def opening(self, text: str) -> np.ndarray:
        """Token ids with which a prompt begins: the tokenizer's bos token, if it has one, and a wording."""
        bos = self.tokenizer.bos_token_id
        return np.concatenate([np.array([] if bos is None else [bos], dtype=np.int64), self.words(text)])

    def written(self, item: int) -> np.ndarray:
        """The text of an item as a response: it ends with the eos token, but where it is cut."""
        eos = self.tokenizer.eos_token_id
        end = [] if eos is None or self.cut[item] else [eos]
        return np.append(self.titles[item], np.array(end, dtype=np.int64))

    def check_room(self, longest: int, task: str) -> None:
        """`ConfigError` where a document of `longest` tokens does not fit into a row."""
        if longest > self.row_tokens:
            raise ConfigError(
                f"row_tokens={self.row_tokens} is less than the {longest} tokens of a document of the task {task}",
                f"use row_tokens of at least {longest}, fewer title_tokens, or a smaller window",
            )


class TitleToId:
    """The text of an item is given, its ID is the response."""

    def __init__(self, items: Items) -> None:
        self.items = items
        self.head, self.tail = items.opening("This item is described as:"), items.words("\nIts ID:")
        items.check_room(len(self.head) + items.longest + len(self.tail) + items.ids.shape[1], "title_to_id")

    def documents(self, items: np.ndarray) -> list[Document]:
        """One document for each of `items` that has a text."""
        known = self.items
        return [
            respond(Prompt(np.concatenate([self.head, known.titles[i], self.tail])), known.ids[i])
            for i in items
            if len(known.titles[i])
        ]


class IdToTitle:
    """The ID of an item is given, its text is the response."""

    def __init__(self, items: Items) -> None:
        self.items = items
        self.head, self.tail = items.opening("The ID of this item:"), items.words("\nIt is described as:")
        around = len(self.head) + items.ids.shape[1] + len(self.tail)
        items.check_room(around + items.longest + 1, "id_to_title")

    def documents(self, items: np.ndarray) -> list[Document]:
        """One document for each of `items` that has a text."""
        known = self.items
        return [
            respond(Prompt(np.concatenate([self.head, known.ids[i], self.tail])), known.written(i))
            for i in items
            if len(known.titles[i])
        ]


class IdsToTitle:
    """The IDs of a history are given, the text of the next item is the response."""

    def __init__(self, items: Items) -> None:
        self.items = items
        self.form = PromptForm(items.ids, items.tokenizer, items.window, items.row_tokens, DESCRIBED)
        history = self.form.prompt(np.zeros(items.window, dtype=np.int64))
        items.check_room(max(len(history), len(self.form.empty)) + items.longest + 1, "ids_to_title")

    def documents(self, items: np.ndarray, first_target: int) -> list[Document]:
        """The `examples`, what their prompts have in common read once."""
        return share_prefixes(self.examples(items, first_target), self.items.row_tokens)

    def examples(self, items: np.ndarray, first_target: int) -> list[Document]:
        """One document for each of items[first_target:] that has a text."""
        return [
            respond(self.form.read(items[:place]), self.items.written(items[place]))
            for place in range(first_target, len(items))
            if len(self.items.titles[items[place]])
        ]


ITEM_TASKS: Mapping[str, type[TitleToId] | type[IdToTitle]] = {"title_to_id": TitleToId, "id_to_title": IdToTitle}
"""Tasks about one item at a time, by their names in `cladapt.config.TaskWeights`."""
