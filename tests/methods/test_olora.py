"""O-LoRA: its penalty against plain arithmetic, and what a block begins with."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cladapt.config import MethodConfig
from cladapt.errors import ConfigError
from cladapt.methods import Context, build
from cladapt.methods.olora import Olora, OloraConfig

SHAPES = {"m.q.lora_A.default.weight": (2, 5), "m.q.lora_B.default.weight": (4, 2)}


def make(seed: int, zero_up: bool = False) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    if zero_up:
        found["m.q.lora_B.default.weight"].zero_()
    return {name: nn.Parameter(tensor) for name, tensor in found.items()}


def begin(method: Olora, block: int, parameters: dict[str, nn.Parameter]) -> tuple[Context, list[dict[str, Tensor]]]:
    histories: list[dict[str, Tensor]] = []
    initial = {name: p.detach().clone() for name, p in make(99, zero_up=True).items()}
    ctx = Context(
        parameters,
        block=block,
        initial=initial,
        set_history=lambda t: histories.append(dict(t)),
        factors=lambda: {name: p.detach().clone() for name, p in parameters.items()},
    )
    method.begin_block(ctx)
    return ctx, histories


def test_the_term_is_the_overlap_with_all_earlier_blocks_and_the_norms() -> None:
    method = Olora(OloraConfig(orthogonality=0.3, decay=0.7))
    parameters = make(0)
    earlier = [{name: p.detach().clone() for name, p in make(seed).items()} for seed in (0, 1)]
    for block, values in enumerate(earlier, 2):
        for name, p in parameters.items():
            p.data.copy_(values[name])
        ctx, histories = begin(method, block + 1, parameters)
    assert histories[-1]["m.q.lora_A.default.weight"].shape == (4, 5)
    assert histories[-1]["m.q.lora_B.default.weight"].shape == (4, 4)
    for name, p in parameters.items():
        assert torch.equal(p, ctx.initial[name])  # a block begins afresh
    (found,) = method.loss_terms(ctx, None, torch.zeros((), dtype=torch.float64)).values()
    a, b = (parameters[name].detach().numpy() for name in SHAPES)
    overlap = sum(np.abs(e["m.q.lora_A.default.weight"].numpy() @ a.T).sum() for e in earlier)
    assert found.item() == pytest.approx(0.3 * overlap + 0.7 * (np.linalg.norm(a) + np.linalg.norm(b)))


def test_the_first_block_has_no_overlap_and_no_history() -> None:
    method = Olora()
    ctx, histories = begin(method, 1, make(0, zero_up=True))
    assert histories == [{}]
    (term,) = method.loss_terms(ctx, None, torch.ones(())).values()
    assert term.item() == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("olora+cumulative", "olora and cumulative would each keep the earlier blocks"),
        ("eblora+olora", "eblora and olora would each keep the earlier blocks"),
        ("full+eblora", "different things would learn: full weights, eblora directions"),
    ],
)
def test_methods_that_cannot_share_an_adapter_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(MethodConfig(name=name))
