"""Alignment tasks: items' texts beside their semantic IDs, so that a language model's words and the IDs mean the same.

The tasks of the LC-Rec family (Zheng et al., "Adapting Large Language Models by Integrating Collaborative Semantics
for Recommendation", ICDE 2024, section 3.3; MiniOneRec, 2025, aligns in the same way). An item task reads or writes one
item; a history task reads the items of a user up to a target. What a text holds, categories too, is what the stream was
imported with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cladapt.errors import ConfigError
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HISTORY = "Someone picked these items, from the oldest to the most recent.\nPicked so far:{items}\n"


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
    def titled(self) -> np.ndarray:
        """Whether each item has a text, bool [n]."""
        return np.array([len(title) > 0 for title in self.titles])

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


class ItemTask(Protocol):
    """A task about one item at a time."""

    def documents(self, items: np.ndarray) -> list[Document]:
        """One document for each of the integer items that has a text."""


class HistoryTask(Protocol):
    """A task about the items of a user up to a target."""

    def documents(self, items: np.ndarray, first_target: int) -> list[Document]:
        """At most one document for each of items[first_target:]: none where a text that it needs is missing."""


class TitleToId:
    """The text of an item is given, its ID is the response."""

    def __init__(self, items: Items) -> None:
        self.items = items
        self.head, self.tail = items.opening("This item is described as:"), items.words("\nIts ID:")
        longest = max(map(len, items.titles), default=0)
        items.check_room(len(self.head) + longest + len(self.tail) + items.ids.shape[1], "title_to_id")

    def documents(self, items: np.ndarray) -> list[Document]:
        """One document for each of `items` that has a text."""
        known = self.items
        return [respond([self.head, known.titles[i], self.tail], known.ids[i]) for i in items if len(known.titles[i])]


class IdToTitle:
    """The ID of an item is given, its text is the response."""

    def __init__(self, items: Items) -> None:
        self.items = items
        self.head, self.tail = items.opening("The ID of this item:"), items.words("\nIt is described as:")
        longest = max(map(len, items.titles), default=0) + 1
        items.check_room(len(self.head) + items.ids.shape[1] + len(self.tail) + longest, "id_to_title")

    def documents(self, items: np.ndarray) -> list[Document]:
        """One document for each of `items` that has a text."""
        known = self.items
        return [respond([self.head, known.ids[i], self.tail], known.written(i)) for i in items if len(known.titles[i])]


class TitlesToId:
    """The texts of a history are given, the ID of the next item is the response.

    Of the last `window` items those with a text are read, the oldest left out until the rest fits into a row;
    `shortened` counts the documents that leave some out for that.
    """

    def __init__(self, items: Items) -> None:
        self.items, self.shortened = items, 0
        before, after = HISTORY.split("{items}")
        self.head, self.separator = items.opening(before), items.words(";")
        self.tail = items.words(f"{after}Which item will they pick next?\nNext item:")
        longest = max(map(len, items.titles), default=0)
        self.room = items.row_tokens - len(self.head) - len(self.tail) - items.ids.shape[1] + len(self.separator)
        items.check_room(items.row_tokens - self.room + longest + len(self.separator), "titles_to_id")

    def documents(self, items: np.ndarray, first_target: int) -> list[Document]:
        """One document for each target that has an item with a text before it."""
        known, documents = self.items, []
        for place in range(first_target, len(items)):
            history = items[max(0, place - known.window) : place]
            titles = [known.titles[i] for i in history if len(known.titles[i])]
            sizes = np.cumsum([len(title) + len(self.separator) for title in reversed(titles)])
            fitting = int((sizes <= self.room).sum())
            self.shortened += fitting < len(titles)
            if titles:
                pieces = [p for title in titles[len(titles) - fitting :] for p in (self.separator, title)]
                documents.append(respond([self.head, *pieces[1:], self.tail], known.ids[items[place]]))
        return documents


class IdsToTitle:
    """The IDs of a history are given, the text of the next item is the response."""

    def __init__(self, items: Items) -> None:
        self.items = items
        before, after = HISTORY.split("{items}")
        self.head, self.separator = items.opening(before), items.words(",")
        self.tail = items.words(f"{after}Which item will they pick next?\nIt is described as:")
        history = items.window * (items.ids.shape[1] + len(self.separator)) - len(self.separator)
        longest = max(map(len, items.titles), default=0) + 1
        items.check_room(len(self.head) + history + len(self.tail) + longest, "ids_to_title")

    def documents(self, items: np.ndarray, first_target: int) -> list[Document]:
        """One document for each target with a text that has an item before it."""
        known, documents = self.items, []
        for place in range(max(1, first_target), len(items)):
            if len(known.titles[items[place]]):
                history = known.ids[items[max(0, place - known.window) : place]]
                pieces = [p for item in history for p in (self.separator, item)]
                documents.append(respond([self.head, *pieces[1:], self.tail], known.written(items[place])))
        return documents


ITEM_TASKS: Mapping[str, type[TitleToId] | type[IdToTitle]] = {"title_to_id": TitleToId, "id_to_title": IdToTitle}
HISTORY_TASKS: Mapping[str, type[TitlesToId] | type[IdsToTitle]] = {
    "titles_to_id": TitlesToId,
    "ids_to_title": IdsToTitle,
}
"""Tasks by their names in `cladapt.config.TaskWeights`."""


def respond(prompt: Sequence[np.ndarray], response: np.ndarray) -> Document:
    """The document of a prompt, given in pieces, whose response is what counts."""
    tokens = np.concatenate([*prompt, response]).astype(np.int64)
    return Document(tokens, np.arange(len(tokens)) >= len(tokens) - len(response))
