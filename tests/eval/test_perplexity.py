"""Perplexity against a whole cross-entropy in float64, and what is no text."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cladapt.errors import DataError
from cladapt.eval import perplexity as module
from cladapt.eval.perplexity import WINDOW, perplexity, read_text, windows_of
from cladapt.model import head
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import make_tokenizer

WORDS = ["the ", "cat ", "naïve ", "sat; ", "\n", "1995 ", "on ", "mats "]


def prose(words: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(WORDS, words))


def subwords() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([prose(200)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>")
    made.add_tokens(["<a_0>"])
    return made


TOKENIZER = subwords()


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # far from uniform
    return model


def written(folder: Path, content: str | bytes) -> Path:
    file = folder / "t.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize("chunk", [1 << 24, 1000])
def test_it_is_the_mean_of_the_whole_cross_entropy(
    lm: LlamaForCausalLM, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    monkeypatch.setattr(module, "AT_ONCE", 2)
    content = prose(1200)
    windows = windows_of(read_text(written(tmp_path, content)), TOKENIZER)
    ids = TOKENIZER.encode(content, add_special_tokens=False)
    n = len(ids) // WINDOW
    assert n >= 3
    assert windows.left_out == len(ids) - n * WINDOW > 0
    assert windows.bytes == len(TOKENIZER.decode(ids[: n * WINDOW]).encode())
    losses, double = [], lm.to(torch.float64)
    for k in range(n):
        own = torch.tensor([[TOKENIZER.eos_token_id, *ids[k * WINDOW : (k + 1) * WINDOW]]])
        with torch.no_grad():
            losses.append(F.cross_entropy(double(own).logits[0, :-1], own[0, 1:], reduction="none"))
    lm.to(torch.float32)
    nats = torch.cat(losses)
    found = perplexity(lm, windows)
    assert found["perplexity"] == pytest.approx(math.exp(float(nats.mean())), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(float(nats.sum()) / math.log(2) / windows.bytes, rel=1e-4)
    assert found["perplexity"] != pytest.approx(len(TOKENIZER), rel=0.05)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"\xff\xfe\x00a", "no text in UTF-8: invalid start byte at byte 0"),
        (b"a\0b", "it has a zero byte"),
        (" \n ", "is empty"),
        ("the cat", r"t.txt has \d tokens, a window 256: give a longer text"),
        (prose(900) + "<a_0>", "spells the semantic-ID token <a_0>"),
    ],
    ids=["missing", "binary", "zero byte", "empty", "short", "id"],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    file = tmp_path / "t.txt" if content is None else written(tmp_path, content)
    with pytest.raises(DataError) as error:
        windows_of(read_text(file), TOKENIZER, [TOKENIZER.convert_tokens_to_ids("<a_0>")])
    assert re.search(message, f"{error.value.message}: {error.value.hint}")


def test_a_tokenizer_without_words_is_refused_and_unknown_ones_are_counted(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(SidTable(("x",), np.array([[0]]), (2,)))
    text = read_text(written(tmp_path, "word " * 300))
    with pytest.raises(DataError, match=r"the base's tokenizer knows no word of t.txt"):
        windows_of(text, tokenizer)
    some = read_text(written(tmp_path, "word <a_0> " * 300))
    assert windows_of(some, tokenizer).unknown == WINDOW
