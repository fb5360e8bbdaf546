"""What a block changes for inputs of earlier blocks, against dense products over every token in float64."""

import warnings
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cladapt.config import AdapterConfig, MethodConfig, RunConfig, SimulateConfig, TrainConfig, VitConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import ExampleWarning
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter, lora_layers
from cladapt.model.load import Base, load_base, new_model, save_base, trie_softmax
from cladapt.model.packed import PackedLoss
from cladapt.model.saved import adapter_provenance, load_adapter, read_adapter
from cladapt.model.vit import ClassLoss, VisionBase, new_vit
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import make_tokenizer
from cladapt.tokens.trie import Trie
from cladapt.train.blocks import adapter_folder
from cladapt.train.feeds import Batch, PackedFeed, evenly, shard
from cladapt.train.interference import EXAMPLES, INTERFERENCE, factors_of, interference, past_blocks
from cladapt.train.looking import Look
from cladapt.train.sinks import MemorySink
from cladapt.train.stream import learned_documents, make_form
from cladapt.workloads.recommend import Recommend

TRAIN = TrainConfig(epochs=1, batch_tokens=256, row_tokens=64, window=8, lr=1e-2, weight_decay=0.0)
ADAPTER = AdapterConfig(rank=2, alpha=6.0, targets=("q_proj", "v_proj", "down_proj", "lm_head"))
SCALE = 3.0


@cache
def stream() -> Stream:
    return simulate(SimulateConfig(users=40, items=40, blocks=4)).stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    number = np.arange(stream().n_items)
    sids = SidTable(tuple(stream().items["item"]), np.column_stack([number // 7, number % 7]), (6, 7))
    save_base(path, *new_model("tiny", sids, seed=0), sids, {"fitted_block": 1})
    return path


def learn(path: Path, folder: Path, name: str, sink: Any = None, **changes: Any) -> None:
    train = TRAIN.model_copy(update=changes)
    config = RunConfig(adapter=ADAPTER, train=train, method=MethodConfig(name=name))
    Recommend().learn(path, config, stream(), load_base(folder), sink or MemorySink(), "hash", lambda _: {"seed": 0})


def recorded(path: Path, block: int) -> Any:
    return adapter_provenance(adapter_folder(path, block)).get(INTERFERENCE)


def products(path: Path, folder: Path, block: int, scale: float) -> dict[str, Tensor]:
    """delta W of every module of a saved adapter, its history included."""
    factors = read_adapter(adapter_folder(path, block), load_base(folder))
    return {
        name.split(".lora_A")[0]: scale * factors[name.replace("lora_A", "lora_B")].double() @ a.double()
        for name, a in factors.items()
        if ".lora_A." in name
    }


def dense(change: Tensor, inputs: Tensor) -> dict[str, float]:
    """Both figures of one module, from delta W [out, in] and the inputs [N, in]."""
    moved = inputs @ change.mT
    size = change.norm() * inputs.norm()
    return {
        "change": float(moved.square().sum(1).mean().sqrt()),
        "alignment": float(moved.norm() / size) if size else 0.0,
    }


@torch.no_grad()
def past_inputs(path: Path, folder: Path, block: int) -> dict[str, Tensor]:
    """What goes into the layers of a block's model, one document of earlier blocks after the other."""
    base = load_base(folder)
    form = make_form("packed", base, TRAIN.window, TRAIN.row_tokens)
    documents = learned_documents(stream(), range(1, block), form, TRAIN)
    codes = base.sids.codes[stream().known(block - 1)]
    first = {c: len({b for a, b in codes.tolist() if a == c}) for c, _ in codes.tolist()}
    model = load_adapter(base, adapter_folder(path, block))
    found: dict[str, list[Tensor]] = {}
    handles = [
        layer.base_layer.register_forward_pre_hook(
            lambda _, given, name=name: found.setdefault(name, []).append(given[0][0].double())
        )
        for name, layer in lora_layers(model).items()
    ]
    ids = base.item_tokens().tolist()
    code_of = {
        token: int(code)
        for row, item in zip(ids, base.sids.codes, strict=True)
        for token, code in zip(row, item, strict=True)
    }
    for document in evenly(documents, min(1.0, EXAMPLES / len(documents))):
        model(torch.from_numpy(document.tokens)[None])
        # the head's inputs are before a marked token that has an alternative: a second code of more than one item
        marked = [
            at - 1
            for at in np.flatnonzero(document.loss)
            if (at - 1) % 2 == 0 or first[code_of[int(document.tokens[at - 1])]] > 1
        ]
        head = next(name for name in found if name.endswith("lm_head"))
        found[head][-1] = found[head][-1][marked]
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("name", ["finetune", "full", "olora", "inflora", "eblora", "cumulative", "lsat"])
def test_figures_are_those_of_dense_products_over_past_inputs(name: str, folder: Path, tmp_path: Path) -> None:
    learn(tmp_path, folder, name)
    scale = 1.0 if name == "full" else SCALE
    for block in (2, 3, 4):
        before = products(tmp_path, folder, block - 1, scale) if block > 2 else {}
        inputs = past_inputs(tmp_path, folder, block)
        found = recorded(tmp_path, block)
        after = products(tmp_path, folder, block, scale)
        assert found.keys() == after.keys() == inputs.keys()
        for module, figures in found.items():
            expected = dense(after[module] - before.get(module, 0.0), inputs[module])
            assert figures == pytest.approx(expected, rel=1e-3), (block, module)
            assert figures["alignment"] <= 1.0
            assert figures["change"] > 0.0 or name == "lsat"  # which may serve the long-term adapter alone


@pytest.mark.parametrize("name", ["finetune", "olora", "inflora", "sdlora"])
def test_a_run_that_was_interrupted_records_the_same(name: str, folder: Path, tmp_path: Path) -> None:
    learn(tmp_path, folder, name)
    whole = recorded(tmp_path, 4)
    adapter_folder(tmp_path, 4).rename(tmp_path / "old_4")
    learn(tmp_path, folder, name)
    assert recorded(tmp_path, 4) == whole


def test_a_block_that_learns_nothing_changes_nothing(folder: Path, tmp_path: Path) -> None:
    learn(tmp_path, folder, "finetune")
    for block in (3, 4):
        adapter_folder(tmp_path, block).rename(tmp_path / f"old_{block}")
    learn(tmp_path, folder, "finetune", block_lr_factor=1e-12)
    assert any(each["change"] > 0.0 for each in recorded(tmp_path, 2).values())
    for block in (3, 4):
        assert all(each == {"change": 0.0, "alignment": 0.0} for each in recorded(tmp_path, block).values())


def test_what_is_left_out_is_said_of_the_block_that_is_learned_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cladapt.train.stream.warn_left_out", lambda documents, of: warnings.warn(of, ExampleWarning, stacklevel=2)
    )
    with pytest.warns(UserWarning, match="^block ") as told:
        learn(tmp_path, folder, "finetune")
    assert [str(each.message) for each in told] == ["block 2", "block 3", "block 4"]
    assert recorded(tmp_path, 4)


def test_earlier_blocks_are_looked_at_evenly_and_the_first_has_none() -> None:
    assert list(past_blocks(1)) == []
    assert list(past_blocks(2)) == [1]
    assert list(past_blocks(9)) == [*range(1, 9)]
    many = list(past_blocks(41))
    assert len(many) == 8
    assert (many[0], many[-1]) == (1, 40)
    assert {b - a for a, b in pairwise(many)} <= {5, 6}


class Images:
    """Images of two classes."""

    unit, items, record, validation_targets = "images", None, {}, 0

    def __init__(self, count: int) -> None:
        self.pixels = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.pixels)

    def sample(self, share: float) -> list[Batch]:
        label, counted = torch.arange(len(self)) % 2, torch.arange(len(self)) != 3
        batches = [*zip(self.pixels.split(4), label.split(4), counted.split(4), strict=True)]
        return [*evenly(batches, share)]


def vision() -> tuple[Any, Any]:
    """An adapted vision transformer, and its loss."""
    base = VisionBase(new_vit(VitConfig(hidden=32, layers=1, patch=4), 8, 1, 4).requires_grad_(False), {"classes": ""})
    model = create_adapter(base, AdapterConfig(rank=2, alpha=6.0, targets=("q_proj", "v_proj", "fc2")), 0)
    return model, ClassLoss(adapted_lm(model), np.array([0, 1]))


def changed(model: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p += size * torch.randn(p.shape, generator=generator)


def look_at(model: nn.Module, loss: Any, feed: Any, own: Any = None, total: Any = None) -> Look:
    def same(given: Any) -> Any:
        return given

    return Look(loss, adapter_parameters(model), feed, own or same, total or same, torch.no_grad)


@pytest.mark.parametrize("size", [0.1, 1e-6])
def test_figures_of_images_leave_out_what_does_not_count_and_resolve_small_changes(size: float) -> None:
    model, loss = vision()
    changed(model, 0.1)
    before, old = factors_of(model), {n: p.detach().double() for n, p in adapter_parameters(model).items()}
    changed(model, size)
    found = interference(model, before, look_at(model, loss, Images(10)))
    seen: dict[str, list[Tensor]] = {}
    for name, layer in lora_layers(model).items():
        layer.base_layer.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0][0].double())
        )
    model.eval()
    with torch.no_grad():
        for i in (0, 1, 2, 4, 5, 6, 7, 8, 9):
            model(Images(10).pixels[i : i + 1])
    new = {n: p.detach().double() for n, p in adapter_parameters(model).items()}
    for module, figures in found.items():
        a, b = (f"{module}.lora_{factor}.default.weight" for factor in "AB")
        expected = dense(SCALE * (new[b] @ new[a] - old[b] @ old[a]), torch.cat(seen[module]))
        assert figures == pytest.approx(expected, rel=1e-4)
    assert found.keys() == seen.keys()


def test_processes_add_up_what_each_has_seen() -> None:
    model, loss = vision()
    before = factors_of(model)
    changed(model, 0.1)
    alone = interference(model, before, look_at(model, loss, Images(8)))
    sums: list[list[Tensor]] = []
    for rank in (0, 1):
        sums.append([])

        def record(tensor: Tensor) -> Tensor:
            sums[-1].append(tensor.clone())
            return tensor

        interference(model, before, look_at(model, loss, Images(8), lambda b, r=rank: shard(b, r, 2), record))
    both: Iterator[Tensor] = iter([a + b for a, b in zip(*sums, strict=True)])
    found = interference(model, before, look_at(model, loss, Images(8), lambda b: shard(b, 0, 2), lambda _: next(both)))
    for module, figures in alone.items():
        assert found[module] == pytest.approx(figures, rel=1e-6)


def test_without_a_past_example_there_is_no_figure() -> None:
    model, loss = vision()
    assert interference(model, factors_of(model), look_at(model, loss, Images(0))) == {}


def test_looking_leaves_no_trace(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that looks and one that does not are the same to the last bit."""
    learn(tmp_path / "a", folder, "olora")
    monkeypatch.setattr("cladapt.train.blocks.past_blocks", lambda block: [])
    learn(tmp_path / "b", folder, "olora")
    assert recorded(tmp_path / "b", 4) is None
    one, other = (read_adapter(adapter_folder(tmp_path / name, 4), load_base(folder)) for name in "ab")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_large_vocabulary_costs_no_logits(measured: Any) -> None:
    vocabulary = 30_000
    codes = np.array([[k // 3, k % 3] for k in range(12)])
    sids = SidTable(tuple(f"i{k}" for k in range(12)), codes, (4, 3))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    base = Base(LlamaForCausalLM(config).requires_grad_(False), make_tokenizer(sids), sids, {})
    model = create_adapter(base, AdapterConfig(rank=2, targets=("q_proj", "lm_head")), 0)
    before = factors_of(model)
    changed(model, 0.1)
    tokens = base.item_tokens().numpy()
    items = np.random.default_rng(0).integers(12, size=(64, 6))
    documents = [Document(np.r_[base.bos(), tokens[row].ravel()], np.arange(13) > 0) for row in items]
    loss = PackedLoss(adapted_lm(model), trie_softmax(base, Trie.build(codes)))
    look = look_at(model, loss, PackedFeed(documents, [], 13 * 64, 13))
    look.inputs()
    with measured() as peak:
        found = interference(model, before, look)
    assert set(found) == set(lora_layers(model))
    targets = 64 * 12
    assert peak.bytes < 4 * targets * vocabulary / 4
