"""How much memory a fit takes, known before it begins: one micro-batch is traced forward and backward without data.

PyTorch's fake tensors have shapes, dtypes and a device, and neither values nor memory: what is traced is the model's
own code, adapters, dropout, autocast and checkpoints included, so the count follows every architecture and option.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cladapt import ops
from cladapt.model.attention import block_mask, branches, compute_dtype, packed_attention
from cladapt.model.checkpointing import set_checkpointing
from cladapt.model.head import cross_entropy, head_logits
from cladapt.model.packed import PackedLoss
from cladapt.train.feeds import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operations make inside it: `now`, and `peak`, the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def given(self, tensors: Sequence[Tensor]) -> None:
        """Tensors that were there before, and are not counted."""
        self._seen |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class MicroBatch:
    """The size of a micro-batch: R rows of S tokens, of which `targets` are scored among `columns` of the vocabulary.

    `children`: entries of the lists that the targets' codes are chosen from; None for the whole vocabulary.
    `branches`: documents of it are trees of shared prefixes, which take the dense mask on every device.
    """

    rows: int
    length: int
    targets: int
    columns: int = 0
    children: int | None = None
    branches: bool = False

    @classmethod
    def of(cls, loss: PackedLoss, batch: Batch) -> "MicroBatch":
        """That of (tokens, document, position, marks), all [R, S], for this loss."""
        device = next(loss.parameters()).device
        tokens, marked = batch[0].to(device), batch[-1].to(device).clone()
        marked[:, 0] = False
        softmax, (rows, length) = loss.softmax, tokens.shape
        trees = branches(*batch[1:3])
        if softmax is None:
            return cls(rows, length, int(marked.sum()), branches=trees)
        node = softmax.nodes(tokens)
        degree = torch.where(node < 0, 0, softmax.degree[node.clamp_min(0)])
        chosen = degree[marked & (degree > 1)]
        return cls(rows, length, len(chosen), len(softmax.rows), int(chosen.sum()), trees)


def activation_bytes(
    lm: "PreTrainedModel",
    batch: MicroBatch,
    precision: ops.Precision,
    checkpointing: bool,
    weights: Sequence[Tensor] = (),
) -> int:
    """Peak bytes beside the model of one micro-batch's forward and backward pass, gradients included.

    `weights`: frozen parameters whose gradients are taken instead of the adapter's, as a method does before it starts;
    dropout is off then, and so is checkpointing.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    learning = [p for p in lm.parameters() if p.requires_grad]
    training, grads = lm.training, [p.grad for p in learning]
    device = next(lm.parameters()).device
    allocations = Allocations()
    lm.train(not weights)
    set_checkpointing(lm, checkpointing)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast:  # what it tries out on the device is no part of the trace
        dense = batch.branches or packed_attention(device, compute_dtype(lm), lm.config)[0] == "dense"
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.random.fork_rng(devices=[]), allocations:
            model = [mode.from_tensor(tensor) for tensor in (*lm.parameters(), *lm.buffers())]
            allocations.given(model)
            with autocast:
                loss = _loss(lm, batch, device, dense)
            found = torch.autograd.grad(loss, [*weights]) if weights else loss.backward()
            del found, loss
    finally:
        for weight in weights:
            weight.requires_grad_(False)
        for parameter, grad in zip(learning, grads, strict=True):
            parameter.grad = grad
        lm.train(training)
    return allocations.peak


def weight_bytes(model: nn.Module, shares: int = 1) -> int:
    """Bytes of a model's weights and buffers on one device.

    `shares`: processes over which its layers are cut; a device then has two layers whole beside its shares.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    total = sum(map(_bytes, tensors.values()))
    if shares == 1:
        return total
    layers = [sum(map(_bytes, layer.parameters())) for layer in cast(Any, model).base_model.layers]
    return total - sum(layers) + sum(layers) // shares + 2 * max(layers)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _loss(lm: "PreTrainedModel", batch: MicroBatch, device: torch.device, dense: bool) -> Tensor:
    """The mean loss of `batch`, by the operations of `PackedLoss` on positions that are known beforehand."""
    ones = torch.ones(batch.rows, batch.length, dtype=torch.int64, device=device)
    # without a mask attention is causal, which keeps what attention of variable length does
    mask = block_mask(ones, next(lm.parameters()).dtype, batch.branches) if dense else None
    backbone = getattr(lm, lm.base_model_prefix)
    hidden = backbone(input_ids=ones, attention_mask=mask, position_ids=ones, use_cache=False).last_hidden_state
    before = hidden[:, :-1].flatten(0, 1)[torch.zeros(batch.targets, dtype=torch.int64, device=device)]
    head = cast(nn.Module, lm.get_output_embeddings())
    target = torch.zeros(batch.targets, dtype=torch.int64, device=device)
    if batch.children is None:
        return cross_entropy(head, before, target).mean()
    rows = torch.zeros(batch.columns, dtype=torch.int64, device=device)
    logits = head_logits(head, before, rows)
    row, code, _ = (torch.zeros(batch.children, dtype=torch.int64, device=device) for _ in range(3))
    children = logits.flatten().gather(0, row * batch.columns + target[row] + code).float()
    highest = children.new_full((batch.targets,), -torch.inf).scatter_reduce(0, row, children.detach(), "amax")
    total = torch.zeros_like(highest).index_add(0, row, (children - highest[row]).exp())
    return (total.log() + highest - logits.gather(1, target[:, None])[:, 0].float()).mean()
