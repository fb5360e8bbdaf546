"""Alignment tasks: what they read and write, spelt out; what does not fit is refused, cut or left out, and counted."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cladapt.errors import ConfigError
from cladapt.tokens.alignment import HISTORY_TASKS, ITEM_TASKS, IdsToTitle, IdToTitle, Items, TitlesToId, TitleToId
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import add_sid_tokens, encode_texts, sid_token_ids

SIDS = SidTable(("x", "y", "z"), np.array([[0, 1], [1, 0], [1, 1]]), (2, 2))
TEXTS = ["Alien (1979)", "", "Blade  Runner\nHorror"]


def tokenizer(bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>"]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *alphabet])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    bpe.decoder = decoders.ByteLevel()
    made: dict[str, Any] = {
        name: token for name, token, on in zip(("bos_token", "eos_token"), specials, (bos, eos), strict=True) if on
    }
    found = PreTrainedTokenizerFast(tokenizer_object=bpe, **made)
    add_sid_tokens(found, SIDS)
    return found


def items(title_tokens: int = 99, window: int = 2, row_tokens: int = 400, **specials: bool) -> Items:
    tok = tokenizer(**specials)
    ids = sid_token_ids(tok, SIDS)[SIDS.token_index]
    return Items.encode(tok, SIDS, ids, TEXTS, title_tokens, window, row_tokens)


def spelt(known: Items, document: Document) -> tuple[str, str]:
    """Prompt and response of a document; the response is what counts, and comes last."""
    counted = np.flatnonzero(document.loss)
    assert counted.tolist() == list(range(counted[0], len(document.tokens)))
    return tuple(known.tokenizer.decode(part) for part in np.split(document.tokens, [counted[0]]))  # type: ignore[return-value]


def test_an_item_task_has_a_document_for_every_item_with_a_text() -> None:
    known = items()
    everything = np.arange(3)
    assert [spelt(known, d) for d in TitleToId(known).documents(everything)] == [
        ("<s>This item is described as: Alien (1979)\nIts ID:", "<a_0><b_1>"),
        ("<s>This item is described as: Blade Runner Horror\nIts ID:", "<a_1><b_1>"),
    ]
    assert [spelt(known, d) for d in IdToTitle(known).documents(everything)] == [
        ("<s>The ID of this item:<a_0><b_1>\nIt is described as:", " Alien (1979)</s>"),
        ("<s>The ID of this item:<a_1><b_1>\nIt is described as:", " Blade Runner Horror</s>"),
    ]
    assert TitleToId(known).documents(np.array([1])) == []


def test_a_history_task_has_at_most_one_document_for_every_target() -> None:
    known = items()
    opening = "<s>Someone picked these items, from the oldest to the most recent.\nPicked so far:"
    question = "\nWhich item will they pick next?\n"
    history = np.array([1, 0, 2, 0])
    # the first target has a history without a text
    assert [spelt(known, d) for d in TitlesToId(known).documents(history, 1)] == [
        (f"{opening} Alien (1979){question}Next item:", "<a_1><b_1>"),
        (f"{opening} Alien (1979); Blade Runner Horror{question}Next item:", "<a_0><b_1>"),
    ]
    assert [spelt(known, d) for d in IdsToTitle(known).documents(history, 0)] == [
        (f"{opening}<a_1><b_0>{question}It is described as:", " Alien (1979)</s>"),
        (f"{opening}<a_1><b_0>,<a_0><b_1>{question}It is described as:", " Blade Runner Horror</s>"),
        (f"{opening}<a_0><b_1>,<a_1><b_1>{question}It is described as:", " Alien (1979)</s>"),
    ]
    assert IdsToTitle(known).documents(np.array([0, 1]), 0) == []  # neither a history before x nor a text of y
    assert TitlesToId(known).shortened == 0


def test_a_text_is_cut_and_then_has_no_end() -> None:
    known = items(title_tokens=6)
    assert known.cut.tolist() == [True, False, True]
    assert known.titled.tolist() == [True, False, True]
    assert spelt(known, IdToTitle(known).documents(np.array([0]))[0])[1] == " Alien"


def test_the_oldest_titles_are_left_out_until_the_rest_fits() -> None:
    roomy = items(window=3)
    history = np.array([0, 2, 0, 1])
    (whole,) = TitlesToId(roomy).documents(history, 3)
    for room, expected in ((len(whole.tokens), 3), (len(whole.tokens) - 1, 2), (len(whole.tokens) - 15, 1)):
        known = items(window=3, row_tokens=room)
        task = TitlesToId(known)
        (document,) = task.documents(history, 3)
        prompt, response = spelt(known, document)
        kept = prompt.split("Picked so far:")[1].split("\n")[0].split(";")
        assert kept == [" Alien (1979)", " Blade Runner Horror", " Alien (1979)"][3 - expected :]
        assert response == "<a_1><b_0>"
        assert len(document.tokens) <= room
        assert task.shortened == (expected < 3)


def test_specials_that_a_tokenizer_lacks_are_left_out() -> None:
    known = items(bos=False, eos=False)
    assert spelt(known, IdToTitle(known).documents(np.array([0]))[0]) == (
        "The ID of this item:<a_0><b_1>\nIt is described as:",
        " Alien (1979)",
    )


@pytest.mark.parametrize("name", [*ITEM_TASKS, *HISTORY_TASKS])
def test_a_row_that_no_document_fits_into_is_refused_before_training(name: str) -> None:
    task: Any = {**ITEM_TASKS, **HISTORY_TASKS}[name]
    every = np.array([2, 2, 2, 2])

    def longest(known: Items) -> int:
        made = task(known)
        found = made.documents(every[:1]) if name in ITEM_TASKS else made.documents(every, 1)
        return max(len(d.tokens) for d in found)

    # of a history of titles one alone must fit
    need = longest(items(window=1 if name == "titles_to_id" else 2))
    assert longest(items(row_tokens=need)) == need
    with pytest.raises(ConfigError, match=rf"row_tokens={need - 1} is less than the {need} tokens .* task {name}"):
        task(items(row_tokens=need - 1))


def test_ids_spelt_in_a_text_and_unknown_words_are_no_words() -> None:
    tok = tokenizer()
    words = encode_texts(tok, ["a<a_1>b", "  ", "c"], SIDS)
    assert [tok.decode(w) for w in words] == [" ab", "", " c"]
    assert encode_texts(tok, [], SIDS) == []
    word_level = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, " known": 1}, unk_token="<unk>")), unk_token="<unk>"
    )
    add_sid_tokens(word_level, SIDS)
    assert [w.tolist() for w in encode_texts(word_level, ["known", "strange"], SIDS)] == [[1], []]
