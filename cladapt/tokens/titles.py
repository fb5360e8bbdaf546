"""Prompts whose history is written out: titles, or semantic IDs with titles, within a budget of tokens."""

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cladapt.errors import ConfigError, DataError
from cladapt.tokens.prompts import Prompt, Template, WordedForm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TitleForm(WordedForm):
    """A worded prompt about titles, or with `ids` about semantic IDs, each followed by a space and its title.

    The prompt is the encoding of its whole text, so that titles are tokenized as in any text. `titles`: one per item,
    of which white space is one space; an item without a title is named by its ID. `history_tokens`: most tokens
    beside those of the template; 0 for what a row of `row_tokens` has room for. The oldest items are left out first;
    where the newest alone is too long, its title is cut at its end.
    """

    def __init__(
        self,
        item_tokens: np.ndarray,
        tokenizer: "PreTrainedTokenizerBase",
        titles: Sequence[str],
        window: int,
        row_tokens: int,
        ids: bool = False,
        template: Template | None = None,
        history_tokens: int = 0,
        window_step: int = 1,
    ) -> None:
        super().__init__(item_tokens, tokenizer, window, row_tokens, template or Template(), window_step)
        if len(titles) != len(item_tokens):
            raise DataError(f"{len(titles)} titles for {len(item_tokens)} items", 'give one title per item, or ""')
        spelled = ["".join(tokenizer.convert_ids_to_tokens(item)) for item in self.item_tokens.tolist()]
        known = _clean(tokenizer, titles)
        # what is never cut of a name, and the whole of it
        self.ids = [spelt if ids or not title else "" for spelt, title in zip(spelled, known, strict=True)]
        self.names = [" ".join(filter(None, pair)) for pair in zip(self.ids, known, strict=True)]
        levels = item_tokens.shape[1]
        self.around = around = len(self._worded(spelled[:1])) - levels
        budget = history_tokens or row_tokens - levels - around
        if budget < levels:
            raise ConfigError(
                f"{f'history_tokens={history_tokens}' if history_tokens else f'row_tokens={row_tokens}'} leaves "
                f"{max(0, budget)} tokens to the history, less than one item's semantic ID of {levels}",
                "raise it: a title takes about a token per word, the template "
                f"{around + levels} of a row with the target",
            )
        self.limit = around + budget
        self.reach = max(self.limit, len(self.empty)) + levels
        if self.limit + levels > row_tokens or len(self.empty) + levels > row_tokens:
            needed = max(self.limit, len(self.empty)) + levels
            raise ConfigError(
                f"row_tokens={row_tokens} is less than the {needed} tokens of a prompt with "
                f"history_tokens={history_tokens} and its target",
                f"use row_tokens of at least {needed}, or a smaller budget",
            )
        encoded = tokenizer([self.template.separator + n for n in self.names], add_special_tokens=False)["input_ids"]
        self.lengths = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
        self._cut: dict[int, Prompt] = {}

    def read(self, history: np.ndarray) -> Prompt:
        """The instruction about as many of the last `window` items as fit, or about an empty history."""
        history = history[max(0, len(history) - self.window) :]
        if not len(history):
            return Prompt(self.empty)
        # apart, items take as many tokens as together, or a few more: begin with one item more than seems to fit
        used = np.cumsum(self.lengths[history[::-1]])
        fitting = int(np.searchsorted(used, self.limit - self.around, side="right"))
        for start in range(max(0, len(history) - fitting - 1), len(history)):
            tokens = self._worded([self.names[i] for i in history[start:]])
            if len(tokens) <= self.limit:
                return Prompt(tokens, dropped=start)
        newest = int(history[-1])
        if newest not in self._cut:
            self._cut[newest] = self._shortened(newest)
        return Prompt(self._cut[newest].tokens, dropped=len(history) - 1, cut=True)

    def _shortened(self, item: int) -> Prompt:
        """The prompt of one item whose name is cut to as many characters as fit."""
        name = self.names[item]
        low, high = len(self.ids[item]), len(name)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._worded([name[:middle].rstrip()])) <= self.limit:
                low = middle
            else:
                high = middle - 1
        return Prompt(self._worded([name[:low].rstrip()]), cut=True)

    def _worded(self, names: Sequence[str]) -> np.ndarray:
        return self.encode(self.template.history.replace("{items}", self.template.separator.join(names)))


def _clean(tokenizer: "PreTrainedTokenizerBase", titles: Sequence[str]) -> list[str]:
    """Titles on one line each, without the spellings of special tokens and semantic IDs, which would act as such.

    `DataError` where no item has a title, or the tokenizer knows none of their words; a warning counts what is changed
    or missing.
    """
    lines = [" ".join(title.split()) for title in titles]
    if not any(lines):
        raise DataError("no item of the stream has a text", "import the items with theirs, or use train.history=ids")
    encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    if unknown is not None and all(unknown in tokens for line, tokens in zip(lines, encoded, strict=True) if line):
        raise DataError(
            "the base's tokenizer knows no words: every title has unknown tokens",
            "use a base made from a pretrained model (`cladapt base init`), or train.history=ids",
        )
    added = tokenizer.get_added_vocab()
    numbers = {*added.values()} - {unknown}
    odd = [i for i, tokens in enumerate(encoded) if numbers.intersection(tokens)]
    if odd:
        spellings = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
        for i in odd:
            lines[i] = " ".join(spellings.sub(" ", lines[i]).split())
        warnings.warn(f"{len(odd)} titles spell special tokens or IDs, which are left out of them", stacklevel=4)
    if untitled := sum(not line for line in lines):
        warnings.warn(f"{untitled} of {len(lines)} items have no title and are named by their IDs", stacklevel=4)
    return lines
