"""`base tune` whole: from a source to base+tokens, stopped and gone on with, and what it refuses."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from cladapt import ops
from cladapt.artifacts import read_json
from cladapt.config import (
    InitConfig,
    RunConfig,
    SimulateConfig,
    TaskWeights,
    TokensConfig,
    TrainConfig,
    TuneConfig,
    resolve,
)
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError, EnvironmentProblem
from cladapt.model.load import extend_model, load_base
from cladapt.pipeline import bases, streams
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import sid_token_ids
from cladapt.train import checkpoint as checkpoints
from cladapt.train.sinks import MemorySink
from cladapt.train.tune import lesson
from cladapt.workloads.recommend import Recommend
from cladapt_cli.app import run as command

TASKS = {"sequence": 1, "title_to_id": 0.5, "id_to_title": 0.5, "titles_to_id": 0.1, "ids_to_title": 0.1}
TOKENS = TokensConfig(dimensions=8, levels=2, codes=4, capacity=16)


def config(**changes: Any) -> TuneConfig:
    quick = {"epochs": 2, "lr": 1e-2, "row_tokens": 320, "title_tokens": 12, "window": 3, "tasks": TASKS}
    return TuneConfig.model_validate(quick | changes)


class Stops(MemorySink):
    """Ctrl-C at one step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def emit(self, event: Mapping[str, Any]) -> None:
        super().emit(event)
        if event["kind"] == "step" and event["step"] == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def world(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `stream`, the checkpoint `source`, the base `init` without learned rows and the base `tuned`."""
    folder = tmp_path_factory.mktemp("world")
    streams.simulate_data(folder / "stream", SimulateConfig(users=24, items=30, topics=4, blocks=2))
    streams.build_tokens(folder / "stream", TOKENS, None)
    checkpoint(folder / "source")
    init = InitConfig(epochs=0)
    bases.init_base(str(folder / "source"), folder / "stream", folder / "init", "packed", init, MemorySink())
    bases.tune_base(str(folder / "source"), folder / "stream", folder / "tuned", config(), MemorySink())
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes", [{}, {"rank": 4}, {"untie": True}, {"rank": 4, "untie": True, "form": "prompt", "history": "both"}]
)
def test_a_tuned_base_is_a_checkpoint_that_has_learned_block_1(
    changes: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    sink, out = MemorySink(), tmp_path / "out"
    report = bases.tune_base(str(world / "source"), world / "stream", out, config(**changes), sink)
    base, stream = load_base(out), Stream.load(world / "stream")
    assert base.fitted_block == 1
    assert base.provenance["stream"] == stream.fingerprints[0]
    assert base.provenance["form"] == changes.get("form", "packed")
    resolved = {"precision": ops.precision("auto")}
    assert TuneConfig(**base.provenance["config"]) == config(**changes).model_copy(update=resolved)
    epochs = [e["valid_log_likelihood"] for e in sink.events if e["kind"] == "epoch"]
    assert report["valid_log_likelihood"] == max(epochs) > report["start_log_likelihood"]
    untied = "untie" in changes
    assert report["head_bytes"] == (base.model.get_output_embeddings().weight.numel() * 4 if untied else 0)
    assert report["rows_by_meaning"] > 0
    assert {row["task"]: row["weight"] for row in report["tasks"]} == TASKS
    stock: Any = AutoModelForCausalLM.from_pretrained(out)
    assert stock.config.tie_word_embeddings is not untied
    inputs = torch.tensor([base.tokenizer.encode("the next item<a_1><b_2><c_0>", add_special_tokens=False)])
    with torch.no_grad():
        assert torch.equal(stock(inputs).logits, base.model(inputs).logits)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}  # no checkpoint is left
    train = TrainConfig(form=base.provenance["form"], history=base.provenance["history"])
    found, opened = Recommend().open_inputs(RunConfig(data=str(world / "stream"), base=str(out), train=train))
    assert opened.sids.items == tuple(found.items["item"])


def test_tuning_from_init_is_tuning_from_its_source(world: Path, tmp_path: Path) -> None:
    report = bases.tune_base(str(world / "init"), world / "stream", tmp_path / "out", config(), MemorySink())
    assert weights(tmp_path / "out") == weights(world / "tuned")
    assert report["new_tokens"] == 0
    assert load_base(tmp_path / "out").provenance["parent_base"] == load_base(world / "init").fingerprint


def test_rows_and_weights_of_the_source_start_as_asked(world: Path, tmp_path: Path) -> None:
    made = {}
    for name, changes in (
        ("meaning", {}),
        ("random rows", {"rows": "random"}),
        ("random weights", {"weights": "random", "seed": 1}),
        ("untied", {"untie": True}),
    ):
        settings = InitConfig.model_validate({"epochs": 0, **changes})
        folder = tmp_path / name
        report = bases.init_base(str(world / "source"), world / "stream", folder, "packed", settings, MemorySink())
        assert (report["rows_by_meaning"] > 0) == (name != "random rows")
        made[name] = load_base(folder)
    ids = sid_token_ids(made["meaning"].tokenizer, made["meaning"].sids)
    tables = {name: base.model.get_input_embeddings().weight for name, base in made.items()}
    assert (tables["meaning"][ids] != tables["random rows"][ids]).any()
    assert torch.equal(tables["meaning"][: ids[0]], tables["random rows"][: ids[0]])
    assert torch.equal(tables["meaning"], tables["untied"])
    assert torch.equal(tables["untied"], made["untied"].model.get_output_embeddings().weight)
    assert (tables["random weights"][: ids[0]] != tables["meaning"][: ids[0]]).any()


def test_nothing_that_comes_after_block_1_matters(world: Path, tmp_path: Path) -> None:
    Stream.load(world / "stream").prefix(1).save(tmp_path / "first")
    streams.build_tokens(tmp_path / "first", TOKENS, None)
    bases.tune_base(str(world / "source"), tmp_path / "first", tmp_path / "out", config(), MemorySink())
    assert weights(tmp_path / "out") == weights(world / "tuned")


def test_held_out_events_are_in_no_document(world: Path) -> None:
    """The log without its validation and test events gives the same documents of every task."""
    from cladapt.data.histories import split_block
    from cladapt.tokens.prompts import LeftOut

    stream = Stream.load(world / "stream").prefix(1)
    base = load_base(world / "init")
    split = split_block(stream, 1)
    counts = sum(len(split.training(i)[0]) for i in range(len(split.user)))
    learned = lesson(base, stream, config())
    targets = {name: sum(int(d.loss.sum()) for d in documents) for name, (documents, _) in learned.tasks.items()}
    assert targets["sequence"] == counts * base.sids.levels
    assert targets["titles_to_id"] == counts * base.sids.levels
    assert LeftOut.of(learned.tasks["ids_to_title"][0]).prompts == counts
    assert len(learned.tasks["title_to_id"][0]) == stream.n_items
    assert len(learned.validation) == split.n_test


@pytest.mark.parametrize("rank", [0, 4])
def test_a_command_that_was_stopped_goes_on_to_the_same_base(rank: int, world: Path, tmp_path: Path) -> None:
    settings = config(rank=rank, dropout=0.1, checkpoint_steps=1, accumulation=2, batch_tokens=320)
    source, data, out = str(world / "source"), world / "stream", tmp_path / "out"
    whole = MemorySink()
    report = bases.tune_base(source, data, tmp_path / "whole", settings, whole)
    last = max(e["step"] for e in whole.events if e["kind"] == "step")
    with pytest.raises(KeyboardInterrupt):
        bases.tune_base(source, data, out, settings, Stops(last - 1))
    assert not out.exists()
    work = tmp_path / "out.unfinished"
    assert work.is_dir()
    rest = MemorySink()
    resumed = bases.tune_base(source, data, out, settings, rest)
    assert weights(out) == weights(tmp_path / "whole")
    judged = ("start_log_likelihood", "valid_log_likelihood", "kept_epoch")
    assert [resumed[name] for name in judged] == [report[name] for name in judged]
    steps = [e["step"] for e in rest.events if e["kind"] == "step"]
    assert steps[0] == last - 1
    assert not work.exists()


def test_an_epoch_is_not_lost_where_a_command_is_killed_later(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data, out = str(world / "source"), world / "stream", tmp_path / "out"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bases, "save_base", killed)  # all is learned, nothing is written
        with pytest.raises(KeyboardInterrupt):
            bases.tune_base(source, data, out, config(tasks={}), MemorySink())
    rest, whole = MemorySink(), MemorySink()
    bases.tune_base(source, data, out, config(tasks={}), rest)
    bases.tune_base(source, data, tmp_path / "whole", config(tasks={}), whole)
    assert weights(out) == weights(tmp_path / "whole")
    assert [e["kind"] for e in rest.events] == ["epoch"]  # no step is done again, the last epoch is judged
    assert any(e["kind"] == "step" for e in whole.events)


def test_what_was_begun_with_other_settings_is_not_gone_on_with(world: Path, tmp_path: Path) -> None:
    source, data, out = str(world / "source"), world / "stream", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bases.tune_base(source, data, out, config(checkpoint_steps=1), Stops(2))
    with pytest.raises(DataError, match="was written under the configuration") as caught:
        bases.tune_base(source, data, out, config(lr=1e-3), MemorySink())
    assert caught.value.hint.endswith(f"or remove {tmp_path / 'out.unfinished'} to begin anew")
    assert (tmp_path / "out.unfinished").is_dir()
    shutil.rmtree(tmp_path / "out.unfinished")
    bases.tune_base(source, data, out, config(lr=1e-3), MemorySink())


def test_a_full_disk_names_the_command_to_give(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(EnvironmentProblem, match=r"the start of block 1") as caught:
        bases.tune_base(
            str(world / "source"), world / "stream", tmp_path / "out", config(checkpoint_steps=1), MemorySink()
        )
    assert caught.value.hint.endswith("then: the same command again")


def test_what_others_have_written_stays(world: Path, tmp_path: Path) -> None:
    class Meanwhile(MemorySink):
        """Another command writes OUT while this one learns."""

        def emit(self, event: Mapping[str, Any]) -> None:
            (tmp_path / "taken").mkdir(exist_ok=True)
            (tmp_path / "taken" / "theirs").touch()

    source, stream, quick = str(world / "init"), world / "stream", config(tasks={}, epochs=1)
    with pytest.raises(ConfigError, match="taken exists and is not empty"):
        bases.tune_base(source, stream, tmp_path / "taken", quick, Meanwhile())
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["theirs"]
    kept = tmp_path / "taken.unfinished"
    assert len(list(kept.glob("block_*"))) == 1
    (kept / "notes.txt").touch()
    (tmp_path / "taken" / "theirs").unlink()
    bases.tune_base(source, stream, tmp_path / "taken", quick, MemorySink())
    assert [file.name for file in kept.iterdir()] == ["notes.txt"]


def test_losses_that_tuning_makes_worse_are_told(world: Path, tmp_path: Path) -> None:
    spoilt = config(tasks={}, epochs=1, lr=3.0)
    with pytest.warns(UserWarning, match=r"tuning has left the validation log-likelihood at -\d+\.\d+, it began at -3"):
        bases.tune_base(str(world / "init"), world / "stream", tmp_path / "out", spoilt, MemorySink())


def test_shortened_prompts_are_told_and_recorded(world: Path, tmp_path: Path) -> None:
    short = config(tasks={}, epochs=1, form="prompt", history="titles", history_tokens=12)
    message = r"block 1, sequence: \d+ of \d+ prompts are shortened .* raise history_tokens"
    with pytest.warns(UserWarning, match=message):
        report = bases.tune_base(str(world / "init"), world / "stream", tmp_path / "out", short, MemorySink())
    assert report["left_out"] == read_json(tmp_path / "out" / "cladapt.json")["left_out"]


def test_a_warning_of_shortened_prompts_names_the_alignment_task(world: Path) -> None:
    stream = Stream.load(world / "stream").prefix(1)
    base = load_base(world / "init")
    with pytest.warns(UserWarning, match=r"block 1, titles_to_id: \d+ of \d+ prompts are shortened"):
        lesson(base, stream, config(tasks={"titles_to_id": 1.0}, row_tokens=120))


def test_id_tokens_that_a_source_has_already_are_counted(world: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = extend_model(str(world / "source"), SidTable(("x",), np.array([[0, 1]]), (1, 2)), 0)
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    start = InitConfig(epochs=0)
    with pytest.warns(UserWarning, match=r"has 3 of the 24 ID tokens already, the first <a_0>: their rows stay"):
        bases.init_base(str(tmp_path / "source"), world / "stream", tmp_path / "out", "packed", start, MemorySink())


def test_texts_are_needed_by_alignment_tasks_alone(world: Path, tmp_path: Path) -> None:
    stream, wordless = Stream.load(world / "stream"), tmp_path / "wordless"
    Stream(stream.interactions, stream.items.with_columns(text=pl.lit("")), {"config": {}}).save(wordless)
    shutil.copy(world / "stream" / "sids.parquet", wordless)
    source, out = str(world / "source"), tmp_path / "out"
    with pytest.raises(DataError, match=r"tasks\.title_to_id needs items' texts: no item of block 1 has one") as caught:
        bases.tune_base(source, wordless, out, config(), MemorySink())
    assert "leave the task out" in caught.value.hint
    assert not out.exists()
    report = bases.tune_base(source, wordless, out, config(tasks={}, epochs=1), MemorySink())
    assert report["rows_by_meaning"] == 0


def test_what_cannot_be_tuned_is_refused_before_anything_is_written(world: Path, tmp_path: Path) -> None:
    data, out = world / "stream", tmp_path / "out"
    with pytest.raises(ConfigError, match=r"weights=random: .*init is a base with ID tokens"):
        bases.tune_base(str(world / "init"), data, out, config(weights="random"), MemorySink())
    short = config(row_tokens=30, tasks={"sequence": 1, "id_to_title": 1})
    with pytest.raises(ConfigError, match=r"row_tokens=30 is less than the \d+ tokens .* the task id_to_title"):
        bases.tune_base(str(world / "source"), data, out, short, MemorySink())
    with pytest.raises(DataError, match=r"cannot load a causal LM from '.*nowhere'"):
        bases.tune_base(str(tmp_path / "nowhere"), data, out, config(), MemorySink())
    with pytest.raises(ConfigError, match="exists and is not empty"):
        bases.tune_base(str(world / "source"), data, world / "tuned", config(), MemorySink())
    assert list(tmp_path.iterdir()) == []


def test_mistaken_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'tasks\.title_to_ids', did you mean 'title_to_id'\?"):
        resolve(TuneConfig, {"tasks": {"title_to_ids": 1}})
    with pytest.raises(ConfigError, match="all weights are 0"):
        resolve(TuneConfig, {"tasks": {"sequence": 0}})
    with pytest.raises(ConfigError, match=r"row_tokens=99 exceeds batch_tokens=50"):
        resolve(TuneConfig, {"row_tokens": 99, "batch_tokens": 50})
    assert TaskWeights(sequence=0, id_to_title=2).alignment == {"id_to_title": 2.0}


def test_the_command_writes_the_same_base(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"tasks.{name}={weight}" for name, weight in TASKS.items()]
    options += ["epochs=2", "tune.lr=0.01", "row_tokens=320", "title_tokens=12", "window=3"]
    asked = ["--from", world / "source", "--data", world / "stream", "--out", tmp_path / "out", "--json"]
    assert command(["base", "tune", *map(str, asked), *(part for o in options for part in ("-o", o))]) == 0
    report = json.loads(capsys.readouterr().out)
    assert weights(tmp_path / "out") == weights(world / "tuned")
    assert report["base"] == str(tmp_path / "out")
    assert command(["config", "show", "--for", "tune", "--json"]) == 0
    keys = {row["key"] for row in json.loads(capsys.readouterr().out)["config"]}
    assert {"rank", "tasks.id_to_title", "rows", "untie", "weights"} <= keys
