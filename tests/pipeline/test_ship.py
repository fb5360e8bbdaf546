"""Which adapter is meant, where an export goes, and recommendations as files."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.artifacts import read_json, write_json
from cladapt.config import MethodConfig, PretrainConfig, RunConfig, SimulateConfig, TokensConfig, TrainConfig
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.pipeline import bases, runs, ship, streams
from cladapt.run import Run
from cladapt.train.sinks import MemorySink


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `stream`, `base` and the runs `run` (the latest) and `frozen`."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        streams.simulate_data(folder / "stream", SimulateConfig(users=60, items=40, topics=4, blocks=3))
        streams.build_tokens(folder / "stream", TokensConfig(dimensions=8, levels=2, codes=4, capacity=16), None)
        bases.pretrain_base(folder / "stream", folder / "base", PretrainConfig(epochs=2), MemorySink())
        for name, method in (("frozen", "frozen"), ("run", "finetune")):
            config = RunConfig(
                data=str(folder / "stream"),
                base=str(folder / "base"),
                method=MethodConfig(name=method),
                train=TrainConfig(epochs=3, batch_tokens=1024, window=7),
            )
            runs.train(config, folder / name, MemorySink())
    return folder


@pytest.fixture(autouse=True)
def _inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


@pytest.fixture
def histories(tmp_path: Path) -> Path:
    lines = [
        {"user": "one", "history": ["i01", "i02", "i03"]},
        {"user": "none", "history": []},
        {"user": "odd", "history": ["i39", "gone"]},
    ]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "h.jsonl"


def recommend(histories: Path, out: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "path": Path("run"),
        "base_folder": None,
        "block": None,
        "top_k": 4,
        "beams": None,
        "catalogue": None,
        "exclude_seen": True,
    }
    return ship.recommend(histories, out, **{**given, **changes})


def test_a_run_stands_for_its_last_adapter_or_for_the_one_of_a_block(world: Path) -> None:
    base = world / "base"
    assert ship.find_source(Path("run"), None, None) == ship.Source(
        Path("run/adapters/block_003"), base, Run.open(Path("run"))
    )
    assert ship.find_source(Path("run"), None, 2).adapter == Path("run/adapters/block_002")
    latest = ship.find_source(None, None, None)
    assert latest.adapter.resolve() == world / "run" / "adapters" / "block_003"
    assert ship.find_source(Path("run"), Path("elsewhere"), None).base == Path("elsewhere")


def test_an_adapter_directory_finds_its_run(world: Path, tmp_path: Path) -> None:
    found = ship.find_source(Path("run/adapters/block_002"), None, None)
    assert (found.adapter, found.base) == (Path("run/adapters/block_002"), world / "base")
    assert found.run is not None
    assert found.run.path == world / "run"
    ship.export(Path("run"), "peft", tmp_path / "away", None, None)
    with pytest.raises(ConfigError, match=r"away does not say where its base is \(give --base DIR"):
        ship.find_source(tmp_path / "away", None, None)
    assert ship.find_source(tmp_path / "away", Path("base"), None).run is None


def test_what_stands_for_no_adapter_is_told() -> None:
    with pytest.raises(ConfigError, match=r"--block 9: run has \[2, 3\] \(choose one of these"):
        ship.find_source(Path("run"), None, 9)
    with pytest.raises(ConfigError, match="--block 2 with an adapter directory"):
        ship.find_source(Path("run/adapters/block_002"), None, 2)
    with pytest.raises(DataError, match=r"frozen has no adapter \(method frozen\)"):
        ship.find_source(Path("frozen"), None, None)
    with pytest.raises(DataError, match="stream is not a run directory"):
        ship.find_source(Path("stream"), None, None)


@pytest.mark.parametrize("target", ["peft", "merged"])
def test_an_export_goes_into_the_run_by_default(target: str, world: Path) -> None:
    report = ship.export(None, target, None, None, None)
    out = Path(report["out"])
    assert out.resolve() == world / "run" / "export" / target
    assert (report["target"], report["block"]) == (target, 3)
    wanted = {"peft": "adapter_model.safetensors", "merged": "model.safetensors"}[target]
    assert (out / wanted).is_file()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        ship.export(None, target, None, None, None)


def test_a_bare_adapter_needs_a_place(tmp_path: Path) -> None:
    ship.export(Path("run"), "peft", tmp_path / "away", None, None)
    with pytest.raises(ConfigError, match=r"needs a place \(give --out DIR"):
        ship.export(tmp_path / "away", "peft", None, Path("base"), None)
    again = ship.export(tmp_path / "away", "peft", tmp_path / "again", Path("base"), None)
    assert again["parameters"] > 0


def test_all_blocks_of_a_run_are_served_over_one_base(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "serving"
    report = ship.export(Path("run"), "vllm", out, None, None, all_blocks=True)
    assert report["block"] == [2, 3]
    assert report["serve"].endswith(
        "--max-lora-rank 8 --lora-modules block_2=adapters/block_2 block_3=adapters/block_3"
    )
    assert sorted(path.name for path in out.iterdir()) == ["SERVING.md", "adapters", "base"]
    base = read_json(world / "base" / "cladapt.json")
    assert read_json(out / "base" / "cladapt.json") == base
    card = (out / "adapters" / "block_3" / "README.md").read_text()
    learned = read_json(world / "run" / "adapters" / "block_003" / "cladapt.json")["stream"]
    assert f"- stream fingerprint: {learned}" in card.splitlines()
    assert "- source: simulate" in card.splitlines()
    again = ship.export(Path("run"), "vllm", out, None, 3)
    assert (again["base"], again["block"]) == ("kept", 3)


def test_the_check_writes_nothing_and_names_the_servers(world: Path) -> None:
    before = sorted(path for path in world.rglob("*"))
    report = ship.check(Path("run"), None, None, all_blocks=True)
    assert (report["vllm"], report["llama.cpp"]) == (True, False)
    assert {row["adapter"] for row in report["findings"]} == {"block_002", "block_003"}
    errors = {(row["server"], row["where"]) for row in report["findings"] if row["level"] == "error"}
    assert errors == {("llama.cpp", "tokenizer.json")}
    assert sorted(path for path in world.rglob("*")) == before


def test_all_blocks_need_a_run_and_a_target_that_holds_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--all-blocks with --target peft \(only --target vllm"):
        ship.export(Path("run"), "peft", tmp_path / "out", None, None, all_blocks=True)
    with pytest.raises(ConfigError, match="--all-blocks with --block 2"):
        ship.check(Path("run"), None, 2, all_blocks=True)
    with pytest.raises(ConfigError, match=r"--all-blocks with an adapter directory \(name its run"):
        ship.check(Path("run/adapters/block_002"), None, None, all_blocks=True)
    assert not (tmp_path / "out").exists()


def test_every_format_holds_the_same_recommendations(histories: Path, tmp_path: Path) -> None:
    reports = [recommend(histories, tmp_path / f"r.{kind}") for kind in ("jsonl", "csv", "parquet")]
    frames = [
        pl.read_ndjson(tmp_path / "r.jsonl"),
        pl.read_csv(tmp_path / "r.csv"),
        pl.read_parquet(tmp_path / "r.parquet"),
    ]
    whole = frames[2]
    assert whole.columns == ["user", "rank", "item", "semantic_id", "score"]
    assert all(frame.drop("score").cast(pl.String).equals(whole.drop("score").cast(pl.String)) for frame in frames)
    assert all(frame["score"].to_list() == pytest.approx(whole["score"].to_list()) for frame in frames)
    assert whole["user"].to_list() == ["one"] * 4 + ["none"] * 4 + ["odd"] * 4
    assert not set(whole.filter(pl.col("user") == "one")["item"]) & {"i01", "i02", "i03"}
    assert reports[0] == {
        "out": str(tmp_path / "r.jsonl"),
        "adapter": "run/adapters/block_003",
        "beams": 20,
        "users": 3,
        "recommendations": 12,
        "users_with_fewer": 0,
        "users_without_known_items": 1,
        "shortened_prompts": 0,
        "history_items_left_out": 0,
        "titles_cut": 0,
        "unknown_history_items": 1,
        "unknown_catalogue_items": 0,
        "withdrawn_catalogue_items": 0,
    }


def test_an_exported_adapter_recommends_as_its_run_does(histories: Path, tmp_path: Path) -> None:
    ship.export(Path("run"), "peft", tmp_path / "away", None, None)
    recommend(histories, tmp_path / "a.parquet")
    recommend(histories, tmp_path / "b.parquet", path=tmp_path / "away", base_folder=Path("base"))
    recommend(histories, tmp_path / "c.parquet", block=2)
    a, b, c = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in "abc")
    assert a.equals(b)
    assert not a.equals(c)


def test_only_the_window_the_adapter_was_trained_with_counts(tmp_path: Path) -> None:
    items = Stream.load(Path("stream")).items["item"].to_list()
    for name, history in (("long", items[:12]), ("short", items[5:12])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"user": "u", "history": history}))
        recommend(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.csv", exclude_seen=False)
    assert (tmp_path / "long.csv").read_text() == (tmp_path / "short.csv").read_text()


def test_a_catalogue_and_seen_items(histories: Path, tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text("i01\ni05\ni06\nnowhere\n")
    report = recommend(histories, tmp_path / "r.csv", catalogue=tmp_path / "items.txt", exclude_seen=False, top_k=3)
    found = pl.read_csv(tmp_path / "r.csv")
    assert {tuple(sorted(items)) for items in found.group_by("user").agg("item")["item"].to_list()} == {
        ("i01", "i05", "i06")
    }
    assert report["unknown_catalogue_items"] == 1


def test_bad_calls_write_nothing(histories: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "r.csv"
    with pytest.raises(ConfigError, match=r"r\.txt: unknown kind of file '\.txt' \(use one of \.jsonl, \.csv, \.parq"):
        recommend(histories, tmp_path / "r.txt")
    with pytest.raises(ConfigError, match="--beams 3 is below the 20 of the evaluation") as caught:
        recommend(histories, out, beams=3)
    assert caught.value.hint == "give --beams 20 or more, or leave it out"
    with pytest.raises(ConfigError, match="top_k=30, beams=25"):
        recommend(histories, out, beams=25, top_k=30)
    with pytest.raises(DataError, match="no such file"):
        recommend(tmp_path / "gone.csv", out)
    with pytest.raises(DataError, match="no such file"):
        recommend(histories, out, catalogue=tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"is not a base\+tokens directory"):
        recommend(histories, out, base_folder=tmp_path)
    assert not out.parent.exists()


def test_an_adapter_that_does_not_say_how_it_was_trained_is_refused(histories: Path, tmp_path: Path) -> None:
    ship.export(Path("run"), "peft", tmp_path / "away", None, None)
    record = read_json(tmp_path / "away" / "cladapt.json")
    kept = {key: value for key, value in record.items() if key not in ("window", "form")}
    write_json(tmp_path / "away" / "cladapt.json", kept)
    with pytest.raises(DataError, match=r"cladapt\.json lacks form, window"):
        recommend(histories, tmp_path / "r.csv", path=tmp_path / "away", base_folder=Path("base"))


def test_a_shorter_list_is_the_head_of_the_longer_one(histories: Path, tmp_path: Path) -> None:
    frames = {}
    for top_k in (1, 5, 20):
        report = recommend(histories, tmp_path / f"{top_k}.parquet", top_k=top_k)
        assert report["beams"] == 20
        frames[top_k] = pl.read_parquet(tmp_path / f"{top_k}.parquet")
    for top_k in (1, 5):
        assert frames[top_k].equals(frames[20].filter(pl.col("rank") <= top_k))


@pytest.mark.parametrize(("recorded", "top_k", "beams"), [(30, 4, 30), (30, 35, 35), (None, 4, 20)])
def test_the_beams_are_those_the_adapter_was_evaluated_with(
    recorded: int | None, top_k: int, beams: int, histories: Path, tmp_path: Path
) -> None:
    ship.export(Path("run"), "peft", tmp_path / "away", None, None)
    record = read_json(tmp_path / "away" / "cladapt.json")
    record.pop("beams", None)
    write_json(tmp_path / "away" / "cladapt.json", record | ({} if recorded is None else {"beams": recorded}))
    away = {"path": tmp_path / "away", "base_folder": Path("base")}
    assert recommend(histories, tmp_path / "r.csv", top_k=top_k, **away)["beams"] == beams


def test_a_run_that_was_evaluated_wider_recommends_as_wide(world: Path, histories: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "wide")
    write_json(tmp_path / "wide" / "metrics.json", {"base_block": 1, "config": {"beams": 40}})
    assert recommend(histories, tmp_path / "r.csv", path=tmp_path / "wide")["beams"] == 40
    with pytest.raises(ConfigError, match="--beams 20 is below the 40 of the evaluation"):
        recommend(histories, tmp_path / "s.csv", path=tmp_path / "wide", beams=20)


def test_histories_are_never_overwritten(histories: Path) -> None:
    before = histories.read_text()
    with pytest.raises(ConfigError, match=r"h\.jsonl is the file of the histories \(name another file"):
        recommend(histories, histories, overwrite=True)
    assert histories.read_text() == before


def test_a_file_is_replaced_only_where_that_is_asked(histories: Path, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("precious")
    with pytest.raises(ConfigError, match=r"r\.csv exists \(choose another --out, or give --overwrite"):
        recommend(histories, tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text() == "precious"
    recommend(histories, tmp_path / "r.csv", overwrite=True)
    assert (tmp_path / "r.csv").read_text().startswith("user,rank,item")


def test_formulas_in_a_csv_are_escaped_and_counted(tmp_path: Path) -> None:
    users = ["=1+1", "+x", "-x", "@x", "\tx", "-5", "+3.5", "x=1", "'=1"]
    (tmp_path / "h.jsonl").write_text("\n".join(json.dumps({"user": u, "history": []}) for u in users))
    report = recommend(tmp_path / "h.jsonl", tmp_path / "r.csv", top_k=1)
    assert report["escaped_cells"] == 5
    found = pl.read_csv(tmp_path / "r.csv", infer_schema=False)
    assert found["user"].to_list() == ["'=1+1", "'+x", "'-x", "'@x", "'\tx", *users[5:]]
    assert all(score.startswith("-") for score in found["score"])  # numbers stay numbers
    recommend(tmp_path / "h.jsonl", tmp_path / "r.parquet", top_k=1)
    assert pl.read_parquet(tmp_path / "r.parquet")["user"].to_list() == users


def test_columns_of_histories_have_the_names_that_are_given(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("who,what,when\nu,i02,2\nu,i01,1\n")
    (tmp_path / "sorted.csv").write_text("user,item\nu,i01\nu,i02\n")
    recommend(tmp_path / "h.csv", tmp_path / "a.parquet", user="who", item="what", timestamp="when")
    recommend(tmp_path / "sorted.csv", tmp_path / "b.parquet")
    assert pl.read_parquet(tmp_path / "a.parquet").equals(pl.read_parquet(tmp_path / "b.parquet"))
