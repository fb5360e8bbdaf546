"""Semantic-ID tokens in a Hugging Face tokenizer: a vocabulary of them alone, or added to an existing one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cladapt.errors import DataError
from cladapt.tokens.sids import SidTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def make_tokenizer(sids: SidTable) -> "PreTrainedTokenizerFast":
    """A word-level tokenizer of the four specials (ids 0-3) and the semantic-ID tokens, for a base made from scratch.

    `<a_1><b_2>` encodes to exactly two ids; anything else is `<unk>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIALS.values(), *sids.tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIALS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(">", "merged_with_previous")]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIALS)


def add_sid_tokens(tokenizer: "PreTrainedTokenizerBase", sids: SidTable) -> int:
    """Add the semantic-ID tokens, never split and not special, and return how many were new to the vocabulary."""
    from tokenizers import AddedToken

    before = len(tokenizer)
    # not normalised: a lower-casing or prefixing normaliser must not touch them
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in sids.tokens])
    return len(tokenizer) - before


def sid_token_ids(tokenizer: "PreTrainedTokenizerBase", sids: SidTable) -> np.ndarray:
    """Token id of every semantic-ID token: int64 [len(sids.tokens)]."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in sids.tokens if token not in vocabulary]
    if missing:
        raise DataError(
            f"the tokenizer lacks {len(missing)} of {len(sids.tokens)} semantic-ID tokens, the first {missing[0]}",
            "make a base with these tokens: `cladapt base init`",
        )
    return np.array([vocabulary[token] for token in sids.tokens], dtype=np.int64)


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], sids: SidTable) -> list[np.ndarray]:
    """Token ids of the words of each text, as they stand inside a sentence: int64 [n] each, empty for a blank text.

    A semantic ID or a special token spelt in a text is no word, nor is what the tokenizer does not know.
    """
    unknown = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    no_words = [*sid_token_ids(tokenizer, sids), *tokenizer.get_added_vocab().values(), *unknown]
    spaced = [f" {' '.join(text.split())}" if text.strip() else "" for text in texts]
    found = tokenizer(spaced, add_special_tokens=False, verbose=False)["input_ids"] if spaced else []
    words = [np.array(tokens, dtype=np.int64) for tokens in found]
    return [tokens[~np.isin(tokens, no_words)] for tokens in words]
