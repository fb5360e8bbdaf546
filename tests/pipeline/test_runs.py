"""Runs end to end on a small stream: what is written, exact continuation, and what is refused before writing."""

import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from safetensors.torch import load_file

from cladapt.artifacts import read_json, write_json
from cladapt.config import (
    AdapterConfig,
    EvalConfig,
    MethodConfig,
    PretrainConfig,
    RunConfig,
    SimulateConfig,
    TokensConfig,
    TrainConfig,
)
from cladapt.data.histories import split_block
from cladapt.data.schema import Stream, write_manifest
from cladapt.data.simulate import ceiling, load_truth
from cladapt.errors import CheckFailed, ConfigError, DataError
from cladapt.eval.metrics import ROWS, summarise
from cladapt.model.load import load_base
from cladapt.pipeline import bases, compare, evaluation, growth, runs, streams
from cladapt.run import Run
from cladapt.train.sinks import MemorySink
from cladapt.workloads import recommend

SIMULATE = SimulateConfig(users=60, items=40, topics=4, blocks=3)
TOKENS = TokensConfig(dimensions=8, levels=2, codes=4, capacity=16)
PRETRAIN = PretrainConfig(epochs=2)
TRAIN = TrainConfig(epochs=3, batch_tokens=1024, precision="fp32")
EVAL: dict[str, Any] = {"bootstrap": 100}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `stream`, `base` and the run `peso` over them, evaluated."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        streams.simulate_data(folder / "stream", SIMULATE)
        streams.build_tokens(folder / "stream", TOKENS, None)
        bases.pretrain_base(folder / "stream", folder / "base", PRETRAIN, MemorySink())
        runs.train(config_of(folder), folder / "peso", MemorySink())
        evaluation.evaluate(folder / "peso", EVAL, None, MemorySink())
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # `runs/latest.json` belongs to the working folder


def config_of(world: Path, method: str = "peso", **train: Any) -> RunConfig:
    return RunConfig(
        data=str(world / "stream"),
        base=str(world / "base"),
        method=MethodConfig(name=method),
        train=TRAIN.model_copy(update=train),
    )


def adapters(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("adapters/*/*.safetensors"))}


def test_a_run_leaves_an_adapter_per_block_and_a_log(world: Path) -> None:
    run = Run.open(world / "peso")
    assert list(run.adapters) == [2, 3]
    assert run.config == config_of(world).model_copy(update={"ids": 1})
    base, stream = load_base(world / "base"), Stream.load(world / "stream")
    record = read_json(run.adapters[3] / "cladapt.json")
    expected = {
        "stream": stream.fingerprint,
        "base": base.fingerprint,
        "config": run.config_hash,
        "method": "peso",
        "block": 3,
        "parent": "block_002",
        "form": "packed",
        "window": 20,
        "softmax": "trie",
    }
    assert {key: record[key] for key in expected} == expected
    events = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert events[0]["kind"] == "kernels"
    assert [(e["block"], e["epoch"]) for e in events if e["kind"] == "epoch"] == [
        (b, e) for b in (2, 3) for e in (1, 2, 3)
    ]
    assert not list((run.path / "checkpoints").glob("*"))


def test_the_summary_names_what_comes_next_and_equals_the_log(world: Path, tmp_path: Path) -> None:
    sink = MemorySink()
    result = runs.train(config_of(world, epochs=1), None, sink)
    path = Path(result["run"])
    assert path.parent == Path("runs")
    assert Run.latest().path.resolve() == path.resolve()
    assert result["next"] == f"cladapt eval {path}"
    logged = [e for e in sink.events if e["kind"] == "block"]
    assert [(b["block"], b["steps"], b["kept_epoch"]) for b in result["blocks"]] == [
        (e["block"], e["steps"], e["kept_epoch"]) for e in logged
    ]


def test_the_same_run_twice_gives_the_same_adapters(world: Path, tmp_path: Path) -> None:
    runs.train(config_of(world), tmp_path / "again", MemorySink())
    assert adapters(tmp_path / "again") == adapters(world / "peso")


class CtrlC:
    """A sink that presses Ctrl-C at the event that has these fields."""

    def __init__(self, kind: str, **fields: int) -> None:
        self.when = {"kind": kind, **fields}

    def emit(self, event: Mapping[str, Any]) -> None:
        if self.when.items() <= event.items():
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("checkpoint_steps", [0, 2])
@pytest.mark.parametrize(("block", "step"), [(2, 1), (3, 3)])
def test_an_interrupted_run_continues_to_the_same_adapters(
    block: int, step: int, checkpoint_steps: int, world: Path, tmp_path: Path
) -> None:
    config = config_of(world, checkpoint_steps=checkpoint_steps)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        runs.train(config, run, CtrlC("step", block=block, step=step))
    # the step in which Ctrl-C came is finished and kept, whatever checkpoint_steps says
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert f"block_{block:03d}_step_{step:08d}" in names
    assert len(Run.open(run).adapters) == block - 2
    resumed = MemorySink()
    result = runs.resume(run, resumed)
    first = next(e for e in resumed.events if e["kind"] == "step")
    assert (first["block"], first["step"]) == (block, step + 1)
    assert [b["block"] for b in result["blocks"]] == list(range(block, 4))
    assert adapters(run) == adapters(world / "peso")
    assert not list((run / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", ["step", "epoch"])
def test_ctrl_c_at_the_end_of_a_block_is_not_lost(kind: str, world: Path, tmp_path: Path) -> None:
    events = [json.loads(line) for line in (world / "peso" / "log.jsonl").read_text().splitlines()]
    last = max(e[kind] for e in events if e["kind"] == kind and e["block"] == 2)
    with pytest.raises(KeyboardInterrupt):
        runs.train(config_of(world), tmp_path / "run", CtrlC(kind, block=2, **{kind: last}))
    runs.resume(tmp_path / "run", MemorySink())
    assert adapters(tmp_path / "run") == adapters(world / "peso")


def test_a_finished_run_resumes_to_nothing(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "peso", tmp_path / "run")
    before = adapters(tmp_path / "run")
    assert runs.resume(tmp_path / "run", MemorySink())["blocks"] == []
    assert adapters(tmp_path / "run") == before


def test_a_checkpoint_of_another_configuration_is_refused(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        runs.train(config_of(world), run, CtrlC("step", block=2, step=1))
    record = read_json(run / "config.json")
    record["config"]["train"]["lr"] = 0.5
    write_json(run / "config.json", record)
    with pytest.raises(DataError, match=r"was written under the configuration .*resume with the run's own"):
        runs.resume(run, MemorySink())


def test_evaluation_writes_rows_of_every_model_on_every_block(world: Path) -> None:
    stream = Stream.load(world / "stream")
    frames = [pl.read_parquet(world / "peso" / "users" / f"block_00{b}.parquet") for b in (1, 2, 3)]
    for block, frame in enumerate(frames, 1):
        assert frame.schema == ROWS
        assert frame["model_block"].value_counts().sort("model_block").rows() == [
            (t, split_block(stream, block).n_test) for t in (1, 2, 3)
        ]
    metrics = read_json(world / "peso" / "metrics.json")
    assert metrics["schema_version"] == 2
    means = summarise(pl.concat(frames), (5, 10), beams=20).to_dicts()
    assert metrics["matrix"] == [{**cell, "learned": False} for cell in means]
    truth = load_truth(world / "stream")
    assert metrics["ceiling"] == {str(b): ceiling(truth, stream, b, (5, 10)) for b in (2, 3)}
    assert (world / "peso" / "report.html").read_text().startswith("<!")


def test_the_latest_run_is_evaluated_by_default_and_settings_override_the_run_s(world: Path, tmp_path: Path) -> None:
    runs.train(config_of(world, epochs=1), tmp_path / "mine", MemorySink())
    sink = MemorySink()
    result = evaluation.evaluate(None, {**EVAL, "top_k": (3,), "beams": 5, "max_users": 10}, 3, sink)
    assert Path(result["run"]).resolve() == tmp_path / "mine"
    models = [line["model"] for line in result["table"]]
    assert models == ["peso", "frozen", "block popularity", "markov", "ceiling"]
    assert "HR@3" in result["table"][0]
    assert result["table"][0]["users"] == 10
    notes = [e["text"] for e in sink.events if e["kind"] == "note"]
    tested = [f"tested the model of block {t} on block 3: 10 users" for t in (1, 2, 3)]
    first = "and on the first events of block 3: 10 users"
    assert notes == [tested[0], first, tested[1], first, tested[2]]
    assert [line["model"] for line in result["next_block"]] == ["peso", "frozen", "block popularity", "markov"]
    names = sorted(path.name for path in (tmp_path / "mine" / "users").iterdir())
    counts = ["counts_block_popularity.parquet", "counts_markov.parquet"]
    rest = ["next_block.parquet", *(f"next_{name}" for name in counts), "tails.parquet"]
    assert names == ["block_003.parquet", *counts, *rest]


def test_ranges_are_checked_after_all_is_written(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "peso", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    value = read_json(world / "peso" / "metrics.json")["table"][0]["HR@10"]
    good.write_text(f"peso: {{HR@10: [{value - 1e-6}, {value + 1e-6}]}}")
    bad.write_text("peso: {HR@10: [2, 3]}\nmarkov: {MRR: [2, 3], HR@5: [0, 1]}")
    assert evaluation.evaluate(tmp_path / "run", EVAL, None, MemorySink(), good)["table"][0]["HR@10"] == value
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(CheckFailed, match=r"2 of 3 expected values do not hold: peso: HR@10=.*; markov: MRR="):
        evaluation.evaluate(tmp_path / "run", EVAL, None, MemorySink(), bad)
    assert read_json(tmp_path / "run" / "metrics.json") == read_json(world / "peso" / "metrics.json")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("peso: {HR@20: [0, 1]}", "no metric 'HR@20', did you mean 'HR@10'"),
        ("finetune: {HR@10: [0, 1]}", "no line 'finetune'"),
        ("peso: {HR@10: 1}", r"HR@10=1: expected \[low, high\]"),
    ],
)
def test_mistakes_in_the_ranges_show_before_the_evaluation(
    text: str, problem: str, world: Path, tmp_path: Path
) -> None:
    expected = tmp_path / "expected.yaml"
    expected.write_text(text)
    sink = MemorySink()
    with pytest.raises(ConfigError, match=problem):
        evaluation.evaluate(world / "peso", EVAL, None, sink, expected)
    assert sink.events == []


def test_evaluating_leaves_no_trace_of_one_model_in_the_next(world: Path, tmp_path: Path) -> None:
    rows = pl.read_parquet(world / "peso" / "users" / "block_002.parquet")
    run = Run.open(world / "peso")
    stream, base = run.workload.open_inputs(run.config)
    again = evaluation.measure(run, stream, base, EvalConfig(**EVAL), 2, MemorySink())
    assert again.rows.equals(rows)
    # the base was bare before and is bare again
    assert not [name for name, _ in base.model.named_parameters() if "lora" in name]
    twice = evaluation.measure(run, stream, base, EvalConfig(**EVAL), 2, MemorySink())
    assert twice.rows.equals(rows)


def test_cells_that_were_learned_are_marked_and_no_memory(world: Path, tmp_path: Path) -> None:
    runs.train(config_of(world, "finetune", epochs=1, held_out="next"), tmp_path / "run", MemorySink())
    result = evaluation.evaluate(tmp_path / "run", EVAL, None, MemorySink())
    metrics = read_json(tmp_path / "run" / "metrics.json")
    learned = {(cell["model_block"], cell["block"]) for cell in metrics["matrix"] if cell["learned"]}
    assert learned == {(2, 1), (3, 1), (3, 2)}
    for line in result["continual"]:
        assert line["backward transfer"] is None
        assert line["plasticity"] is not None
        assert line["left out"].startswith("backward transfer without block 1, 2: the last model has learned")
    assert (tmp_path / "run" / "report.html").read_text().count("<s>") == 3 * 3  # of three headline metrics
    found = evaluation.Evaluated.read(Run.open(tmp_path / "run")).measures
    assert found.learned == learned
    both = compare.compare_runs([tmp_path / "run", world / "peso"])
    assert not [line for line in both["differences"] if line["metric"].startswith("backward")]


def test_a_method_that_does_not_train_has_base_rows_alone(world: Path, tmp_path: Path) -> None:
    result = runs.train(config_of(world, "frozen"), tmp_path / "run", MemorySink())
    assert result["blocks"] == []
    table = evaluation.evaluate(tmp_path / "run", EVAL, None, MemorySink())["table"]
    assert [line["model"] for line in table] == ["frozen", "block popularity", "markov", "ceiling"]


def test_adapters_of_a_method_that_does_not_train_are_refused(world: Path, tmp_path: Path) -> None:
    runs.train(config_of(world, "frozen"), tmp_path / "run", MemorySink())
    shutil.copytree(world / "peso" / "adapters", tmp_path / "run" / "adapters")
    with pytest.raises(DataError, match=r"run has adapters for the blocks \[2, 3\], frozen leaves none"):
        evaluation.evaluate(tmp_path / "run", EVAL, None, MemorySink())


def test_a_run_of_another_task_is_not_resumed_as_this_one(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--task classify: .*peso is a run of --task recommend \(leave out --task\)"):
        runs.resume(world / "peso", MemorySink(), {}, "classify")


def test_a_run_starts_from_an_adapter_and_remembers_it(world: Path, tmp_path: Path) -> None:
    start = str(world / "peso" / "adapters" / "block_002")
    config = config_of(world, "finetune").model_copy(update={"from_adapter": start})
    runs.train(config, tmp_path / "run", MemorySink())
    (record,) = (read_json(folder / "cladapt.json") for folder in Run.open(tmp_path / "run").adapters.values())
    assert (record["block"], record["parent"], record["from_adapter"]) == (3, start, start)
    result = evaluation.evaluate(tmp_path / "run", EVAL, None, MemorySink())
    assert [line["model"] for line in result["table"]][:2] == ["finetune", "frozen"]
    rows = pl.read_parquet(tmp_path / "run" / "users" / "block_003.parquet")
    assert sorted(rows["model_block"].unique()) == [2, 3]  # what it starts from is the frozen line


def test_a_plan_counts_what_a_run_does_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    plan = runs.plan(config_of(world))
    assert list(tmp_path.iterdir()) == []
    sink = MemorySink()
    runs.train(config_of(world), tmp_path / "run", sink)
    done = {e["block"]: e for e in sink.events if e["kind"] == "block"}
    stream = Stream.load(world / "stream")
    for block in plan["blocks"]:
        split = split_block(stream, block["block"])
        targets = sum(len(split.training(i)[0]) - split.training(i)[1] for i in range(len(split.user)))
        assert block["targets"] == targets
        assert block["tokens_per_epoch"] * TRAIN.epochs == done[block["block"]]["tokens"]
        assert block["steps"] == done[block["block"]]["steps"]
        assert 0.0 < block["filled"] <= 1.0
    tensors = load_file(tmp_path / "run" / "adapters" / "block_002" / "adapter_model.safetensors")
    assert plan["trained_parameters"] == sum(t.numel() for t in tensors.values())
    assert plan["adapted_modules"] == len({name.split(".lora_")[0] for name in tensors})
    assert plan["base_parameters"] == sum(p.numel() for p in load_base(world / "base").model.parameters())
    assert plan["method_state_bytes"] == 4 * plan["trained_parameters"]  # PESO's anchor


def test_a_plan_counts_an_example_for_each_target_and_what_two_passes_keep(world: Path) -> None:
    forms = [MethodConfig(name="eisam", options={"targets": targets}) for targets in ("packed", "exact")]
    packed, apart = (runs.plan(config_of(world).model_copy(update={"method": form})) for form in forms)
    for one, other in zip(packed["blocks"], apart["blocks"], strict=True):
        assert one["documents"] < one["targets"] == other["targets"] == other["documents"]
        assert one["tokens_per_epoch"] < other["tokens_per_epoch"]
    plain = runs.plan(config_of(world, "finetune"))
    assert packed["memory"]["activations"] > plain["memory"]["activations"]


def test_a_plan_says_where_nothing_is_left_to_learn(world: Path, tmp_path: Path) -> None:
    stream = Stream.load(world / "stream")
    shutil.copytree(world / "stream", tmp_path / "stream")
    write_manifest(tmp_path / "stream", stream.prefix(1).manifest)
    with pytest.warns(UserWarning, match=r"base has learned all 1 blocks of .*stream: nothing is left to learn"):
        plan = runs.plan(config_of(world).model_copy(update={"data": str(tmp_path / "stream")}))
    assert plan["blocks"] == []


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"data": "nowhere"}, DataError, "nowhere is not a stream directory"),
    ({"base": "nowhere"}, DataError, r"nowhere is not a base\+tokens directory"),
    ({"method": MethodConfig(name="pesto")}, ConfigError, "no method 'pesto'.*did you mean 'peso'"),
    ({"method": MethodConfig(options={"x": 1})}, ConfigError, "unknown key 'x'"),
    ({"adapter": AdapterConfig(targets="nothing")}, ConfigError, "adapter.targets='nothing'"),
    ({"train": TrainConfig(row_tokens=8)}, ConfigError, "row_tokens=8 holds 2 items"),
]


@pytest.mark.parametrize("start", [lambda config: runs.train(config, Path("run"), MemorySink()), runs.plan])
@pytest.mark.parametrize(("change", "kind", "text"), BAD)
def test_what_is_wrong_shows_before_anything_is_written(
    change: dict[str, Any], kind: type[Exception], text: str, start: Any, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=text):
        start(config_of(world).model_copy(update=change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", [lambda config: runs.train(config, Path("run"), MemorySink()), runs.plan])
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    start: Any, world: Path, tmp_path: Path
) -> None:
    adapter = str(world / "peso" / "adapters" / "block_003")
    for change, text in (
        ({"from_adapter": "nowhere"}, "nowhere is not an adapter directory"),
        ({"from_adapter": adapter, "adapter": AdapterConfig(rank=2)}, "the adapter does not fit this model"),
        ({"from_adapter": adapter, "adapter": AdapterConfig(alpha=32.0)}, "scale alpha / r = 2, this adapter has 4"),
    ):
        with pytest.raises(DataError, match=text):
            start(config_of(world).model_copy(update=change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["from_adapter", "else"])
def test_an_input_that_the_run_does_not_have_is_told(name: str, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "peso", tmp_path / "run")
    record = read_json(tmp_path / "run" / "config.json")
    write_json(tmp_path / "run" / "config.json", {**record, "inputs": {**record["inputs"], name: "abc"}})
    with pytest.raises(DataError, match=rf"began with other inputs: {name} \(.*\) is None, it was abc"):
        runs.resume(tmp_path / "run", MemorySink())


@pytest.mark.parametrize("start", [lambda config: runs.train(config, Path("run"), MemorySink()), runs.plan])
def test_an_adapter_that_does_not_say_what_it_has_learned_is_no_start(start: Any, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "peso" / "adapters" / "block_002", tmp_path / "bare")
    record = read_json(tmp_path / "bare" / "cladapt.json")
    write_json(tmp_path / "bare" / "cladapt.json", {key: value for key, value in record.items() if key != "block"})
    with pytest.raises(DataError, match=r"bare/cladapt\.json lacks block: what it has learned is not known"):
        start(config_of(world).model_copy(update={"from_adapter": "bare"}))
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


@pytest.mark.parametrize("given", ["data", "base"])
def test_half_of_the_inputs_is_a_mistake(given: str, world: Path, tmp_path: Path) -> None:
    missing = {"data": "base", "base": "data"}[given]
    config = RunConfig().model_copy(update={given: str(world / given)})
    with pytest.raises(ConfigError, match=rf"{given}='.*' without {missing} \(give both, or neither"):
        runs.train(config, None, MemorySink())
    with pytest.raises(
        ConfigError, match=r"needs --data and --base .*--data runs/embedded/stream --base runs/embedded/base"
    ):
        runs.plan(config)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_the_base_was_not_made_from_is_refused(world: Path, tmp_path: Path) -> None:
    streams.simulate_data(tmp_path / "other", SIMULATE.model_copy(update={"seed": 1}))
    config = config_of(world).model_copy(update={"data": str(tmp_path / "other")})
    with pytest.raises(DataError, match=r"was trained on block 1 of the stream .*no test event is in its training"):
        recommend.Recommend().open_inputs(config)


def test_a_run_waits_for_blocks_where_its_base_has_seen_all(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    record = read_json(tmp_path / "base" / "cladapt.json")
    write_json(tmp_path / "base" / "cladapt.json", {**record, "fitted_block": 3})
    config = config_of(world).model_copy(update={"base": str(tmp_path / "base")})
    sink = MemorySink()
    report = runs.train(config, tmp_path / "run", sink)
    assert (report["blocks"], report["next"]) == ([], f"cladapt update LOG --run {tmp_path / 'run'}")
    said = "the base has learned all blocks of the stream, 1 to 3: the run waits for the next"
    assert {"kind": "note", "text": said}.items() <= next(e for e in sink.events if e["kind"] == "note").items()
    with pytest.raises(ConfigError, match=r"there is nothing to test .* on: its stream has 3 blocks") as caught:
        evaluation.evaluate(tmp_path / "run", {}, None, sink)
    assert caught.value.hint.startswith("append the next block")


def test_a_run_with_missing_blocks_is_not_measured(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "peso", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "adapters" / "block_003")
    with pytest.raises(DataError, match=r"half has adapters for the blocks \[2\], the stream needs \[2, 3\].*--resume"):
        evaluation.evaluate(tmp_path / "half", EVAL, None, MemorySink())


@pytest.mark.parametrize("block", [0, 4])
def test_a_block_that_is_not_there_is_refused(block: int, world: Path) -> None:
    with pytest.raises(ConfigError, match=f"--block {block}: the stream has blocks 1 to 3"):
        evaluation.evaluate(world / "peso", EVAL, block, MemorySink())


def test_the_embedded_inputs_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommend, "SimulateConfig", lambda: SIMULATE)
    monkeypatch.setattr(recommend, "TokensConfig", lambda: TOKENS)
    monkeypatch.setattr(recommend, "PretrainConfig", lambda: PretrainConfig(epochs=1))
    sink = MemorySink()
    config = runs.with_embedded(RunConfig(), sink)
    assert (config.data, config.base) == ("runs/embedded/stream", "runs/embedded/base")
    assert [e["text"].split(" in ")[0] for e in sink.events if e["kind"] == "note"] == [
        "simulating the embedded stream",
        "training the embedded base",
    ]
    print_before = load_base(Path(config.base)).fingerprint
    again = MemorySink()
    assert runs.with_embedded(RunConfig(), again) == config
    assert again.events == []
    assert load_base(Path(config.base)).fingerprint == print_before
    assert runs.with_embedded(config, again) == config


def test_a_block_that_was_not_simulated_has_no_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    streams.simulate_data(Path("stream"), SIMULATE)
    streams.build_tokens(Path("stream"), TokensConfig(dimensions=8, levels=2, codes=4, capacity=16), None)
    bases.pretrain_base(Path("stream"), Path("base"), PretrainConfig(epochs=0), MemorySink())
    known = Stream.load(Path("stream"))
    items, end = known.items["item"].to_list(), int(known.interactions["timestamp"].max())  # type: ignore[arg-type]
    rows = [f"someone{u},{items[k]},{end + 1 + u + 10 * k}" for u in range(3) for k in range(4)]
    Path("log.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    growth.append_data(Path("stream"), "log.csv")
    config = RunConfig(data="stream", base="base", method=MethodConfig(name="frozen"))
    runs.train(config, Path("run"), MemorySink())
    sink = MemorySink()
    evaluation.evaluate(Path("run"), EVAL, None, sink)
    last = known.n_blocks + 1
    assert sorted(read_json(Path("run") / "metrics.json")["ceiling"]) == [str(b) for b in range(2, last)]
    assert any(f"block {last} has no ceiling" in str(event.get("text")) for event in sink.events)
