"""Replay: the sample against its definition, and what both workloads make of it, counted by hand."""

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cladapt.artifacts import read_tensors
from cladapt.config import (
    AdapterConfig,
    ImageTrainConfig,
    MethodConfig,
    RunConfig,
    TrainConfig,
    VitConfig,
)
from cladapt.data.histories import split_block
from cladapt.data.images import ImageStream
from cladapt.data.schema import INTERACTIONS, Stream
from cladapt.errors import ConfigError
from cladapt.methods import Replay, build
from cladapt.model.adapter import adapted_lm, create_adapter
from cladapt.model.load import Base, load_base, new_model, save_base
from cladapt.model.saved import adapter_provenance, read_adapter
from cladapt.model.vit import VisionBase, load_vision_base, new_vit, save_vision_base
from cladapt.pipeline.forget import forget_users
from cladapt.tokens.prompts import PackedForm
from cladapt.tokens.sids import SidTable
from cladapt.train.blocks import adapter_folder
from cladapt.train.feeds import PackedFeed
from cladapt.train.sinks import MemorySink
from cladapt.train.stream import learned_documents, replayed
from cladapt.workloads.classify import Classify, ClassifyConfig
from cladapt.workloads.recommend import Recommend

TRAIN = TrainConfig(epochs=2, batch_tokens=64, row_tokens=32, window=4, lr=5e-3, weight_decay=0.0)
ADAPTER = AdapterConfig(rank=2, targets=("q_proj", "v_proj"))


def names(sizes: tuple[int, ...]) -> list[tuple[int, str]]:
    return [(block, f"u{k}") for block, size in enumerate(sizes, 1) for k in range(size)]


def sample(replay: Replay, examples: list[tuple[int, str]], seed: int = 0) -> set[tuple[int, str]]:
    places = replay.take(examples, seed)
    assert places == sorted(set(places))
    assert len(places) == min(replay.size, len(examples))
    return {examples[place] for place in places}


def test_the_reservoir_is_carried_on_from_block_to_block() -> None:
    replay = Replay(20)
    before = sample(replay, names((30,)))
    for sizes in ((30, 25), (30, 25, 40), (30, 25, 40, 300)):
        after, new = sample(replay, names(sizes)), {e for e in names(sizes) if e[0] == len(sizes)}
        assert after - new < before or after - new == before  # newer ones displace, none comes back
        before = after
    assert before != sample(replay, names(sizes), seed=1)
    shuffled = names(sizes)
    np.random.default_rng(0).shuffle(shuffled)  # type: ignore[arg-type]
    assert sample(replay, [(int(b), str(name)) for b, name in shuffled]) == before


def test_what_is_gone_leaves_its_place_to_the_next_and_all_others_stay() -> None:
    replay, examples = Replay(20), names((30, 25, 40))
    before = sample(replay, examples)
    gone = {*sorted(before)[:3]}
    after = sample(replay, [e for e in examples if e not in gone])
    assert before - gone < after
    assert len(after - before) == 3


def test_every_example_is_as_likely_as_any_other() -> None:
    examples, draws, size = names((10, 20, 30)), 2000, 15
    found = [sample(Replay(size), examples, seed) for seed in range(draws)]
    counts = Counter(e for each in found for e in each)
    share = size / len(examples)
    deviation = (np.array([counts[e] for e in examples]) - draws * share) / np.sqrt(draws * share * (1 - share))
    assert np.abs(deviation).max() < 4.5  # of 60 standard normal figures
    both = sum({*examples[:2]} <= each for each in found)
    assert both / draws == pytest.approx(share * (size - 1) / (len(examples) - 1), abs=0.015)


@pytest.mark.parametrize(
    ("size", "expected"), [(10, (0, 0, 10)), (50, (0, 10, 40)), (80, (15, 25, 40)), (99, (30, 25, 40))]
)
def test_recent_takes_the_newest_blocks_first(size: int, expected: tuple[int, ...]) -> None:
    examples = names((30, 25, 40))
    found = sample(Replay(size, "recent"), examples)
    assert tuple(sum(block == b for block, _ in found) for b in (1, 2, 3)) == expected
    for block, count in enumerate(expected, 1):
        own = [e for e in examples if e[0] == block]
        assert {e for e in found if e[0] == block} == (sample(Replay(count), own) if count else set())


@cache
def stream() -> Stream:
    """Users with 0 to 5 events in each of four blocks, no item twice: an item names its (user, event)."""
    rng = np.random.default_rng(3)
    rows: list[tuple[str, str, int, int, int]] = []
    for user in (f"u{k:02d}" for k in range(14)):
        blocks = np.repeat([1, 2, 3, 4], rng.integers(0, 6, size=4)).tolist()
        rows += [(user, f"{user}-{k}", 100 * block + k, k, block) for k, block in enumerate(blocks)]
    events = pl.DataFrame(rows, schema=INTERACTIONS, orient="row")
    items = events.select("item", text=pl.lit(""), first_block="block").sort("first_block", maintain_order=True)
    return Stream(events, items)


def trained(user: str, block: int) -> list[str]:
    """The training targets of a user in a block: all but the last two of three or more events."""
    own = stream().interactions.filter((pl.col("user") == user) & (pl.col("block") == block))["item"].to_list()
    return own[:-2] if len(own) >= 3 else own


def targets(documents: Any, items: list[str]) -> Counter[str]:
    return Counter(items[token - 1] for d in documents for token in d.tokens[d.loss])


@pytest.mark.parametrize("held_out", ["never", "next"])
@pytest.mark.parametrize("policy", ["reservoir", "recent"])
def test_training_events_of_users_in_earlier_blocks_are_learned_again(policy: Any, held_out: str) -> None:
    items = stream().items["item"].to_list()
    form = PackedForm(np.arange(1, len(items) + 1)[:, None], bos=0, window=4, row_tokens=16)
    config = TRAIN.model_copy(update={"held_out": held_out})
    for newest in (1, 2, 3, 4):
        again = replayed(stream(), newest, Replay(6, policy), seed=5)
        found = [(split.block, stream().users[split.user[i]]) for split, i in again]
        past = stream().interactions.filter(pl.col("block") < newest).select("block", "user").unique().rows()
        assert {*found} == sample(Replay(6, policy), past, 5)
        assert len(found) == min(6, len(past))
        plain = targets(learned_documents(stream(), (newest,), form, config), items)
        both = learned_documents(stream(), (newest,), form, config, again)
        assert targets(both, items) - plain == Counter(item for block, user in found for item in trained(user, block))
        for (block, user), document in zip(found, both[len(both) - len(again) :], strict=True):
            names_of = [items[token - 1] for token in document.tokens[1:]]
            before = stream().interactions.filter((pl.col("user") == user) & (pl.col("block") <= block))["item"]
            assert names_of == [i for i in before if i in names_of]  # with the history it had then
            assert not {*names_of} - {*before}


def drawn(of: Stream, before: int, size: int) -> set[tuple[int, str]]:
    """The block and the user of every example that is learned again."""
    found = [(split.block, of.users[split.user[i]]) for split, i in replayed(of, before, Replay(size), 0)]
    assert len(found) == len({*found})
    return {*found}


def test_a_longer_stream_gives_the_same_examples() -> None:
    for block in (2, 3):
        assert drawn(stream(), block, 6) == drawn(stream().prefix(block), block, 6)


def test_forgotten_users_are_not_learned_again_and_all_others_are(tmp_path: Path) -> None:
    stream().save(tmp_path / "stream")
    before = drawn(stream(), 4, 9)
    gone = min(user for _, user in before)
    (tmp_path / "users.txt").write_text(gone)
    forget_users(tmp_path / "stream", tmp_path / "users.txt")
    after = drawn(Stream.load(tmp_path / "stream"), 4, 9)
    assert len(after) == len(before) == 9
    assert gone not in {user for _, user in after}
    assert {(block, user) for block, user in before if user != gone} < after


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    number = np.arange(stream().n_items)
    sids = SidTable(tuple(stream().items["item"]), np.column_stack([number // 10, number % 10]), (16, 10))
    save_base(path, *new_model("tiny", sids, seed=0), sids, {"fitted_block": 1})
    return path


def config_of(name: str, held_out: str = "never", **options: Any) -> RunConfig:
    train = TRAIN.model_copy(update={"held_out": held_out})
    return RunConfig(adapter=ADAPTER, train=train, method=MethodConfig(name=name, options=options), seed=3)


def learn(path: Path, folder: Path, config: RunConfig) -> dict[int, Path]:
    work, loaded = Recommend(), load_base(folder)
    work.learn(path, config, stream(), loaded, MemorySink(), "hash", lambda block: work.provenance(config, block))
    return {block: adapter_folder(path, block) for block in (2, 3, 4)}


def examples(folder: Path, config: RunConfig, blocks: tuple[int, ...]) -> PackedFeed:
    loaded = load_base(folder)
    _, feed = Recommend().examples(config, stream(), loaded)(create_adapter(loaded, ADAPTER, 0), blocks)
    assert isinstance(feed, PackedFeed)
    return feed


def test_a_run_learns_and_plans_the_block_and_its_replay_and_is_judged_by_the_block(base: Path) -> None:
    plain, config = config_of("finetune"), config_of("replay", size=5)
    loaded: Base = load_base(base)
    tokens = {tuple(t): name for t, name in zip(loaded.item_tokens().tolist(), loaded.sids.items, strict=True)}
    lines = Recommend().plan(config, stream(), loaded, (2, 3, 4))
    for line in lines:
        block = line["block"]
        found, alone = examples(base, config, (block,)), examples(base, plain, (block,))
        again = [(s.block, stream().users[s.user[i]]) for s, i in replayed(stream(), block, Replay(5), seed=3)]
        marked = [d.tokens[d.loss].reshape(-1, 2).tolist() for d in found.documents]
        learned = Counter(tokens[tuple(t)] for each in marked for t in each)
        own = [(block, stream().users[u]) for u in split_block(stream(), block).user]
        assert learned == Counter(item for b, user in own + again for item in trained(user, b))
        assert [d.tokens.tolist() for d in found.held_out] == [d.tokens.tolist() for d in alone.held_out]
        assert (line["replayed"], line["documents"], line["targets"]) == (5, len(found), learned.total())
        assert line["steps"] == sum(len(found.epoch([config.seed, epoch])) for epoch in range(2))
        assert line["tokens_per_epoch"] == sum(len(d.tokens) for d in found.documents)
    assert all("replayed" not in line for line in Recommend().plan(plain, stream(), loaded, (2, 3)))


def test_memory_is_estimated_with_the_replay(base: Path) -> None:
    """A batch that the block alone does not fill is filled by what is learned again."""
    found = {}
    for name, options in (("finetune", {}), ("replay", {"size": 30})):
        config, loaded = config_of(name, **options), load_base(base)
        config = config.model_copy(update={"train": TRAIN.model_copy(update={"batch_tokens": 4096})})
        model = create_adapter(loaded, ADAPTER, 0)
        found[name] = Recommend().activation_bytes(config, stream(), loaded, model, (2, 3, 4))
    assert found["replay"] > 1.5 * found["finetune"]


def test_a_size_of_0_is_fine_tuning_bit_for_bit_and_another_is_not(base: Path, tmp_path: Path) -> None:
    runs = {
        name: learn(tmp_path / name, base, config_of(name.split()[0], **options))
        for name, options in (("finetune", {}), ("replay none", {"size": 0}), ("replay some", {"size": 5}))
    }
    adapters = {name: read_adapter(found[4], load_base(base)) for name, found in runs.items()}
    plain = adapters["finetune"]
    assert all(torch.equal(tensor, adapters["replay none"][name]) for name, tensor in plain.items())
    assert not all(torch.equal(tensor, adapters["replay some"][name]) for name, tensor in plain.items())


def test_held_out_events_are_recorded_as_learned_where_fine_tuning_has_them(base: Path, tmp_path: Path) -> None:
    for held_out, expected in (("never", [[], [], []]), ("next", [[1], [1, 2], [1, 2, 3]])):
        found = learn(tmp_path / held_out, base, config_of("replay", held_out, size=5))
        assert [adapter_provenance(found[b]).get("held_out_blocks", []) for b in (2, 3, 4)] == expected


@cache
def images() -> ImageStream:
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(9), 8)
    pixels = rng.integers(0, 256, size=(len(label), 8, 8, 1)).astype(np.uint8)
    split = np.tile([0] * 5 + [1, 2, 2], 9).astype(np.int8)
    return ImageStream(pixels, label, split, tuple("abcdefghi"), np.repeat([1, 2, 3], 3))


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vision") / "base"
    model = new_vit(VitConfig(hidden=32, layers=2, patch=2), 8, 1, 9)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a head whose rows tell classes apart
        for p in model.get_submodule("classifier").parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    save_vision_base(path, model, "nine", {"fitted_block": 1, "stream": ""})
    return path


def classify_config(name: str = "replay", **options: Any) -> ClassifyConfig:
    method = MethodConfig(name=name, options=options)
    return ClassifyConfig(adapter=ADAPTER, train=ImageTrainConfig(epochs=2, batch_images=4), method=method, seed=1)


def test_images_compete_among_the_classes_of_the_block_and_of_the_replay(vision: Path) -> None:
    config = classify_config(size=3)
    loaded: VisionBase = load_vision_base(vision)
    model = create_adapter(loaded, ADAPTER, 0).eval()
    loss, feed = Classify().examples(config, images(), loaded)(model, (3,))
    past = [(b, str(row)) for b in (1, 2) for row in images().rows(b, "train")]
    again = [int(row) for _, row in sample(Replay(3), past, seed=1)]
    assert sorted(feed.train) == sorted([*images().rows(3, "train"), *again])  # type: ignore[attr-defined]
    assert feed.valid.tolist() == images().rows(3, "valid").tolist()  # type: ignore[attr-defined]
    classes = sorted({6, 7, 8} | {int(images().label[row]) for row in again})
    assert 3 < len(classes) < 9
    (batch,) = feed.sample(1e-9)
    pixels, label, _ = batch
    with torch.no_grad():
        logits = adapted_lm(model)(pixel_values=pixels).logits[:, classes]
        expected = -logits.log_softmax(1)[torch.arange(len(label)), [classes.index(c) for c in label.tolist()]]
        torch.testing.assert_close(loss(*batch), expected)


@pytest.mark.parametrize(
    ("name", "options", "train", "again"),
    [
        ("finetune", {}, (15, 15), (None, None)),
        ("replay", {"size": 4}, (19, 19), (4, 4)),
        ("replay", {"size": 20, "policy": "recent"}, (30, 35), (15, 20)),
        ("retrain", {}, (30, 45), (None, None)),
        ("lsat", {}, (30, 15), (None, None)),
    ],
)
def test_a_plan_of_images_counts_all_that_is_learned(
    name: str, options: dict[str, Any], train: tuple[int, ...], again: tuple[int | None, ...], vision: Path
) -> None:
    config, loaded = classify_config(name, **options), load_vision_base(vision)
    lines = Classify().plan(config, images(), loaded, (2, 3))
    assert tuple(line["train"] for line in lines) == train
    assert tuple(line.get("replayed") for line in lines) == again
    assert [line["steps"] for line in lines] == [2 * -(-count // 4) for count in train]


def test_the_heads_rows_of_replayed_classes_learn_and_the_rest_stay(vision: Path, tmp_path: Path) -> None:
    config = classify_config(size=3)
    Classify().learn(tmp_path, config, images(), load_vision_base(vision), MemorySink(), "hash", lambda _: {})
    heads = [
        read_tensors(file)["base_model.model.classifier.weight"]
        for file in (adapter_folder(tmp_path, block) / "adapter_model.safetensors" for block in (2, 3))
    ]
    past = [(b, str(row)) for b in (1, 2) for row in images().rows(b, "train")]
    again = {int(images().label[int(row)]) for _, row in sample(Replay(3), past, seed=1)}
    moved = {c for c in range(9) if not torch.equal(heads[0][c], heads[1][c])}
    assert moved == {6, 7, 8} | again


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("replay+retrain", "replay and retrain would each say what is learned of earlier blocks"),
        ("lsat+replay", "lsat and replay would each say what is learned of earlier blocks"),
        ("frozen+replay", "frozen leaves nothing to train"),
    ],
)
def test_what_cannot_be_joined_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(MethodConfig(name=name))


def test_a_joined_method_replays() -> None:
    for name in ("replay+peso", "eblora+replay", "ewc+replay", "olora+replay", "replay+svdeq"):
        assert build(MethodConfig(name=name, options={"replay.size": 7})).replay == Replay(7)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"size=-1.*; policy='newest'"):
        build(MethodConfig(name="replay", options={"size": -1, "policy": "newest"}))
