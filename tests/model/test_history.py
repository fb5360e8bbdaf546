"""A history on a bfloat16 base: every block learns through the fused op, as near to float64 as bfloat16 allows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cladapt.config import AdapterConfig, MethodConfig
from cladapt.methods import Context, build
from cladapt.model import lora_layer
from cladapt.model.adapter import adapted_lm, adapter_parameters, adapter_tensors, create_adapter, lora_layers
from cladapt.model.history import history_of
from cladapt.model.load import load_base, trie_softmax
from cladapt.model.packed import PackedLoss
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import PackedFeed
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.sinks import MemorySink

SIDS = SidTable(tuple(f"i{k}" for k in range(12)), np.array([[k // 3, k % 3] for k in range(12)]), (4, 3))
ADAPTER = AdapterConfig(rank=4, alpha=8.0, dropout=0.1, targets=("q_proj", "down_proj"))


class Calls:
    """Counts forward passes with gradients of adapters alone: by the op, and by PEFT."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fused = self.stock = 0
        op, layer = lora_layer.ops.lora_linear, lora_layer.LoraLinear.forward

        def counted(*given: Any) -> Tensor:
            self.fused += 1
            return op(*given)

        def watched(own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            trains_itself = own.get_base_layer().weight.requires_grad  # as mean gradients have it
            self.stock += bool(own.stock_reason(x)) and not trains_itself
            return layer(own, x, *args, **kwargs)

        monkeypatch.setattr(lora_layer.ops, "lora_linear", counted)
        monkeypatch.setattr(lora_layer.LoraLinear, "forward", watched)


class Learner:
    """A bfloat16 base that one method adapts block after block."""

    def __init__(self, folder: Path, method: str) -> None:
        self.base = load_base(folder)
        self.base.model.to(torch.bfloat16)
        self.method = build(MethodConfig(name=method))
        self.model = create_adapter(self.base, ADAPTER, 0, self.method.parameters)
        self.initial = {name: p.detach().clone() for name, p in adapter_parameters(self.model).items()}

    def learn(self, block: int) -> None:
        tokens, bos = self.base.item_tokens().numpy(), self.base.bos()
        items = (np.random.default_rng(block).integers(12, size=(12, 1)) + block * np.arange(4)) % 12
        documents = [Document(np.r_[bos, tokens[row].ravel()], np.arange(9) > 2) for row in items]
        Fit(
            PackedLoss(adapted_lm(self.model), trie_softmax(self.base, Trie.build(SIDS.codes))),
            self.method,
            Context.of(self.model, block, self.initial),
            PackedFeed(documents[:8], documents[8:], 64, 32),
            FitSettings(lr=2e-2, epochs=2, seed=0, precision="bf16"),
            MemorySink(),
        ).run()


def exact(layer: Any, x: Tensor, factors: Mapping[str, Tensor], history: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of a layer in evaluation, in float64, of the loss sum(output weights)."""
    weight = layer.get_base_layer().weight.double()
    a, b = (factors[name].double().requires_grad_() for name in ("a", "b"))
    x = x.double().requires_grad_()
    y = x @ (weight + 2.0 * (history["b"].double() @ history["a"].double() + b @ a)).T
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    dx, da, db = torch.autograd.grad((y * weights).sum(), (x, a, b))
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


@pytest.mark.parametrize("method", ["eblora", "olora", "cumulative", "sdlora"])
def test_every_block_learns_through_the_op_and_values_are_those_of_float64(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cladapt.ops.uses_kernel", lambda op, *_: op == "lora_linear")
    calls, learner = Calls(monkeypatch), Learner(folder, method)
    per_block = []
    for block in (1, 2, 3):
        before = calls.fused
        learner.learn(block)
        per_block.append(calls.fused - before)
    assert calls.stock == 0
    assert min(per_block) == per_block[0] > 0  # earlier ones are measured before they have learned anything
    history, own = history_of(learner.model), adapter_tensors(learner.model)
    assert {len(t) for name, t in history.items() if ".lora_A." in name} == {8}
    learner.model.eval()
    for name, layer in lora_layers(learner.model).items():
        named = {side: f"{name}.lora_{side.upper()}.default.weight" for side in ("a", "b")}
        factors, frozen = ({side: tensors[n] for side, n in named.items()} for tensors in (own, history))
        x = torch.randn(40, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        truth = exact(layer, x, factors, frozen)
        given = x.clone().requires_grad_()
        y = layer(given)
        assert y.dtype == torch.bfloat16
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        a = layer.lora_A["default"].weight
        taken = torch.autograd.grad((y * weights.bfloat16()).sum(), (given, a))
        for kind, tensor in zip(("y", "dx", "da"), (y, *taken), strict=True):
            worst = (tensor.double() - truth[kind]).abs().max() / truth[kind].abs().max()
            assert worst < 2**-6, (name, kind)  # a few roundings of 2^-9, of sums and of the loss's weights
