"""A run over a stream: what each block learns from, where it starts, and that an interruption changes nothing."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cladapt.artifacts import read_tensors
from cladapt.config import AdapterConfig, MethodConfig, RunConfig, SimulateConfig, TrainConfig
from cladapt.data.histories import split_block
from cladapt.data.schema import INTERACTIONS, Stream
from cladapt.data.simulate import simulate
from cladapt.errors import DataError
from cladapt.methods import Context, Method
from cladapt.model.adapter import adapted_lm
from cladapt.model.load import Base, load_base, new_model, save_base, weights_hash
from cladapt.model.packed import PackedLoss
from cladapt.model.saved import adapter_provenance, load_adapter, read_adapter
from cladapt.tokens.prompts import PackedForm
from cladapt.tokens.sids import SidTable
from cladapt.train.blocks import adapter_folder, fit_settings
from cladapt.train.loop import FitResult
from cladapt.train.sinks import MemorySink, Sink
from cladapt.train.stream import (
    catalogue_softmax,
    held_out_documents,
    learned_documents,
    make_form,
    training_documents,
    validation_documents,
)
from cladapt.workloads.recommend import Recommend

TRAIN = TrainConfig(epochs=2, batch_tokens=256, row_tokens=64, window=8, lr=5e-3)
CONFIG = RunConfig(adapter=AdapterConfig(rank=2, targets=("q_proj", "down_proj")), train=TRAIN)


@cache
def stream() -> Stream:
    return simulate(SimulateConfig(users=60, items=40, blocks=3)).stream


def make_sids() -> SidTable:
    number = np.arange(stream().n_items)
    return SidTable(tuple(stream().items["item"]), np.column_stack([number // 7, number % 7]), (6, 7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    save_base(path, *new_model("tiny", make_sids(), seed=0), make_sids(), {"fitted_block": 1})
    return path


def changed(**changes: Any) -> RunConfig:
    return CONFIG.model_copy(update={"train": TRAIN.model_copy(update=changes)})


def run(
    path: Path,
    folder: Path,
    config: RunConfig = CONFIG,
    sink: Sink | None = None,
    from_adapter: Path | None = None,
    base: Base | None = None,
) -> dict[int, FitResult]:
    base = base or load_base(folder)
    start = None if from_adapter is None else str(from_adapter)
    config = config.model_copy(update={"from_adapter": start or ""})
    work = Recommend()

    def provenance(block: int) -> dict[str, Any]:
        return {"seed": 0, **work.provenance(config, block)}

    return work.learn(path, config, stream(), base, sink or MemorySink(), "hash", provenance)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, FitResult]]:
    path = tmp_path_factory.mktemp("runs") / "whole"
    return path, run(path, folder)


def equal(one: Path, other: Path, folder: Path, block: int) -> bool:
    base = load_base(folder)
    a, b = (read_adapter(adapter_folder(path, block), base) for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_training_event_is_a_target_once_and_each_held_out_user_validates_once(folder: Path) -> None:
    base = load_base(folder)
    tokens = base.item_tokens().tolist()
    item_of = {tuple(t): name for t, name in zip(tokens, base.sids.items, strict=True)}
    for block in (1, 2, 3):
        split = split_block(stream(), block)
        form = make_form("packed", base, window=8, row_tokens=32)

        def targets(documents: list[Any]) -> list[str]:
            marked = [d.tokens[d.loss].reshape(-1, 2).tolist() for d in documents]
            return [item_of[tuple(t)] for each in marked for t in each]

        in_block = stream().interactions.filter(pl.col("block") == block)
        by_user = in_block.group_by("user", maintain_order=True).agg("item")["item"].to_list()
        trained = [item for items in by_user for item in (items[:-2] if len(items) >= 3 else items)]
        assert Counter(targets(training_documents(split, form))) == Counter(trained)
        valid = validation_documents(split, form)
        assert targets(valid) == [items[-2] for items in by_user if len(items) >= 3]
        assert len(valid) == split.n_test


def test_the_validation_target_follows_its_whole_history(folder: Path) -> None:
    base = load_base(folder)
    form = make_form("packed", base, window=4, row_tokens=32)
    split = split_block(stream(), 3)
    for i, d in zip(split.test_users, validation_documents(split, form), strict=True):
        expected = form.prompt(split.history(int(i), before="valid"))
        np.testing.assert_array_equal(d.tokens[:-2], expected)


def unique_stream() -> Stream:
    """Users with 0 to 5 events in each of three blocks, no item twice: an item names its (user, event)."""
    rng = np.random.default_rng(3)
    rows: list[tuple[str, str, int, int, int]] = []
    for user in (f"u{k:02d}" for k in range(12)):
        blocks = np.repeat([1, 2, 3], rng.integers(0, 6, size=3)).tolist()
        rows += [(user, f"{user}-{k}", 100 * block + k, k, block) for k, block in enumerate(blocks)]
    events = pl.DataFrame(rows, schema=INTERACTIONS, orient="row")
    items = events.select("item", text=pl.lit(""), first_block="block").sort("first_block", maintain_order=True)
    return Stream(events, items)


def items_of(document: Any, items: list[str]) -> tuple[list[str], list[str]]:
    """The items of a packed document whose tokens are [0, item, item, …], and those of them that are targets."""
    assert document.tokens[0] == 0
    names = [items[token - 1] for token in document.tokens[1:]]
    return names, [name for name, marked in zip(names, document.loss[1:], strict=True) if marked]


@pytest.mark.parametrize("held_out", ["never", "next"])
@pytest.mark.parametrize("past_data", [False, True])
def test_which_events_are_targets(held_out: str, past_data: bool) -> None:
    whole = unique_stream()
    items = whole.items["item"].to_list()
    form = PackedForm(np.arange(1, len(items) + 1)[:, None], bos=0, window=4, row_tokens=16)
    by_user: dict[str, list[tuple[int, str]]] = {}
    for user, item, block in whole.interactions.select("user", "item", "block").iter_rows():
        by_user.setdefault(user, []).append((block, item))
    config = TRAIN.model_copy(update={"held_out": held_out})
    for newest in (1, 2, 3):
        expected = []
        for events in by_user.values():
            for block in (1, 2, 3):
                own = [item for b, item in events if b == block]
                tested = own[-2:] if len(own) >= 3 else []
                if block == newest or (past_data and block < newest):
                    expected += own[: len(own) - len(tested)]
                if held_out == "next" and (block == newest - 1 or (past_data and block < newest)):
                    expected += tested
        blocks = range(1, newest + 1) if past_data else (newest,)
        documents = learned_documents(whole, blocks, form, config)
        found = [items_of(document, items) for document in documents]
        assert sorted(target for _, targets in found for target in targets) == sorted(expected)
        for names, targets in found:  # each is a stretch of one user's events, with enough before its first target
            own = [item for _, item in by_user[names[0][:3]]]
            first = own.index(names[0])
            assert names == own[first : first + len(names)]
            assert first == 0 or names.index(targets[0]) >= 2


def test_the_held_out_events_of_a_user_are_two_targets_of_one_document(folder: Path) -> None:
    base = load_base(folder)
    tokens = base.item_tokens().numpy()
    split = split_block(stream(), 2)
    documents = held_out_documents(split, make_form("packed", base, window=8, row_tokens=64))
    assert len(documents) == split.n_test
    for i, document in zip(split.test_users, documents, strict=True):
        events = split.events[split.offsets[i] : split.offsets[i + 1]]
        np.testing.assert_array_equal(document.tokens, [base.bos(), *tokens[events[-10:]].ravel()])
        assert document.loss.tolist() == [False] * (len(document.tokens) - 4) + [True] * 4


def test_a_document_of_prompts_has_the_held_out_events_of_a_user(folder: Path) -> None:
    base = load_base(folder)
    form = make_form("prompt", base, window=3, row_tokens=128)
    split = split_block(stream(), 2)
    tokens = base.item_tokens().numpy()
    targets = [d.tokens[d.loss].tolist() for d in held_out_documents(split, form)]
    held_out = np.column_stack([split.targets("valid"), split.targets("test")])
    assert targets == tokens[held_out].reshape(len(held_out), -1).tolist()


@pytest.mark.parametrize("method", ["finetune", "retrain"])
def test_held_out_events_are_learned_a_block_later_and_adapters_say_so(
    method: str, folder: Path, tmp_path: Path
) -> None:
    plain, config = (
        changed(epochs=1, held_out=held_out).model_copy(update={"method": MethodConfig(name=method)})
        for held_out in ("never", "next")
    )
    run(tmp_path / "never", folder, plain)
    sink = MemorySink()
    run(tmp_path / "next", folder, config, sink)
    records = {
        name: [adapter_provenance(adapter_folder(tmp_path / name, block)) for block in (2, 3)]
        for name in ("never", "next")
    }
    assert [r["held_out"] for r in records["never"] + records["next"]] == ["never"] * 2 + ["next"] * 2
    assert [r.get("held_out_blocks", []) for r in records["never"] + records["next"]] == [[], [], [1], [1, 2]]
    assert not equal(tmp_path / "never", tmp_path / "next", folder, 2)
    base = load_base(folder)
    plans = [Recommend().plan(c, stream(), base, (2, 3)) for c in (plain, config)]
    tested = [split_block(stream(), block).n_test for block in (1, 2)]
    more = [two["targets"] - one["targets"] for one, two in zip(*plans, strict=True)]
    assert more == [2 * tested[0], 2 * (sum(tested) if method == "retrain" else tested[1])]
    used = [e["tokens"] for e in sink.events if e["kind"] == "block"]
    assert [line["tokens_per_epoch"] for line in plans[1]] == used


def test_an_adapter_to_start_from_passes_on_what_it_has_learned(folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "first", folder, changed(epochs=1, held_out="next"))
    given = adapter_folder(tmp_path / "first", 2)
    run(tmp_path / "second", folder, changed(epochs=1), from_adapter=given)
    assert adapter_provenance(adapter_folder(tmp_path / "second", 3))["held_out_blocks"] == [1]


def test_the_softmax_of_a_block_is_over_the_items_known_by_then(folder: Path) -> None:
    base = load_base(folder)
    assert catalogue_softmax(base, stream(), 2, "vocabulary") is None
    sizes = [softmax.trie.n_leaves for b in (1, 2, 3) if (softmax := catalogue_softmax(base, stream(), b, "trie"))]
    assert sizes == [int((stream().items["first_block"] <= b).sum()) for b in (1, 2, 3)]
    assert sizes[0] < sizes[2] == 40


def test_the_settings_of_a_block_are_the_configurations(folder: Path) -> None:
    config = TrainConfig(
        lr=0.5,
        block_lr_factor=0.1,
        epochs=3,
        schedule="linear",
        warmup=0.2,
        weight_decay=0.3,
        clip=0.4,
        batch_tokens=99,
        row_tokens=98,
        accumulation=7,
        precision="bf16",
        keep="last",
    )
    first, second = (fit_settings(config, seed=5, block=b) for b in (1, 2))
    assert (first.lr, second.lr) == (0.5, pytest.approx(0.05))
    for name in set(TrainConfig.model_fields) & set(first.__dataclass_fields__) - {"lr"}:
        assert getattr(first, name) == getattr(second, name) == getattr(config, name)
    assert (first.seed, first.patience) == (5, 0)


def test_a_block_leaves_an_adapter_its_state_and_its_events(
    whole: tuple[Path, dict[int, FitResult]], folder: Path
) -> None:
    path, results = whole
    assert sorted(results) == [2, 3]
    written = {str(p.relative_to(path)) for p in path.glob("*/*")}
    assert written == {
        "adapters/block_002",
        "adapters/block_003",
        "method/block_002.safetensors",
        "method/block_003.safetensors",
    }
    record = adapter_provenance(adapter_folder(path, 3))
    assert (record["block"], record["parent"], record["seed"]) == (3, "block_002", 0)
    assert record["base"] == load_base(folder).fingerprint
    assert (record["kept_epoch"], record["valid_log_likelihood"]) == (results[3].epoch, results[3].score)
    assert adapter_provenance(adapter_folder(path, 2))["parent"] is None
    second, third = (read_adapter(adapter_folder(path, block), load_base(folder)) for block in (2, 3))
    assert not any(torch.equal(third[name], tensor) for name, tensor in second.items())


def test_a_block_starts_at_the_adapter_of_the_block_before(
    whole: tuple[Path, dict[int, FitResult]], folder: Path
) -> None:
    path, results = whole
    base = load_base(folder)
    form = make_form("packed", base, TRAIN.window, TRAIN.row_tokens)
    loss = PackedLoss(base.model, catalogue_softmax(base, stream(), 3, "trie"))
    load_adapter(base, adapter_folder(path, 2))
    documents = validation_documents(split_block(stream(), 3), form)
    total = 0.0
    for d in documents:
        tokens, marked = torch.from_numpy(d.tokens)[None], torch.from_numpy(d.loss)[None]
        with torch.no_grad():
            total -= loss(tokens, torch.ones_like(tokens), torch.arange(len(d.tokens))[None], marked).sum().item()
    assert results[3].start_score == pytest.approx(total / len(documents), rel=1e-5)


def test_the_events_name_each_block(folder: Path, tmp_path: Path) -> None:
    sink = MemorySink()
    results = run(tmp_path, folder, changed(epochs=1), sink)
    blocks = [e for e in sink.events if e["kind"] == "block"]
    assert [e["block"] for e in blocks] == [2, 3]
    for e in blocks:
        result = results[e["block"]]
        assert (e["kept_epoch"], e["steps"], e["tokens"]) == (result.epoch, result.steps, result.used)
    assert [e["block"] for e in sink.events if e["kind"] == "epoch"] == [2, 3]


@pytest.mark.parametrize("method", ["peso", "finetune"])
def test_a_finished_block_is_taken_as_it_is(method: str, folder: Path, tmp_path: Path) -> None:
    config = changed(epochs=1).model_copy(update={"method": MethodConfig(name=method)})
    run(tmp_path / "whole", folder, config)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(adapter_folder(tmp_path / "part", 3))
    assert sorted(run(tmp_path / "part", folder, config)) == [3]
    assert equal(tmp_path / "whole", tmp_path / "part", folder, 3)
    assert run(tmp_path / "part", folder, config) == {}


class Counts(Method):
    """Remembers how many blocks it has seen the end of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = 0

    def end_block(self, ctx: Context) -> None:
        self.blocks += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"blocks": torch.tensor(self.blocks)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.blocks = int(state["blocks"])


def test_a_method_takes_back_its_memory_of_the_finished_blocks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Counts] = []

    def build(_config: MethodConfig) -> Counts:
        made.append(Counts())
        return made[-1]

    monkeypatch.setattr("cladapt.train.blocks.build", build)
    run(tmp_path, folder, changed(epochs=1))
    shutil.rmtree(adapter_folder(tmp_path, 3))
    run(tmp_path, folder, changed(epochs=1))
    assert [method.blocks for method in made] == [2, 2]
    assert int(read_tensors(tmp_path / "method" / "block_002.safetensors")["blocks"]) == 1


class Stops(MemorySink):
    """Fails at a step of a block, as a kill would."""

    def __init__(self, block: int, step: int) -> None:
        super().__init__()
        self.at = (block, step)

    def emit(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "step" and (event["block"], event["step"]) == self.at:
            raise KeyboardInterrupt
        super().emit(event)


@pytest.mark.parametrize(("block", "step"), [(2, 1), (2, 6), (3, 5)])
def test_an_interruption_changes_nothing(block: int, step: int, folder: Path, tmp_path: Path, whole: Any) -> None:
    config = changed(checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, folder, config, Stops(block, step))
    left = list((tmp_path / "checkpoints").glob("*"))
    assert bool(left) == (step > 2)
    assert sorted(run(tmp_path, folder, config)) == list(range(block, 4))
    for b in (2, 3):
        assert equal(whole[0], tmp_path, folder, b)
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_run_from_an_adapter_starts_there_also_when_continued(whole: Any, folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(adapter_folder(whole[0], 2), given)
    started = run(tmp_path / "a", folder, from_adapter=given)
    assert list(started) == [3]  # block 2 is learned already: the first run's adapter of block 3 comes out again
    assert started[3].start_score == whole[1][3].start_score
    assert equal(whole[0], tmp_path / "a", folder, 3)
    assert adapter_provenance(adapter_folder(tmp_path / "a", 3))["parent"] == str(given)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", folder, sink=Stops(3, 3), from_adapter=given)
    run(tmp_path / "b", folder, from_adapter=given)
    assert equal(tmp_path / "a", tmp_path / "b", folder, 3)


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    whole: Any, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    save_base(other, *new_model("tiny", make_sids(), seed=1), make_sids(), {"fitted_block": 1})
    given = adapter_folder(whole[0], 2)
    with pytest.raises(DataError, match="was trained on the base"):
        run(tmp_path / "run", other, from_adapter=given)
    larger = CONFIG.model_copy(update={"adapter": AdapterConfig(rank=3, targets=("q_proj", "down_proj"))})
    with pytest.raises(DataError, match="the adapter does not fit this model: 8 tensors differ"):
        run(tmp_path / "run", folder, larger, from_adapter=given)
    assert not (tmp_path / "run").exists()


def test_frozen_trains_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    base, sink = load_base(folder), MemorySink()
    before = weights_hash(base.model)
    config = CONFIG.model_copy(update={"method": MethodConfig(name="frozen")})
    assert run(tmp_path / "run", folder, config, sink, base=base) == {}
    assert not (tmp_path / "run").exists()
    assert sink.events == []
    assert weights_hash(base.model) == before


def test_training_leaves_the_bases_own_weights_alone(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder)
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    run(tmp_path, folder, changed(epochs=1), base=base)
    after = {n.replace(".base_layer", ""): p for n, p in adapted_base(base).items()}
    assert all(torch.equal(after[n], p) for n, p in before.items())


def adapted_base(base: Base) -> dict[str, torch.Tensor]:
    return {n: p for n, p in base.model.named_parameters() if ".lora_" not in n}


def test_a_base_that_has_seen_everything_has_nothing_to_learn(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder)
    bases = [Base(base.model, base.tokenizer, base.sids, {"fitted_block": b}) for b in (0, 1, 3)]
    assert [list(Recommend().blocks(CONFIG, stream(), b)) for b in bases] == [[1, 2, 3], [2, 3], []]
    assert not run(tmp_path, folder, base=bases[-1])


@pytest.mark.parametrize(
    "changes",
    [{"softmax": "vocabulary"}, {"precision": "bf16"}, {"form": "prompt", "row_tokens": 128, "window": 3}],
    ids=["vocabulary", "bf16", "prompt"],
)
def test_the_other_ways_of_training_learn_too(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    results = run(tmp_path, folder, changed(**{"epochs": 1, **changes}))
    assert all(math.isfinite(r.score) for r in results.values())
    assert results[2].score > results[2].start_score  # the block in which the adapter leaves zero
    base = load_base(folder)
    assert adapted_lm(load_adapter(base, adapter_folder(tmp_path, 3))) is base.model


def test_without_validation_the_last_epoch_is_kept_and_its_score_is_null(folder: Path, tmp_path: Path) -> None:
    short = Stream(
        stream().interactions.filter(pl.int_range(pl.len()).over("user", "block") < 2), stream().items
    )  # two events a block: nobody is held out
    base = load_base(folder)
    results = Recommend().learn(
        tmp_path, changed(keep="last", epochs=1), short, base, MemorySink(), "hash", lambda _: {}
    )
    assert math.isnan(results[3].score)
    text = (adapter_folder(tmp_path, 3) / "cladapt.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["valid_log_likelihood"] is None
    with pytest.raises(DataError, match="block 2 has no validation target to choose an epoch by"):
        Recommend().learn(
            tmp_path / "best", changed(epochs=1), short, load_base(folder), MemorySink(), "hash", lambda _: {}
        )
