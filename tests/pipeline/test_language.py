"""Perplexity of a text beside an evaluation: which models have a row, what is kept, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cladapt.artifacts import hash_file, read_json, write_json
from cladapt.config import InitConfig, MethodConfig, RunConfig, SimulateConfig, TokensConfig, TrainConfig
from cladapt.errors import ConfigError, DataError
from cladapt.eval.perplexity import perplexity, read_text, windows_of
from cladapt.model.load import load_base
from cladapt.model.saved import adapted
from cladapt.pipeline import bases, evaluation, runs, streams
from cladapt.run import Run, open_run
from cladapt.train.sinks import MemorySink
from cladapt_cli.app import run

EVAL = {"bootstrap": 100, "beams": 5, "top_k": [5]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run` over `stream` and `base`, which was made from `source`; `text` is a text."""
    folder = tmp_path_factory.mktemp("world")
    streams.simulate_data(folder / "stream", SimulateConfig(users=40, items=30, topics=3, blocks=3))
    streams.build_tokens(folder / "stream", TokensConfig(dimensions=8, levels=2, codes=4), None)
    words = np.random.default_rng(0).choice(["some ", "words ", "of a ", "text.\n"], 900)
    (folder / "text").write_text("".join(words))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["some words of a text.\n"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder / "source")
    config = LlamaConfig(
        vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    rows = InitConfig(epochs=0)
    bases.init_base(str(folder / "source"), folder / "stream", folder / "base", "packed", rows, MemorySink())
    config_of_run = RunConfig(
        data=str(folder / "stream"),
        base=str(folder / "base"),
        method=MethodConfig(name="finetune"),
        train=TrainConfig(epochs=1, batch_tokens=1024),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs.train(config_of_run, folder / "run", MemorySink())
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_model_has_a_row_that_is_its_own_perplexity(world: Path) -> None:
    printed = evaluation.evaluate(world / "run", EVAL, None, MemorySink(), text=world / "text")
    rows = printed["text"]
    measured = Run.open(world / "run")
    assert [(r["model"], r["block"]) for r in rows] == [
        ("base", 0),
        (f"source {world / 'source'}", None),
        *(("adapter", b) for b in (1, 2, 3)),
    ]
    record = read_json(measured.path / "metrics.json")["text"]
    assert (record["file"], record["hash"], record["rows"]) == ("text", hash_file(world / "text"), rows)
    assert "Perplexity of text" in (measured.path / "report.html").read_text()
    base, text = load_base(world / "base"), read_text(world / "text")
    expected = [perplexity(base.model, windows_of(text, base.tokenizer))]
    source = AutoModelForCausalLM.from_pretrained(world / "source")
    expected.append(perplexity(source, windows_of(text, AutoTokenizer.from_pretrained(world / "source"))))
    for folder in measured.adapters.values():
        with adapted(base, folder) as model:
            expected.append(perplexity(model, windows_of(text, base.tokenizer)))
    for row, values in zip(rows, expected, strict=True):
        assert (row["perplexity"], row["bits_per_byte"]) == pytest.approx(tuple(values.values()))
    assert len({row["perplexity"] for row in rows}) == len(rows)


def test_a_later_evaluation_keeps_it_while_the_weights_are_the_same(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    places = {"data": world / "stream", "base": world / "base"}
    rows = evaluation.evaluate(tmp_path / "run", EVAL, None, MemorySink(), text=world / "text", **places)["text"]
    evaluation.evaluate(tmp_path / "run", EVAL, None, MemorySink(), **places)
    assert read_json(tmp_path / "run" / "metrics.json")["text"]["rows"] == rows
    file = tmp_path / "run" / "adapters" / "block_003" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, file, {"format": "pt"})
    record = read_json(file.parent / "cladapt.json")
    write_json(file.parent / "cladapt.json", {**record, "weights": hash_file(file)})
    sink = MemorySink()
    evaluation.evaluate(tmp_path / "run", EVAL, None, sink, **places)
    assert "text" not in read_json(tmp_path / "run" / "metrics.json")
    assert any("text was measured under other weights; see --text" in e.get("text", "") for e in sink.events)


def test_a_source_that_is_gone_is_said_and_left_out(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.copytree(world / "base", tmp_path / "base")
    record = read_json(tmp_path / "base" / "cladapt.json")
    write_json(tmp_path / "base" / "cladapt.json", {**record, "source": "gone/model"})
    sink = MemorySink()
    rows = evaluation.evaluate(
        tmp_path / "run", EVAL, None, sink, data=world / "stream", base=tmp_path / "base", text=world / "text"
    )["text"]
    assert [r["model"] for r in rows] == ["base", "adapter", "adapter", "adapter"]
    assert any("source gone/model is not there" in e.get("text", "") for e in sink.events)


def test_what_is_no_text_is_refused_before_anything_is_measured(world: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("words")
    for name, message in (("missing", "no such file"), ("short", r"short has \d tokens, a window 256")):
        sink = MemorySink()
        with pytest.raises(DataError, match=message):
            evaluation.evaluate(world / "run", EVAL, None, sink, everything=True, text=tmp_path / name)
        assert sink.events == []


def test_the_command_takes_the_file(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(world / "run"), "--text", str(tmp_path / "gone")]) == 3
    assert capsys.readouterr().err.startswith(f"error: no such file: {tmp_path / 'gone'}")


def test_a_task_without_language_has_no_perplexity(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_run(world / "run")
    monkeypatch.setattr(type(opened.workload), "language", False)
    with pytest.raises(ConfigError, match=r"--text .* is a run of --task recommend"):
        evaluation.evaluate(world / "run", EVAL, None, MemorySink(), text=world / "text")
