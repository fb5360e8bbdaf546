"""Training with the ops in place against training without: the same losses, adapters and figures, resumable."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from cladapt.artifacts import read_tensors
from cladapt.config import (
    AdapterConfig,
    MethodConfig,
    PretrainConfig,
    RunConfig,
    SimulateConfig,
    TokensConfig,
    TrainConfig,
)
from cladapt.errors import ConfigError
from cladapt.methods.peso import Peso
from cladapt.pipeline import bases, runs, streams
from cladapt.train.sinks import MemorySink
from cladapt_kernels.lora import linear
from cladapt_kernels.lora.routes import Factors, Route

STRENGTH = {"literal": 50.0, "scaled": 0.1, "l2": 5.0}
FORMS = [("scaled", "factor"), ("scaled", "module"), ("literal", "factor"), ("l2", "factor")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    streams.simulate_data(folder / "stream", SimulateConfig(users=60, items=40, topics=4, blocks=3))
    streams.build_tokens(folder / "stream", TokensConfig(dimensions=8, levels=2, codes=4, capacity=16), None)
    bases.pretrain_base(folder / "stream", folder / "base", PretrainConfig(epochs=1), MemorySink())
    return folder


@pytest.fixture(autouse=True)
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stream", "base"):
        (tmp_path / name).symlink_to(world / name)
    monkeypatch.chdir(tmp_path)


def config(form: str, groups: str = "factor", method: str = "peso", place: str = "auto") -> RunConfig:
    options = {"regulariser": form, "groups": groups, "strength": STRENGTH[form], "place": place}
    return RunConfig(
        data="stream",
        base="base",
        method=MethodConfig(name=method, options={f"peso.{name}": value for name, value in options.items()}),
        adapter=AdapterConfig(rank=2, dropout=0.1),
        train=TrainConfig(epochs=2, batch_tokens=512, clip=0.05, checkpoint_steps=2),
    )


def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cladapt.ops.uses_kernel", lambda op, *_: op == "prox_adamw")


def steps(run: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["kind"] == "step"]


def factors(run: str) -> dict[str, torch.Tensor]:
    files = sorted(Path(run).glob("adapters/*/adapter_model.safetensors"))
    return {f"{file.parent.name}/{name}": t for file in files for name, t in read_tensors(file).items()}


@pytest.mark.parametrize(("form", "groups"), FORMS)
def test_inside_the_step_a_term_does_what_it_does_before_it(
    form: str, groups: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(form, groups)
    runs.train(settings, Path("before"), MemorySink())
    inside(monkeypatch)
    runs.train(settings, Path("inside"), MemorySink())
    expected, found = factors("before"), factors("inside")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    keys = ("loss", "grad_norm", "peso/term", "peso/distance", "peso/ratio", "peso/cosine")
    for one, two in zip(steps("before"), steps("inside"), strict=True):
        assert one.keys() == two.keys()
        for key in keys:
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=2e-3, abs=1e-6), (one["block"], one["step"], key)
    assert max(step.get("peso/term", 0.0) for step in steps("inside")) > 0


def test_a_run_with_every_op_in_place_is_the_run_without(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config("scaled")
    # the masks of the op and of torch are others
    settings = settings.model_copy(update={"adapter": AdapterConfig(rank=2, dropout=0.0)})
    runs.train(settings, Path("without"), MemorySink())
    monkeypatch.setattr("cladapt.ops.uses_kernel", lambda *_: True)
    monkeypatch.setattr("peft.tuners.lora.Linear.forward", None)  # no layer takes PEFT's way
    runs.train(settings, Path("with"), MemorySink())
    expected, found = factors("without"), factors("with")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5)
    for one, two in zip(steps("without"), steps("with"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def with_linears(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    """The fused linears everywhere; with `kernels` the factors' gradients and the term are computed by them."""
    monkeypatch.setattr("cladapt.ops.uses_kernel", lambda op, *_: op in ("lora_linear", "prox_adamw"))
    factors: Factors = "skinny" if kernels else "matmul"
    monkeypatch.setattr(linear, "route", lambda *_: Route("addmm", "addmm", factors, "asked for"))
    if kernels:
        monkeypatch.setattr("cladapt_kernels.optim.proximal.launch_obstacle", lambda *_: "")
        monkeypatch.setattr("cladapt_kernels.optim.optimizer.launch_obstacle", lambda *_: "")


@pytest.mark.parametrize(
    ("method", "form", "asked", "taken"),
    [
        ("peso", "scaled", "epilogue", "epilogue"),
        ("peso+eblora", "scaled", "auto", "epilogue"),
        ("eblora+peso", "l2", "auto", "optimiser"),
    ],
)
def test_a_term_does_the_same_in_every_place(
    method: str, form: str, asked: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_linears(monkeypatch, kernels=False)
    check_places(method, form, asked, taken, {}, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["peso", "peso+eblora"])
def test_the_kernels_train_what_plain_torch_trains(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_linears(monkeypatch, kernels=True)
    skinny = pytest.importorskip("cladapt_kernels.lora.skinny", reason="the kernels are written in triton")
    joined = Mock(wraps=skinny.proximal_of)
    monkeypatch.setattr(skinny, "proximal_of", joined)
    one_linear = AdapterConfig(rank=2, dropout=0.1, targets=r".*layers\.0\.self_attn\.q_proj")
    check_places(method, "scaled", "epilogue", "epilogue", {"adapter": one_linear}, monkeypatch)
    assert joined.called


def check_places(
    method: str, form: str, asked: str, taken: str, changes: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training with the term where it is asked for is training with it added by plain torch."""
    places: list[str] = []
    place = Peso._place
    monkeypatch.setattr(Peso, "_place", lambda own, ctx: places.append(place(own, ctx)) or places[-1])
    for name in ("eager", asked):
        settings = config(form, method=method, place=name)
        train = settings.train.model_copy(update={"epochs": 1, "accumulation": 2, "batch_tokens": 256})
        runs.train(settings.model_copy(update={"train": train, **changes}), Path(name), MemorySink())
    assert {*places} == {"eager", taken}
    expected, found = factors("eager"), factors(asked)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5)
    for one, two in zip(steps("eager"), steps(asked), strict=True):
        assert one.keys() == two.keys()
        for key in ("loss", "grad_norm", *(key for key in one if "peso/" in key)):
            # a cosine is off by as much as its vectors are, relative to their lengths
            near = pytest.approx(one[key], rel=2e-3, abs=2e-3 if key == "peso/cosine" else 1e-6)
            assert two[key] == near, (one["block"], one["step"], key)
    assert max(step.get("peso/term", 0.0) for step in steps(asked)) > 0


@pytest.mark.parametrize(
    ("method", "place", "message"),
    [
        ("peso", "epilogue", r"place=epilogue: the linears do not run the fused op \(auto: there is no GPU"),
        ("peso+eblora", "optimiser", "place=optimiser: a method that comes after peso edits gradients"),
        ("eblora+peso", "epilogue", "place=epilogue: a method that comes before peso edits gradients"),
    ],
)
def test_a_place_where_the_term_cannot_join_is_refused(method: str, place: str, message: str) -> None:
    if torch.cuda.is_available() and method == "peso":
        pytest.skip("the linears run the fused op")
    with pytest.raises(ConfigError, match=message) as caught:
        runs.train(config("scaled", method=method, place=place), Path("run"), MemorySink())
    assert caught.value.hint == "use place=auto"
    assert not Path("run").exists()
    with pytest.raises(ConfigError, match=message):
        runs.plan(config("scaled", method=method, place=place))


class Stops(MemorySink):
    """Fails at a step of block 3, as a kill would."""

    def emit(self, event: Mapping[str, Any]) -> None:
        super().emit(event)
        if {"kind": "step", "block": 3, "step": 3}.items() <= event.items():
            raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["optimiser", "epilogue"])
def test_a_run_with_the_term_inside_resumes_to_the_same_bits(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_linears(monkeypatch, kernels=False)
    settings = config("scaled", place=place)
    runs.train(settings, Path("whole"), MemorySink())
    with pytest.raises(KeyboardInterrupt):
        runs.train(settings, Path("part"), Stops())
    runs.resume(Path("part"), MemorySink())
    expected, found = factors("whole"), factors("part")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
