"""Bases: a model learned from scratch, and new token rows fitted in one that stays as it is."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from cladapt.config import PretrainConfig
from cladapt.model.load import Base, load_base, new_model, save_base, trie_softmax
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import make_tokenizer
from cladapt.tokens.trie import Trie
from cladapt.train.pretrain import fit_token_rows, pretrain, residual_dropout
from cladapt.train.sinks import MemorySink

SIDS = SidTable(tuple(f"i{k}" for k in range(9)), np.array([[k // 3, k % 3] for k in range(9)]), (3, 3))
NEW = [4, 5, 6, 7, 8, 9]  # the rows of the semantic IDs, after the four specials
CONFIG = PretrainConfig(epochs=3, batch_tokens=128, row_tokens=32, lr=1e-2, dropout=0.1)


def cycles(base: Base, count: int, seed: int) -> list[Document]:
    """Histories that count through the items: the next item is certain."""
    starts = np.random.default_rng(seed).integers(9, size=count)
    tokens = base.item_tokens().numpy()
    return [Document(np.r_[base.bos(), tokens[(s + np.arange(5)) % 9].ravel()], np.arange(11) > 2) for s in starts]


def small(family: str = "llama", tied: bool = True) -> Base:
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    tokenizer = make_tokenizer(SIDS)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Base(model_class(config), tokenizer, SIDS, {})


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_pretraining_learns_a_certain_next_item_and_keeps_the_best_epoch() -> None:
    model, tokenizer = new_model("tiny", SIDS, seed=0)
    base = Base(model, tokenizer, SIDS, {})
    sink = MemorySink()
    softmax = trie_softmax(base, Trie.build(SIDS.codes))
    config = CONFIG.model_copy(update={"epochs": 12, "patience": 20})
    result = pretrain(model, softmax, cycles(base, 60, 0), cycles(base, 10, 1), config, sink)
    scores = [e["valid_log_likelihood"] for e in sink.events if e["kind"] == "epoch"]
    assert result.score == max(scores) == scores[result.epoch - 1]
    assert result.start_score == pytest.approx(4 * 2 * -np.log(3), rel=0.05)  # 4 targets of 2 tokens, 3 codes each
    assert result.score > 0.2 * result.start_score
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())  # the dropout is gone


def test_pretraining_is_a_function_of_its_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        base = small()
        config = CONFIG.model_copy(update={"seed": seed})
        pretrain(base.model, None, cycles(base, 20, 0), cycles(base, 5, 1), config, MemorySink())
        states.append(values(base.model))
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert any(not torch.equal(t, states[2][n]) for n, t in states[0].items())


def test_no_epoch_leaves_the_model_as_it_was() -> None:
    base = small()
    before = values(base.model)
    config = CONFIG.model_copy(update={"epochs": 0})
    result = pretrain(base.model, None, cycles(base, 5, 0), cycles(base, 5, 1), config, MemorySink())
    assert (result.epoch, result.steps) == (0, 0)
    assert np.isfinite(result.start_score)
    assert all(torch.equal(t, before[n]) for n, t in values(base.model).items())


def test_patience_ends_the_fit() -> None:
    base = small()
    sink = MemorySink()
    # the validation counts downwards: what is learned makes it worse
    wrong = [Document(np.r_[d.tokens[:1], d.tokens[1:][::-1]], d.loss) for d in cycles(base, 5, 1)]
    config = CONFIG.model_copy(update={"epochs": 30, "patience": 2})
    result = pretrain(base.model, None, cycles(base, 40, 0), wrong, config, sink)
    assert sum(e["kind"] == "epoch" for e in sink.events) == result.epoch + 2 < 30


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False)])
@pytest.mark.parametrize("trie", [True, False])
def test_fitting_token_rows_moves_the_new_rows_alone(family: str, tied: bool, trie: bool) -> None:
    base = small(family, tied)
    before = values(base.model)
    softmax = trie_softmax(base, Trie.build(SIDS.codes)) if trie else None
    documents = cycles(base, 40, 0), cycles(base, 10, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, result = fit_token_rows(base.model, NEW, softmax, *documents, CONFIG, MemorySink())
    assert result.score > result.start_score
    after = values(model)
    assert after.keys() == before.keys()  # no wrapper is left
    for name, old in before.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert torch.equal(after[name][:4], old[:4]), name
            assert (after[name][NEW] != old[NEW]).any(dim=1).all(), name
        else:
            assert torch.equal(after[name], old), name
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_the_baked_rows_are_those_that_were_scored(tied: bool, tmp_path: Path) -> None:
    base = small(tied=tied)
    valid = cycles(base, 10, 1)
    model, result = fit_token_rows(base.model, NEW, None, cycles(base, 40, 0), valid, CONFIG, MemorySink())
    save_base(tmp_path / "base", model, base.tokenizer, SIDS, {"fitted_block": 0})
    loaded = load_base(tmp_path / "base")
    for lm in (model, loaded.model):
        assert mean_log_likelihood(lm, valid) == pytest.approx(result.score, rel=1e-5)


@torch.no_grad()
def mean_log_likelihood(lm: PreTrainedModel, documents: list[Document]) -> float:
    total = 0.0
    for d in documents:
        tokens = torch.from_numpy(d.tokens)
        log_p = lm.eval()(tokens[None]).logits[0].log_softmax(-1)
        total += sum(log_p[i - 1, tokens[i]].item() for i in np.flatnonzero(d.loss))
    return total / len(documents)


def test_dropout_acts_on_embedding_and_branches_in_training_alone() -> None:
    base = small()
    inputs = torch.tensor([[1, 4, 7, 5, 8]])
    plain = base.model.eval()(inputs).logits
    seen: dict[str, Any] = {}
    with residual_dropout(base.model, 0.5):
        assert torch.equal(base.model(inputs).logits, plain)
        base.model.train()
        handles = [
            base.model.model.get_submodule(name).register_forward_hook(
                lambda _m, _i, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
            )
            for name in ("embed_tokens", "layers.0.self_attn", "layers.0.mlp")
        ]
        torch.manual_seed(0)
        base.model(inputs)
    for handle in handles:
        handle.remove()
    for name, output in seen.items():
        assert 0.3 < (output == 0).float().mean() < 0.7, name
    assert torch.equal(base.model(inputs).logits, plain)  # still in training mode, but the hooks are gone


def test_dropout_keeps_the_expectation() -> None:
    base = small()
    inputs = torch.tensor([[1, 4, 7, 5, 8]])
    rows = base.model.get_input_embeddings()(inputs)
    with residual_dropout(base.model, 0.5):
        base.model.train()
        embedding = base.model.get_input_embeddings()
        mean = torch.stack([embedding(inputs) for _ in range(2000)]).mean(dim=0)
    # a mean of 2000 draws of 0 or 2x lies within five standard errors |x| / sqrt(2000)
    assert ((mean - rows).abs() <= 5 * rows.abs() / 2000**0.5 + 1e-6).all()
