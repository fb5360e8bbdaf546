"""Tuning a base: what learns and what stays, whether what is kept is what was scored, and where weights decay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cladapt.config import TuneConfig
from cladapt.model.load import Base, extend_model, load_base, save_base, trie_softmax
from cladapt.model.rows import untie
from cladapt.tokens.alignment import IdToTitle, Items
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import sid_token_ids
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import MixedFeed
from cladapt.train.sinks import MemorySink
from cladapt.train.tune import tune

SIDS = SidTable(tuple(f"i{k}" for k in range(9)), np.array([[k // 3, k % 3] for k in range(9)]), (3, 3))
TEXTS = [f"item {'abcdefghi'[k]}" for k in range(9)]
CONFIG = TuneConfig(epochs=3, batch_tokens=256, row_tokens=64, lr=1e-2)


def opened(checkpoint: Callable[..., Path], folder: Path, family: str = "llama", tied: bool = True) -> Base:
    model, tokenizer, _ = extend_model(str(checkpoint(folder, family)), SIDS, seed=0)
    if not tied:
        untie(model)
    return Base(model, tokenizer, SIDS, {})


def cycles(base: Base, count: int, seed: int) -> list[Document]:
    """Histories that count through the items: the next item is certain."""
    starts = np.random.default_rng(seed).integers(9, size=count)
    tokens = base.item_tokens().numpy()
    return [Document(np.r_[base.bos(), tokens[(s + np.arange(5)) % 9].ravel()], np.arange(11) > 2) for s in starts]


def feed(base: Base, words: bool = True) -> MixedFeed:
    tasks: list[Any] = [(cycles(base, 30, 0), 1.0)]
    if words:
        items = Items.encode(base.tokenizer, SIDS, base.item_tokens().numpy(), TEXTS, 20, 5, 64)
        tasks.append((IdToTitle(items).documents(np.arange(9)), 0.5))
    return MixedFeed(tasks, cycles(base, 10, 1), CONFIG.batch_tokens, CONFIG.row_tokens)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def mean_log_likelihood(lm: Any, ids: torch.Tensor | None, documents: list[Document]) -> float:
    """Of the softmax over all tokens, or over the codes of a level, which `ids` holds one after the other; float64."""
    lm, total = lm.double().eval(), 0.0
    for d in documents:
        tokens = torch.from_numpy(d.tokens)
        logits = lm(tokens[None]).logits[0]
        for place in np.flatnonzero(d.loss):
            row = logits[place - 1]
            if ids is not None:  # every prefix of SIDS has all three codes of the next level
                level = ids[:3] if tokens[place] in ids[:3] else ids[3:]
                total += (row[tokens[place]] - row[level].logsumexp(0)).item()
            else:
                total += row.log_softmax(-1)[tokens[place]].item()
    return total / len(documents)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False)])
@pytest.mark.parametrize("trie", [True, False])
def test_what_is_kept_is_an_ordinary_model_with_the_score_of_its_epoch(
    rank: int, family: str, tied: bool, trie: bool, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base, sink = opened(checkpoint, tmp_path / "source", family, tied), MemorySink()
    before = values(base.model)
    softmax = trie_softmax(base, Trie.build(SIDS.codes)) if trie else None
    model, result = tune(base, softmax, feed(base), CONFIG.model_copy(update={"rank": rank}), sink)
    scores = [e["valid_log_likelihood"] for e in sink.events if e["kind"] == "epoch"]
    assert result.score == max(scores) == scores[result.epoch - 1] > result.start_score
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    after = values(model)
    assert after.keys() == before.keys()  # no wrapper is left
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    ids = sid_token_ids(base.tokenizer, SIDS).tolist()
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for name, old in before.items():
        changed = after[name] != old
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert changed[ids].any(dim=1).all(), name
            words = [i for i in range(len(old)) if i not in ids]
            assert changed[words].any().item() == (rank == 0), name
        else:
            assert changed.any().item() == (rank == 0 or name in linear), name
    save_base(tmp_path / "base", model, base.tokenizer, SIDS, {"fitted_block": 1})
    loaded = load_base(tmp_path / "base")
    codes = torch.tensor(ids) if trie else None
    assert mean_log_likelihood(loaded.model, codes, cycles(base, 10, 1)) == pytest.approx(result.score, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_lora_changes_each_matrix_by_its_rank(
    tied: bool, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = opened(checkpoint, tmp_path, tied=tied)
    before = values(base.model)
    model, _ = tune(base, None, feed(base), CONFIG.model_copy(update={"rank": 2}), MemorySink())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            delta = (module.weight - before[f"{name}.weight"]).double()
            found = torch.linalg.svdvals(delta)
            assert found[1] > 1e-3 * found[0] > 1e2 * found[2], name


@pytest.mark.parametrize("rank", [0, 4])
def test_weights_of_linear_layers_alone_decay(rank: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The first step of AdamW has the same gradient whatever the decay; a factor B is zero, so only A shows it."""
    found = []
    for decay in (0.0, 5.0):
        base = opened(checkpoint, tmp_path / f"{decay}", "qwen2", tied=False)  # it has biases
        config = CONFIG.model_copy(
            update={"rank": rank, "weight_decay": decay, "epochs": 1, "keep": "last", "batch_tokens": 64 * 99}
        )
        whole = MixedFeed([(cycles(base, 30, 0), 1.0)], cycles(base, 2, 1), config.batch_tokens, 64)
        assert len(whole.epoch([0, 0])) == 1
        found.append(values(tune(base, None, whole, config, MemorySink())[0]))
    linear = {f"{n}.weight" for n, m in base.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for name, plain in found[0].items():
        assert torch.equal(plain, found[1][name]) == (name not in linear), name


def test_tuning_is_a_function_of_its_seed(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    states = []
    for n, seed in enumerate((0, 0, 1)):
        base = opened(checkpoint, tmp_path / str(n))
        config = CONFIG.model_copy(update={"rank": 2, "seed": seed, "dropout": 0.1, "epochs": 1})
        states.append(values(tune(base, None, feed(base), config, MemorySink())[0]))
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert any(not torch.equal(t, states[2][n]) for n, t in states[0].items())


def test_patience_ends_tuning_by_the_sequence_task(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base, sink = opened(checkpoint, tmp_path), MemorySink()
    # the validation counts downwards: what is learned makes it worse, whatever the texts' task gains
    wrong = [Document(np.r_[d.tokens[:1], d.tokens[1:][::-1]], d.loss) for d in cycles(base, 5, 1)]
    tasks = feed(base).tasks
    config = CONFIG.model_copy(update={"epochs": 40, "patience": 2})
    _, result = tune(base, None, MixedFeed(tasks, wrong, 256, 64), config, sink)
    assert sum(e["kind"] == "epoch" for e in sink.events) == result.epoch + 2 < 40


@pytest.mark.parametrize("rank", [0, 4])
def test_layers_computed_again_give_the_same_weights(
    rank: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    found = []
    for again in (False, True):
        base = opened(checkpoint, tmp_path / str(again))
        config = CONFIG.model_copy(update={"rank": rank, "checkpointing": again, "epochs": 1, "precision": "bf16"})
        model, _ = tune(base, trie_softmax(base, Trie.build(SIDS.codes)), feed(base), config, MemorySink())
        found.append(values(model))
        assert {t.dtype for t in found[-1].values()} == {torch.float32}
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
