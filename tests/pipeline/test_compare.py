"""Pooling and pairing of evaluated runs against plain arithmetic on their rows, and what is refused."""

import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl
import pytest

from cladapt.artifacts import read_json, write_json
from cladapt.config import MethodConfig, PretrainConfig, RunConfig, SimulateConfig, TokensConfig, TrainConfig
from cladapt.errors import ConfigError, DataError
from cladapt.eval.significance import NO_DIFFERENCE
from cladapt.pipeline import bases, evaluation, runs, streams
from cladapt.pipeline.compare import compare_runs
from cladapt.run import Run
from cladapt.train.sinks import MemorySink

EVAL: dict[str, Any] = {"bootstrap": 100, "scope": "current"}
METHODS: dict[str, dict[str, Any]] = {
    "peso": {},
    "weak": {"name": "peso", "options": {"strength": 0.001}},
    "finetune": {"name": "finetune"},
    "frozen": {"name": "frozen"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream, a base, and evaluated runs `<method>-<seed>` of two seeds over them."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        streams.simulate_data(folder / "stream", SimulateConfig(users=60, items=40, topics=4, blocks=3))
        streams.build_tokens(folder / "stream", TokensConfig(dimensions=8, levels=2, codes=4, capacity=16), None)
        bases.pretrain_base(folder / "stream", folder / "base", PretrainConfig(epochs=2), MemorySink())
        for name, method in METHODS.items():
            for seed in (0, 1):
                config = RunConfig(
                    seed=seed,
                    data=str(folder / "stream"),
                    base=str(folder / "base"),
                    method=MethodConfig(**method),
                    train=TrainConfig(epochs=1),
                )
                runs.train(config, folder / f"{name}-{seed}", MemorySink())
                if name != "frozen" or seed == 0:
                    evaluation.evaluate(folder / f"{name}-{seed}", EVAL, None, MemorySink())
        shutil.copytree(folder / "frozen-0" / "users", folder / "frozen-1" / "users")  # the base has no seed
        shutil.copy(folder / "frozen-0" / "metrics.json", folder / "frozen-1")
    return folder


def paths(world: Path, *names: str, seeds: tuple[int, ...] = (0, 1)) -> list[Path]:
    return [world / f"{name}-{seed}" for name in names for seed in seeds]


def likelihood(run: Path, model: int | None = None) -> float:
    """Mean over the later blocks of the block means, from the parquet files themselves."""
    frames = {b: pl.read_parquet(run / "users" / f"block_00{b}.parquet") for b in (2, 3)}
    kept = (f.filter(pl.col("model_block") == (b if model is None else model)) for b, f in frames.items())
    return fmean(frame["log_likelihood"].mean() for frame in kept)  # type: ignore[misc]


def test_what_blocks_change_for_earlier_inputs_stands_in_a_table_of_every_method(world: Path, tmp_path: Path) -> None:
    result = compare_runs(paths(world, "peso", "finetune", "frozen"), tmp_path / "out")
    expected = []
    for name in ("peso", "finetune"):  # the frozen base changes nothing
        line = {"model": name, "seeds": 2}
        for figure in ("change", "alignment"):
            by_seed = []
            for run in paths(world, name):
                records = [read_json(run / "adapters" / f"block_00{b}" / "cladapt.json") for b in (2, 3)]
                each = [fmean(module[figure] for module in r["interference"].values()) for r in records]
                by_seed.append(fmean(each))
            line[figure] = pytest.approx(fmean(by_seed))
        expected.append(line)
    assert result["interference"] == expected
    written = pl.read_csv(tmp_path / "out" / "interference.csv")
    assert written["model"].to_list() == ["peso", "finetune"]
    assert written["change"].to_list() == pytest.approx([line["change"] for line in result["interference"]], abs=1e-6)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What blocks change for earlier inputs" in page
    assert "The lower, the better earlier inputs are protected." in page


def test_where_no_run_has_adapted_twice_there_is_no_such_table(world: Path, tmp_path: Path) -> None:
    result = compare_runs(paths(world, "frozen"), tmp_path / "out")
    assert "interference" not in result
    assert not (tmp_path / "out" / "interference.csv").exists()


def test_seeds_are_pooled_and_groups_named_by_what_differs(world: Path) -> None:
    result = compare_runs(paths(world, "peso", "weak", "finetune"))
    names = ["peso strength=0.1", "peso strength=0.001", "finetune"]
    assert [group["name"] for group in result["groups"]] == names
    assert [group["seeds"] for group in result["groups"]] == [[0, 1]] * 3
    assert result["groups"][1]["runs"] == [str(path) for path in paths(world, "weak")]
    summary = {row["model"]: row for row in result["summary"]}
    assert list(summary) == [*names, "frozen", "block popularity", "markov", "ceiling"]
    for name, folder in zip(names, ("peso", "weak", "finetune"), strict=True):
        assert summary[name]["seeds"] == 2
        expected = fmean(likelihood(path) for path in paths(world, folder))
        assert summary[name]["log_likelihood"] == pytest.approx(expected)
        assert summary[name]["log_likelihood 95 %"].startswith("[")
    assert summary["frozen"]["log_likelihood"] == pytest.approx(likelihood(world / "peso-0", model=1))
    assert "seeds" not in summary["markov"]


def test_a_difference_is_that_of_the_two_lines_with_an_interval_over_users(world: Path) -> None:
    result = compare_runs(paths(world, "finetune", "peso"))
    summary = {row["model"]: row for row in result["summary"]}
    rows = {(row["difference"], row["metric"]): row for row in result["differences"]}
    assert {name for name, _ in rows} == {f"{n} - finetune" for n in ("peso", "frozen", "block popularity", "markov")}
    for (name, metric), row in rows.items():
        other = name.removesuffix(" - finetune")
        assert row["effect"] == pytest.approx(summary[other][metric] - summary["finetune"][metric])
        assert row["low"] <= row["effect"] <= row["high"]
        assert (row["shown"] == NO_DIFFERENCE) == (row["low"] <= 0 <= row["high"])
    assert ("markov - finetune", "log_likelihood") not in rows

    # the interval by hand: users drawn together with all their blocks and seeds
    cases: dict[str, list[float]] = {}
    for seed in (0, 1):
        for b in (2, 3):
            frames = [
                pl.read_parquet(world / f"{n}-{seed}" / "users" / f"block_00{b}.parquet")
                .filter(pl.col("model_block") == b)
                .sort("user")
                for n in ("peso", "finetune")
            ]
            gains = frames[0]["log_likelihood"] - frames[1]["log_likelihood"]
            for user, gain in zip(frames[0]["user"], gains / len(gains) / 4, strict=True):  # 2 seeds x 2 blocks
                cases.setdefault(user, []).append(gain)
    total = np.array([sum(cases[user]) for user in sorted(cases)])
    count = np.array([len(cases[user]) for user in sorted(cases)])
    drawn = np.random.default_rng(0).integers(len(total), size=(100, len(total)))
    means = total[drawn].sum(axis=1) / count[drawn].sum(axis=1) * count.sum()
    row = rows["peso - finetune", "log_likelihood"]
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_a_method_that_does_not_train_is_compared_as_it_is(world: Path) -> None:
    result = compare_runs(paths(world, "frozen", "peso"))
    names = [row["model"] for row in result["summary"]]
    assert names == ["frozen", "peso", "block popularity", "markov", "ceiling"]  # its base is not listed twice
    assert result["summary"][0]["log_likelihood"] == pytest.approx(likelihood(world / "frozen-0", model=1))
    assert result["differences"][0]["difference"] == "peso - frozen"


def test_one_run_stands_beside_what_was_measured_with_it(world: Path) -> None:
    result = compare_runs([world / "peso-0"])
    assert result["groups"][0]["name"] == "peso"
    assert {row["difference"] for row in result["differences"]} == {
        f"{name} - peso" for name in ("frozen", "block popularity", "markov")
    }


def test_the_tables_and_a_page_are_written(world: Path, tmp_path: Path) -> None:
    result = compare_runs(paths(world, "peso", "finetune"), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "differences.csv",
        "interference.csv",
        "new_items_differences.csv",
        "new_items_summary.csv",
        "next_block_differences.csv",
        "next_block_summary.csv",
        "report.html",
        "summary.csv",
        "tails.csv",
        "tails_differences.csv",
    ]
    after = pl.read_csv(tmp_path / "out" / "next_block_summary.csv")
    assert after["model"].to_list() == ["peso", "finetune", "frozen", "block popularity", "markov"]
    born = pl.read_csv(tmp_path / "out" / "new_items_summary.csv")
    assert born["model"].to_list() == after["model"].to_list()  # no ceiling: it is known for all tests together
    rows = pl.concat(pl.read_parquet(world / run / "users" / "block_*.parquet") for run in ("peso-0", "peso-1"))
    own = rows.filter(pl.col("new_item") & (pl.col("model_block") == pl.col("block")) & (pl.col("block") > 1))
    assert 0 < own.height == born["tests"][0]
    summary = pl.read_csv(tmp_path / "out" / "summary.csv")
    assert summary["model"].to_list() == [row["model"] for row in result["summary"]]
    assert pl.read_csv(tmp_path / "out" / "differences.csv").height == len(result["differences"])
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 3
    assert str(world / "finetune-1") in html
    with pytest.raises(ConfigError, match="out exists and is not empty"):
        compare_runs(paths(world, "peso"), tmp_path / "out")


def test_head_and_tail_are_those_of_the_files_with_seeds_pooled(world: Path) -> None:
    result = compare_runs(paths(world, "peso", "finetune"))
    tests: dict[str, dict[str, list[float]]] = {}
    for name in ("peso", "finetune"):
        for seed in (0, 1):
            run = world / f"{name}-{seed}" / "users"
            stand = {(p["block"], p["item"]): p for p in pl.read_parquet(run / "tails.parquet").to_dicts()}
            for row in pl.read_parquet(run / "block_*.parquet").to_dicts():
                if row["model_block"] == row["block"] > 1:
                    place = stand[row["block"], row["item"]]
                    prior = "head" if place["prior_quintile"] == 1 else "tail"
                    data = "head" if place["data_quintile"] == 1 else "tail"
                    group = f"prior {prior}, data {data}"
                    tests.setdefault(name, {}).setdefault(group, []).append(row["log_likelihood"])
    lines = {(row["model"], row["group"]): row for row in result["tails"]}
    for name, by_group in tests.items():
        assert len(by_group) == 4
        for group, values in by_group.items():
            assert lines[name, group]["tests"] == len(values)
            assert lines[name, group]["log_likelihood"] == pytest.approx(fmean(values))
    differences = {(row["difference"], row["group"]): row for row in result["tails_differences"]}
    for group in tests["peso"]:
        row = differences["finetune - peso", group]
        gain = lines["finetune", group]["log_likelihood"] - lines["peso", group]["log_likelihood"]
        assert row["log_likelihood"] == pytest.approx(gain)
        assert row["log_likelihood low"] <= gain <= row["log_likelihood high"]
    assert not [name for name in result if name.startswith(("next_block_tails", "new_items_tails"))]


def test_a_run_evaluated_before_head_and_tail_were_is_named_until_it_is_evaluated_again(
    world: Path, tmp_path: Path
) -> None:
    run = copied(world, "finetune-0", tmp_path / "run")
    before = (run / "users" / "tails.parquet").read_bytes()
    (run / "users" / "tails.parquet").unlink()
    changed(run, "metrics.json", lambda record: record["measured"]["rows"].pop("tails.parquet"))
    result = compare_runs([world / "peso-0", run])
    (line,) = result["tails"]
    assert (line["model"], line["seed"]) == ("finetune", 0)
    assert "give `cladapt eval` again" in line["missing"]
    assert result["tails_differences"] == []
    compare_runs([world / "peso-0", run], tmp_path / "out")
    assert not (tmp_path / "out" / "tails_differences.csv").exists()
    again = evaluation.evaluate(run, EVAL, None, MemorySink())
    assert again["cells"]["measured"] == 0
    assert (run / "users" / "tails.parquet").read_bytes() == before
    assert "missing" not in compare_runs([world / "peso-0", run])["tails"][0]


def copied(world: Path, name: str, target: Path) -> Path:
    shutil.copytree(world / name, target)
    return target


def changed(run: Path, file: str, change: Any) -> None:
    record = read_json(run / file)
    change(record)
    write_json(run / file, record)


def test_a_run_not_evaluated_is_refused_with_what_to_do(world: Path, tmp_path: Path) -> None:
    run = copied(world, "finetune-0", tmp_path / "run")
    (run / "metrics.json").unlink()
    with pytest.raises(DataError, match=rf"{run} is not evaluated yet \(cladapt eval {run}\)"):
        compare_runs([world / "peso-0", run])
    assert not (tmp_path / "out").exists()


def test_another_stream_is_refused(world: Path, tmp_path: Path) -> None:
    run = copied(world, "finetune-0", tmp_path / "run")
    changed(run, "metrics.json", lambda record: record.update(stream="elsewhere"))
    with pytest.raises(DataError, match=r"was evaluated on the stream \w+, .*run on elsewhere"):
        compare_runs([world / "peso-0", run])
    changed(run, "metrics.json", lambda record: record.pop("stream"))
    with pytest.raises(DataError, match=r"does not say which stream it is of \(cladapt eval"):
        compare_runs([world / "peso-0", run])


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("exclude_seen", False, "exclude_seen True against False"),
        ("beams", 30, "beams 20 against 30"),
        ("targets", "valid", "targets test against valid"),
        ("top_k", [10], r"top_k \(5, 10\) against \(10,\)"),
        ("max_users", 3, "max_users 0 against 3"),
    ],
)
def test_other_evaluation_settings_are_refused(key: str, value: Any, text: str, world: Path, tmp_path: Path) -> None:
    run = copied(world, "finetune-0", tmp_path / "run")
    changed(run, "metrics.json", lambda record: record["config"].update({key: value}))
    with pytest.raises(ConfigError, match=f"were evaluated differently: {text}"):
        compare_runs([world / "peso-0", run])


def test_other_blocks_are_refused(world: Path, tmp_path: Path) -> None:
    run = copied(world, "finetune-0", tmp_path / "run")
    (run / "users" / "block_003.parquet").unlink()
    with pytest.raises(DataError, match=r"are of two evaluations: block_003\.parquet in one alone \(cladapt eval"):
        compare_runs([world / "peso-0", run])
    changed(run, "metrics.json", lambda m: m.update(matrix=[row for row in m["matrix"] if row["block"] != 3]))
    with pytest.raises(ConfigError, match=r"blocks \[2, 3\] against \[2\]"):
        compare_runs([world / "peso-0", run])


def test_settings_of_the_effort_alone_may_differ(world: Path, tmp_path: Path) -> None:
    run = copied(world, "finetune-0", tmp_path / "run")
    changed(run, "metrics.json", lambda record: record["config"].update(batch_users=7, bootstrap=300))
    assert len(compare_runs([world / "peso-0", run])["groups"]) == 2


def test_unequal_seeds_are_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"the groups have different seeds \(peso: 0, 1; finetune: 0\)"):
        compare_runs([*paths(world, "peso"), world / "finetune-0"])


def test_the_same_run_twice_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="peso-0 is given twice"):
        compare_runs([world / "peso-0", world / "stream" / ".." / "peso-0"])
    again = copied(world, "peso-0", tmp_path / "again")
    with pytest.raises(ConfigError, match=r"peso-0 and .*again have the same configuration and seed=0"):
        compare_runs([world / "peso-0", again])


def base_of_seed(world: Path, folder: Path, seed: int) -> str:
    shutil.copytree(world / "base", folder)
    made = read_json(folder / "cladapt.json")
    made["config"]["seed"] = seed
    write_json(folder / "cladapt.json", {**made, "fingerprint": f"base of seed {seed}"})
    return str(folder)


def test_each_seed_may_have_its_own_base(world: Path, tmp_path: Path) -> None:
    other = base_of_seed(world, tmp_path / "base", 1)
    for name in ("peso", "finetune"):
        run = copied(world, f"{name}-1", tmp_path / name)
        changed(run, "config.json", lambda record: record["config"].update(base=other))
    given = [world / "peso-0", tmp_path / "peso", world / "finetune-0", tmp_path / "finetune"]
    assert [group["name"] for group in compare_runs(given)["groups"]] == ["peso", "finetune"]
    with pytest.raises(ConfigError, match=r"have seed=1 but stand on bases that differ in their own seed"):
        compare_runs([*given[:3], world / "finetune-1"])


def test_other_settings_and_bases_tell_groups_apart(world: Path, tmp_path: Path) -> None:
    other = copied(world, "base", tmp_path / "large")
    changed(other, "cladapt.json", lambda record: record["config"].update(preset="small"))
    run = copied(world, "peso-0", tmp_path / "run")
    changed(run, "config.json", lambda record: record["config"].update(base=str(other)))
    changed(run, "config.json", lambda record: record["config"]["train"].update(lr=0.5))
    result = compare_runs([world / "peso-0", run])
    first, second = (group["name"] for group in result["groups"])
    assert first.startswith("peso train.lr=0.002 base=base (")
    assert second.startswith("peso train.lr=0.5 base=large (")
    assert f"frozen ({second})" in [row["model"] for row in result["summary"]]


def test_options_spelt_out_are_those_left_at_their_default(world: Path, tmp_path: Path) -> None:
    run = copied(world, "peso-1", tmp_path / "run")
    changed(run, "config.json", lambda record: record["config"]["method"].update(options={"strength": 0.1}))
    assert Run.open(run).config.method.options == {"strength": 0.1}
    assert len(compare_runs([world / "peso-0", run])["groups"]) == 1
