"""Settings that spare memory: the precision is settled once, layers computed again change nothing, what cannot be is
refused before anything is read."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cladapt import ops
from cladapt.artifacts import hash_value, read_json, write_json
from cladapt.config import AdapterConfig, MethodConfig, RunConfig, TrainConfig
from cladapt.errors import ConfigError, EnvironmentProblem
from cladapt.pipeline import runs
from cladapt.run import FOLDERS, Run
from cladapt.train.sinks import MemorySink

TRAIN = TrainConfig(epochs=1, batch_tokens=512, row_tokens=128)


def config_of(growth: Path, **train: Any) -> RunConfig:
    return RunConfig(
        data=str(growth / "short"),
        base=str(growth / "base"),
        adapter=AdapterConfig(rank=2, dropout=0.3),
        train=TRAIN.model_copy(update=train),
    )


@pytest.fixture(scope="module")
def plain(growth: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one block."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs.train(config_of(growth), folder / "run", MemorySink())
    return folder / "run"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def adapter(run: Path) -> bytes:
    return (run / "adapters" / "block_002" / "adapter_model.safetensors").read_bytes()


class Stops(MemorySink):
    def emit(self, event: Any) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            raise KeyboardInterrupt


def test_the_precision_of_this_machine_is_recorded(plain: Path) -> None:
    assert TRAIN.precision == "auto"
    assert read_json(plain / "config.json")["config"]["train"]["precision"] == ops.precision("auto")
    assert Run.open(plain).config.train.precision == ops.precision("auto")


def test_a_run_keeps_its_precision_on_another_machine(
    growth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setattr(ops, "precision", lambda configured: "bf16" if configured == "auto" else configured)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config_of(growth), tmp_path / "run", Stops())
    assert Run.open(tmp_path / "run").config.train.precision == "bf16"
    with pytest.raises(ConfigError, match=r"train.precision='fp32', the run has 'bf16'"):
        runs.resume(tmp_path / "run", MemorySink(), {"train": {"precision": "fp32"}})
    runs.resume(tmp_path / "run", MemorySink(), {"train": {"precision": "auto"}})
    runs.train(config_of(growth, precision="bf16"), tmp_path / "bf16", MemorySink())
    assert adapter(tmp_path / "run") == adapter(tmp_path / "bf16")


def test_a_run_with_layers_computed_again_leaves_the_same_adapter(growth: Path, plain: Path, tmp_path: Path) -> None:
    runs.train(config_of(growth, checkpointing=True), tmp_path / "run", MemorySink())
    assert adapter(tmp_path / "run") == adapter(plain)
    assert Run.open(tmp_path / "run").config_hash == Run.open(plain).config_hash


@pytest.mark.skipif(torch.cuda.is_available(), reason="models run on a GPU, the profiler counts the CPU's")
def test_a_plan_says_what_a_run_takes(growth: Path, tmp_path: Path, measured: Any) -> None:
    config = RunConfig(
        data=str(growth / "short"),
        base=str(growth / "base"),
        method=MethodConfig(name="peso"),
        train=TrainConfig(epochs=2, batch_tokens=2048, row_tokens=128, precision="fp32"),
    )
    plan = runs.plan(config)
    assert plan["memory_bytes"] == sum(plan["memory"].values())
    with measured() as peak:
        runs.train(config, tmp_path / "run", MemorySink())
    assert plan["memory_bytes"] == pytest.approx(peak.bytes, rel=0.2)
    spared = runs.plan(config.model_copy(update={"train": config.train.model_copy(update={"checkpointing": True})}))
    assert spared["memory"]["activations"] < plan["memory"]["activations"]


def test_a_run_from_before_these_settings_goes_on(growth: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs.train(config_of(growth, checkpoint_steps=1), tmp_path / "run", Stops())
    record = read_json(tmp_path / "run" / "config.json")
    for key in ("quantisation", "sharding", "ids"):
        del record["config"][key]
    del record["config"]["train"]["checkpointing"]
    write_json(tmp_path / "run" / "config.json", record)
    old = {k: v for k, v in record["config"].items() if k not in ("eval", "track", *FOLDERS)}
    (place,) = (tmp_path / "run" / "checkpoints").glob("*/position.json")
    assert read_json(place)["config"] == hash_value(old)  # what the version without them wrote
    runs.resume(tmp_path / "run", MemorySink())
    assert adapter(tmp_path / "run") == adapter(plain)


@pytest.mark.parametrize("start", [lambda config: runs.train(config, Path("run"), MemorySink()), runs.plan])
@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("eblora", "eblora takes gradients of the base's own weights"),
        ("peso+eblora", "gradients of the base's own weights"),
        ("full", "full learns matrices as large as the base's own"),
    ],
)
@pytest.mark.parametrize(("key", "form"), [("quantisation", "4bit"), ("sharding", "full")])
def test_methods_that_need_the_weights_themselves_are_refused_where_they_are_packed_or_cut(
    key: str, form: str, method: str, reason: str, start: Any, growth: Path
) -> None:
    config = config_of(growth).model_copy(update={key: form, "method": MethodConfig(name=method)})
    with pytest.raises(ConfigError, match=f"^{key}={form}: .*{reason}") as caught:
        start(config)
    assert caught.value.hint == f"use {key}=none, or another method"
    assert not Path("run").exists()


def test_perturbed_factors_are_refused_on_packed_weights(growth: Path) -> None:
    method = MethodConfig(name="peso+eisam")
    config = config_of(growth).model_copy(update={"quantisation": "4bit", "method": method})
    with pytest.raises(ConfigError, match=r"^quantisation=4bit: peso\+eisam perturbs the factors of plain linears"):
        runs.plan(config)


def test_an_adapted_head_over_all_tokens_is_refused_where_factors_are_perturbed(growth: Path) -> None:
    config = config_of(growth, softmax="vocabulary")
    perturbed = config.model_copy(update={"method": MethodConfig(name="peso+eisam")})
    with pytest.raises(ConfigError, match=r"peso\+eisam cannot perturb an adapted head over all tokens") as caught:
        runs.train(perturbed, Path("run"), MemorySink())
    assert caught.value.hint == "use train.softmax=trie, or leave the head out of adapter.targets"
    assert not Path("run").exists()
    without_head = perturbed.adapter.model_copy(update={"targets": "all-linear"})
    assert runs.plan(perturbed.model_copy(update={"adapter": without_head}))["blocks"]


@pytest.mark.parametrize("name", ["lwf", "peso+lwf"])
def test_a_method_that_reads_choices_is_refused_where_none_are_told_apart(growth: Path, name: str) -> None:
    config = config_of(growth, softmax="vocabulary").model_copy(update={"method": MethodConfig(name=name)})
    with pytest.raises(ConfigError, match=r"^train\.softmax=vocabulary: .*lwf compares what the model makes") as caught:
        runs.train(config, Path("run"), MemorySink())
    assert caught.value.hint == "use train.softmax=trie"
    assert not Path("run").exists()


def test_one_process_cuts_nothing_and_packed_weights_are_not_cut(growth: Path) -> None:
    config = config_of(growth).model_copy(update={"sharding": "full"})
    with pytest.raises(
        ConfigError, match=r"^sharding=full cuts the base over several processes, this is one"
    ) as caught:
        runs.train(config, Path("run"), MemorySink())
    assert caught.value.hint.startswith("start several: torchrun")
    with pytest.raises(ConfigError, match=r"^quantisation=4bit and sharding=full: bitsandbytes' packed weights"):
        runs.plan(config.model_copy(update={"quantisation": "4bit"}))
    assert not Path("run").exists()


def test_four_bits_without_bitsandbytes_are_refused_with_the_reason(
    growth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    config = config_of(growth).model_copy(update={"quantisation": "4bit"})
    with pytest.raises(EnvironmentProblem, match=r"^quantisation=4bit: bitsandbytes cannot be loaded: ") as caught:
        runs.train(config, Path("run"), MemorySink())
    assert caught.value.hint.startswith("pip install 'cladapt[quant]'")
    assert not Path("run").exists()


def test_a_base_in_four_bits_is_the_saved_one_and_adapters_learn_on_it(growth: Path, plain: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the quant extra")
    config = config_of(growth).model_copy(update={"quantisation": "4bit"})
    work = Run.open(plain).workload
    _, base = work.open_inputs(config)
    assert base.fingerprint == work.open_inputs(config_of(growth))[1].fingerprint
    packed = {type(m).__name__ for m in base.model.modules() if isinstance(m, torch.nn.Linear)}
    assert "Linear4bit" in packed
    runs.train(config, Path("run"), MemorySink())
    assert Run.open(Path("run")).config.quantisation == "4bit"
    assert adapter(Path("run")) != adapter(plain)
