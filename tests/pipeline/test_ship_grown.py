"""Exports and recommendations of an adapter whose stream has grown since: the stream's IDs, the items offered now."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.artifacts import read_json
from cladapt.config import (
    InitConfig,
    MethodConfig,
    PretrainConfig,
    RunConfig,
    SimulateConfig,
    TokensConfig,
    TrainConfig,
)
from cladapt.data.schema import Stream, read_manifest, write_manifest
from cladapt.data.simulate import simulate
from cladapt.errors import DataError
from cladapt.model.load import load_base
from cladapt.pipeline import bases, runs, ship, streams
from cladapt.tokens.sids import SidTable
from cladapt.train.sinks import MemorySink

PLACES = {"peft": "", "vllm": "adapters/block_2"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a run of two blocks; then a third block came, its items got IDs, and i05 was withdrawn."""
    folder = tmp_path_factory.mktemp("grown")
    whole = simulate(SimulateConfig(users=60, items=40, topics=4, blocks=3, births=0.5)).stream
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        whole.prefix(2).save(folder / "stream")
        streams.build_tokens(folder / "stream", TokensConfig(dimensions=8, levels=2, codes=4, capacity=16), None)
        bases.pretrain_base(folder / "stream", folder / "base", PretrainConfig(epochs=1), MemorySink())
        config = RunConfig(
            data=str(folder / "stream"),
            base=str(folder / "base"),
            method=MethodConfig(name="finetune"),
            train=TrainConfig(epochs=1, batch_tokens=1024),
        )
        runs.train(config, folder / "run", MemorySink())
        ship.export(Path("run"), "peft", folder / "before", None, None)
    kept = Stream.load(folder / "stream").manifest
    Stream(whole.interactions, whole.items, kept).save_after(folder / "stream", 2)
    streams.extend_tokens(folder / "stream")
    manifest = read_manifest(folder / "stream")
    write_manifest(folder / "stream", {**manifest, "withdrawn": [["i05", 4, None]]})
    lines = [{"user": "one", "history": ["i01", "i02", new_items(folder)[0]]}, {"user": "none", "history": []}]
    (folder / "h.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(autouse=True)
def _inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


def new_items(folder: Path) -> list[str]:
    return Stream.load(folder / "stream").items.filter(pl.col("first_block") == 3)["item"].to_list()


def offered(folder: Path) -> list[str]:
    return [item for item in Stream.load(folder / "stream").items["item"] if item != "i05"]


def recommend(out: Path, **changes: Any) -> tuple[dict[str, Any], pl.DataFrame]:
    given: dict[str, Any] = {
        "path": Path("run"),
        "base_folder": None,
        "block": None,
        "top_k": 100,
        "beams": None,
        "catalogue": None,
        "exclude_seen": False,
    }
    report = ship.recommend(Path("h.jsonl"), out, **{**given, **changes})
    return report, pl.read_parquet(out)


def test_a_run_recommends_what_is_offered_now(world: Path, tmp_path: Path) -> None:
    report, frame = recommend(tmp_path / "r.parquet")
    assert len(new_items(world)) > 1
    for items in frame.group_by("user").agg("item")["item"].to_list():
        assert sorted(items) == sorted(offered(world))
    assert (report["unknown_history_items"], report["withdrawn_catalogue_items"]) == (0, 0)
    table = SidTable.load(world / "stream" / "sids.parquet")
    assert dict(frame.select("item", "semantic_id").iter_rows()) == {i: table.spelt(i) for i in offered(world)}


def test_withdrawn_items_are_never_recommended_and_counted(world: Path, tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text(f"i05\ni01\n{new_items(world)[0]}\nnowhere\n")
    report, frame = recommend(tmp_path / "r.parquet", catalogue=tmp_path / "items.txt")
    assert set(frame["item"]) == {"i01", new_items(world)[0]}
    assert (report["withdrawn_catalogue_items"], report["unknown_catalogue_items"]) == (1, 1)
    (tmp_path / "gone.txt").write_text("i05\n")
    with pytest.raises(DataError, match=r"all 1 items of .*gone\.txt are withdrawn"):
        recommend(tmp_path / "s.parquet", catalogue=tmp_path / "gone.txt")


@pytest.mark.parametrize("target", PLACES)
def test_an_export_brings_the_ids_and_the_offered_items(target: str, world: Path, tmp_path: Path) -> None:
    report = ship.export(Path("run"), target, tmp_path / "out", None, None)
    place = tmp_path / "out" / PLACES[target]
    assert report["offered_items"] == len(offered(world))
    assert (place / "sids.parquet").read_bytes() == (world / "stream" / "sids.parquet").read_bytes()
    assert pl.read_parquet(place / "catalogue.parquet")["item"].to_list() == offered(world)
    _, own = recommend(tmp_path / "a.parquet")
    _, exported = recommend(tmp_path / "b.parquet", path=place, base_folder=Path("base"))
    assert own.equals(exported)


def test_a_merged_export_has_the_ids_of_the_whole_stream(world: Path, tmp_path: Path) -> None:
    ship.export(Path("run"), "merged", tmp_path / "out", None, None)
    merged = load_base(tmp_path / "out")
    assert merged.sids.fingerprint == SidTable.load(world / "stream" / "sids.parquet").fingerprint
    assert pl.read_parquet(tmp_path / "out" / "catalogue.parquet")["item"].to_list() == offered(world)
    assert merged.fitted_block == 2
    report = bases.init_base(
        str(tmp_path / "out"), world / "stream", tmp_path / "next", "packed", InitConfig(), MemorySink()
    )
    assert report["new_tokens"] == 0
    following = load_base(tmp_path / "next")
    assert (following.fingerprint, following.fitted_block) == (merged.fingerprint, 2)
    assert following.provenance["stream"] == merged.provenance["stream"]


def test_an_export_recommends_from_the_catalogue_it_was_made_with(world: Path, tmp_path: Path) -> None:
    before = {"path": Path("before"), "base_folder": Path("base")}
    report, frame = recommend(tmp_path / "a.parquet", **before)
    assert set(frame["item"]) == set(Stream.load(world / "stream").prefix(2).items["item"])
    assert report["unknown_history_items"] == 1  # an item of block 3
    report, frame = recommend(tmp_path / "b.parquet", **before, data=world / "stream")
    assert set(frame["item"]) == set(offered(world))
    ship.export(Path("before"), "peft", tmp_path / "again", Path("base"), None)
    for name in ("sids.parquet", "catalogue.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (world / "before" / name).read_bytes()


def test_exporting_again_renews_the_catalogue_of_what_is_served(world: Path, tmp_path: Path) -> None:
    data = shutil.copytree(world / "stream", tmp_path / "stream")
    out, place = tmp_path / "served", tmp_path / "served" / PLACES["vllm"]
    ship.export(Path("run"), "vllm", out, None, None, data=data)
    write_manifest(data, {**read_manifest(data), "withdrawn": [["i05", 4, None], ["i06", 4, None]]})
    ship.export(Path("run"), "vllm", out, None, None, data=data)
    assert pl.read_parquet(place / "catalogue.parquet")["item"].to_list() == [i for i in offered(world) if i != "i06"]


def test_an_export_of_before_is_served_with_the_ids_of_its_base(world: Path, tmp_path: Path) -> None:
    old = shutil.copytree(world / "before", tmp_path / "old")
    (old / "sids.parquet").unlink()
    (old / "catalogue.parquet").unlink()
    with pytest.warns(
        UserWarning, match=r"old has no sids\.parquet and no catalogue\.parquet: items and IDs are those of"
    ):
        _, frame = recommend(tmp_path / "r.parquet", path=old, base_folder=Path("base"))
    assert set(frame["item"]) == set(load_base(world / "base").sids.items)


def test_half_an_export_is_refused(world: Path, tmp_path: Path) -> None:
    old = shutil.copytree(world / "before", tmp_path / "old")
    pl.DataFrame({"item": ["stranger"]}).write_parquet(old / "catalogue.parquet")
    with pytest.raises(
        DataError, match=r"catalogue\.parquet offers 1 items that sids\.parquet lacks, the first 'strang"
    ):
        recommend(tmp_path / "r.parquet", path=old, base_folder=Path("base"))
    pl.DataFrame({"item": []}, schema={"item": pl.String()}).write_parquet(old / "catalogue.parquet")
    with pytest.raises(DataError, match=r"catalogue\.parquet offers no item"):
        recommend(tmp_path / "r.parquet", path=old, base_folder=Path("base"))
    (old / "catalogue.parquet").unlink()
    with pytest.raises(DataError, match=r"no such file: .*catalogue\.parquet"):
        recommend(tmp_path / "r.parquet", path=old, base_folder=Path("base"))


def test_a_stream_that_moved_is_named(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    config = read_json(tmp_path / "run" / "config.json")
    config["config"]["data"] = str(tmp_path / "gone")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"gone is not a stream directory \(say where the stream is now: --data DIR\)"):
        ship.export(tmp_path / "run", "peft", tmp_path / "out", None, None)
    ship.export(tmp_path / "run", "peft", tmp_path / "out", None, None, data=world / "stream")
    assert "- source: simulate" in (tmp_path / "out" / "README.md").read_text().splitlines()


def test_another_stream_is_refused(world: Path, tmp_path: Path) -> None:
    streams.simulate_data(tmp_path / "other", SimulateConfig(users=60, items=40, topics=4, blocks=3))
    shutil.copy(world / "stream" / "sids.parquet", tmp_path / "other")
    for call in (
        lambda: ship.export(Path("run"), "peft", tmp_path / "out", None, None, data=tmp_path / "other"),
        lambda: ship.export(Path("run"), "merged", tmp_path / "out", None, None, data=tmp_path / "other"),
        lambda: recommend(tmp_path / "r.parquet", data=tmp_path / "other"),
    ):
        with pytest.raises(DataError, match=r"block_002 has learned the stream \w+, .*other is the stream \w+"):
            call()
    assert not (tmp_path / "out").exists()


def test_items_without_an_id_stop_an_export(world: Path, tmp_path: Path) -> None:
    data = shutil.copytree(world / "stream", tmp_path / "stream")
    shutil.copy(world / "before" / "sids.parquet", data)
    with pytest.raises(DataError, match="items have no semantic ID") as caught:
        ship.export(Path("run"), "peft", tmp_path / "out", None, None, data=data)
    assert caught.value.hint == f"give the new items semantic IDs: cladapt tokens extend {data}"
    write_manifest(data, {**read_manifest(data), "withdrawn": [[item, 4, None] for item in {*offered(world), "i05"}]})
    shutil.copy(world / "stream" / "sids.parquet", data)
    with pytest.raises(DataError, match="every item of the stream is withdrawn"):
        ship.export(Path("run"), "peft", tmp_path / "out", None, None, data=data)
