"""Base+tokens directories: a small model from scratch, and a given one with new token rows."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from cladapt.artifacts import read_json, write_json
from cladapt.config import AdapterConfig, InitConfig, PretrainConfig, RunConfig, SimulateConfig, TokensConfig
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.export.merge import merge
from cladapt.model.adapter import create_adapter
from cladapt.model.load import check_form, load_base, new_model
from cladapt.model.saved import save_adapter
from cladapt.pipeline import bases, streams
from cladapt.tokens.sids import SidTable
from cladapt.train.sinks import MemorySink
from cladapt.workloads.recommend import Recommend

QUICK = PretrainConfig(epochs=3)
ROWS = InitConfig(epochs=3)
pytestmark = pytest.mark.filterwarnings("ignore:.* ID tokens already:UserWarning")  # see `source`
TOKENS = TokensConfig(dimensions=8, levels=2, codes=4, capacity=16)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "stream"
    streams.simulate_data(folder, SimulateConfig(users=60, items=40, topics=4, blocks=3))
    streams.build_tokens(folder, TOKENS, None)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows other tokens, some of them spelt like ours."""
    folder = tmp_path_factory.mktemp("source") / "source"
    model, tokenizer = new_model("tiny", SidTable(("x", "y"), np.array([[0], [1]]), (2,)), 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_pretraining_learns_block_1_and_says_so(stream: Path, tmp_path: Path) -> None:
    sink = MemorySink()
    report = bases.pretrain_base(stream, tmp_path / "base", QUICK, sink)
    base = load_base(tmp_path / "base")
    assert base.fitted_block == 1
    assert base.provenance["stream"] == Stream.load(stream).fingerprints[0]
    assert PretrainConfig(**base.provenance["config"]) == QUICK
    assert base.sids.fingerprint == streams.load_sids(stream, Stream.load(stream).prefix(1)).fingerprint
    assert report["parameters"] == sum(p.numel() for p in base.model.parameters())
    assert report["vocabulary"] == len(base.tokenizer) == 4 + len(base.sids.tokens)
    epochs = [e["valid_log_likelihood"] for e in sink.events if e["kind"] == "epoch"]
    assert report["valid_log_likelihood"] == max(epochs) == epochs[report["kept_epoch"] - 1]
    assert report["valid_log_likelihood"] > -math.log(34)  # better than a uniform choice among block 1's items


def test_pretraining_is_repeatable_and_the_seed_matters(stream: Path, tmp_path: Path) -> None:
    one = PretrainConfig(epochs=1)
    for name, config in (("a", one), ("b", one), ("c", one.model_copy(update={"seed": 1}))):
        bases.pretrain_base(stream, tmp_path / name, config, MemorySink())
    prints = [load_base(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("form", ["packed", "prompt"])
def test_new_rows_are_fitted_and_the_rest_of_the_model_stays(
    form: str, stream: Path, source: Path, tmp_path: Path
) -> None:
    config = InitConfig(epochs=2, batch_tokens=2048, row_tokens=512)
    report = bases.init_base(str(source), stream, tmp_path / "base", form, config, MemorySink())
    base = load_base(tmp_path / "base")
    assert base.fitted_block == 0  # block 1 is still to be learned
    assert base.provenance["source"] == str(source)
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    # <a_0> and <a_1> are among the source's six tokens already; the other tokens of the IDs are new
    table = "model.embed_tokens.weight"
    assert report["new_tokens"] == base.provenance["new_tokens"] == len(base.sids.tokens) - 2
    assert report["vocabulary"] == len(new[table]) == 6 + report["new_tokens"]
    assert torch.equal(new[table][:6], old[table])
    assert all(torch.equal(new[name], old[name]) for name in old if name not in (table, "lm_head.weight"))
    assert report["kept_epoch"] >= 1
    assert math.isfinite(report["valid_log_likelihood"])


def test_no_epochs_leave_the_rows_as_they_were_drawn(stream: Path, source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        report = bases.init_base(str(source), stream, tmp_path / name, "packed", InitConfig(epochs=0), MemorySink())
    assert "kept_epoch" not in report
    assert load_base(tmp_path / "a").fingerprint == load_base(tmp_path / "b").fingerprint


def test_a_base_without_pretraining_is_a_random_model(stream: Path, tmp_path: Path) -> None:
    report = bases.pretrain_base(stream, tmp_path / "base", PretrainConfig(epochs=0), MemorySink())
    assert report["kept_epoch"] == 0
    sids = streams.load_sids(stream, Stream.load(stream).prefix(1))
    fresh, _ = new_model("tiny", sids, 0)
    loaded = dict(load_base(tmp_path / "base").model.named_parameters())
    assert all(torch.equal(p, loaded[name]) for name, p in fresh.named_parameters())


def test_what_cannot_become_a_base_is_refused_before_anything_is_written(
    stream: Path, source: Path, tmp_path: Path
) -> None:
    out, sink = tmp_path / "out", MemorySink()
    with pytest.raises(ConfigError, match=r"form 'words' is not known \(use packed or prompt"):
        bases.init_base(str(source), stream, out, "words", ROWS, sink)
    with pytest.raises(DataError, match=r"cannot load a causal LM from '.*nowhere'.*give a local"):
        bases.init_base(str(tmp_path / "nowhere"), stream, out, "packed", ROWS, sink)
    for make in (
        lambda data: bases.pretrain_base(data, out, QUICK, sink),
        lambda data: bases.init_base(str(source), data, out, "packed", ROWS, sink),
    ):
        with pytest.raises(DataError, match="is not a stream directory"):
            make(tmp_path / "nowhere")
    bare = tmp_path / "bare"
    streams.simulate_data(bare, SimulateConfig(users=60, items=40, topics=4, blocks=3))
    with pytest.raises(DataError, match=r"has no sids\.parquet"):
        bases.pretrain_base(bare, out, QUICK, sink)
    assert not out.exists()
    assert sink.events == []
    with pytest.raises(ConfigError, match="exists and is not empty"):
        bases.pretrain_base(stream, bare, QUICK, sink)


def test_a_base_says_on_which_histories_its_rows_were_fitted(stream: Path, source: Path, tmp_path: Path) -> None:
    one: dict[str, Any] = {"epochs": 1, "window": 9, "batch_tokens": 2048, "row_tokens": 512}
    bases.init_base(str(source), stream, tmp_path / "init", "prompt", InitConfig(**one), MemorySink())
    bases.pretrain_base(stream, tmp_path / "pretrained", PretrainConfig(**one), MemorySink())
    bases.pretrain_base(stream, tmp_path / "random", PretrainConfig(epochs=0), MemorySink())
    init, pretrained, random = (load_base(tmp_path / name) for name in ("init", "pretrained", "random"))
    found = [{key: b.provenance.get(key) for key in ("form", "window", "softmax")} for b in (init, pretrained)]
    assert found == [{"form": form, "window": 9, "softmax": "trie"} for form in ("prompt", "packed")]
    told = "fitted on histories of the form 'prompt', train.form is 'packed'"
    with pytest.warns(UserWarning, match=told):
        check_form(init, "packed")
    with pytest.warns(UserWarning, match=told):
        Recommend().open_inputs(RunConfig(data=str(stream), base=str(tmp_path / "init")))
    for base, form in ((init, "prompt"), (pretrained, "packed"), (random, "packed"), (random, "prompt")):
        check_form(base, form)  # no warning, which would be an error


def test_a_base_that_has_the_ids_keeps_its_rows_and_what_it_has_learned(stream: Path, tmp_path: Path) -> None:
    bases.pretrain_base(stream, tmp_path / "base", PretrainConfig(epochs=1), MemorySink())
    base = load_base(tmp_path / "base")
    report = bases.init_base(str(tmp_path / "base"), stream, tmp_path / "again", "prompt", ROWS, MemorySink())
    again = load_base(tmp_path / "again")
    assert (report["new_tokens"], report["fitted_tokens"]) == (0, 0)
    assert "kept_epoch" not in report
    assert again.fingerprint == base.fingerprint == again.provenance["parent_base"]
    assert (again.fitted_block, again.provenance["form"]) == (1, "packed")
    report = bases.init_base(str(tmp_path / "base"), stream, tmp_path / "fit", "packed", ROWS, MemorySink(), refit=True)
    assert report["fitted_tokens"] == len(base.sids.tokens)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "fit"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_merged_export_is_the_next_base(stream: Path, tmp_path: Path) -> None:
    bases.pretrain_base(stream, tmp_path / "base", PretrainConfig(epochs=1), MemorySink())
    base = load_base(tmp_path / "base")
    record = {"block": 3, "stream": base.provenance["stream"]}
    save_adapter(tmp_path / "adapter", create_adapter(base, AdapterConfig(), 0), base, record)
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    bases.init_base(str(tmp_path / "merged"), stream, tmp_path / "next", "packed", ROWS, MemorySink())
    found = load_base(tmp_path / "next")
    assert found.fitted_block == 3
    assert found.fingerprint == load_base(tmp_path / "merged").fingerprint


def test_a_base_of_other_ids_or_of_another_stream_is_refused(stream: Path, tmp_path: Path) -> None:
    bases.pretrain_base(stream, tmp_path / "base", PretrainConfig(epochs=0), MemorySink())
    other = tmp_path / "other"
    streams.simulate_data(other, SimulateConfig(users=60, items=40, topics=4, blocks=3))
    streams.build_tokens(other, TokensConfig(dimensions=8, levels=2, codes=5, capacity=16), None)
    bases.pretrain_base(stream, tmp_path / "untaught", PretrainConfig(epochs=0), MemorySink())
    record = read_json(tmp_path / "untaught" / "cladapt.json")
    write_json(tmp_path / "untaught" / "cladapt.json", {**record, "fitted_block": 0})
    with pytest.raises(DataError, match=r"levels of \[4, 4, 16\] codes, the stream's IDs have levels of \[5, 5, 16\]"):
        bases.init_base(str(tmp_path / "untaught"), other, tmp_path / "out", "packed", ROWS, MemorySink())
    shorter = tmp_path / "shorter"
    streams.simulate_data(shorter, SimulateConfig(users=50, items=40, topics=4, blocks=3))
    shutil.copy(stream / "sids.parquet", shorter)
    with pytest.raises(DataError, match="base was trained on block 1 of the stream"):
        bases.init_base(str(tmp_path / "base"), shorter, tmp_path / "out", "packed", ROWS, MemorySink())
    assert not (tmp_path / "out").exists()


def test_generation_settings_of_the_source_are_left_out_and_told(stream: Path, source: Path, tmp_path: Path) -> None:
    sampling = shutil.copytree(source, tmp_path / "source")
    write_json(sampling / "generation_config.json", {"do_sample": True, "temperature": 0.6, "eos_token_id": 2})
    report = bases.init_base(str(sampling), stream, tmp_path / "base", "packed", InitConfig(epochs=0), MemorySink())
    assert report["generation_left_out"] == {"do_sample": True, "temperature": 0.6}
    written = read_json(tmp_path / "base" / "generation_config.json")
    assert (written["do_sample"], written["max_new_tokens"], "temperature" in written) == (False, 3, False)


def test_a_base_is_the_same_bytes_however_long_the_stream_was(stream: Path, source: Path, tmp_path: Path) -> None:
    whole, first = Stream.load(stream), tmp_path / "first"
    whole.prefix(1).save(first)
    streams.build_tokens(first, TOKENS, None)
    one = PretrainConfig(epochs=1)
    for name, data in (("short", first), ("long", stream)):
        bases.pretrain_base(data, tmp_path / name / "pretrained", one, MemorySink())
        bases.init_base(str(source), data, tmp_path / name / "init", "packed", InitConfig(epochs=1), MemorySink())
    for path in sorted(p for p in (tmp_path / "short").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "long" / path.relative_to(tmp_path / "short")).read_bytes(), path
    base = load_base(tmp_path / "long" / "pretrained")
    assert base.sids.items == tuple(whole.items.filter(whole.items["first_block"] == 1)["item"])


def test_rows_fitted_on_another_cut_of_the_log_are_refused(stream: Path, source: Path, tmp_path: Path) -> None:
    bases.init_base(str(source), stream, tmp_path / "base", "packed", InitConfig(epochs=1), MemorySink())
    bases.init_base(str(source), stream, tmp_path / "drawn", "packed", InitConfig(epochs=0), MemorySink())
    whole, other = Stream.load(stream), tmp_path / "other"
    moved = whole.interactions.with_columns(block=(pl.col("block") - 1).clip(1).cast(pl.Int32))
    first_block = (pl.col("first_block") - 1).clip(1).cast(whole.items.schema["first_block"])
    Stream(moved, whole.items.with_columns(first_block=first_block), {"config": {}}).save(other)
    shutil.copy(stream / "sids.parquet", other)
    config = RunConfig(data=str(other), base=str(tmp_path / "base"))
    with pytest.raises(DataError, match=r"base has ID rows fitted on block 1 of the stream \w+, .*other is the stream"):
        Recommend().open_inputs(config)
    with pytest.raises(DataError, match=r"base has ID rows fitted on block 1 of the stream"):
        bases.init_base(str(tmp_path / "base"), other, tmp_path / "out", "packed", ROWS, MemorySink())
    Recommend().open_inputs(config.model_copy(update={"base": str(tmp_path / "drawn")}))


def test_a_base_made_at_block_1_is_at_home_on_the_longer_stream(stream: Path, tmp_path: Path) -> None:
    bases.pretrain_base(stream, tmp_path / "base", PretrainConfig(epochs=0), MemorySink())
    found, base = Recommend().open_inputs(RunConfig(data=str(stream), base=str(tmp_path / "base")))
    assert base.sids.items == tuple(found.items["item"])
    assert len(base.item_tokens()) == found.n_items > len(load_base(tmp_path / "base").sids.items)
