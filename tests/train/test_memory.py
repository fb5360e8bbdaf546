"""Memory estimated without data against what the allocator gave out, as PyTorch's profiler saw it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from cladapt.config import AdapterConfig
from cladapt.methods import Context
from cladapt.methods.finetune import Finetune
from cladapt.model.adapter import adapted_lm, adapted_weights, adapter_parameters, create_adapter
from cladapt.model.load import Base, trie_softmax
from cladapt.model.packed import PackedLoss
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import make_tokenizer
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import PackedFeed
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.memory import Allocations, MicroBatch, activation_bytes, weight_bytes
from cladapt.train.sinks import MemorySink

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="models run on a GPU, the profiler counts the CPU's")

Measured = Callable[[], Any]
SIDS = SidTable(tuple(f"i{n}" for n in range(200)), np.array(list(np.ndindex(10, 20))), (10, 20))
TOKENIZER = make_tokenizer(SIDS)
SIZES: dict[str, Any] = {"vocab_size": len(TOKENIZER), "hidden_size": 96, "num_hidden_layers": 3}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=256, num_attention_heads=4),
    "qwen3": Qwen3Config(
        **SIZES,
        intermediate_size=192,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    ),
}


def make_fit(family: str, softmax: str = "trie", **changes: Any) -> tuple[Any, Fit, PackedFeed]:
    """An adapted model, and a fit on documents of random items."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="sdpa")
    if changes.get("precision") == "bf16":
        model.to(torch.bfloat16)
    base = Base(model.eval().requires_grad_(False), TOKENIZER, SIDS, {})
    adapted = create_adapter(base, AdapterConfig(rank=4), 0)
    rng, items = np.random.default_rng(0), base.item_tokens().numpy()
    lengths = rng.integers(5, 40, size=30)
    tokens = [np.concatenate([[1], items[rng.integers(len(items), size=n)].ravel()]) for n in lengths]
    documents = [Document(t, np.arange(len(t)) > 0) for t in tokens]
    trie = trie_softmax(base, Trie.build(SIDS.codes)) if softmax == "trie" else None
    loss = PackedLoss(adapted_lm(adapted), trie)
    feed = PackedFeed(documents, documents[:2], 512, 128)
    settings = FitSettings(lr=1e-3, epochs=1, seed=0, **changes)
    context = Context(adapter_parameters(adapted), block=2)
    return adapted, Fit(loss, Finetune(), context, feed, settings, MemorySink()), feed


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_peak_of_a_step_is_known_beforehand(family: str, checkpointing: bool, measured: Measured) -> None:
    check_step(measured, family, checkpointing=checkpointing)


def test_the_peak_is_known_in_bf16_and_over_the_whole_vocabulary_too(measured: Measured) -> None:
    check_step(measured, "llama", precision="bf16", checkpointing=True)
    check_step(measured, "qwen3", softmax="vocabulary")


def check_step(measured: Measured, family: str, softmax: str = "trie", **changes: Any) -> None:
    adapted, fit, feed = make_fit(family, softmax, **changes)
    batch = max(feed.epoch([0, 0]), key=lambda b: b[0].numel())
    size = MicroBatch.of(fit._unwrapped, batch)  # type: ignore[arg-type]
    precision, checkpointing = changes.get("precision", "fp32"), changes.get("checkpointing", False)
    expected = activation_bytes(adapted_lm(adapted), size, precision, checkpointing)
    assert all(p.grad is None for p in adapted.parameters())
    assert not adapted_lm(adapted).training
    fit.step([batch], 0.5)  # the first step makes the optimiser's state
    with measured() as peak:
        fit.step([batch], 0.5)
    assert expected == pytest.approx(peak.bytes, rel=0.1)
    if checkpointing:
        assert expected < 0.6 * activation_bytes(adapted_lm(adapted), size, precision, False)


def test_the_peak_of_a_pass_for_the_gradients_of_weights_is_known_beforehand(measured: Measured) -> None:
    adapted, fit, feed = make_fit("llama")
    weights = adapted_weights(adapted)
    batch = max(feed.epoch([0, 0]), key=lambda b: b[0].numel())
    size = MicroBatch.of(fit._unwrapped, batch)  # type: ignore[arg-type]
    expected = activation_bytes(adapted_lm(adapted), size, "fp32", False, [*weights.values()])
    assert not any(w.requires_grad for w in weights.values())
    with measured() as peak:
        found = fit.ctx.mean_gradient(weights, 1.0)
    added = sum(4 * g.numel() for g in found.values())
    assert expected + added == pytest.approx(peak.bytes, rel=0.1)


def test_allocations_are_what_arithmetic_says() -> None:
    start = torch.zeros(1000)
    with Allocations() as count:
        count.given([start])
        one = start + 1.0  # 4000 bytes
        two = one.double()  # 8000
        view = two[:10]
        del one
        three = torch.zeros(500, dtype=torch.int64)  # 4000
        assert count.now == 12000
        del two, three
        assert count.now == 8000  # the view keeps what it looks at
        del view
        assert (count.now, count.peak) == (0, 12000)


def test_weights_count_once_and_in_shares() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"], attn_implementation="sdpa")
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    total = 4 * sum(p.numel() for p in model.parameters())
    assert weight_bytes(model) == total + buffers
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert weight_bytes(model, 4) == total + buffers - 3 * layer + 3 * layer // 4 + 2 * layer
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    assert weight_bytes(tied) == 64


def test_only_children_have_no_loss_and_what_is_not_marked_neither() -> None:
    _, fit, _ = make_fit("llama")
    loss: Any = fit._unwrapped
    item = torch.tensor(TOKENIZER.encode(SIDS.spelt("i0"), add_special_tokens=False))
    tokens = torch.stack([torch.cat([torch.tensor([1]), item, item])])
    marks = torch.tensor([[True, True, True, False, True]])
    size = MicroBatch.of(loss, (tokens, torch.ones_like(tokens), torch.arange(5)[None], marks))
    losses: Tensor = loss(tokens, torch.ones_like(tokens), torch.arange(5)[None], marks)
    assert (size.rows, size.length, size.targets, size.columns) == (1, 5, len(losses), 30)
    assert size.children == 10 + 20 + 20
