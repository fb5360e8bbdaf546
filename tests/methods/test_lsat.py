"""LSAT: what each module learns from, and the sum that is served, against the factors and a search by hand."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cladapt.config import AdapterConfig, MethodConfig, RunConfig, SimulateConfig, TrainConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError
from cladapt.methods import Context, build
from cladapt.methods.lsat import Lsat, LsatConfig
from cladapt.model.load import load_base, new_model, save_base
from cladapt.model.saved import load_adapter, read_adapter
from cladapt.tokens.sids import SidTable
from cladapt.train.blocks import adapter_folder
from cladapt.train.sinks import MemorySink
from cladapt.workloads.recommend import Recommend

A, B = "m.q.lora_A.default.weight", "m.q.lora_B.default.weight"
TRAIN = TrainConfig(epochs=2, batch_tokens=256, row_tokens=64, window=8, lr=5e-3, weight_decay=0.0)
ADAPTER = AdapterConfig(rank=2, alpha=6.0, targets=("q_proj", "down_proj"))
PROBE = torch.tensor([[1, 4, 9, 5, 8, 6, 10, 7, 8]])


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in ((A, (2, 5)), (B, (4, 2)))
    }


class World:
    """A context whose model is a sum of products, and whose score is how near that is to a matrix."""

    def __init__(self, wanted: Tensor | None = None) -> None:
        self.parameters = {name: nn.Parameter(t) for name, t in drawn(0).items()}
        self.history: dict[str, Tensor] = {}
        self.wanted = wanted

    def set_history(self, tensors: Any) -> None:
        self.history = dict(tensors)

    def served(self) -> Tensor:
        own = self.parameters[B].detach() @ self.parameters[A].detach()
        return own + self.history[B] @ self.history[A] if self.history else own

    def context(self, block: int) -> Context:
        def score() -> float:
            assert self.wanted is not None
            return -(self.served() - self.wanted).norm().item()

        return Context(
            self.parameters,
            block=block,
            initial=drawn(9),
            set_history=self.set_history,
            score=None if self.wanted is None else score,
        )

    def learn(self, method: Lsat, block: int, values: dict[str, Tensor]) -> Context:
        """A block that ends at these values."""
        ctx = self.context(block)
        method.begin_block(ctx)
        assert self.history == {}  # neither module sees the other
        assert all(torch.equal(p, ctx.initial[name]) for name, p in self.parameters.items())
        for name, p in self.parameters.items():
            p.data.copy_(values[name])
        method.end_block(ctx)
        return ctx


def product(values: dict[str, Tensor]) -> Tensor:
    return values[B] @ values[A]


def test_long_term_blocks_learn_all_data_and_later_ones_their_own() -> None:
    method = Lsat(LsatConfig(long_blocks=3))
    assert [list(method.learned_with(block)) for block in (1, 2, 3, 4, 5)] == [[1], [1, 2], [1, 2, 3], [4], [5]]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fusion", ["products", "factors"])
def test_the_sum_that_is_served_is_that_of_the_paper(fusion: str, weight: float) -> None:
    world, method = World(), Lsat(LsatConfig(weight=weight, fusion=fusion))  # type: ignore[arg-type]
    long, short, shorter = drawn(1), drawn(2), drawn(3)
    world.learn(method, 2, long)
    torch.testing.assert_close(world.served(), product(long))
    for block, own in ((3, short), (4, shorter)):  # the long-term one stays, whatever was served between
        ctx = world.learn(method, block, own)
        if fusion == "products":
            expected = weight * product(long) + (1 - weight) * product(own)
        else:
            expected = product({name: weight * long[name] + (1 - weight) * own[name] for name in own})
        torch.testing.assert_close(world.served(), expected)
        assert ctx.log == {"lsat/weight": weight}
        assert bool(world.history) == (fusion == "products" and weight > 0)


@pytest.mark.parametrize("truth", [0.0, 0.42, 0.96])
def test_the_weight_of_the_best_score_is_chosen(truth: float) -> None:
    long, short = drawn(1), drawn(2)
    world, method = World(truth * product(long) + (1 - truth) * product(short)), Lsat()
    world.learn(method, 2, long)
    ctx = world.learn(method, 3, short)
    nearest = round(truth, 1)
    assert ctx.log == {"lsat/weight": nearest}
    torch.testing.assert_close(world.served(), nearest * product(long) + (1 - nearest) * product(short))


def test_an_adapter_that_a_run_starts_from_is_the_long_term_one() -> None:
    world, method = World(), Lsat(LsatConfig(weight=0.5))
    start = {name: p.detach().clone() for name, p in world.parameters.items()}
    world.learn(method, 7, drawn(2))
    torch.testing.assert_close(world.served(), 0.5 * product(start) + 0.5 * product(drawn(2)))


def test_without_a_block_for_the_long_term_module_it_says_what_to_do() -> None:
    world = World()
    world.parameters[B].data.zero_()
    with pytest.raises(ConfigError, match=r"long_blocks=2: the first block to learn is 4, which leaves none") as caught:
        Lsat(LsatConfig(weight=0.5)).check(world.context(4))
    Lsat(LsatConfig(weight=0.5)).check(world.context(2))
    assert caught.value.hint == "use method.options.long_blocks=4 or more, or start from an adapter"


def test_without_validation_a_weight_has_to_be_given() -> None:
    world, method = World(), Lsat()
    world.learn(method, 2, drawn(1))
    with pytest.raises(ConfigError, match="weight=validation: block 3 has no validation target") as caught:
        method.begin_block(world.context(3))
    assert "method.options.weight=0.5" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lsat+olora", "lsat and olora would each keep the earlier blocks"),
        ("lsat+ewc", "ewc weighs entries of the factors against those of another block, lsat puts others"),
        ("retrain+lsat", "retrain and lsat would each say what is learned of earlier blocks"),
    ],
)
def test_what_cannot_be_joined_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(MethodConfig(name=name))


def test_a_joined_method_learns_the_blocks_that_lsat_says() -> None:
    method = build(MethodConfig(name="peso+lsat"))
    assert [list(method.learned_with(block)) for block in (2, 3)] == [[1, 2], [3]]


@cache
def stream() -> Stream:
    return simulate(SimulateConfig(users=60, items=40, blocks=4)).stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases with the same weights that say to have learned block 1 and blocks 1 and 2."""
    path = tmp_path_factory.mktemp("bases")
    number = np.arange(stream().n_items)
    sids = SidTable(tuple(stream().items["item"]), np.column_stack([number // 7, number % 7]), (6, 7))
    for block in (1, 2):
        save_base(path / str(block), *new_model("tiny", sids, seed=0), sids, {"fitted_block": block})
    return path


def learn(path: Path, base: Path, name: str, **options: Any) -> list[dict[str, Any]]:
    """The events of the blocks' ends; adapters are below `path`."""
    config = RunConfig(adapter=ADAPTER, train=TRAIN, method=MethodConfig(name=name, options=options))
    sink = MemorySink()
    Recommend().learn(path, config, stream(), load_base(base), sink, "hash", lambda _: {"seed": 0})
    return [event for event in sink.events if event["kind"] == "block"]


def test_over_a_stream_both_modules_are_learned_alone_and_saved_as_one_adapter(folder: Path, tmp_path: Path) -> None:
    said = learn(tmp_path / "lsat", folder / "1", "lsat", weight=0.25)
    assert [event.get("lsat/weight") for event in said] == [None, 0.25, 0.25]
    learn(tmp_path / "long", folder / "1", "retrain")  # of which block 2 is a fresh adapter on all data up to it
    learn(tmp_path / "short", folder / "2", "finetune")  # of which block 3 is a fresh adapter on its data alone
    base = load_base(folder / "1")
    long = read_adapter(adapter_folder(tmp_path / "long", 2), base)
    short = read_adapter(adapter_folder(tmp_path / "short", 3), base)
    first, served = (read_adapter(adapter_folder(tmp_path / "lsat", block), base) for block in (2, 3))
    assert all(torch.equal(tensor, first[name]) for name, tensor in long.items())
    for name, tensor in served.items():
        if ".lora_A." in name:
            torch.testing.assert_close(tensor, torch.cat([long[name], short[name]]))
        else:
            torch.testing.assert_close(tensor, torch.cat([0.25 * long[name], 0.75 * short[name]], dim=1))
    found = load_adapter(base, adapter_folder(tmp_path / "lsat", 3))
    plain = load_base(folder / "1").model
    with torch.no_grad():
        for name, down in served.items():
            if ".lora_A." in name:
                linear = plain.get_submodule(name.split(".lora_A")[0].removeprefix("base_model.model."))
                linear.weight += 3.0 * served[name.replace("_A.", "_B.")] @ down  # type: ignore[union-attr]
        torch.testing.assert_close(found(PROBE).logits, plain(PROBE).logits, rtol=1e-4, atol=1e-4)


def test_a_run_that_was_interrupted_between_blocks_keeps_its_long_term_module(folder: Path, tmp_path: Path) -> None:
    learn(tmp_path, folder / "1", "lsat")
    base = load_base(folder / "1")
    whole = read_adapter(adapter_folder(tmp_path, 4), base)
    adapter_folder(tmp_path, 4).rename(tmp_path / "old")
    (event,) = learn(tmp_path, folder / "1", "lsat")
    again = read_adapter(adapter_folder(tmp_path, 4), base)
    assert event["lsat/weight"] in [step / 10 for step in range(11)]
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
