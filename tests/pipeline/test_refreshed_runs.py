"""Runs before and after their stream's IDs were refreshed: each adapter is read by the IDs that it has learned."""

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.artifacts import read_json, write_json
from cladapt.config import AdapterConfig, MethodConfig, PretrainConfig, RunConfig, TrainConfig
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.export.merge import merge
from cladapt.model.load import base_provenance, load_base
from cladapt.model.saved import adapter_provenance
from cladapt.pipeline import bases, evaluation, promote, refresh, runs, ship, streams
from cladapt.run import open_run
from cladapt.tokens.build import load_sids
from cladapt.train.sinks import MemorySink

EVAL: dict[str, Any] = {"bootstrap": 100, "max_users": 4, "beams": 10}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(folder: Path, **settings: Any) -> RunConfig:
    fit = TrainConfig(epochs=1, batch_tokens=256, row_tokens=128)
    adapter = AdapterConfig(rank=2, targets=("q_proj", "down_proj"))
    places = {"data": str(folder / "stream"), "base": str(folder / "base")}
    return RunConfig(**places, adapter=adapter, method=MethodConfig(name="finetune"), train=fit, **settings)


@pytest.fixture(scope="module")
def world(growth: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two blocks whose stream was refreshed then, and has grown by two more since."""
    folder = tmp_path_factory.mktemp("refreshed")
    shutil.copytree(growth / "short", folder / "stream")
    shutil.copytree(growth / "base", folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs.train(config_of(folder), folder / "run", MemorySink())
        evaluation.evaluate(folder / "run", EVAL, None, MemorySink())
    report = refresh.refresh_tokens(folder / "stream", {})
    assert (report["version"], report["result"]) == (2, "refreshed")
    assert report["moved"] > 0
    grow(folder / "stream", growth)
    return folder


def grow(stream: Path, growth: Path) -> None:
    whole = Stream.load(growth / "whole")
    Stream(whole.interactions, whole.items, Stream.load(stream).manifest).save_after(stream, 2)
    streams.extend_tokens(stream)


def copied(world: Path, folder: Path) -> Path:
    shutil.copytree(world, folder, dirs_exist_ok=True)
    return folder / "run"


def recommended(source: Path, folder: Path) -> dict[str, str]:
    """The ID that was written for each recommended item."""
    histories = folder / "histories.csv"
    Stream.load(folder / "stream").interactions.select("user", "item", "timestamp").write_csv(histories)
    out = folder / f"{source.name}.parquet"
    ship.recommend(histories, out, source, folder / "base", None, 5, None, None, True, overwrite=True)
    frame = pl.read_parquet(out)
    return dict(zip(frame["item"], frame["semantic_id"], strict=True))


def test_new_blocks_are_learned_by_the_ids_that_are_asked_for(world: Path, tmp_path: Path) -> None:
    run = copied(world, tmp_path)
    before = {path: path.read_bytes() for path in (run / "adapters").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"has learned by version 1 of the IDs, .* is at version 2") as caught:
        runs.continue_run(run, MemorySink())
    assert caught.value.hint.startswith("--ids 2 learns the new blocks by the new IDs, --ids 1 goes on by the old ones")
    assert read_json(run / "config.json")["config"]["ids"] == 1
    assert [b["block"] for b in runs.continue_run(run, MemorySink(), ids=2)["blocks"]] == [3, 4]
    assert read_json(run / "config.json")["ids"] == {"3": 2}
    assert {path: path.read_bytes() for path in before} == before
    stream = Stream.load(tmp_path / "stream")
    for block, version in ((2, 1), (3, 2), (4, 2)):
        table = load_sids(tmp_path / "stream", stream, version).first(len(stream.known(block)))
        recorded = adapter_provenance(run / "adapters" / f"block_{block:03d}")["ids"]
        expected = {"version": version, "items": len(table.items), "fingerprint": table.fingerprint}
        assert recorded == expected
    assert runs.continue_run(run, MemorySink())["blocks"] == []
    cells = evaluation.evaluate(run, EVAL, None, MemorySink())["cells"]
    assert cells["kept"] == 4
    again = {path.name: path.read_bytes() for path in (run / "users").iterdir()}
    evaluation.evaluate(run, EVAL, None, MemorySink(), everything=True)
    assert {path.name: path.read_bytes() for path in (run / "users").iterdir()} == again
    assert evaluation.evaluate(run, EVAL, None, MemorySink())["cells"]["measured"] == 0
    assert promote.promote(run, {"rule": "not-worse", "bootstrap": 100}, 3, MemorySink())["decision"] == "promoted"


def test_an_adapter_is_measured_by_its_own_ids_whatever_came_after(world: Path, growth: Path, tmp_path: Path) -> None:
    """The models of block 1 and 2 on all four blocks: as in a run whose stream was never refreshed."""
    run = copied(world, tmp_path)
    runs.continue_run(run, MemorySink(), ids=2)
    evaluation.evaluate(run, EVAL, None, MemorySink())
    frozen = tmp_path / "frozen"
    shutil.copytree(growth / "whole", frozen / "stream")
    shutil.copytree(growth / "base", frozen / "base")
    runs.train(config_of(frozen), frozen / "run", MemorySink())
    evaluation.evaluate(frozen / "run", EVAL, None, MemorySink())
    early = pl.col("model_block") <= 2
    for name in [path.name for path in (run / "users").glob("block_*.parquet")]:
        mine, theirs = (pl.read_parquet(path / "users" / name) for path in (run, frozen / "run"))
        assert mine.filter(early).equals(theirs.filter(early)), name
        assert not mine.filter(~early).equals(theirs.filter(~early)), name


def test_recommendations_and_exports_have_the_ids_of_their_adapter(world: Path, tmp_path: Path) -> None:
    run = copied(world, tmp_path)
    runs.continue_run(run, MemorySink(), ids=2)
    stream = Stream.load(tmp_path / "stream")
    for block, version in ((2, 1), (4, 2)):
        table = load_sids(tmp_path / "stream", stream, version)
        found = recommended(run / "adapters" / f"block_{block:03d}", tmp_path)
        assert found == {item: table.spelt(item) for item in found}
        out = tmp_path / f"peft-{block}"
        assert ship.export(run, "peft", out, tmp_path / "base", block)["ids"] == version
        assert f"ID table: version {version}" in (out / "README.md").read_text().replace("**", "")
        assert recommended(out, tmp_path) == found
    (out / "sids.parquet").write_bytes((tmp_path / "peft-2" / "sids.parquet").read_bytes())
    with pytest.raises(DataError, match=r"has learned by version 2 of the IDs .* these are of version 1"):
        recommended(out, tmp_path)
    for name in ("sids.parquet", "catalogue.parquet"):
        (out / name).unlink()
    without = "has learned by version 2 of the IDs and came without them"
    with pytest.raises(DataError, match=without), pytest.warns(UserWarning, match=r"has no sids\.parquet"):
        recommended(out, tmp_path)
    with pytest.raises(DataError, match=without):
        merge(out, tmp_path / "base", tmp_path / "alone")
    served = tmp_path / "served"
    ship.export(run, "vllm", served, tmp_path / "base", None, all_blocks=True)
    for block, version in ((2, 1), (3, 2), (4, 2)):
        sids = load_sids(tmp_path / "stream", stream, version)
        written = pl.read_parquet(served / "adapters" / f"block_{block}" / "sids.parquet")
        assert written["codes"].to_list() == sids.codes.tolist()
    ship.export(run, "merged", tmp_path / "merged", tmp_path / "base", 4)
    merged = load_base(tmp_path / "merged")
    assert (merged.version, base_provenance(tmp_path / "merged")["ids"]) == (2, 2)
    assert merged.sids.fingerprint == table.fingerprint


def test_a_new_run_says_which_ids_it_learns(world: Path, tmp_path: Path) -> None:
    start = copied(world, tmp_path) / "adapters" / "block_002"
    with pytest.raises(
        ConfigError, match=r"base was made with version 1 of the IDs, .*stream is at version 2"
    ) as caught:
        runs.train(config_of(tmp_path), tmp_path / "new", MemorySink())
    assert caught.value.hint.startswith("-o ids=1 goes on by the IDs it knows, -o ids=2 learns the new ones from it")
    with pytest.raises(ConfigError, match="block_002 was made with version 1 of the IDs"):
        runs.train(config_of(tmp_path, from_adapter=str(start)), tmp_path / "new", MemorySink())
    with pytest.raises(DataError, match="has no version 3 of its IDs, it has versions 1 to 2"):
        runs.train(config_of(tmp_path, ids=3), tmp_path / "new", MemorySink())
    runs.train(config_of(tmp_path, from_adapter=str(start), ids=2), tmp_path / "new", MemorySink())
    assert open_run(tmp_path / "new").config.ids == 2
    runs.continue_run(tmp_path / "run", MemorySink(), ids=2)
    for block in ("block_003", "block_004"):
        files = [tmp_path / run / "adapters" / block / "adapter_model.safetensors" for run in ("new", "run")]
        assert files[0].read_bytes() == files[1].read_bytes()
    rows = evaluation.evaluate(tmp_path / "new", EVAL, None, MemorySink())["cells"]
    assert rows["measured"] > 0


def test_blocks_that_the_ids_were_fitted_on_are_told(world: Path, tmp_path: Path) -> None:
    copied(world, tmp_path)
    refresh.refresh_tokens(tmp_path / "stream", {})
    told = r"block \d is learned by version 3 of the IDs, which was fitted on blocks 1 to 4: its figures know what came"
    with pytest.warns(UserWarning, match=told) as caught:
        runs.train(config_of(tmp_path, ids=3), tmp_path / "new", MemorySink())
    assert {str(each.message)[:7] for each in caught} == {"block 2", "block 3"}


def test_an_inspection_against_an_earlier_version_counts_what_moved(world: Path) -> None:
    stream = world / "stream"
    report = streams.inspect_tokens(stream, 3, Path("1"))
    assert (report["version"], report["sids"]) == (2, str(stream / "ids" / "00002" / "sids.parquet"))
    old, new = (load_sids(stream, Stream.load(stream), version) for version in (1, 2))
    assert report["churn"][-1]["moved"] == pytest.approx((old.codes != new.codes).any(axis=1).mean())
    assert streams.inspect_tokens(stream, 0, Path("2"))["churn"][-1]["moved"] == 0.0


def test_blocks_that_are_left_are_learned_by_the_ids_they_were_to_be(world: Path, tmp_path: Path) -> None:
    run = copied(world, tmp_path)
    runs.continue_run(run, MemorySink(), ids=2)
    shutil.rmtree(run / "adapters" / "block_004")
    with pytest.raises(ConfigError, match=r"--ids 1: .* was to learn block 4 with ids=2") as caught:
        runs.continue_run(run, MemorySink(), ids=1)
    assert caught.value.hint == f"finish it first: cladapt train --resume {run}"
    assert [b["block"] for b in runs.resume(run, MemorySink())["blocks"]] == [4]
    assert adapter_provenance(run / "adapters" / "block_004")["ids"]["version"] == 2


def test_going_back_lets_old_runs_go_on(world: Path, tmp_path: Path) -> None:
    run = copied(world, tmp_path)
    assert refresh.take_back(tmp_path / "stream")["version"] == 1
    assert [b["block"] for b in runs.continue_run(run, MemorySink())["blocks"]] == [3, 4]
    assert "ids" not in read_json(run / "config.json")


def test_a_base_of_the_new_ids_names_them(world: Path, tmp_path: Path) -> None:
    copied(world, tmp_path)
    bases.pretrain_base(tmp_path / "stream", tmp_path / "second", PretrainConfig(epochs=1), MemorySink())
    assert load_base(tmp_path / "second").version == 2
    with pytest.raises(DataError, match=r"the base has version 1 of the IDs, the stream's are of version 2"):
        load_base(tmp_path / "base").with_sids(load_sids(tmp_path / "stream", Stream.load(tmp_path / "stream")))


def test_a_run_of_before_there_were_versions_knows_the_first(world: Path, tmp_path: Path) -> None:
    run = copied(world, tmp_path)
    record = read_json(run / "config.json")
    hashed = open_run(run).config_hash
    del record["config"]["ids"]
    write_json(run / "config.json", record)
    for folder in (run / "adapters").iterdir():
        made = read_json(folder / "cladapt.json")
        del made["ids"]
        write_json(folder / "cladapt.json", made)
    assert (open_run(run).config.ids, open_run(run).config_hash) == (1, hashed)
    assert evaluation.evaluate(run, EVAL, None, MemorySink())["cells"] == {"measured": 0, "kept": 4}
