"""Item histories to token documents, and documents to rows of a fixed length.

A form says how a history reads. `PackedForm` is one causal pass in which every item is a target at once; a `WordedForm`
is an instruction per target, about semantic IDs (`PromptForm`) or titles (`cladapt.tokens.titles`), of which what is
common to a user's instructions is computed once. All give evaluation the prompt that training used.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cladapt.errors import ConfigError, ExampleWarning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LeftOut:
    """What a token budget left out: `items` and the ends of `titles`, of the histories in `shortened` of `prompts`."""

    prompts: int
    shortened: int = 0
    items: int = 0
    titles: int = 0

    @classmethod
    def of(cls, read: "Iterable[Prompt | Document]") -> "LeftOut":
        """The sums over prompts or documents."""
        found = [p.left_out for p in read]
        prompts, shortened = sum(f.prompts for f in found), sum(f.shortened for f in found)
        return cls(prompts, shortened, sum(f.items for f in found), sum(f.titles for f in found))

    def __str__(self) -> str:
        return (
            f"{self.shortened} of {self.prompts} prompts are shortened to their token budget: {self.items} oldest "
            f"items left out, {self.titles} titles cut"
        )


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids int64 [n] before a target, and what the token budget left out of the history.

    `dropped`: its oldest items that are left out; `cut`: the title of the one item that is left was cut at its end.
    """

    tokens: np.ndarray
    dropped: int = 0
    cut: bool = False

    @property
    def left_out(self) -> LeftOut:
        return LeftOut(1, int(self.dropped > 0 or self.cut), self.dropped, int(self.cut))


@dataclass(frozen=True, eq=False)
class Document:
    """Tokens int64 [n] that attend to each other alone; `loss` bool [n] marks those predicted and counted.

    `position` int64 [n] is a token's depth in a tree of shared prefixes, laid out depth first: token i sees j <= i
    unless a token of (j, i] is as high as j or higher. None is 0, 1, 2, …: a token sees all before it.
    `left_out`: the sum over its prompts.
    """

    tokens: np.ndarray
    loss: np.ndarray
    left_out: LeftOut = LeftOut(prompts=1)
    position: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not len(self.tokens) or self.tokens.shape != self.loss.shape or self.loss[0]:
            raise ConfigError(
                f"a document of tokens {self.tokens.shape} and loss {self.loss.shape} cannot be learned from",
                "give equal, non-empty shapes; the first token has nothing before it to be predicted from",
            )


class Form(Protocol):
    """How item histories become tokens."""

    item_tokens: np.ndarray
    """The ID tokens of every item, int64 [n, L]."""
    reach: int
    """The most tokens from the first of a document to one that sees it, both included."""

    def prompt(self, history: np.ndarray) -> np.ndarray:
        """Token ids, int64, after which the target's semantic-ID tokens follow; `history` holds integer items."""

    def documents(self, items: np.ndarray, first_target: int) -> list[Document]:
        """Documents in which each of items[first_target:] is a target exactly once, in order."""


def read_all(form: Form, histories: Iterable[np.ndarray]) -> list[Prompt]:
    """The prompts of histories, with what a worded form leaves out."""
    return [form.read(h) if isinstance(form, WordedForm) else Prompt(form.prompt(h)) for h in histories]


def warn_left_out(read: "Iterable[Prompt | Document]", what: str) -> None:
    """Warn where a token budget has shortened prompts, with how many."""
    found = LeftOut.of(read)
    if found.shortened:
        text = f"{what}: {found}; raise history_tokens or row_tokens to keep more"
        warnings.warn(text, ExampleWarning, stacklevel=3)


class PackedForm:
    """`[bos] item item item …`, each item its semantic-ID tokens, all targets in one causal pass.

    The prompt holds the last `window` items. A document starts `window` items before the first target and runs on as
    far as `row_tokens` allows, so later targets may see more than the window; what does not fit continues in further
    documents that each repeat `window // 2` items. A target thus sees at least min(available, window // 2) items.
    """

    def __init__(self, item_tokens: np.ndarray, bos: int, window: int, row_tokens: int) -> None:
        _check_window(window)
        self.item_tokens, self.bos, self.window = item_tokens.astype(np.int64), bos, window
        self.overlap = window // 2
        self.row_items = (row_tokens - 1) // item_tokens.shape[1]
        self.reach = 1 + self.row_items * item_tokens.shape[1]
        if self.row_items < self.overlap + 1:
            raise ConfigError(
                f"row_tokens={row_tokens} holds {self.row_items} items of {item_tokens.shape[1]} tokens, "
                f"window={window} needs {self.overlap + 1}",
                f"use row_tokens of at least {1 + (self.overlap + 1) * item_tokens.shape[1]}, or a smaller window",
            )

    def prompt(self, history: np.ndarray) -> np.ndarray:
        """`[bos]` and the last `window` items."""
        return self._tokens(_last(history, self.window))

    def documents(self, items: np.ndarray, first_target: int) -> list[Document]:
        """One document, or several when the items do not fit into `row_tokens`."""
        begin, documents = max(0, first_target - self.window), []
        for start in range(begin, len(items), self.row_items - self.overlap):
            stop = min(start + self.row_items, len(items))
            target = first_target if start == begin else max(first_target, start + self.overlap)
            if target < stop:
                tokens = self._tokens(items[start:stop])
                loss = np.arange(len(tokens)) > (target - start) * self.item_tokens.shape[1]
                documents.append(Document(tokens, loss))
        return documents

    def _tokens(self, items: np.ndarray) -> np.ndarray:
        return np.concatenate([[self.bos], self.item_tokens[items].ravel()])


@dataclass(frozen=True)
class Template:
    """The words around a history. `history` holds `{items}` once; `empty` is for a user without a history."""

    history: str = (
        "Someone picked these items, from the oldest to the most recent.\n"
        "Picked so far: {items}\n"
        "Which item will they pick next?\n"
        "Next item:"
    )
    empty: str = "Someone has not picked any item yet.\nWhich item will they pick first?\nNext item:"
    separator: str = ", "

    def __post_init__(self) -> None:
        if self.history.count("{items}") != 1 or not self.empty:
            raise ConfigError(
                f"the prompt template {self.history!r} / {self.empty!r} does not say where the items go",
                "write {items} exactly once in `history`, and a non-empty `empty`",
            )


class WordedForm(ABC):
    """A worded prompt per target, the target's semantic-ID tokens the response: the form of the LC-Rec and PESO family.

    The prompt opens with the tokenizer's bos token, if it has one, and holds at most `limit` tokens. Of a history that
    is longer the oldest items are left out. In training what a prompt holds moves on by `window_step` items as soon as
    it is full, so that prompts of a user begin alike; the first of them, and the only one of evaluation, holds all.
    """

    def __init__(
        self,
        item_tokens: np.ndarray,
        tokenizer: "PreTrainedTokenizerBase",
        window: int,
        row_tokens: int,
        template: Template,
        window_step: int = 1,
    ) -> None:
        _check_window(window)
        if not 1 <= window_step <= window:
            raise ConfigError(f"window_step={window_step} with window={window}", "use 1 to window")
        self.window_step = window_step
        self.item_tokens, self.window, self.template = item_tokens.astype(np.int64), window, template
        self.row_tokens = row_tokens
        self.tokenizer = tokenizer
        bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self.bos = np.array(bos, dtype=np.int64)
        self.empty = self.encode(template.empty)

    def encode(self, text: str) -> np.ndarray:
        """The bos token, if there is one, and the tokens of a text: int64."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return np.concatenate([self.bos, np.array(ids, dtype=np.int64)])

    @abstractmethod
    def read(self, history: np.ndarray) -> Prompt:
        """The instruction about the last `window` items, or about an empty history, and what it leaves out."""

    def prompt(self, history: np.ndarray) -> np.ndarray:
        """The token ids of `read`."""
        return self.read(history).tokens

    def documents(self, items: np.ndarray, first_target: int) -> list[Document]:
        """The `examples`, what their prompts have in common read once: see `share_prefixes`."""
        return share_prefixes(self.examples(items, first_target), self.row_tokens)

    def examples(self, items: np.ndarray, first_target: int) -> list[Document]:
        """One document per target: its prompt, then its tokens."""
        step, documents = self.window_step, list[Document]()
        begin = max(0, first_target - self.window)
        for place in range(first_target, len(items)):
            if place - begin > self.window:
                begin += step
            prompt = self.read(items[begin:place])
            while step > 1 and place > first_target and prompt.left_out.shortened and place - begin > step:
                begin += step  # where the budget is what bounds the history, it moves on in steps too
                prompt = self.read(items[begin:place])
            documents.append(respond(prompt, self.item_tokens[items[place]]))
        return documents


class PromptForm(WordedForm):
    """A worded prompt about semantic IDs.

    It is put together from token ids that the template has between semantic IDs, which equals encoding the whole text
    because semantic-ID tokens are never split. `history_tokens`: most tokens of IDs and separators; 0 has room for
    `window` items, which a row must hold.
    """

    def __init__(
        self,
        item_tokens: np.ndarray,
        tokenizer: "PreTrainedTokenizerBase",
        window: int,
        row_tokens: int,
        template: Template | None = None,
        history_tokens: int = 0,
        window_step: int = 1,
    ) -> None:
        super().__init__(item_tokens, tokenizer, window, row_tokens, template or Template(), window_step)
        head, self.separator, self.tail = _pieces(tokenizer, self.template, self.item_tokens[0])
        self.head = np.concatenate([self.bos, head]).astype(np.int64)
        levels, between = item_tokens.shape[1], len(self.separator)
        fitting = (history_tokens + between) // (levels + between) if history_tokens else window
        if fitting < 1:
            raise ConfigError(
                f"history_tokens={history_tokens} holds no item of {levels} tokens",
                f"use history_tokens of at least {levels}, or 0 for what a row has room for",
            )
        self.fitting = min(window, fitting)
        around = len(self.head) + len(self.tail)
        longest = max(len(self.empty), around + self.fitting * (levels + between) - between) + levels
        self.reach = longest
        if longest > row_tokens:
            what, smaller = (
                (f"history_tokens={history_tokens}", "smaller history_tokens")
                if history_tokens
                else (f"window={window}", "a smaller window")
            )
            raise ConfigError(
                f"row_tokens={row_tokens} is less than the {longest} tokens of a prompt with {what}",
                f"use row_tokens of at least {longest}, or {smaller}",
            )

    def read(self, history: np.ndarray) -> Prompt:
        """The instruction about the last `window` items, or about an empty history, and what it leaves out."""
        meant = _last(history, self.window)
        if not len(meant):
            return Prompt(self.empty)
        kept = _last(meant, self.fitting)
        separators = np.broadcast_to(self.separator, (len(kept), len(self.separator)))
        items = np.concatenate([self.item_tokens[kept], separators], axis=1).ravel()
        tokens = np.concatenate([self.head, items[: len(items) - len(self.separator)], self.tail])
        return Prompt(tokens, dropped=len(meant) - len(kept))


def respond(prompt: Prompt, response: np.ndarray) -> Document:
    """A prompt and the response that is learned, int64 [n]."""
    tokens = np.concatenate([prompt.tokens, response])
    return Document(tokens, np.arange(len(tokens)) >= len(prompt.tokens), prompt.left_out)


def share_prefixes(documents: Sequence[Document], row_tokens: int) -> list[Document]:
    """The same documents as few: each goes on where it parts from the one before it, within `row_tokens` tokens.

    A token's hidden state depends on what it sees alone, so every loss is what it was; a prefix is computed once for
    all documents in a row that begin with it. Prompts of one user, in order, differ by an item each.
    """
    shared, parts, size = list[Document](), list[Document](), 0
    for before, document in zip([None, *documents], documents, strict=False):
        prefix = 0 if before is None else _common_prefix(before, document)
        if not prefix or size + len(document.tokens) - prefix > row_tokens:
            shared += _joined(parts)
            parts, size, prefix = [], 0, 0
        position = np.arange(prefix, len(document.tokens))
        parts.append(Document(document.tokens[prefix:], document.loss[prefix:], document.left_out, position))
        size += len(position)
    return shared + _joined(parts)


def one_target_each(document: Document, levels: int) -> list[Document]:
    """A document for each target, of `levels` marked tokens: what that target sees, and nothing else is learned.

    Their losses are those of the document, which computes what they have in common once.
    """
    position = np.arange(len(document.tokens)) if document.position is None else document.position
    found = []
    for last in np.flatnonzero(document.loss)[levels - 1 :: levels].tolist():
        path, depth = [], int(position[last])
        for place in range(last, -1, -1):  # the nearest token before that is less deep is what it goes on from
            if position[place] == depth:
                path.append(place)
                depth -= 1
        tokens = document.tokens[path[::-1]]
        found.append(Document(tokens, np.arange(len(tokens)) >= len(tokens) - levels))
    return found


def _common_prefix(one: Document, other: Document) -> int:
    """Tokens with which both begin; the token before the first that `other` learns is its own, to predict from."""
    most = min(len(one.tokens), max(0, int(other.loss.argmax()) - 1))
    differs = one.tokens[:most] != other.tokens[:most]
    return int(differs.argmax()) if differs.any() else most


def _joined(parts: Sequence[Document]) -> list[Document]:
    """The parts as one document, or none of none."""
    if not parts:
        return []
    columns = zip(*((d.tokens, d.loss, d.position) for d in parts), strict=True)
    tokens, loss, position = map(np.concatenate, columns)
    return [Document(tokens, loss, LeftOut.of(parts), position)]


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Documents side by side in rows of S tokens; all arrays [R, S]."""

    tokens: np.ndarray  # int64
    document: np.ndarray  # int64, 1, 2, … within a row, 0 = padding
    position: np.ndarray  # int64, that of its document, 0 for padding
    loss: np.ndarray  # bool

    @classmethod
    def stacked(cls, parts: "Sequence[PackedRows]") -> "PackedRows":
        """The rows of several, which are equally long, one below the other."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))


def pack(documents: Sequence[Document], row_tokens: int, order: np.random.Generator | None, pad: int = 0) -> PackedRows:
    """Place each document whole into a row: best fit over all open rows, in shuffled order when `order` is given.

    Rows are shuffled too, because best fit leaves the rows it opened last to the long documents.
    """
    length = np.array([len(d.tokens) for d in documents], dtype=np.int64)
    if len(length) and length.max() > row_tokens:
        raise ConfigError(f"a document has {length.max()} tokens, a row {row_tokens}", "raise row_tokens")
    sequence = np.arange(len(length)) if order is None else order.permutation(len(length))
    length = length[sequence]
    row, column, number, n_rows = _best_fit(length.tolist(), row_tokens)
    if order is not None:
        row = order.permutation(n_rows)[row]

    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    place = np.repeat(row * row_tokens + column, length) + within

    def laid_out(values: np.ndarray, empty: int | bool) -> np.ndarray:
        rows = np.full(n_rows * row_tokens, empty, dtype=values.dtype)
        rows[place] = values
        return rows.reshape(n_rows, row_tokens)

    chosen = [documents[i] for i in sequence]
    return PackedRows(
        tokens=laid_out(np.concatenate([np.empty(0, dtype=np.int64), *(d.tokens for d in chosen)]), pad),
        document=laid_out(np.repeat(number, length), 0),
        position=laid_out(np.concatenate([within[:0], *(_positions(d) for d in chosen)]), 0),
        loss=laid_out(np.concatenate([np.empty(0, dtype=bool), *(d.loss for d in chosen)]), False),
    )


def _positions(document: Document) -> np.ndarray:
    return np.arange(len(document.tokens)) if document.position is None else document.position


def _best_fit(length: list[int], row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """For each document its row, first column and number in the row (from 1); and the number of rows."""
    with_space: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # rows by the space they have left
    spaces = 0  # bit s set: some row has exactly s tokens left
    filled: list[int] = []  # documents in each row
    placed = np.empty((len(length), 3), dtype=np.int64)
    for index, size in enumerate(length):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = row_tokens, len(filled)
            filled.append(0)
        filled[row] += 1
        placed[index] = row, row_tokens - space, filled[row]
        with_space[space - size].append(row)
        spaces |= 1 << (space - size)
    return placed[:, 0], placed[:, 1], placed[:, 2], len(filled)


def _pieces(
    tokenizer: "PreTrainedTokenizerBase", template: Template, item: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids before, between and after the items, as the tokenizer gives them around real semantic IDs."""
    spelled = "".join(tokenizer.convert_ids_to_tokens(item.tolist()))
    text = template.history.replace("{items}", template.separator.join([spelled, spelled]))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
    levels = len(item)
    starts = [i for i in range(len(ids) - levels + 1) if np.array_equal(ids[i : i + levels], item)]
    if len(starts) != 2:
        raise ConfigError(
            f"the tokenizer does not keep the semantic ID {spelled} whole inside a prompt",
            "make a base with these tokens: `cladapt base init`",
        )
    first, second = starts
    return ids[:first], ids[first + levels : second], ids[second + levels :]


def _last(history: np.ndarray, count: int) -> np.ndarray:
    return history[max(0, len(history) - count) :]


def _check_window(window: int) -> None:
    if window < 1:
        raise ConfigError(f"window={window} keeps no history", "use a window of at least 1")
