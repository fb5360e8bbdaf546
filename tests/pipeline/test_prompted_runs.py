"""Runs whose prompts name items by their titles: recorded, checked where they go on, and used by recommend."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cladapt.artifacts import read_json, write_json
from cladapt.config import InitConfig, MethodConfig, RunConfig, SimulateConfig, TokensConfig, TrainConfig, resolve
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError, DataError
from cladapt.eval.evaluate import Evaluator
from cladapt.model.load import check_form, load_base
from cladapt.pipeline import bases, evaluation, runs, ship, streams
from cladapt.run import Run
from cladapt.tokens.prompts import Template
from cladapt.train.sinks import MemorySink
from cladapt.workloads.recommend import Recommend, form_of

pytestmark = pytest.mark.filterwarnings("default:.*prompts are shortened:UserWarning")

SIMULATE = SimulateConfig(users=50, items=40, topics=4, blocks=3, births=0.3)
TOKENS = TokensConfig(dimensions=8, levels=2, codes=4)
TRAIN = TrainConfig(
    epochs=1, batch_tokens=1024, row_tokens=256, window=5, form="prompt", history="both", history_tokens=60
)


def subwords(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of byte-level subwords that was trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([Template().history, Template().empty, *texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`short`, the first two blocks of `stream`; a base that knows words; and `run`, which has learned `short`."""
    folder = tmp_path_factory.mktemp("world")
    whole = simulate(SIMULATE).stream
    whole.prefix(2).save(folder / "short")
    streams.build_tokens(folder / "short", TOKENS, None)
    shutil.copytree(folder / "short", folder / "stream")
    kept = Stream.load(folder / "stream").manifest
    Stream(whole.interactions, whole.items, kept).save_after(folder / "stream", 2)
    streams.extend_tokens(folder / "stream")
    tokenizer = subwords(whole.items["text"].to_list())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    rows = InitConfig(epochs=0)
    bases.init_base(str(folder / "source"), folder / "short", folder / "base", "prompt", rows, MemorySink())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.warns(UserWarning, match=r"block 1: \d+ of \d+ prompts are shortened to their token budget"):
            runs.train(config_of(folder, "short"), folder / "run", MemorySink())
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(world: Path, stream: str = "short", **changes: Any) -> RunConfig:
    train = resolve(TrainConfig, {**TRAIN.model_dump(), **changes})
    method = MethodConfig(name="finetune")
    return RunConfig(data=str(world / stream), base=str(world / "base"), method=method, train=train)


def histories(folder: Path) -> Path:
    lines = [{"user": "one", "history": ["i01", "i02", "i03", "i04", "i05", "i06"]}, {"user": "none", "history": []}]
    (folder / "h.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "h.jsonl"


def recommend(path: Path, base: Path | None, out: Path, given: Path, **changes: Any) -> dict[str, Any]:
    options = {"block": None, "top_k": 5, "beams": None, "catalogue": None, "exclude_seen": True}
    return ship.recommend(given, out, path, base, **{**options, **changes})


def test_the_prompt_and_what_it_left_out_are_in_the_adapters_record(world: Path) -> None:
    run = Run.open(world / "run")
    record = read_json(run.adapters[2] / "cladapt.json")
    assert record["prompt"] == {
        "history": "both",
        "history_tokens": 60,
        "row_tokens": 256,
        "template": {"history": Template().history, "empty": Template().empty, "separator": Template().separator},
    }
    left = record["left_out"]
    assert left["items"] >= left["shortened"] > 0
    events = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [e["left_out"] for e in events if e["kind"] == "block" and e["block"] == 2] == [left]
    plan = runs.plan(config_of(world))["blocks"]
    assert (plan[1]["items_left_out"], plan[1]["titles_cut"]) == (left["items"], left["titles"])
    assert read_json(run.path / "config.json")["config"]["train"]["history"] == "both"


def test_decoding_reads_the_prompts_that_training_read(world: Path) -> None:
    config = config_of(world)
    stream, base = Recommend().open_inputs(config)
    form = form_of(config, base, stream)
    evaluator = Evaluator(stream, base, form, config.eval)
    prepared = evaluator._prepare(2, first=False)
    texts = dict(stream.items.select("item", "text").iter_rows())
    for history, prompt in zip(prepared.cases.histories, prepared.prompts, strict=True):
        (document,) = form.documents(np.append(history, 0), len(history))
        np.testing.assert_array_equal(document.tokens[~document.loss], prompt)
        shown = base.tokenizer.decode(prompt)
        for item in history[-2:].tolist():  # two always fit
            name = base.sids.items[item]
            assert f"{base.sids.spelt(name)} {texts[name]}" in shown


def test_recommend_uses_the_recorded_prompt_and_the_streams_titles(world: Path, tmp_path: Path) -> None:
    given = histories(tmp_path)
    counts = recommend(world / "run", None, tmp_path / "a.parquet", given)
    assert (counts["shortened_prompts"], counts["titles_cut"]) == (1, 0)
    assert counts["history_items_left_out"] > 0
    # an export alone has the titles with it
    ship.export(world / "run", "peft", tmp_path / "peft", None, None)
    again = recommend(tmp_path / "peft", world / "base", tmp_path / "b.parquet", given)
    assert again["history_items_left_out"] == counts["history_items_left_out"]
    first, second = pl.read_parquet(tmp_path / "a.parquet"), pl.read_parquet(tmp_path / "b.parquet")
    assert first.equals(second)
    # other words or titles are other prompts
    texts = pl.read_parquet(tmp_path / "peft" / "texts.parquet")
    texts.with_columns(text=pl.lit("nothing")).write_parquet(tmp_path / "peft" / "texts.parquet")
    recommend(tmp_path / "peft", world / "base", tmp_path / "c.parquet", given)
    assert not first["score"].equals(pl.read_parquet(tmp_path / "c.parquet")["score"])
    texts.head(3).write_parquet(tmp_path / "peft" / "texts.parquet")
    with pytest.raises(DataError, match=r"texts.parquet has not one text for each item of sids.parquet"):
        recommend(tmp_path / "peft", world / "base", tmp_path / "d.parquet", given)
    (tmp_path / "peft" / "texts.parquet").unlink()
    with pytest.raises(ConfigError, match=r"history=both without the items' texts.*--data DIR"):
        recommend(tmp_path / "peft", world / "base", tmp_path / "d.parquet", given)


def test_a_merged_model_keeps_the_titles_and_says_what_it_has_learned(world: Path, tmp_path: Path) -> None:
    ship.export(world / "run", "peft", tmp_path / "peft", None, None)
    ship.export(world / "run", "merged", tmp_path / "merged", None, None)
    texts = [pl.read_parquet(tmp_path / kind / "texts.parquet") for kind in ("peft", "merged")]
    assert texts[0].equals(texts[1])
    record = read_json(tmp_path / "merged" / "cladapt.json")
    assert (record["form"], record["history"]) == ("prompt", "both")
    check_form(load_base(tmp_path / "merged"), "prompt", "both")  # or warns
    with pytest.warns(UserWarning, match="fitted on histories of the form 'prompt', train.form is 'packed'"):
        check_form(load_base(tmp_path / "merged"), "packed")


def test_the_recorded_words_are_those_of_recommend(world: Path, tmp_path: Path) -> None:
    given = histories(tmp_path)
    shutil.copytree(world / "run", tmp_path / "run")
    recommend(tmp_path / "run", world / "base", tmp_path / "a.parquet", given, data=world / "short")
    record = tmp_path / "run" / "adapters" / "block_002" / "cladapt.json"
    words = read_json(record)
    words["prompt"]["template"]["history"] = "Other words: {items}\nNext:"
    write_json(record, words)
    recommend(tmp_path / "run", world / "base", tmp_path / "b.parquet", given, data=world / "short")
    first, second = pl.read_parquet(tmp_path / "a.parquet"), pl.read_parquet(tmp_path / "b.parquet")
    assert not first["score"].equals(second["score"])
    with pytest.raises(ConfigError, match=r"block_002 has learned other prompts: template=.*Other words"):
        evaluation.evaluate(tmp_path / "run", {}, None, MemorySink(), data=world / "short", base=world / "base")


def test_an_appended_block_brings_the_titles_of_its_items(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    runs.continue_run(tmp_path / "run", MemorySink(), data=world / "stream", base=world / "base")
    run = Run.open(tmp_path / "run")
    assert (
        read_json(run.adapters[3] / "cladapt.json")["prompt"] == read_json(run.adapters[2] / "cladapt.json")["prompt"]
    )
    stream = Stream.load(world / "stream")
    new = stream.items.filter(pl.col("first_block") == 3)["item"].to_list()
    line = {"user": "new", "history": new[:1]}
    (tmp_path / "n.jsonl").write_text(json.dumps(line))
    counts = recommend(
        tmp_path / "run", world / "base", tmp_path / "n.parquet", tmp_path / "n.jsonl", data=world / "stream"
    )
    assert counts["unknown_history_items"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": "titles"}, "history='both', now 'titles'"),
        ({"history_tokens": 50}, "history_tokens=60, now 50"),
        ({"form": "packed", "history": "ids", "history_tokens": 0}, "form='prompt', now 'packed'"),
    ],
    ids=["history", "budget", "form"],
)
def test_an_adapter_goes_on_with_its_own_prompts_alone(
    world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    start = {"from_adapter": str(Run.open(world / "run").adapters[2])}
    config = config_of(world, "stream", **changes).model_copy(update=start)
    with pytest.raises(ConfigError, match=f"block_002 has learned other prompts: .*{message}"):
        runs.train(config, tmp_path / "other", MemorySink())
    wider = config_of(world, "stream", row_tokens=300).model_copy(update=start)
    assert runs.plan(wider)["blocks"]  # the budget is stated, so the rows may grow


def test_the_card_tells_the_prompt(world: Path, tmp_path: Path) -> None:
    ship.export(world / "run", "peft", tmp_path / "peft", None, None)
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "each ID and its title, within 60 tokens; the oldest are left out" in card
    assert "Which item will they pick next?" in card
    assert "tokenizer.encode(prompt" in card


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"form": "packed"}, "history=both needs form=prompt, form is packed"),
        ({"form": "packed", "history": "ids"}, "history_tokens=60 needs form=prompt"),
    ],
    ids=["history", "budget"],
)
def test_titles_need_the_worded_form(world: Path, train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(world, **train)


def test_a_stream_without_titles_is_refused(world: Path, tmp_path: Path) -> None:
    stream = simulate(SIMULATE).stream.prefix(2)
    Stream(stream.interactions, stream.items.with_columns(text=pl.lit("")), stream.manifest).save(tmp_path / "stream")
    shutil.copy(world / "short" / "sids.parquet", tmp_path / "stream")
    config = config_of(world).model_copy(update={"data": str(tmp_path / "stream")})
    with pytest.raises(DataError, match="no item of the stream has a text"):
        runs.train(config, tmp_path / "run", MemorySink())
    assert not (tmp_path / "run").exists()
