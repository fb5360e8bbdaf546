"""Both passes of item-wise SAM in one LoRA layer: all items at once, a loop over them, and twice a plain step.

All providers have the same inputs, runs of one item each and of equal length, and factors in float32. The model of
bytes counts passes over X and Y beyond those of the four frozen products, and float32 gradients by item: written once,
read by the sum over the items and twice by the second pass.
"""

from functools import partial

import torch
from torch import Tensor

from cladapt_kernels.lora import ItemFactors, Runs, item_linear, lora_linear
from cladapt_kernels.timing import Entry, Providers, Work
from registry.lora import PASSES, SCALE, Layer, Size, layer

TESTS = ("tests/kernels/test_by_item.py", "tests/kernels/test_items.py")
RADIUS = 0.5
PLAIN, LOOP = "lora_linear, two steps", "a loop over the items"
TORCH, OURS = "batched, items by torch", "batched, as dispatched"
Gradients = tuple[Tensor, ...]


class _Short(Runs):
    """Runs that no kernel by item takes."""

    are_long = False


def _kappa(squares: Tensor) -> Tensor:
    return (RADIUS * squares.rsqrt()).float()


def _plain(own: Layer) -> Gradients:
    own.backward(lora_linear(own.x, own.weight, None, own.a, own.b, SCALE))
    return own.backward(lora_linear(own.x, own.weight, None, own.a, own.b, SCALE))


def _batched(own: Layer, runs: Runs) -> Gradients:
    kept = ItemFactors(runs)
    own.backward(item_linear(own.x, own.weight, None, own.a, own.b, SCALE, kept))
    kept.kappa = _kappa(kept.squares())
    return own.backward(item_linear(own.x, own.weight, None, own.a, own.b, SCALE, kept))


def _loop(parts: list[Layer]) -> Gradients:
    """Each item with factors of its own in the second pass; their sum in the dtype of the factors."""
    found = []
    for part in parts:
        _, da, db = part.backward(lora_linear(part.x, part.weight, None, part.a, part.b, SCALE))
        kappa = _kappa(da.square().sum() + db.square().sum())
        a, b = ((t.detach() + kappa * step).requires_grad_() for t, step in ((part.a, da), (part.b, db)))
        found.append(part._replace(a=a, b=b).backward(lora_linear(part.x, part.weight, None, a, b, SCALE)))
    inputs, downs, ups = zip(*found, strict=True)
    return torch.cat(inputs), torch.stack(downs).sum(0), torch.stack(ups).sum(0)


def _passes(size: Size, items: int, device: torch.device) -> Providers:
    own = layer(size, device, torch.float32)
    item = torch.arange(items, device=device).repeat_interleave(size.m // items)
    runs, short = Runs.of(item, items), _Short.of(item, items)
    parts = [
        own._replace(x=x.detach().requires_grad_(), dy=dy)
        for x, dy in zip(own.x.chunk(items), own.dy.chunk(items), strict=True)
    ]
    return {
        PLAIN: partial(_plain, own),
        LOOP: partial(_loop, parts),
        TORCH: partial(_batched, own, short),
        OURS: partial(_batched, own, runs),
    }


def _entry(size: Size, items: int, gpu_only: bool = True) -> Entry:
    frozen, buffer = 8 * size.m * size.k * size.n, 4 * items * size.r * (size.k + size.n)
    over_x, over_y = PASSES["seeded, skinny"]
    plain = size.passes(2 * over_x, 2 * over_y)
    work = {PLAIN: Work(frozen, plain), OURS: Work(frozen, plain + 4 * buffer)}
    make = partial(_passes, size, items)
    return Entry("item_sam", f"{items} items, {size}", TESTS, make, Work(frozen), work, gpu_only)


ENTRIES = (
    _entry(Size(8192, 1024, 1024, 16), 32),
    _entry(Size(8192, 2048, 2048, 16), 32),
    _entry(Size(8192, 4096, 4096, 16), 32),
    _entry(Size(4096, 2048, 2048, 16), 32),
)
ON_CPU = _entry(Size(512, 256, 256, 8), 8, gpu_only=False)
