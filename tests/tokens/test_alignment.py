"""Alignment tasks: what they read and write, spelt out; what does not fit is refused, cut or left out, and counted."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cladapt.errors import ConfigError
from cladapt.tokens.alignment import ITEM_TASKS, IdsToTitle, IdToTitle, Items, TitleToId
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


def test_a_history_leads_to_the_text_of_each_target_that_has_one() -> None:
    known = items()
    opening = "<s>Someone picked these items, from the oldest to the most recent.\nPicked so far: "
    question = "\nWhich item will they pick next?\nIt is described as:"
    assert [spelt(known, d) for d in IdsToTitle(known).examples(np.array([1, 0, 2, 0]), 0)] == [
        (f"{opening}<a_1><b_0>{question}", " Alien (1979)</s>"),
        (f"{opening}<a_1><b_0>, <a_0><b_1>{question}", " Blade Runner Horror</s>"),
        (f"{opening}<a_0><b_1>, <a_1><b_1>{question}", " Alien (1979)</s>"),
    ]
    assert spelt(known, IdsToTitle(known).examples(np.array([0, 1, 2]), 0)[0]) == (
        "<s>Someone has not picked any item yet.\nWhich item will they pick first?\nIt is described as:",
        " Alien (1979)</s>",
    )
    assert IdsToTitle(known).documents(np.array([0, 1]), 1) == []  # the target has no text


def test_a_text_is_cut_and_then_has_no_end() -> None:
    known = items(title_tokens=6)
    assert known.cut.tolist() == [True, False, True]
    assert spelt(known, IdToTitle(known).documents(np.array([0]))[0])[1] == " Alien"


def test_specials_that_a_tokenizer_lacks_are_left_out() -> None:
    known = items(bos=False, eos=False)
    assert spelt(known, IdToTitle(known).documents(np.array([0]))[0]) == (
        "The ID of this item:<a_0><b_1>\nIt is described as:",
        " Alien (1979)",
    )


@pytest.mark.parametrize("name", [*ITEM_TASKS, "ids_to_title"])
def test_a_row_that_no_document_fits_into_is_refused_before_training(name: str) -> None:
    task: Any = {**ITEM_TASKS, "ids_to_title": IdsToTitle}[name]
    every = np.array([2, 2, 2, 2])
    made = task(items())
    found = made.documents(every[:1]) if name in ITEM_TASKS else made.examples(every, 1)
    need = max(len(d.tokens) for d in found)
    task(items(row_tokens=need))
    with pytest.raises(ConfigError, match=rf"row_tokens={need - 1} is less than the {need} tokens .* task {name}"):
        task(items(row_tokens=need - 1))


def test_ids_and_specials_spelt_in_a_text_and_unknown_words_are_no_words() -> None:
    tok = tokenizer()
    words = encode_texts(tok, ["a<a_1>b", "  ", "c</s>"], SIDS)
    assert [tok.decode(w) for w in words] == [" ab", "", " c"]
    assert encode_texts(tok, [], SIDS) == []
    word_level = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, " known": 1}, unk_token="<unk>")), unk_token="<unk>"
    )
    add_sid_tokens(word_level, SIDS)
    assert [w.tolist() for w in encode_texts(word_level, ["known", "strange"], SIDS)] == [[1], []]
