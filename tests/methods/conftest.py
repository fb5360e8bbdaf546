"""What the tests of methods share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cladapt.config import AdapterConfig, MethodConfig
from cladapt.methods import Context, build
from cladapt.model.adapter import adapted_lm, adapter_parameters, adapter_tensors, create_adapter
from cladapt.model.anchors import is_up, joined
from cladapt.model.history import history_of
from cladapt.model.load import load_base, trie_softmax
from cladapt.model.observe import Outputs
from cladapt.model.packed import PackedLoss
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.trie import Trie
from cladapt.train.feeds import PackedFeed
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.sinks import MemorySink

OutputsAt = Callable[[Mapping[str, Tensor]], dict[str, Any]]
SIDS = SidTable(tuple(f"i{k}" for k in range(12)), np.array([[k // 3, k % 3] for k in range(12)]), (4, 3))


class Learner:
    """A base that adapts to blocks whose users go on by a step of the block's own."""

    def __init__(self, folder: Path, method: str, adapter: AdapterConfig, options: Mapping[str, Any]) -> None:
        self.base = load_base(folder)
        self.method = build(MethodConfig(name=method, options=options))
        self.model = create_adapter(self.base, adapter, 0, self.method.parameters)
        self.initial = {name: p.detach().clone() for name, p in adapter_parameters(self.model).items()}
        self.sink = MemorySink()

    def documents(self, block: int) -> list[Document]:
        tokens, bos = self.base.item_tokens().numpy(), self.base.bos()
        items = (np.random.default_rng(block).integers(12, size=(20, 1)) + block * np.arange(6)) % 12
        return [Document(np.r_[bos, tokens[row].ravel()], np.arange(13) > 2) for row in items]

    def fit(self, block: int, **settings: Any) -> Fit:
        documents = self.documents(block)
        return Fit(
            PackedLoss(adapted_lm(self.model), trie_softmax(self.base, Trie.build(SIDS.codes))),
            self.method,
            Context.of(self.model, block, self.initial),
            PackedFeed(documents[:16], documents[16:], 64, 32),
            FitSettings(**{"lr": 2e-2, "epochs": 3, "seed": 0, "weight_decay": 0.1, **settings}),
            self.sink,
        )

    def learn(self, *blocks: int) -> dict[str, Tensor]:
        """B A of all that was learned after some more blocks."""
        for block in blocks:
            self.fit(block).run()
        return self.products()

    def products(self) -> dict[str, Tensor]:
        """B A of all that was learned, histories included, in float64."""
        found = joined(history_of(self.model), adapter_tensors(self.model))
        return {
            name.split(".lora_A")[0]: found[name.replace("lora_A", "lora_B")].double() @ a.double()
            for name, a in found.items()
            if not is_up(name)
        }

    def protected(self) -> dict[str, Tensor]:
        """V of every module in float64, by the inputs of its layers."""
        known = self.method.subspaces.directions  # type: ignore[attr-defined]
        return {module: known[name].double() for module, name in self.fit(9).ctx.inputs().items() if name in known}


@pytest.fixture
def make_learner(folder: Path) -> Callable[..., Learner]:
    """Makes a learner: `make_learner(method, adapter, **options)`."""
    return lambda method, adapter, **options: Learner(folder, method, adapter, options)


@pytest.fixture
def outputs_at() -> OutputsAt:
    """Members of a context whose model is made up: its logits, four choices of three, and its two features of four
    numbers are linear in the values of its parameters."""

    def outputs(values: Mapping[str, Tensor]) -> Outputs:
        flat = torch.cat([value.flatten() for value in values.values()])
        maps = torch.randn(20, len(flat), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = maps.to(flat) @ flat
        features = found[12:].view(2, 4)
        return Outputs(features, features, torch.tensor([0, 1]), found[:12], torch.arange(12) // 3, 5)

    def members(values: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"outputs": lambda: outputs(values), "outputs_with": lambda others, batch: outputs(others)}

    return members
