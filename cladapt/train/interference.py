"""How much a block's update answers to what earlier blocks put into a layer: the condition delta W X_past = 0.

    change     sqrt(mean_x ||delta W x||^2)                        what an earlier block's layer output moves by
    alignment  ||delta W X||_F / (||delta W||_F ||X||_F)           0 for an update that no earlier input meets, to 1

for each adapted module. delta W is what the block changed, histories included, X = [x] the inputs that the model after
the block has on examples of earlier blocks: of `BLOCKS` of them at most, about `EXAMPLES` in all. The mean of
||delta W X_past||_F over layers is the diagnostic of Janus-LoRA (arXiv 2605.28495); here by token.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cladapt.model.adapter import NAME, adapter_tensors, lora_layers, scale_of
from cladapt.model.anchors import joined
from cladapt.model.history import history_of
from cladapt.train.feeds import evenly
from cladapt.train.looking import Look

if TYPE_CHECKING:
    from peft import PeftModel

BLOCKS, EXAMPLES = 8, 256
FIGURES = ("change", "alignment")
INTERFERENCE = "interference"
"""In the `cladapt.json` of an adapter: both figures by module; none where there is no earlier block."""


def past_blocks(block: int) -> Sequence[int]:
    """The earlier blocks whose examples are looked at, evenly spaced."""
    before = range(1, block)
    return evenly(before, min(1.0, BLOCKS / len(before))) if before else []


def factors_of(model: "PeftModel") -> dict[str, Tensor]:
    """A and B of all that the adapter and its history add to the base."""
    own = adapter_tensors(model)
    return joined(history_of(model), own)


@torch.no_grad()
def interference(model: "PeftModel", before: Mapping[str, Tensor], look: Look) -> dict[str, dict[str, float]]:
    """Both figures by module, of what the model adds to its base beyond the factors `before`, on past examples.

    Names and shapes of `before` are those of `factors_of`; its ranks may differ. Nothing where there is no example.
    """
    if not look.examples:
        return {}
    scale, after = scale_of(model), factors_of(model)
    layers: dict[str, Any] = lora_layers(model)
    changed: dict[str, tuple[Tensor, Tensor]] = {}  # A [R, in] and B^T B of delta W = B A, without making B A
    for name, layer in layers.items():
        down, up = (f"{name}.{factor}.{NAME}.weight" for factor in ("lora_A", "lora_B"))
        device = layer.get_base_layer().weight.device
        # zeros behind the smaller rank, and factors subtracted: products that are nearly equal would leave rounding
        a, a_before = pad_sequence([f[down].to(device) for f in (after, before)], batch_first=True).double()
        b, b_before = pad_sequence([f[up].to(device).mT for f in (after, before)], batch_first=True).double().mT
        a, b = torch.cat([a, a - a_before]), torch.cat([b - b_before, b_before], 1)
        changed[name] = a, scale**2 * (b.mT @ b)
    sums = {name: torch.zeros(3, dtype=torch.float64, device=a.device) for name, (a, _) in changed.items()}
    of_input: dict[str, list[str]] = {}
    for module, name in look.inputs().items():
        of_input.setdefault(name, []).append(module)

    def see(name: str, rows: Tensor) -> None:
        x = rows.double()
        sizes = x.square().sum(1)
        for module in of_input[name]:
            a, gram = changed[module]
            y = x @ a.mT
            moved = ((y @ gram) * y).sum().clamp_min(0.0)
            sums[module] += torch.stack([moved, sizes.sum(), (sizes > 0).sum().double()])  # rows of padding are zero

    for _ in look.over(min(1.0, EXAMPLES / look.examples), see):
        pass
    found = {}
    for name, (a, gram) in changed.items():
        moved, sizes, count = look.total(sums[name]).tolist()
        norm = ((a @ a.mT) * gram).sum().clamp_min(0.0).item()
        if count:
            found[name] = {
                "change": (moved / count) ** 0.5,
                "alignment": (moved / (norm * sizes)) ** 0.5 if norm * sizes else 0.0,
            }
    return found
