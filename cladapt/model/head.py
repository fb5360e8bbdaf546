"""The output head for the rows of the vocabulary that are needed, or for all of them a chunk of tokens at a time.

A pretrained vocabulary has fifty to two hundred times the rows that semantic IDs use. Nothing here makes a tensor of
[tokens, V] that is larger than CHUNK. PEFT's `TrainableTokensLayer` copies the whole table in every pass: it is
computed from the frozen table and the learned rows instead.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners import lora
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cladapt.model.lora_layer import LoraLinear

CHUNK = 1 << 25
"""Logits over the whole vocabulary that exist at once: 128 MiB in float32."""


def head_logits(head: nn.Module, hidden: Tensor, rows: Tensor) -> Tensor:
    """`head(hidden)[..., rows]`, from these rows alone: hidden [..., d], rows int64 [m] -> [..., m].

    Rows are picked in a plain linear, in PEFT's LoRA on one, whichever adapters are active, and in PEFT's trainable
    tokens on one. Any other head, and one with hooks, is run whole.
    """
    if not _hooked(head):
        if type(head) is nn.Linear:
            return _linear(head, hidden, rows)
        if type(head) in (lora.Linear, LoraLinear):
            return _lora(cast(lora.Linear, head), hidden, rows)
        if type(head) is TrainableTokensLayer and type(head.base_layer) is nn.Linear and not _hooked(head.base_layer):
            return _trainable_tokens(head, hidden, rows)
    return cast(Tensor, head(hidden))[..., rows]


def all_logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """`head(hidden)`: hidden [n, d] -> [n, V]."""
    if not (_learns_tokens(head) and type(head.base_layer) is nn.Linear and not _hooked(head.base_layer)):
        return cast(Tensor, head(hidden))
    logits = F.linear(hidden, head.base_layer.weight)  # PEFT leaves a bias out
    for ids, learned in _learned(head, head.base_layer.weight):
        logits = logits.index_copy(1, ids, F.linear(hidden, learned).to(logits.dtype))
    return logits


def cross_entropy(head: nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
    """`F.cross_entropy(head(hidden).float(), target, reduction="none")`: [n, d], int64 [n] -> float32 [n].

    Where [n, V] exceeds CHUNK logits, they are made CHUNK at a time and again in the backward pass, one more product
    with the head; dropout in the head then draws a mask for each chunk.
    """

    def losses(some: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(all_logits(head, some).float(), ids, reduction="none")

    size = _at_once(head)
    if len(hidden) <= size:
        return losses(hidden, target)
    chunks = zip(hidden.split(size), target.split(size), strict=True)
    return torch.cat([cast(Tensor, checkpoint(losses, *chunk, use_reentrant=False)) for chunk in chunks])


def vocabulary_log_prob(head: nn.Module, hidden: Tensor, rows: Tensor) -> Tensor:
    """`head(hidden).float().log_softmax(-1)[:, rows]`, at most CHUNK logits at a time: [n, d], [m] -> [n, m]."""
    found = []
    for some in hidden.split(_at_once(head)):
        logits = all_logits(head, some).float()
        found.append(logits.index_select(1, rows) - logits.logsumexp(dim=1, keepdim=True))
    return torch.cat(found)


def embedded(embedding: Any, tokens: Tensor) -> Tensor | None:
    """`embedding(tokens)` where PEFT's trainable tokens would copy the table for it, else None: [...] -> [..., d]."""
    if not _learns_tokens(embedding):
        return None
    table = embedding.base_layer
    if not isinstance(table, nn.Embedding) or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        return None
    if any(table.padding_idx in embedding.token_indices[name] for name in embedding.active_adapters):
        return None
    vectors = F.embedding(tokens, table.weight, table.padding_idx)
    for ids, learned in _learned(embedding, vectors):
        new, found = _picked(learned, ids, tokens)
        vectors = torch.where(found[..., None], new, vectors)
    scale = embedding._get_embed_scale()
    return vectors if scale is None else vectors * scale.to(vectors.dtype)


def _at_once(head: nn.Module) -> int:
    """Tokens whose logits over the whole vocabulary are made at once."""
    return max(1, CHUNK // cast(int, head.out_features))


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    hooks: Any = module
    return "forward" in vars(module) or any(
        (hooks._forward_hooks, hooks._forward_pre_hooks, hooks._backward_hooks, hooks._backward_pre_hooks)
    )


def _linear(linear: nn.Linear, hidden: Tensor, rows: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.index_select(0, rows)
    return F.linear(hidden, linear.weight.index_select(0, rows), bias)


def _lora(layer: lora.Linear, hidden: Tensor, rows: Tensor) -> Tensor:
    """PEFT's own forward pass with the rows picked in the base and in B."""
    if layer.disable_adapters and layer.merged:
        return cast(Tensor, layer(hidden))[..., rows]  # PEFT takes the adapter out of the weights first
    base = layer.base_layer
    if layer.disable_adapters or layer.merged:
        return head_logits(base, hidden, rows)
    if (
        isinstance(layer, LoraLinear)
        and type(base) is nn.Linear
        and not _hooked(base)
        and not layer.stock_reason(hidden)
    ):
        return layer.fused(hidden, rows)
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    parts = [module[name] for name in names for module in (layer.lora_A, layer.lora_B)]
    if any(name in layer.lora_variant for name in names) or any(map(_hooked, parts)):
        return cast(Tensor, layer(hidden))[..., rows]
    logits = head_logits(base, hidden, rows)
    dtype = logits.dtype
    for name in names:
        down, up = layer.lora_A[name], cast(nn.Linear, layer.lora_B[name])
        hidden = layer._cast_input_dtype(hidden, cast(torch.dtype, down.weight.dtype))
        logits = logits + _linear(up, down(layer.lora_dropout[name](hidden)), rows) * layer.scaling[name]
    return logits.to(dtype)


def _trainable_tokens(layer: Any, hidden: Tensor, rows: Tensor) -> Tensor:
    if not _learns_tokens(layer):
        if layer.disable_adapters and layer.merged:
            return cast(Tensor, layer(hidden))[..., rows]
        return head_logits(layer.base_layer, hidden, rows)
    weight = layer.base_layer.weight.index_select(0, rows)
    for ids, learned in _learned(layer, weight):
        new, found = _picked(learned, ids, rows)
        weight = torch.where(found[:, None], new, weight)
    return F.linear(hidden, weight)  # PEFT leaves a bias out


def _learns_tokens(module: Any) -> bool:
    """Whether it is a table whose rows of some tokens are replaced by learned ones."""
    return (
        type(module) is TrainableTokensLayer
        and not _hooked(module)
        and not (module.disable_adapters or module.merged)
        and bool(module.active_adapters)
    )


def _learned(layer: Any, like: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """Token ids int64 [t] and their learned rows [t, d] of every active adapter, in the dtype of `like`."""
    layer._check_overlapping_tokens(layer.active_adapters)
    return [
        (torch.tensor(layer.token_indices[name], device=like.device), layer.trainable_tokens_delta[name].to(like))
        for name in layer.active_adapters
    ]


def _picked(learned: Tensor, ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The learned rows of `tokens` [...] as [..., d], and bool [...] of those that have one; others get any row."""
    ascending, order = ids.sort()
    place = torch.searchsorted(ascending, tokens.contiguous()).clamp_max(len(ids) - 1)
    return F.embedding(order[place], learned), ascending[place] == tokens
