"""Rows of ID tokens: where they start is a mean that can be counted by hand; a head of its own is the table's copy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cladapt.model import rows
from cladapt.model.load import extend_model, load_base, save_base
from cladapt.model.rows import start_by_meaning, tables, untie
from cladapt.tokens.sids import SidTable

Checkpoint = Callable[..., Path]
SIDS = SidTable(("x", "y", "z"), np.array([[0, 1], [2, 0], [2, 1]]), (3, 2))
TEXTS = ["the next item", "", "which <a_0> list item item"]  # of the items (0, 1), (2, 0) and (2, 1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_row_starts_at_the_mean_of_the_words_of_its_items(
    checkpoint: Checkpoint, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(checkpoint(tmp_path, tied=tied))
    drawn, tokenizer, new = extend_model(source, SIDS, seed=3)
    model, _, _ = extend_model(source, SIDS, seed=3)
    monkeypatch.setattr(rows, "CHUNK", 3)  # sums go over pieces
    size = len(tokenizer) - len(new)
    words = [[t for t in tokenizer.encode(f" {text}") if t < size] if text else [] for text in TEXTS]
    assert start_by_meaning(model, tokenizer, SIDS, TEXTS, new) == 3
    # the codes a_0, a_2 and b_1 have items with words; a_1 has no item, the item of b_0 no words
    expected = {0: words[0], 2: words[2], 4: words[0] + words[2]}
    for before, after in zip(tables(drawn), tables(model), strict=True):
        assert torch.equal(before[:size], after[:size])
        for place, row in enumerate(new):
            if place not in expected:
                assert torch.equal(after[row], before[row])
                continue
            meaning = torch.stack([before[w] for w in expected[place]]).double().mean(dim=0)
            noise = before[row].double() - before[:size].double().mean(dim=0)
            torch.testing.assert_close(after[row].double(), meaning + noise, atol=1e-6, rtol=0)


def test_codes_of_equal_items_are_told_apart(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, tokenizer, new = extend_model(str(checkpoint(tmp_path)), SIDS, seed=3)
    start_by_meaning(model, tokenizer, SIDS, ["same"] * 3, new)
    assert len(tables(model)[0][new].unique(dim=0)) == len(new)


def test_rows_that_a_source_has_already_stay(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, tokenizer, new = extend_model(str(checkpoint(tmp_path / "a")), SIDS, seed=0)
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    larger = SidTable(SIDS.items, np.array([[0, 1], [2, 0], [2, 3]]), (3, 4))
    again, grown, added = extend_model(str(tmp_path / "b"), larger, seed=0)
    assert start_by_meaning(again, grown, larger, TEXTS, added) == 1
    assert torch.equal(tables(again)[0][new], tables(model)[0][new])


def test_no_words_move_no_row(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, tokenizer, new = extend_model(str(checkpoint(tmp_path)), SIDS, seed=0)
    before = tables(model)[0].clone()
    assert start_by_meaning(model, tokenizer, SIDS, ["", " ", "\n"], new) == 0
    assert torch.equal(tables(model)[0], before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_an_untied_head_is_a_copy_that_stock_transformers_loads(
    checkpoint: Checkpoint, family: str, tmp_path: Path
) -> None:
    model, tokenizer, new = extend_model(str(checkpoint(tmp_path / "source", family)), SIDS, seed=0)
    inputs = torch.arange(12)[None]
    with torch.no_grad():
        tied = model.eval()(inputs).logits
        (embedding,) = tables(model)
        assert untie(model) == embedding.numel() * 4
        assert torch.equal(model(inputs).logits, tied)
        assert untie(model) == 0  # it has one now
        model.get_output_embeddings().weight[new[0]] += 1.0
        expected = model(inputs).logits
    assert (expected != tied).any()
    save_base(tmp_path / "base", model, tokenizer, SIDS, {"fitted_block": 0})
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert stock.config.tie_word_embeddings is False
    with torch.no_grad():
        assert torch.equal(stock(inputs).logits, expected)
        assert torch.equal(load_base(tmp_path / "base").model(inputs).logits, expected)
        assert not torch.equal(*tables(stock))
    stock.tie_weights()
    assert not torch.equal(*tables(stock))
