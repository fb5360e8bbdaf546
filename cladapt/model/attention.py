"""Attention inside packed rows, where each document sees itself alone: without a mask where the device can.

`dense`: an additive mask [R, 1, S, S], on any device. `varlen`: the documents one after another through torch's
variable-length flash attention, which computes only what is seen and needs their ends alone: on a GPU, in half
precision, for models whose attention is plain, and rows without a tree of shared prefixes. Neither is a setting; the
environment's CLADAPT_KERNELS=reference leaves the dense mask alone. Sliding windows play no part in either: documents
that are longer than one are refused (`cladapt.model.source.check_reach`).
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cladapt import ops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["dense", "varlen"]
IMPLEMENTATION = "cladapt_packed"
"""Name of our attention function in transformers: `sdpa`, but for the ends of documents in place of a mask."""
PLAIN = ("gemma", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose attention is softmax(scale Q K^T + mask) V and nothing more."""
WIDEST_HEAD = 256
_TOLERANCE = 2e-2  # between two bf16 computations of values of size 1


def packed_mask(lm: "PreTrainedModel", document: Tensor, position: Tensor) -> Tensor:
    """What `lm`'s backbone takes as attention_mask for rows `document` [R, S] (0 = padding) at their `position`s.

    The dense mask, or the ends of the documents, which the model's attention function is then made to understand.
    """
    kind, _ = packed_attention(document.device, compute_dtype(lm), lm.config)
    trees = branches(document, position)
    if kind == "dense" or trees:
        return block_mask(position, next(lm.parameters()).dtype, trees)
    if lm.config._attn_implementation != IMPLEMENTATION:
        register()
        lm.set_attn_implementation(IMPLEMENTATION)
    return document_ends(document)


def packed_attention(device: torch.device, dtype: torch.dtype, config: Any = None) -> tuple[Kind, str]:
    """Which attention packed rows take on this device in this dtype, and why; `config` is a model's, where known."""
    if device.type != "cuda":
        return "dense", f"variable-length attention needs a GPU, this is {device.type.upper()}"
    if ops.requested() == "reference":
        return "dense", "asked for"
    if dtype not in (torch.bfloat16, torch.float16):
        return "dense", f"variable-length attention takes half precision, not {str(dtype).removeprefix('torch.')}"
    head = 64
    if config is not None:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if config.model_type not in PLAIN:
            return "dense", f"the attention of {config.model_type} is not known to be plain"
        if config.attention_dropout:
            return "dense", "variable-length attention has no dropout"
        if head % 8 or head > WIDEST_HEAD:
            return "dense", f"variable-length attention takes no heads of width {head}"
    if obstacle := _obstacle(device, dtype, head):
        return "dense", obstacle
    return "varlen", "there is a GPU, and it gives what the dense mask gives"


def compute_dtype(lm: "PreTrainedModel") -> torch.dtype:
    """The dtype in which attention runs now: autocast's inside it, else the model's."""
    parameter = next(lm.parameters())
    if torch.is_autocast_enabled(parameter.device.type):
        return torch.get_autocast_dtype(parameter.device.type)
    return parameter.dtype


def branches(document: Tensor, position: Tensor) -> bool:
    """Whether a document of the rows, both [R, S], is a tree of shared prefixes."""
    same = document[:, 1:] == document[:, :-1]
    return bool((same & (document[:, 1:] > 0) & (position[:, 1:] <= position[:, :-1])).any())


def block_mask(position: Tensor, dtype: torch.dtype, trees: bool = True) -> Tensor:
    """Additive attention mask of packed rows from their positions [R, S], int64 -> [R, 1, S, S].

    Position is depth in a tree of prefixes that is laid out depth first, and 0 where a document begins and in padding:
    token i sees itself, and j < i where all of position[j + 1 : i + 1] are greater than position[j]. Others get the
    dtype's lowest value, not -inf, so that a padding row stays finite. Without `trees` no document has branches,
    and the mask takes half the time.
    """
    size = position.shape[1]
    index = torch.arange(size, device=position.device)
    if trees:
        later = (position[:, None, :] <= position[:, :, None]) & (index > index[:, None])  # [R, j, i]
        # the first token that is no deeper ends what sees j
        end = torch.where(later.any(-1), later.byte().argmax(-1), size)
        seen = (index[:, None] >= index) & (index[:, None] < end[:, None])
    else:
        number = (position == 0).cumsum(1)
        seen = (index[:, None] >= index) & (number[:, :, None] == number[:, None, :])
    mask = torch.zeros(seen.shape, dtype=dtype, device=position.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def document_ends(document: Tensor) -> Tensor:
    """Where documents begin and end in the rows laid one after another: document [R, S] -> int32 [1, 1, 1, n + 1].

    From 0 to R S, ascending; the padding of a row is a document too. Four dimensions, because transformers hands such
    masks to the attention function as they are.
    """
    first = torch.ones_like(document, dtype=torch.bool)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    return F.pad(starts, (0, 1), value=document.numel()).int()[None, None, None]


def register() -> None:
    """Make the attention function known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, but where `attention_mask` are the ends of documents: [R, heads, S, D] -> [R, S, heads, D].

    Key and value may have fewer heads than the query.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, _, size, _ = query.shape
    device = query.device.type
    # what norms of queries and keys have left in float32
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (t.transpose(1, 2).flatten(0, 1).to(dtype) for t in (query, key, value))
    found = variable_length(query, key, value, attention_mask.flatten(), size, kwargs.get("scaling"))
    return found.view(rows, size, *found.shape[1:]), None


def variable_length(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float | None
) -> Tensor:
    """Causal attention inside each of the documents ends[i] : ends[i + 1]: [tokens, heads, D] -> [tokens, heads, D]."""
    from torch.nn.attention.varlen import varlen_attn

    attention: Callable[..., Any] = varlen_attn
    return cast(
        Tensor,
        attention(query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=True),
    )


@functools.cache
def _obstacle(device: torch.device, dtype: torch.dtype, head: int) -> str:
    """Why variable-length attention cannot stand for the dense mask here, empty where it can: both are run once."""
    try:
        return _difference(device, dtype, head)
    except Exception as error:  # a build of torch without the kernel, or a GPU that it does not run on
        return f"variable-length attention fails: {' '.join(str(error).split())[:200] or type(error).__name__}"


def _difference(device: torch.device, dtype: torch.dtype, head: int) -> str:
    """How far apart both are on a small case, values and gradients; empty where rounding explains it."""
    document = torch.tensor([[1] * 37 + [2] * 50 + [0] * 9, [1] * 96], device=device)
    position = torch.tensor([[*range(37), *range(50), *range(9)], [*range(96)]], device=device)
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(2, heads, 96, head, generator=generator).to(device, dtype).requires_grad_()

    query, key, value = random(4), random(2), random(2)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        mask, ends = block_mask(position, dtype), document_ends(document)
        wide_key, wide_value = (t.repeat_interleave(2, dim=1) for t in (key, value))
        dense = F.scaled_dot_product_attention(query, wide_key, wide_value, attn_mask=mask).transpose(1, 2)
        found, _ = attend(nn.Identity(), query, key, value, ends)
        weights = torch.randn(dense.shape, generator=generator).to(device, dtype)
        outputs = [(out, *torch.autograd.grad((out * weights).sum(), (query, key, value))) for out in (found, dense)]
    for name, ours, theirs in zip(("values", "dQ", "dK", "dV"), *outputs, strict=True):
        error = (ours - theirs).float().abs().max() / theirs.float().abs().max()
        if not error <= _TOLERANCE:
            return f"variable-length attention differs from the dense mask by {error:.1e} in {name}"
    return ""
