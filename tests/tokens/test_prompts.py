"""Documents and packed rows: every target once, enough context, nothing mixed or lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cladapt.errors import ConfigError
from cladapt.tokens.prompts import Document, PackedForm, PromptForm, Template, one_target_each, pack, share_prefixes
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import add_sid_tokens, make_tokenizer, sid_token_ids

BOS = 1


def item_tokens(n: int, levels: int) -> np.ndarray:
    """Tokens from which the item can be read back: 10, 11, 12, …, all distinct."""
    return 10 + np.arange(n * levels).reshape(n, levels)


def items_of(tokens: np.ndarray, levels: int) -> list[int]:
    return ((tokens[1::levels] - 10) // levels).tolist()


@settings(max_examples=150)
@given(
    levels=st.integers(1, 4),
    window=st.integers(1, 9),
    slack=st.integers(0, 12),
    n=st.integers(0, 40),
    first_target=st.integers(0, 40),
)
def test_packed_documents_predict_every_target_once_with_enough_context(
    levels: int, window: int, slack: int, n: int, first_target: int
) -> None:
    row_tokens = 1 + (window // 2 + 1) * levels + slack
    form = PackedForm(item_tokens(40, levels), BOS, window, row_tokens)
    items, first_target = np.arange(n), min(first_target, n)
    predicted = []
    for document in form.documents(items, first_target):
        assert len(document.tokens) <= row_tokens
        assert document.tokens.dtype == np.int64
        assert document.tokens[0] == BOS
        assert not document.loss[0]
        inside = items_of(document.tokens, levels)
        assert inside == list(range(inside[0], inside[0] + len(inside)))  # whole items, none skipped
        np.testing.assert_array_equal(document.tokens[1:], form.item_tokens[inside].ravel())
        per_item = document.loss[1:].reshape(-1, levels)
        assert (per_item.all(axis=1) | ~per_item.any(axis=1)).all()
        for place in np.flatnonzero(per_item.all(axis=1)):
            predicted.append(inside[place])
            assert place >= min(inside[place], window // 2)
    assert predicted == list(range(first_target, n))


def test_a_short_user_is_one_document_behind_a_window() -> None:
    form = PackedForm(item_tokens(50, 2), BOS, window=3, row_tokens=100)
    (document,) = form.documents(np.arange(12), first_target=8)
    assert items_of(document.tokens, 2) == [5, 6, 7, 8, 9, 10, 11]
    assert document.loss.tolist() == [False] * 7 + [True] * 8


def test_a_long_user_is_split_with_half_a_window_repeated() -> None:
    form = PackedForm(item_tokens(50, 2), BOS, window=4, row_tokens=1 + 2 * 6)
    documents = form.documents(np.arange(13), first_target=1)
    assert [items_of(d.tokens, 2) for d in documents] == [
        [0, 1, 2, 3, 4, 5],
        [4, 5, 6, 7, 8, 9],
        [8, 9, 10, 11, 12],
    ]
    assert [int(d.loss.sum()) // 2 for d in documents] == [5, 4, 3]


def test_the_packed_prompt_is_the_context_of_the_first_target() -> None:
    form = PackedForm(item_tokens(50, 3), BOS, window=4, row_tokens=100)
    for n in (0, 1, 4, 9):
        (document,) = form.documents(np.arange(n + 1), first_target=n)
        np.testing.assert_array_equal(form.prompt(np.arange(n)), document.tokens[~document.loss])
    assert form.prompt(np.arange(0)).tolist() == [BOS]
    assert items_of(form.prompt(np.arange(9)), 3) == [5, 6, 7, 8]


def test_nothing_to_predict_gives_no_document() -> None:
    form = PackedForm(item_tokens(5, 2), BOS, window=4, row_tokens=20)
    assert form.documents(np.arange(3), first_target=3) == []
    assert form.documents(np.arange(0), first_target=0) == []


def test_a_row_too_short_for_half_a_window_is_refused() -> None:
    PackedForm(item_tokens(5, 4), BOS, window=20, row_tokens=45)
    with pytest.raises(ConfigError, match=r"row_tokens=44 holds 10 items of 4 tokens, window=20 needs 11.*at least 45"):
        PackedForm(item_tokens(5, 4), BOS, window=20, row_tokens=44)
    with pytest.raises(ConfigError, match="window=0 keeps no history"):
        PackedForm(item_tokens(5, 4), BOS, window=0, row_tokens=44)


def sids() -> SidTable:
    return SidTable(("p", "q", "r", "s"), np.array([[0, 1], [1, 0], [1, 2], [2, 2]]), (3, 3))


def subword_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Template().history, Template().empty], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"bos_token": "<s>"} if bos else {}))
    add_sid_tokens(made, sids())
    return made


def tokens_for(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    return sid_token_ids(tokenizer, sids())[sids().token_index]


TOKENIZERS = {
    "subwords": subword_tokenizer,
    "no-bos": lambda: subword_tokenizer(bos=False),
    "words": lambda: make_tokenizer(sids()),
}


@pytest.fixture(params=TOKENIZERS, name="tokenizer")
def _tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def test_a_prompt_is_the_encoding_of_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    form = PromptForm(tokens_for(tokenizer), tokenizer, window=3, row_tokens=400)
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for history, spelled in (
        ([1], "<a_1><b_0>"),
        ([0, 3], "<a_0><b_1>, <a_2><b_2>"),
        ([0, 1, 2, 3], "<a_1><b_0>, <a_1><b_2>, <a_2><b_2>"),  # the last three
    ):
        text = Template().history.replace("{items}", spelled)
        expected = opening + tokenizer.encode(text, add_special_tokens=False)
        assert form.prompt(np.array(history)).tolist() == expected
    nothing = form.prompt(np.array([], dtype=np.int64))
    assert nothing.tolist() == opening + tokenizer.encode(Template().empty, add_special_tokens=False)


def test_a_prompt_document_is_the_evaluation_prompt_and_the_response(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokens_for(tokenizer)
    form = PromptForm(ids, tokenizer, window=2, row_tokens=400)
    items = np.array([2, 0, 3, 1])
    for first_target in (0, 2):
        documents = form.examples(items, first_target)
        assert len(documents) == 4 - first_target
        for place, document in enumerate(documents, start=first_target):
            np.testing.assert_array_equal(document.tokens[~document.loss], form.prompt(items[:place]))
            np.testing.assert_array_equal(document.tokens[document.loss], ids[items[place]])
            assert document.loss[-2:].all()
    assert form.documents(items, 4) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 5), st.integers(1, 5), st.integers(0, 200))
def test_shared_prefixes_unfold_to_every_prompt(history: list[int], first: int, window: int, room: int) -> None:
    tokenizer = subword_tokenizer()
    ids = tokens_for(tokenizer)
    longest = PromptForm(ids, tokenizer, window, 400).examples(np.zeros(window + 1, dtype=np.int64), 0)
    row_tokens = max(len(d.tokens) for d in longest) + room
    form, items = PromptForm(ids, tokenizer, window, row_tokens), np.array(history, dtype=np.int64)
    examples, documents = form.examples(items, first), form.documents(items, first)
    assert all(len(d.tokens) <= row_tokens for d in documents)
    found = [pair for d in documents for pair in unfolded(d)]
    assert found == [(d.tokens[~d.loss].tolist(), d.tokens[d.loss].tolist()) for d in examples]
    if len(examples) > 1 and room == 200:
        assert sum(len(d.tokens) for d in documents) < sum(len(d.tokens) for d in examples)


def unfolded(document: Document) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each target of a tree: the path from the root to it."""
    assert document.position is not None
    path, found, last = [], [], len(document.tokens) - 1
    for i, (token, depth, counts) in enumerate(
        zip(document.tokens.tolist(), document.position.tolist(), document.loss.tolist(), strict=True)
    ):
        assert depth <= len(path)
        path = [*path[:depth], (token, i if counts else -1)]
        if counts and (i == last or not document.loss[i + 1]):
            begin = next(k for k, (_, mark) in enumerate(path) if mark == i - (len(path) - 1 - k) and mark >= 0)
            found.append(([t for t, _ in path[:begin]], [t for t, _ in path[begin:]]))
    return found


def test_a_window_that_moves_on_in_steps_sees_the_newest_items_and_fewer_of_them() -> None:
    tokenizer = subword_tokenizer()
    ids, items = tokens_for(tokenizer), np.arange(20) % 4
    form = PromptForm(ids, tokenizer, window=6, row_tokens=4000, window_step=4)

    def seen(first_target: int) -> list[int]:
        lengths = []
        for place, d in enumerate(form.examples(items, first_target), start=first_target):
            (n,) = (n for n in range(7) if np.array_equal(form.prompt(items[place - n : place]), d.tokens[~d.loss]))
            lengths.append(n)
        return lengths

    assert seen(4) == [4, 5, 6, 3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5, 6, 3]
    assert seen(12) == [6, 3, 4, 5, 6, 3, 4, 5]
    assert seen(19) == [6]  # what is evaluated is what is decoded
    by_one = PromptForm(ids, tokenizer, window=6, row_tokens=4000)
    whole, fewer = (sum(len(d.tokens) for d in f.documents(items, 0)) for f in (by_one, form))
    assert fewer < 0.8 * whole
    with pytest.raises(ConfigError, match="window_step=7 with window=6"):
        PromptForm(ids, tokenizer, window=6, row_tokens=4000, window_step=7)


def test_a_budget_moves_on_in_steps_too() -> None:
    tokenizer = subword_tokenizer()
    ids, items = tokens_for(tokenizer), np.arange(12) % 4
    by_one = PromptForm(ids, tokenizer, window=10, row_tokens=4000)
    separator = len(by_one.separator)
    budget = 5 * (ids.shape[1] + separator) - separator
    form = PromptForm(ids, tokenizer, window=10, row_tokens=4000, history_tokens=budget, window_step=3)
    assert form.fitting == 5
    lengths = []
    for place, d in enumerate(form.examples(items, 2), start=2):
        (n,) = (n for n in range(6) if np.array_equal(form.prompt(items[place - n : place]), d.tokens[~d.loss]))
        lengths.append(n)
    assert lengths == [2, 3, 4, 5, 3, 4, 5, 3, 4, 5]
    (last,) = form.examples(items, 11)  # the only one of evaluation holds all that fit
    np.testing.assert_array_equal(last.tokens[~last.loss], form.prompt(items[:11]))
    assert last.left_out.items == 5


def test_prefixes_are_shared_up_to_the_token_that_predicts() -> None:
    def document(tokens: list[int], marked: int) -> Document:
        return Document(np.array(tokens), np.arange(len(tokens)) >= marked)

    one, other = document([1, 2, 3, 4, 5], 3), document([1, 2, 3, 4, 6], 4)
    (shared,) = share_prefixes([one, other], 9)
    assert shared.tokens.tolist() == [1, 2, 3, 4, 5, 4, 6]
    assert shared.position.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert shared.loss.tolist() == [False, False, False, True, True, False, True]
    assert shared.left_out.prompts == 2
    assert [d.tokens.tolist() for d in share_prefixes([one, other], 6)] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]
    assert len(share_prefixes([one, document([9, 2, 3], 1), document([9, 2, 4], 1)], 20)) == 3  # nothing is in common
    assert share_prefixes([], 9) == []


def test_the_longest_prompt_must_fit_a_row() -> None:
    tokenizer = subword_tokenizer()
    ids = tokens_for(tokenizer)
    form = PromptForm(ids, tokenizer, window=20, row_tokens=400)
    longest = len(form.documents(np.zeros(21, dtype=np.int64), 20)[0].tokens)
    PromptForm(ids, tokenizer, window=20, row_tokens=longest)
    with pytest.raises(ConfigError, match=rf"row_tokens={longest - 1} is less than the {longest} tokens"):
        PromptForm(ids, tokenizer, window=20, row_tokens=longest - 1)


def test_a_tokenizer_that_splits_ids_is_refused() -> None:
    split = subword_tokenizer()
    ids = np.array([split.convert_tokens_to_ids(["i", "t"])])  # the subwords of "it" are merged
    with pytest.raises(ConfigError, match="does not keep the semantic ID it whole"):
        PromptForm(ids, split, window=2, row_tokens=400)


@pytest.mark.parametrize("history", ["no place", "{items} and {items}"])
def test_a_template_without_one_place_for_the_items_is_refused(history: str) -> None:
    with pytest.raises(ConfigError, match="does not say where the items go"):
        Template(history=history)


def numbered(lengths: list[int]) -> list[Document]:
    """Documents whose tokens tell which document and place they are from."""
    rng = np.random.default_rng(0)
    return [
        Document(1000 * i + np.arange(1, n + 1), np.r_[False, rng.random(n - 1) < 0.5]) for i, n in enumerate(lengths)
    ]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 16), max_size=40), st.one_of(st.none(), st.integers(0, 9)))
def test_packing_keeps_every_document_whole(lengths: list[int], seed: int | None) -> None:
    documents = numbered(lengths)
    rows = pack(documents, 16, None if seed is None else np.random.default_rng(seed), pad=-5)
    found = {}
    for tokens, document, position, loss in zip(rows.tokens, rows.document, rows.position, rows.loss, strict=True):
        used = int((document > 0).sum())
        assert (document[:used] > 0).all()  # padding only at the end
        assert (np.diff(document[:used]) >= 0).all()
        assert np.unique(document[:used]).tolist() == list(range(1, document.max() + 1))
        assert (tokens[used:] == -5).all()
        assert not loss[used:].any()
        assert not position[used:].any()
        for number in range(1, document.max() + 1):
            piece = document == number
            index = int(tokens[piece][0]) // 1000
            assert index not in found
            found[index] = True
            np.testing.assert_array_equal(tokens[piece], documents[index].tokens)
            np.testing.assert_array_equal(loss[piece], documents[index].loss)
            np.testing.assert_array_equal(position[piece], np.arange(lengths[index]))
    assert sorted(found) == list(range(len(lengths)))
    assert len(rows.tokens) <= max(2 * sum(lengths) / 16, 1)  # best fit never leaves two rows half empty
    assert (rows.tokens.dtype, rows.document.dtype, rows.position.dtype, rows.loss.dtype) == ("i8", "i8", "i8", "?")


def test_packing_is_fixed_by_the_generator_and_varies_with_it() -> None:
    documents = numbered([3, 5, 7, 2, 6, 4, 8, 1, 5, 5])
    first, again, other = (pack(documents, 10, np.random.default_rng(seed)).tokens for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


def test_without_a_generator_documents_are_placed_in_order() -> None:
    rows = pack(numbered([2, 3, 1]), 6, None)
    assert rows.tokens.tolist() == [[1, 2, 1001, 1002, 1003, 2001]]
    assert rows.document.tolist() == [[1, 1, 2, 2, 2, 3]]
    assert rows.position.tolist() == [[0, 1, 0, 1, 2, 0]]


def test_no_documents_make_no_rows() -> None:
    assert pack([], 8, np.random.default_rng(0)).tokens.shape == (0, 8)


def test_twenty_thousand_documents_are_packed_tightly() -> None:
    documents = numbered(np.random.default_rng(0).integers(10, 120, 20_000).tolist())
    rows = pack(documents, 256, np.random.default_rng(0))
    assert (rows.document > 0).mean() > 0.95


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="a document has 9 tokens, a row 8"):
        pack(numbered([3, 9]), 8, None)


@pytest.mark.parametrize(
    ("tokens", "loss"),
    [([], []), ([1, 2], [False]), ([1, 2], [True, True])],
    ids=["empty", "unequal", "first token marked"],
)
def test_a_document_that_cannot_be_learned_from_is_refused(tokens: list, loss: list) -> None:
    with pytest.raises(ConfigError, match="cannot be learned from"):
        Document(np.array(tokens, dtype=np.int64), np.array(loss, dtype=bool))


def test_a_document_for_each_target_holds_what_the_target_sees() -> None:
    packed = Document(np.array([9, 1, 2, 3, 4, 5, 6]), np.arange(7) > 2)
    each = one_target_each(packed, 2)
    assert [d.tokens.tolist() for d in each] == [[9, 1, 2, 3, 4], [9, 1, 2, 3, 4, 5, 6]]
    assert [np.flatnonzero(d.loss).tolist() for d in each] == [[3, 4], [5, 6]]
    prompts = [
        Document(np.array([9, 1, 7, 5, 6]), np.arange(5) > 2),
        Document(np.array([9, 1, 2, 7, 5, 8]), np.arange(6) > 3),
    ]
    (tree,) = share_prefixes(prompts, 64)
    apart = one_target_each(tree, 2)
    assert [d.tokens.tolist() for d in apart] == [d.tokens.tolist() for d in prompts]
    assert [d.loss.tolist() for d in apart] == [d.loss.tolist() for d in prompts]
