"""Attention of packed rows: the mask says who sees whom, and the ends of documents mean the same in every family."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from cladapt.model import attention
from cladapt.model.attention import block_mask, branches, compute_dtype, document_ends, packed_attention, packed_mask
from cladapt.model.packed import PackedLoss

CPU, GPU = torch.device("cpu"), torch.device("cuda")
POSITION = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]])
DOCUMENT = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3]])


def test_the_mask_is_causal_inside_a_document_and_closed_outside() -> None:
    numbers = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    mask = block_mask(POSITION[:2] * (numbers > 0), torch.float32)
    assert mask.shape == (2, 1, 6, 6)
    for r in range(2):
        for i in range(6):
            for j in range(6):
                seen = i == j or (j < i and 0 < numbers[r, i] == numbers[r, j])
                assert mask[r, 0, i, j] == (0.0 if seen else torch.finfo(torch.float32).min)
    assert torch.equal(mask, block_mask(POSITION[:2] * (numbers > 0), torch.float32, trees=False))
    assert block_mask(POSITION, torch.bfloat16).isfinite().all()


def test_a_token_of_a_tree_sees_the_path_to_it() -> None:
    # a0 a1 a2 | b1 b2 b3 under a0 | c2 under a0 b1 | another document of two
    position = torch.tensor([[0, 1, 2, 1, 2, 3, 2, 0, 1]])
    paths = [{0}, {0, 1}, {0, 1, 2}, {0, 3}, {0, 3, 4}, {0, 3, 4, 5}, {0, 3, 6}, {7}, {7, 8}]
    mask = block_mask(position, torch.float32)[0, 0]
    assert [set((row == 0).nonzero()[:, 0].tolist()) for row in mask] == paths
    document = torch.tensor([[1] * 7 + [2] * 2])
    assert branches(document, position)
    assert not branches(document[:, 7:], position[:, 7:])
    assert not branches(DOCUMENT, POSITION)


def test_ends_cut_the_rows_where_documents_and_rows_change() -> None:
    ends = document_ends(DOCUMENT)
    assert ends.dtype == torch.int32
    assert ends.shape == (1, 1, 1, 7)
    assert ends.flatten().tolist() == [0, 2, 5, 6, 7, 12, 18]


def documents_apart(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: Any) -> Tensor:
    """What the kernel of a GPU computes, by one plain causal attention per document."""
    found = []
    for start, end in pairwise(ends.tolist()):
        assert end - start <= longest
        some = [t[start:end].transpose(0, 1)[None] for t in (query, key, value)]
        own = F.scaled_dot_product_attention(*some, is_causal=True, scale=scale, enable_gqa=True)
        found.append(own[0].transpose(0, 1))
    return torch.cat(found)


def small(kind: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        kind,
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "packed_attention", lambda *_: ("varlen", "a stand-in"))
    monkeypatch.setattr(attention, "variable_length", documents_apart)


def losses_and_gradients(lm: PreTrainedModel) -> dict[str, Tensor]:
    tokens = torch.randint(1, 30, DOCUMENT.shape, generator=torch.Generator().manual_seed(1))
    lm.zero_grad()
    losses = PackedLoss(lm)(tokens, DOCUMENT, POSITION, DOCUMENT > 0)
    losses.sum().backward()
    return {"loss": losses.detach(), **{n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("kind", attention.PLAIN)
def test_ends_of_documents_give_the_losses_and_gradients_of_the_dense_mask(
    kind: str, request: pytest.FixtureRequest
) -> None:
    lm = small(kind)
    dense = losses_and_gradients(lm)
    assert lm.config._attn_implementation == "sdpa"
    request.getfixturevalue("as_on_a_gpu")
    found = losses_and_gradients(lm)
    assert lm.config._attn_implementation == attention.IMPLEMENTATION
    assert found.keys() == dense.keys()
    for name, tensor in dense.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradient_checkpointing_computes_the_same_again() -> None:
    lm = small("llama").train()
    plain = losses_and_gradients(lm)
    lm.activation_checkpointing_enable()
    again = losses_and_gradients(lm)
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_model_made_to_understand_ends_takes_plain_input_as_before() -> None:
    lm = small("qwen2").eval()
    tokens = torch.arange(1, 9).view(2, 4)
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        expected = [lm(tokens).logits, lm(tokens, attention_mask=padding).logits]
        losses_and = PackedLoss(lm)
        losses_and(tokens, torch.ones_like(tokens), torch.arange(4).expand(2, 4), tokens > 0)
        found = [lm(tokens).logits, lm(tokens, attention_mask=padding).logits]
    assert lm.config._attn_implementation == attention.IMPLEMENTATION
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert "attn_implementation" not in lm.config.to_diff_dict()
    assert attention.IMPLEMENTATION not in lm.config.to_json_string()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_autocast_s_precision_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def watched(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        seen.update(t.dtype for t in (query, key, value))
        return documents_apart(query, key, value, *rest)

    monkeypatch.setattr(attention, "variable_length", watched)
    lm = small("qwen3")  # its norms of queries and keys give float32
    assert compute_dtype(lm) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(lm) == torch.bfloat16
        losses_and_gradients(lm)
    assert seen == {torch.bfloat16}


def test_a_cpu_takes_the_dense_mask() -> None:
    assert packed_attention(CPU, torch.bfloat16) == ("dense", "variable-length attention needs a GPU, this is CPU")
    assert torch.equal(packed_mask(small("llama"), DOCUMENT, POSITION), block_mask(POSITION, torch.float32))


@pytest.mark.parametrize(
    ("dtype", "changes", "reason"),
    [
        (torch.float32, {}, "variable-length attention takes half precision, not float32"),
        (torch.bfloat16, {"attention_dropout": 0.1}, "variable-length attention has no dropout"),
        (torch.bfloat16, {"head_dim": 12}, "variable-length attention takes no heads of width 12"),
        (torch.bfloat16, {"head_dim": 264}, "variable-length attention takes no heads of width 264"),
        (torch.bfloat16, {"model_type": "gemma2"}, "the attention of gemma2 is not known to be plain"),
    ],
)
def test_what_the_kernel_does_not_take_gets_the_dense_mask(
    dtype: torch.dtype, changes: dict[str, Any], reason: str
) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    for name, value in changes.items():
        setattr(config, name, value)
    assert packed_attention(GPU, dtype, config) == ("dense", reason)


def test_a_gpu_s_kernel_is_compared_with_the_dense_mask_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kernel: Any) -> str:
        monkeypatch.setattr(attention, "variable_length", kernel)
        attention._obstacle.cache_clear()
        return attention._obstacle(CPU, torch.bfloat16, 16)

    assert run(documents_apart) == ""
    assert "differs from the dense mask by" in run(lambda *inputs: documents_apart(*inputs) * 1.1)
    assert "in dK" in run(lambda q, k, *rest: documents_apart(q, k.detach() + 0.5 * (k - k.detach()), *rest))
    assert "differs" in run(lambda *inputs: documents_apart(*inputs) * torch.nan)

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no kernel\nimage")

    assert run(broken) == "variable-length attention fails: no kernel image"
    attention._obstacle.cache_clear()


def test_the_environment_can_ask_for_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_obstacle", lambda *_: "")
    assert packed_attention(GPU, torch.bfloat16)[0] == "varlen"
    monkeypatch.setenv("CLADAPT_KERNELS", "reference")
    assert packed_attention(GPU, torch.bfloat16) == ("dense", "asked for")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("head", [16, 64, 128])
def test_this_gpu_s_kernel_gives_what_the_dense_mask_gives(head: int) -> None:
    assert attention._obstacle(torch.device("cuda"), torch.bfloat16, head) == ""
