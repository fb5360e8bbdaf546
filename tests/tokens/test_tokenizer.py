"""Semantic-ID tokens stay whole in a vocabulary of their own and in a subword tokenizer."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cladapt.errors import DataError
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import add_sid_tokens, make_tokenizer, sid_token_ids


def table(sizes: tuple[int, ...] = (12, 3)) -> SidTable:
    return SidTable(("x", "y"), np.array([[0] * len(sizes), [s - 1 for s in sizes]]), sizes)


def subword_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that lower-cases, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the next item is <a_1> and then <a_1>, <a_1>"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_the_made_vocabulary_is_specials_then_tokens() -> None:
    tokenizer, sids = make_tokenizer(table()), table()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert len(tokenizer) == 4 + len(sids.tokens)
    assert sid_token_ids(tokenizer, sids).tolist() == list(range(4, 4 + 15))
    assert sid_token_ids(tokenizer, sids).dtype == np.int64


@pytest.mark.parametrize("text", ["<a_1><b_2>", "<a_1> <b_2>"])
def test_the_made_tokenizer_encodes_an_id_to_exactly_its_tokens(text: str) -> None:
    tokenizer = make_tokenizer(table())
    assert tokenizer(text)["input_ids"] == [4 + 1, 4 + 12 + 2]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == "<a_1><b_2>"


def test_specials_encode_to_themselves_and_the_rest_is_unknown() -> None:
    assert make_tokenizer(table()).encode("<bos><a_0>, film <a_99>") == [1, 4, 3, 3, 3]


def test_the_made_tokenizer_survives_saving(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(table())
    tokenizer.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert back.encode("<bos><a_11><b_2>") == tokenizer.encode("<bos><a_11><b_2>") == [1, 15, 18]
    assert back.get_vocab() == tokenizer.get_vocab()
    assert (back.bos_token_id, back.pad_token_id, back.eos_token_id) == (1, 0, 2)


def test_added_tokens_are_never_split_nor_special_and_counted_once(tmp_path: Path) -> None:
    tokenizer, sids = subword_tokenizer(), table()
    before = len(tokenizer)
    assert add_sid_tokens(tokenizer, sids) == 15
    assert add_sid_tokens(tokenizer, sids) == 0
    ids = sid_token_ids(tokenizer, sids)
    assert ids.tolist() == list(range(before, before + 15))
    assert tokenizer.encode("".join(sids.tokens), add_special_tokens=False) == ids.tolist()
    text = "The item <a_1><b_2>, then<a_11>"
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert [i for i in encoded if i in ids] == [ids[1], ids[12 + 2], ids[11]]
    assert tokenizer.decode(encoded, skip_special_tokens=True) == text.lower()
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == tokenizer.encode(text)


def test_only_the_new_tokens_of_a_larger_table_are_counted() -> None:
    tokenizer = subword_tokenizer()
    add_sid_tokens(tokenizer, table((12, 3)))
    assert add_sid_tokens(tokenizer, table((12, 5))) == 2


@pytest.mark.parametrize("make", [lambda: make_tokenizer(table((2, 2))), subword_tokenizer], ids=["words", "subwords"])
def test_missing_tokens_are_counted_and_named(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=r"lacks \d+ of 15 semantic-ID tokens, the first <a_[02]>.*cladapt base init"):
        sid_token_ids(make(), table())
