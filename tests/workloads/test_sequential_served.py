"""Sequential runs in use: what is recommended against the scores of all items, and nights of new logs."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cladapt.artifacts import read_json
from cladapt.config import PromoteConfig, SimulateConfig, resolve
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError, DataError
from cladapt.model.saved import adapted
from cladapt.pipeline import bases, evaluation, growth, promote, runs, ship
from cladapt.pipeline.compare import compare_runs
from cladapt.pipeline.update import update
from cladapt.run import open_run
from cladapt.sequential import SequentialBaseConfig
from cladapt.tokens.sequences import form_of_backbone
from cladapt.train.sinks import MemorySink
from cladapt.workloads.sequential import Sequential, SequentialConfig

SINK = MemorySink()
ALWAYS = PromoteConfig(rule="always", bootstrap=100)
BACKBONES: dict[str, dict[str, Any]] = {
    "sasrec": {"normalise": "both", "temperature": 0.2},
    "gru4rec": {},
    "bert4rec": {"normalise": "score"},
}


def settings(world: Path, backbone: str = "sasrec", data: str = "stream") -> SequentialConfig:
    given = {"adapter": {"rank": 2}, "method": {"name": "finetune"}, "train": {"epochs": 1, "lr": 0.01}}
    given |= {"eval": {"bootstrap": 100}, "data": str(world / data), "base": str(world / backbone)}
    return resolve(SequentialConfig, given)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of three blocks without IDs, a run on a base of each backbone, the first two blocks with a run on them,
    and the log of the third."""
    folder = tmp_path_factory.mktemp("world")
    made = simulate(SimulateConfig(users=60, items=50, topics=4, blocks=3)).stream
    used = made.interactions.group_by("item").agg(pl.col("block").min().alias("first_block"))
    items = made.items.drop("first_block").join(used, on="item").sort("first_block", maintain_order=True)
    stream = Stream(made.interactions, items.select(made.items.columns), made.manifest)
    stream.save(folder / "stream")
    stream.prefix(2).save(folder / "short")
    log = stream.interactions.filter(pl.col("block") == 3).join(items.select("item", "text"), on="item")
    log.drop("block", "position").write_csv(folder / "log.csv")
    for backbone, values in BACKBONES.items():
        given = {"backbone": backbone, "hidden": 8, "layers": 1, "epochs": 1, **values}
        config = SequentialBaseConfig.model_validate(given)
        bases.sequential_base(folder / "stream", folder / backbone, config, SINK)
        runs.train(settings(folder, backbone), folder / f"run-{backbone}", SINK)
    runs.train(settings(folder, data="short"), folder / "run-short", SINK)
    histories = [[user, item] for user, item in made.interactions.select("user", "item").rows()][:200]
    rows = [*histories, ["new", "never seen"]]
    pl.DataFrame(rows, schema=["user", "item"], orient="row").write_parquet(folder / "histories.parquet")
    return folder


def recommend(world: Path, out: Path, run: str = "run-sasrec", **changes: Any) -> tuple[pl.DataFrame, dict[str, Any]]:
    given: dict[str, Any] = {"base_folder": None, "block": None, "top_k": 5, "beams": None, "catalogue": None}
    given |= {"path": world / run, "exclude_seen": True, "overwrite": True, **changes}
    counts = ship.recommend(world / "histories.parquet", out, **given)
    return pl.read_parquet(out), counts


@pytest.mark.filterwarnings("ignore:.* has no column")
@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_lists_are_the_best_of_all_scores(
    world: Path, tmp_path: Path, backbone: str, block: int, exclude_seen: bool
) -> None:
    run = f"run-{backbone}"
    found, counts = recommend(world, tmp_path / "o.parquet", run, block=block, exclude_seen=exclude_seen)
    stream, base = Sequential().open_inputs(settings(world, backbone))
    items, form = stream.items["item"].to_list(), form_of_backbone(base.config, base.config.mask)
    given = pl.read_parquet(world / "histories.parquet")
    assert found.columns == ["user", "rank", "item", "score"]
    assert counts["unknown_history_items"] == counts["users_without_known_items"] == 1
    with adapted(base, open_run(world / run).adapters[block]) as lm, torch.no_grad():
        table = lm.items(len(items))
        for user in given["user"].unique():
            history = [items.index(i) for i in given.filter(pl.col("user") == user)["item"] if i in items]
            sequence = torch.from_numpy(form.read(np.array(history, dtype=np.int64)))[None]
            query = lm.query(lm.encode(sequence, table)[0, -1:])
            rows = torch.nn.functional.normalize(table, dim=1) if lm.normalises else table
            score = (query.double() @ rows.double().T)[0].log_softmax(0)
            if exclude_seen:
                score[history] = -torch.inf
            best = score.topk(5)
            own = found.filter(pl.col("user") == user)
            assert own["rank"].to_list() == [1, 2, 3, 4, 5]
            assert own["item"].to_list() == [items[i] for i in best.indices.tolist()]
            assert own["score"].to_list() == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.filterwarnings("ignore:.* has no column")
def test_only_what_is_offered_and_listed(world: Path, tmp_path: Path) -> None:
    stream = Stream.load(world / "stream")
    *listed, gone = stream.items["item"][:4].to_list()
    (tmp_path / "items.txt").write_text("\n".join([*listed, gone, "unknown"]))
    shutil.copytree(world / "stream", tmp_path / "stream")
    (tmp_path / "gone.txt").write_text(gone)
    growth.retire_items(tmp_path / "stream", tmp_path / "gone.txt")
    found, counts = recommend(
        world, tmp_path / "o.parquet", data=tmp_path / "stream", catalogue=tmp_path / "items.txt", exclude_seen=False
    )
    assert {*found["item"]} == {*listed}
    assert counts["users_with_fewer"] == counts["users"]
    assert (counts["withdrawn_catalogue_items"], counts["unknown_catalogue_items"]) == (1, 1)
    total = found.group_by("user").agg(pl.col("score").exp().sum())["score"]
    assert total.to_list() == pytest.approx([1.0] * len(total), abs=1e-5)
    (tmp_path / "items.txt").write_text(gone)
    with pytest.raises(DataError, match=r"all 1 items of .*items\.txt are withdrawn"):
        recommend(world, tmp_path / "o.parquet", data=tmp_path / "stream", catalogue=tmp_path / "items.txt")


@pytest.mark.filterwarnings("ignore:.* has no column")
def test_an_adapter_alone_needs_its_base_and_its_stream(world: Path, tmp_path: Path) -> None:
    whole, _ = recommend(world, tmp_path / "o.parquet", block=2)
    shutil.copytree(world / "run-sasrec" / "adapters" / "block_002", tmp_path / "alone")
    card = (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")
    assert "    cladapt recommend HISTORIES --adapter . --base BASE --data STREAM" in card.splitlines()
    given = {"path": tmp_path / "alone", "base_folder": world / "sasrec"}
    with pytest.raises(ConfigError, match=r"alone does not say where its stream is \(give --data DIR\)"):
        recommend(world, tmp_path / "o.parquet", **given)
    assert recommend(world, tmp_path / "o.parquet", **given, data=world / "stream")[0].equals(whole)


@pytest.mark.filterwarnings("ignore:.* has no column")
def test_what_has_no_meaning_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--beams 20 .* which scores every item \(leave --beams out\)"):
        recommend(world, tmp_path / "o.parquet", beams=20)
    with pytest.raises(ConfigError, match=r"top_k=0 \(use top-k of 1 or more"):
        recommend(world, tmp_path / "o.parquet", top_k=0)
    for target in ("peft", "merged", "vllm"):
        with pytest.raises(ConfigError, match=r"is of --task sequential: servers .* cannot take it \(write its"):
            ship.export(world / "run-sasrec", target, tmp_path / "out", None, None)
    with pytest.raises(ConfigError, match=r"is of --task sequential"):
        ship.check(world / "run-sasrec", None, None)
    for given in ({"target": "vllm"}, {"out": tmp_path / "out"}, {"index": tmp_path / "i"}, {"ids": 2}):
        (option,) = given
        with pytest.raises(ConfigError, match=rf"--{option}: .*sequential, which knows no IDs and exports nothing"):
            update("log.csv", world / "run-sasrec", None, None, SINK, **given)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.* has no column")
def test_nights_of_new_logs(world: Path, tmp_path: Path) -> None:
    for name in ("short", "sasrec", "run-short", "log.csv", "histories.parquet"):
        (shutil.copy if name.count(".") else shutil.copytree)(world / name, tmp_path / name)
    run = tmp_path / "run-short"
    given: dict[str, Any] = {"data": tmp_path / "short", "base": tmp_path / "sasrec", "least": 1}
    night = update(str(tmp_path / "log.csv"), run, sink=SINK, promotion=ALWAYS, **given)
    assert (night["outcome"], night["learn"], night["decide"]["current"]) == ("promoted", [3], 3)
    assert not {"export", "extend"} & night.keys()
    assert not (run / "export").exists()
    again = update(str(tmp_path / "log.csv"), run, sink=SINK, promotion=ALWAYS, **given)
    assert (again["outcome"], again["learn"]) == ("nothing new", [])
    grown, whole = Stream.load(tmp_path / "short"), Stream.load(world / "stream")
    assert [len(grown.known(b)) for b in (1, 2, 3)] == [len(whole.known(b)) for b in (1, 2, 3)]
    where = {"data": tmp_path / "short", "base_folder": tmp_path / "sasrec"}
    newest, _ = recommend(tmp_path, tmp_path / "new.parquet", "run-short", **where)
    promote.promote(run, {"rule": "always", "bootstrap": 100}, 2, SINK, given["data"], given["base"])
    before, counts = recommend(tmp_path, tmp_path / "old.parquet", "run-short", **where)
    assert counts["adapter"].endswith("block_002")
    assert not before.equals(newest)
    promote.rollback(run, None)
    assert recommend(tmp_path, tmp_path / "back.parquet", "run-short", **where)[0].equals(newest)
    evaluation.evaluate_run(open_run(world / "run-sasrec"), settings(world).eval, None, SINK)
    evaluation.evaluate_run(open_run(world / "run-gru4rec"), settings(world).eval, None, SINK)
    lines = compare_runs([world / "run-sasrec", world / "run-gru4rec"])["groups"]
    assert len(lines) == 2
    assert read_json(world / "run-sasrec" / "metrics.json")["diagnostics"]
