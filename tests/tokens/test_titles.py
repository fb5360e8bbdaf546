"""Prompts of titles: the encoding of their whole text, within a budget that loses the oldest items first."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cladapt.errors import ConfigError, DataError
from cladapt.tokens.prompts import LeftOut, PromptForm, Template, read_all, warn_left_out
from cladapt.tokens.sids import SidTable
from cladapt.tokens.titles import TitleForm
from cladapt.tokens.tokenizer import add_sid_tokens, make_tokenizer, sid_token_ids

SIDS = SidTable(("p", "q", "r", "s"), np.array([[0, 1], [1, 0], [1, 2], [2, 2]]), (3, 3))
TITLES = ["The Matrix", "Amélie?!", "Toy\n  Story (1995)", "Up"]
CLEAN = ["The Matrix", "Amélie?!", "Toy Story (1995)", "Up"]
SPELT = ["<a_0><b_1>", "<a_1><b_0>", "<a_1><b_2>", "<a_2><b_2>"]


def subwords(bos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Template().history, Template().empty, *CLEAN], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"bos_token": "<s>"} if bos else {}))
    add_sid_tokens(made, SIDS)
    return made


TOKENIZER = subwords()
IDS = sid_token_ids(TOKENIZER, SIDS)[SIDS.token_index]


def form_of(titles: list[str] = TITLES, **settings: Any) -> TitleForm:
    return TitleForm(IDS, TOKENIZER, titles, **{"window": 3, "row_tokens": 400, **settings})


def encoded(text: str) -> list[int]:
    return [TOKENIZER.bos_token_id, *TOKENIZER.encode(text, add_special_tokens=False)]


def of_names(names: list[str]) -> list[int]:
    return encoded(Template().history.replace("{items}", ", ".join(names)))


@pytest.mark.parametrize("ids", [False, True])
def test_a_prompt_is_the_encoding_of_its_text(ids: bool) -> None:
    form = form_of(ids=ids)
    for history in ([1], [0, 3], [0, 1, 2, 3]):
        names = [f"{SPELT[i]} {CLEAN[i]}" if ids else CLEAN[i] for i in history[-3:]]
        assert form.prompt(np.array(history)).tolist() == of_names(names)
    assert form.prompt(np.array([], dtype=np.int64)).tolist() == encoded(Template().empty)


def test_without_a_bos_token_the_prompt_opens_with_its_words() -> None:
    tokenizer = subwords(bos=False)
    form = TitleForm(sid_token_ids(tokenizer, SIDS)[SIDS.token_index], tokenizer, TITLES, 3, 400)
    expected = tokenizer.encode(Template().history.replace("{items}", "Up"), add_special_tokens=False)
    assert form.prompt(np.array([3])).tolist() == expected


def test_training_reads_the_prompt_of_decoding() -> None:
    form, items = form_of(ids=True, history_tokens=14), np.array([2, 0, 3, 1])
    documents = form.examples(items, 1)
    assert len(documents) == 3
    for place, document in enumerate(documents, start=1):
        np.testing.assert_array_equal(document.tokens[~document.loss], form.prompt(items[:place]))
        np.testing.assert_array_equal(document.tokens[document.loss], IDS[items[place]])
        assert document.left_out == form.read(items[:place]).left_out
    assert LeftOut.of(form.documents(items, 1)) == LeftOut.of(documents)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(3, 60), st.booleans(), st.integers(1, 9))
def test_the_budget_keeps_as_many_of_the_newest_items_as_fit(
    history: list[int], budget: int, ids: bool, window: int
) -> None:
    form = form_of(ids=ids, window=window, history_tokens=budget)
    template = len(of_names([SPELT[0]])) - 2
    read = form.read(np.array(history))
    assert len(read.tokens) <= template + budget
    meant = history[-window:]
    names = [f"{SPELT[i]} {CLEAN[i]}" if ids else CLEAN[i] for i in meant]
    kept = names[read.dropped :]
    if read.cut:
        assert len(kept) == 1
        text = TOKENIZER.decode(read.tokens[1:])
        begin, end = Template().history.split("{items}")
        shown = text.removeprefix(begin).removesuffix(end)
        assert kept[0].startswith(shown)
        assert len(shown) < len(kept[0])
    else:
        assert read.tokens.tolist() == of_names(kept)
    for more in range(read.dropped - (not read.cut)):  # one more item, or several, would not have fitted
        assert len(of_names(names[more:])) > template + budget


def test_without_a_budget_the_row_bounds_the_history() -> None:
    form = form_of(row_tokens=len(of_names(["Up", "Up"])) + 2)
    read = form.read(np.array([0, 3, 3]))
    assert (read.dropped, read.cut) == (1, False)
    (document,) = form.documents(np.array([0, 3, 3, 1]), 3)
    assert len(document.tokens) == form.limit + 2


def test_a_title_that_is_too_long_is_cut_at_its_end_and_keeps_its_id() -> None:
    form = form_of([*TITLES[:3], "Up and away " * 30], ids=True, history_tokens=8)
    read = form.read(np.array([0, 3]))
    assert (read.dropped, read.cut) == (1, True)
    assert "Picked so far: <a_2><b_2> Up and" in TOKENIZER.decode(read.tokens)
    assert form.read(np.array([3])).tokens.tolist() == read.tokens.tolist()


def test_what_is_left_out_is_counted_and_said() -> None:
    form = form_of(ids=True, history_tokens=12)
    read = read_all(form, [np.array(h, dtype=np.int64) for h in ([], [3], [3, 3, 3], [2])])
    dropped = [p.dropped for p in read]
    found = LeftOut.of(read)
    assert dropped[:2] == [0, 0]
    assert dropped[2] > 0
    assert (found.prompts, found.items, found.titles) == (4, sum(dropped), sum(p.cut for p in read))
    expected = rf"block 2: {found.shortened} of 4 prompts are shortened .* {found.items} oldest items left out"
    with pytest.warns(UserWarning, match=expected):
        warn_left_out(read, "block 2")


def test_semantic_ids_have_a_budget_too() -> None:
    form = PromptForm(IDS, TOKENIZER, window=4, row_tokens=400, history_tokens=7)
    separator = len(form.separator)
    assert form.fitting == (7 + separator) // (2 + separator) < 4
    read = form.read(np.array([0, 1, 2, 3]))
    assert read.dropped == 4 - form.fitting
    assert read.tokens.tolist() == of_names(SPELT[read.dropped :])
    with pytest.raises(ConfigError, match="history_tokens=1 holds no item of 2 tokens"):
        PromptForm(IDS, TOKENIZER, window=4, row_tokens=400, history_tokens=1)
    with pytest.raises(ConfigError, match=r"row_tokens=40 is less than .* of a prompt with history_tokens=99"):
        PromptForm(IDS, TOKENIZER, window=30, row_tokens=40, history_tokens=99)


def test_titles_cannot_pass_for_ids_or_special_tokens() -> None:
    with pytest.warns(UserWarning, match="2 titles spell special tokens or IDs"):
        form = form_of(["a <a_1><b_2> b", "<s>x", "Up", "<b_<b_1>1>"[:4] + "y"])
    tokens = form.prompt(np.array([0, 1])).tolist()
    assert not {*tokens[1:]} & {TOKENIZER.bos_token_id, *IDS.ravel().tolist()}
    assert tokens == of_names(["a b", "x"])


def test_an_item_without_a_title_is_named_by_its_id() -> None:
    with pytest.warns(UserWarning, match="1 of 4 items have no title"):
        form = form_of(["Up", "  ", "Up", "Up"])
    assert form.prompt(np.array([0, 1])).tolist() == of_names(["Up", SPELT[1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"titles": TITLES[:2]}, "2 titles for 4 items"),
        ({"titles": [""] * 4}, "no item of the stream has a text"),
        ({"history_tokens": 1}, "history_tokens=1 leaves 1 tokens to the history"),
        ({"row_tokens": 20}, "row_tokens=20 leaves 0 tokens to the history"),
        ({"history_tokens": 390}, r"row_tokens=400 is less than the \d+ tokens of a prompt with history_tokens=390"),
        ({"window": 0}, "window=0 keeps no history"),
    ],
    ids=["titles", "untitled", "budget", "row", "budget and row", "window"],
)
def test_what_cannot_be_worded_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        form_of(**settings)


def test_a_tokenizer_without_words_is_refused() -> None:
    tokenizer = make_tokenizer(SIDS)
    with pytest.raises(DataError, match="the base's tokenizer knows no words"):
        TitleForm(sid_token_ids(tokenizer, SIDS)[SIDS.token_index], tokenizer, TITLES, 3, 400)
