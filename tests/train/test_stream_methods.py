"""The protocol's baselines over a stream: each against what its definition says, computed another way."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cladapt.config import AdapterConfig, MethodConfig, RunConfig, SimulateConfig, TrainConfig
from cladapt.data.histories import split_block
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError
from cladapt.methods import Context, build
from cladapt.model.adapter import adapted_lm, adapter_tensors, create_adapter
from cladapt.model.load import Base, load_base, new_model, save_base
from cladapt.model.packed import PackedLoss
from cladapt.model.saved import adapter_provenance, load_adapter, read_adapter, read_own_factors
from cladapt.tokens.sids import SidTable
from cladapt.train.blocks import adapter_folder, fit_settings
from cladapt.train.feeds import PackedFeed
from cladapt.train.loop import Fit
from cladapt.train.sinks import MemorySink
from cladapt.train.stream import catalogue_softmax, make_form, training_documents, validation_documents
from cladapt.workloads.recommend import Recommend

TRAIN = TrainConfig(epochs=2, batch_tokens=256, row_tokens=64, window=8, lr=5e-3, weight_decay=0.0)
ADAPTER = AdapterConfig(rank=2, alpha=6.0, targets=("q_proj", "down_proj", "lm_head"))
SCALE = 3.0
PROBE = torch.tensor([[1, 4, 9, 5, 8, 6, 10, 7, 8]])


@cache
def stream() -> Stream:
    return simulate(SimulateConfig(users=60, items=40, blocks=4)).stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    number = np.arange(stream().n_items)
    sids = SidTable(tuple(stream().items["item"]), np.column_stack([number // 7, number % 7]), (6, 7))
    save_base(path, *new_model("tiny", sids, seed=0), sids, {"fitted_block": 1})
    return path


def config_of(name: str, **options: Any) -> RunConfig:
    return RunConfig(adapter=ADAPTER, train=TRAIN, method=MethodConfig(name=name, options=options))


def learn(path: Path, folder: Path, config: RunConfig, sink: MemorySink | None = None) -> Any:
    base, said = load_base(folder), {"seed": 0}
    return Recommend().learn(path, config, stream(), base, sink or MemorySink(), "hash", lambda _: said)


@torch.no_grad()
def logits_of(path: Path, folder: Path, block: int) -> Tensor:
    return load_adapter(load_base(folder), adapter_folder(path, block))(PROBE).logits


def products(factors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A, B)."""
    modules = {name.split(".lora_")[0]: None for name in factors}
    return {m: tuple(factors[f"{m}.lora_{f}.default.weight"] for f in "AB") for m in modules}  # type: ignore[misc]


@pytest.mark.parametrize("inherit", [True, False])
@pytest.mark.parametrize("keep", ["all", "latest"])
def test_sum_lora_is_the_sum_of_normalised_earlier_products_and_its_own(
    keep: str, inherit: bool, folder: Path, tmp_path: Path
) -> None:
    learn(tmp_path, folder, config_of("cumulative", keep=keep, inherit=inherit))
    own = {b: products(read_own_factors(adapter_folder(tmp_path, b), load_base(folder))) for b in (2, 3, 4)}
    for block in (2, 3, 4):
        earlier = [b for b in range(2, block) if keep == "all" or b == block - 1]
        base = load_base(folder)
        for module, (a, b) in own[block].items():
            linear = base.model.get_submodule(module.removeprefix("base_model.model."))
            assert isinstance(linear, nn.Linear)
            delta = b.double() @ a.double()
            for past in earlier:
                a_past, b_past = (t.double() for t in own[past][module])
                delta += (b_past / b_past.norm()) @ (a_past / a_past.norm())
            with torch.no_grad():
                linear.weight.copy_(linear.weight.double() + SCALE * delta)
        with torch.no_grad():
            torch.testing.assert_close(logits_of(tmp_path, folder, block), base.model(PROBE).logits)
        record = adapter_provenance(adapter_folder(tmp_path, block))
        assert record.get("history_rank", 0) == 2 * len(earlier)


def test_inheriting_starts_where_the_block_before_ended(folder: Path, tmp_path: Path) -> None:
    """At a learning rate that moves nothing, the factors stay what they started from."""
    still = TRAIN.model_copy(update={"block_lr_factor": 1e-12})
    for inherit in (True, False):
        path = tmp_path / str(inherit)
        config = config_of("cumulative", inherit=inherit)
        learn(path, folder, config)
        for block in (3, 4):
            for name in ("adapters", "method"):
                for old in (path / name).glob(f"block_{block:03d}*"):
                    old.rename(path / f"{old.name}.old")
        learn(path, folder, config.model_copy(update={"train": still}))
        base = load_base(folder)
        second, third = (read_own_factors(adapter_folder(path, b), base) for b in (2, 3))
        fresh = adapter_tensors(create_adapter(base, ADAPTER, 0))
        expected = second if inherit else fresh
        for name, tensor in third.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["cumulative", "retrain", "full", "interpolate", "svdeq", "ewc", "replay"])
def test_finished_blocks_of_an_interrupted_run_are_taken_as_they_are(name: str, folder: Path, tmp_path: Path) -> None:
    learn(tmp_path, folder, config_of(name))
    base = load_base(folder)
    whole = {b: read_adapter(adapter_folder(tmp_path, b), base) for b in (3, 4)}
    for block in (3, 4):
        adapter_folder(tmp_path, block).rename(tmp_path / f"old_{block}")
    learn(tmp_path, folder, config_of(name))
    for block, tensors in whole.items():
        again = read_adapter(adapter_folder(tmp_path, block), base)
        assert tensors.keys() == again.keys()
        assert all(torch.equal(tensors[n], again[n]) for n in tensors), block


def fit_of(base: Base, method: str, documents: list[Any], block: int, context: dict[str, Any]) -> tuple[Any, Fit]:
    built = build(MethodConfig(name=method))
    model = create_adapter(base, ADAPTER, 0, built.parameters)
    form = make_form("packed", base, TRAIN.window, TRAIN.row_tokens)
    fit = Fit(
        PackedLoss(adapted_lm(model), catalogue_softmax(base, stream(), block, "trie")),
        built,
        replace(Context.of(model, block, {}), **context),
        PackedFeed(
            documents, validation_documents(split_block(stream(), block), form), TRAIN.batch_tokens, TRAIN.row_tokens
        ),
        fit_settings(TRAIN, 0, block),
        MemorySink(),
    )
    return model, fit


def test_retraining_is_a_fresh_adapter_on_the_data_of_all_blocks(folder: Path, tmp_path: Path) -> None:
    learn(tmp_path, folder, config_of("retrain"))
    base = load_base(folder)
    form = make_form("packed", base, TRAIN.window, TRAIN.row_tokens)
    documents = [d for b in (1, 2, 3) for d in training_documents(split_block(stream(), b), form)]
    model, fit = fit_of(base, "finetune", documents, 3, {})
    fit.run()
    kept = read_adapter(adapter_folder(tmp_path, 3), load_base(folder))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter_tensors(model).items())


def test_full_fine_tuning_moves_the_weights_as_adamw_on_them_does(folder: Path) -> None:
    base, twin = load_base(folder), load_base(folder)
    form = make_form("packed", base, TRAIN.window, TRAIN.row_tokens)
    documents = training_documents(split_block(stream(), 2), form)
    model, fit = fit_of(base, "full", documents, 2, {})
    fit.method.begin_block(fit.ctx)
    modules = {n.split(".lora_")[0].removeprefix("base_model.model.") for n in fit.ctx.parameters}
    weights = [twin.model.get_submodule(module).weight for module in sorted(modules)]
    for weight in weights:
        weight.requires_grad_(True)
    loss_of = PackedLoss(twin.model, catalogue_softmax(twin, stream(), 2, "trie"))
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    steps = fit.steps(0)
    for index, micro_batches in enumerate(steps):
        fit.step(micro_batches, (index + 0.5) / len(steps))
        optimizer.zero_grad()
        targets = sum(int(batch[3][:, 1:].sum()) for batch in micro_batches)
        for batch in micro_batches:
            (loss_of(*batch).sum() / targets).backward()
        torch.nn.utils.clip_grad_norm_(weights, TRAIN.clip)
        for group in optimizer.param_groups:
            group["lr"] = fit.optimizer.param_groups[0]["lr"]
        optimizer.step()
    model.eval()
    with torch.no_grad():
        plain, expected = load_base(folder).model(PROBE).logits, twin.model(PROBE).logits
        torch.testing.assert_close(model(PROBE).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1


def test_full_fine_tuning_leaves_an_ordinary_adapter(folder: Path, tmp_path: Path) -> None:
    learn(tmp_path, folder, config_of("full"))
    for module, (a, b) in products(read_adapter(adapter_folder(tmp_path, 4), load_base(folder))).items():
        identity, delta = (a, b) if a.shape[0] == a.shape[1] else (b, a)
        assert torch.equal(identity, torch.eye(len(identity))), module
        assert min(a.shape) == min(a.shape[1], b.shape[0])
        assert torch.linalg.matrix_rank(delta) > 2


def test_interpolation_halves_the_way_and_scores_what_it_keeps(folder: Path, tmp_path: Path) -> None:
    results = learn(tmp_path / "half", folder, config_of("interpolate", weight=0.5))
    learn(tmp_path / "whole", folder, config_of("interpolate", weight=1.0))
    learn(tmp_path / "tuned", folder, config_of("finetune"))
    base = load_base(folder)
    fresh = adapter_tensors(create_adapter(base, ADAPTER, 0))
    base = load_base(folder)
    half, whole, tuned = (read_adapter(adapter_folder(tmp_path / name, 2), base) for name in ("half", "whole", "tuned"))
    for name, tensor in tuned.items():
        assert torch.equal(whole[name], tensor)
        torch.testing.assert_close(half[name], (fresh[name] + tensor) / 2)
    form = make_form("packed", base, TRAIN.window, TRAIN.row_tokens)
    lm = adapted_lm(load_adapter(base, adapter_folder(tmp_path / "half", 2)))
    loss_of = PackedLoss(lm, catalogue_softmax(base, stream(), 2, "trie"))
    documents = validation_documents(split_block(stream(), 2), form)
    with torch.no_grad():
        total = sum(
            -loss_of(
                *(
                    torch.from_numpy(x)[None]
                    for x in (d.tokens, np.ones(len(d.tokens), int), np.arange(len(d.tokens)), d.loss)
                )
            )
            .sum()
            .item()
            for d in documents
        )
    assert results[2].score == pytest.approx(total / len(documents), rel=1e-5)


def test_frozen_factors_need_one_rank_for_all_modules(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="modules differ in rank"):
        learn(tmp_path, folder, config_of("full+cumulative"))
