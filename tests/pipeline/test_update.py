"""The nightly job: what it leaves equals one run over the whole stream; it can be repeated, killed, refused, undone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.artifacts import hash_file, read_json
from cladapt.config import (
    EvalConfig,
    MethodConfig,
    PretrainConfig,
    PromoteConfig,
    RunConfig,
    SimulateConfig,
    TokensConfig,
)
from cladapt.config import TrainConfig as Train
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import CheckFailed, ConfigError, DataError, EnvironmentProblem
from cladapt.eval.promotion import Decision
from cladapt.lock import locked
from cladapt.pipeline import bases, evaluation, growth, promote, runs, ship, streams
from cladapt.pipeline import update as pipeline
from cladapt.run import open_run
from cladapt.train.sinks import MemorySink

SINK = MemorySink()
# a handful of items drifts
pytestmark = pytest.mark.filterwarnings("ignore:.* of the new items")
ALWAYS = PromoteConfig(rule="always", bootstrap=200)
KNOWN = 2  # blocks of the stream at the start; two more come
BLOCKS = 4


def config(data: str, **train: Any) -> RunConfig:
    return RunConfig(
        data=data,
        base="base",
        method=MethodConfig(name="peso"),
        train=Train(epochs=1, batch_tokens=1024, **train),
        eval=EvalConfig(bootstrap=200),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `stream` of two blocks, a `base`, a `run` over it, and the logs of the blocks 3 and 4."""
    folder = tmp_path_factory.mktemp("world")
    simulated = simulate(SimulateConfig(users=60, items=40, topics=4, blocks=BLOCKS)).stream
    # only what a log can bring: items that occur
    used = simulated.interactions.select("item", "block").group_by("item").agg(pl.col("block").min())
    items = simulated.items.join(used, on="item").select("item", "text", pl.col("block").alias("first_block"))
    stream = Stream(simulated.interactions, items.sort("first_block", maintain_order=True), simulated.manifest)
    texts = simulated.items.select("item", "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = stream.interactions.join(texts, on="item").sort("timestamp")
        for block in range(KNOWN + 1, BLOCKS + 1):
            rows.filter(pl.col("block") == block).drop("block", "position").write_csv(f"log{block}.csv")
        rows.filter(pl.col("block") <= KNOWN).drop("block", "position").write_csv("start.csv")
        rows.drop("block", "position").write_csv("all.csv")
        starts = rows.group_by("block").agg(pl.col("timestamp").min()).sort("block")["timestamp"].to_list()
        (folder / "starts").write_text(",".join(map(str, starts)))
        rows.filter(pl.col("block") <= KNOWN).drop("position").write_csv("blocks.csv")
        make(folder, "start.csv", starts[1:KNOWN])
        bases.pretrain_base(Path("stream"), Path("base"), PretrainConfig(epochs=1), SINK)
        runs.train(config("stream"), Path("run"), SINK)
    return folder


def make(folder: Path, log: str, starts: list[int]) -> None:
    """Import a log in blocks that begin at unix times, which an import can only cut by date: by a column then."""
    from cladapt.config import BlocksConfig
    from cladapt.data.blocks import build_stream
    from cladapt.data.readers import ReadOptions, read

    raw = read(log, "csv", ReadOptions(text=("text",)))
    share = [int((raw.events["timestamp"] < t).sum()) for t in starts] + [raw.events.height]
    fractions = tuple((b - a) / raw.events.height for a, b in zip([0, *share[:-1]], share, strict=True))
    build_stream(raw, BlocksConfig(fractions=fractions, min_events=5)).save(Path("stream"))
    streams.build_tokens(Path("stream"), TokensConfig(dimensions=8, levels=2, codes=4, capacity=16), None)


@pytest.fixture
def inside(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world to work in."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def night(log: str, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"least": 1, "promotion": ALWAYS, **changes}
    return pipeline.update(log, Path("run"), None, None, SINK, **given)


def contents(*folders: str) -> dict[str, str]:
    """Hash of every file, without what tells of time and place."""
    skipped = ("log.jsonl", "report.html", "environment.json")
    files = [f for folder in folders for f in sorted(Path(folder).rglob("*")) if f.is_file() and f.name not in skipped]
    return {str(file): hash_file(file) for file in files}


def adapters(run: str) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in sorted(Path(run).glob("adapters/*/adapter_model.safetensors"))}


def test_nights_leave_what_one_run_over_the_whole_stream_leaves(inside: Path) -> None:
    for block in (3, 4):
        report = night(f"log{block}.csv", held_out="never")
        assert (report["outcome"], report["learn"]) == ("promoted", [block])
        assert report["append"]["appended_blocks"] == [block]
        assert report["decide"]["current"] == block
        assert report["export"] == {"out": "run/export/peft", "block": block, "written": True}
        assert read_json(Path("run/export/peft/cladapt.json"))["block"] == block
    grown = Stream.load(Path("stream"))
    shutil.copytree("base", "again")
    Path("stream").rename("grown")
    starts = [int(t) for t in Path("starts").read_text().split(",")]
    make(inside, "all.csv", starts[1:])
    whole = Stream.load(Path("stream"))
    assert grown.fingerprints == whole.fingerprints
    assert Path("grown/sids.parquet").read_bytes() == Path("stream/sids.parquet").read_bytes()
    runs.train(config("stream"), Path("once"), SINK)
    assert adapters("run") == adapters("once")
    evaluation.evaluate(Path("once"), {}, None, SINK)
    one, two = (read_json(Path(run) / "metrics.json") for run in ("run", "once"))
    assert one["table"] == two["table"]
    assert one["matrix"] == two["matrix"]


def test_the_same_log_twice_changes_nothing(inside: Path) -> None:
    night("log3.csv")
    before = contents("run", "stream")
    report = night("log3.csv")
    assert report["outcome"] == "nothing new"
    assert (report["learn"], report["append"]["new_rows"], report["export"]["written"]) == ([], 0, False)
    assert contents("run", "stream") == before


def test_few_rows_wait_for_the_next_log_and_are_not_lost(inside: Path) -> None:
    report = night("log3.csv", least=10_000)
    rows = len(Path("log3.csv").read_text().splitlines()) - 1
    assert (report["append"]["pending"], report["append"]["waiting"], report["learn"]) == (rows, True, [])
    assert report["outcome"] == "promoted"  # the adapter of block 2, which nobody had judged
    before = contents("run", "stream")
    assert night("log3.csv", least=10_000)["outcome"] == "waiting"
    assert contents("run", "stream") == before
    assert Stream.load(Path("stream")).n_blocks == KNOWN
    report = night("log4.csv")
    assert (report["outcome"], report["append"]["pending"], report["learn"]) == ("promoted", 0, [3])
    events = Stream.load(Path("stream")).interactions
    assert events.height == len(Path("all.csv").read_text().splitlines()) - 1


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a night leaves that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "world"
    shutil.copytree(world, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        night("log3.csv")
        return contents("run", "stream")


@pytest.mark.parametrize("stage", ["extend_tokens", "continue_run", "evaluate", "judge", "export"])
def test_a_night_that_stops_at_any_stage_is_started_again(
    stage: str, undisturbed: dict[str, str], inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = next(m for m in (streams, runs, evaluation, pipeline, ship) if hasattr(m, stage) and m is not promote)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            night("log3.csv")
    assert night("log3.csv")["outcome"] == ("promoted" if stage != "export" else "nothing new")
    found = contents("run", "stream")
    dated = {"run/current.json", "run/export/peft/adapter_config.json"}  # a time, and where the base is
    assert {k: v for k, v in found.items() if k not in dated} == {
        k: v for k, v in undisturbed.items() if k not in dated
    }


def test_a_refused_adapter_is_kept_and_not_served(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    night("log3.csv")
    exported = contents("run/export")
    monkeypatch.setattr(promote, "compare", lambda *_: Decision(False, ("it is shown worse",), ()))
    last = Path("log4.csv").read_text().splitlines()[-1].split(",")
    Path("more.csv").write_text(f"user,item,timestamp,text\n{last[0]},{last[1]},{int(last[2]) + 60},{last[3]}\n")
    with pytest.raises(CheckFailed, match="block 4 is not promoted: it is shown worse") as caught:
        night("log4.csv")
    report = caught.value.result
    assert report is not None
    assert (report["outcome"], report["decide"]["current"], report["learn"]) == ("refused", 3, [4])
    served = {k: v for k, v in contents("run/export").items() if "adapter" in k}
    assert served == {k: v for k, v in exported.items() if "adapter" in k}
    before = contents("run", "stream")
    with pytest.raises(CheckFailed, match="block 4 is not promoted"):  # as long as the newest adapter stands refused
        night("log4.csv")
    assert contents("run", "stream") == before
    few = night("more.csv", least=10_000)
    assert few["outcome"] == "waiting"


def test_what_was_rolled_back_is_not_promoted_again_by_the_same_log(inside: Path) -> None:
    night("log3.csv")
    night("log4.csv")
    promote.rollback(Path("run"), None)
    report = night("log4.csv")
    assert (report["outcome"], report["decide"]["current"]) == ("nothing new", 3)
    assert report["export"] == {"out": "run/export/peft", "block": 3, "written": True}


def test_withdrawn_items_leave_the_export(inside: Path) -> None:
    night("log3.csv")
    offered = pl.read_parquet("run/export/peft/catalogue.parquet")["item"].to_list()
    Path("gone.txt").write_text(f"{offered[0]}\n")
    growth.retire_items(Path("stream"), Path("gone.txt"))
    assert night("log3.csv")["export"]["written"]
    assert pl.read_parquet("run/export/peft/catalogue.parquet")["item"].to_list() == offered[1:]


def test_a_second_job_is_refused(inside: Path) -> None:
    with locked(Path("run/.update")), pytest.raises(EnvironmentProblem, match=r"\.update is in use"):
        night("log3.csv")
    assert Stream.load(Path("stream")).n_blocks == KNOWN


def test_held_out_events_of_the_block_before_are_learned_by_default(inside: Path) -> None:
    night("log3.csv")
    assert open_run(Path("run")).held_out == {3: "next"}
    assert read_json(Path("run/adapters/block_003/cladapt.json"))["held_out"] == "next"
    assert read_json(Path("run/adapters/block_002/cladapt.json"))["held_out"] == "never"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: shutil.rmtree("stream"), "not a stream directory"),
        (lambda: Path("log3.csv").write_text("user,item\n"), "timestamp"),
        (lambda: shutil.rmtree("base"), "base"),
    ],
    ids=["no stream", "another log", "no base"],
)
def test_mistakes_are_named(damage: Callable[[], object], message: str, inside: Path) -> None:
    damage()
    with pytest.raises(DataError, match=message):
        night("log3.csv")


def test_a_refused_adapter_is_not_shipped_by_other_commands(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promote, "compare", lambda *_: Decision(False, ("it is shown worse",), ()))
    with pytest.raises(CheckFailed):
        night("log3.csv")
    with pytest.raises(DataError, match=r"no adapter of run is current: that of block 3 was refused"):
        ship.find_source(Path("run"), None, None)
    assert ship.find_source(Path("run"), None, 3).adapter.name == "block_003"
    with pytest.raises(CheckFailed):  # the rule is the same
        night("log3.csv")
    monkeypatch.setattr(promote, "compare", lambda *_: Decision(True, ("so it is asked",), ()))
    report = night("log3.csv", promotion=PromoteConfig(rule="shown"))
    assert (report["outcome"], report["decide"]["current"]) == ("promoted", 3)


def test_another_stream_or_base_is_refused_before_the_log_is_in_it(inside: Path) -> None:
    streams.simulate_data(Path("other"), SimulateConfig(users=60, items=40, topics=4, blocks=2, seed=5))
    bases.pretrain_base(Path("stream"), Path("stranger"), PretrainConfig(epochs=0, seed=9), SINK)
    before = contents("other", "stream", "run")
    for changes in ({"data": Path("other")}, {"base": Path("stranger")}):
        with pytest.raises(DataError, match=r"began with other inputs|is the stream"):
            pipeline.update(
                "log3.csv", Path("run"), changes.get("data"), changes.get("base"), SINK, least=1, promotion=ALWAYS
            )
    assert contents("other", "stream", "run") == before


def test_an_export_never_replaces_a_base_or_an_adapter_of_the_run(inside: Path) -> None:
    before = contents("base", "stream", "run")
    for out in (Path("base"), Path("run/adapters/block_002"), Path("run"), Path("stream")):
        with pytest.raises(ConfigError, match="exists and is not empty"):
            night("log3.csv", out=out)
    assert contents("base", "stream", "run") == before


def test_a_log_that_comes_too_late_as_a_whole_is_no_quiet_night(inside: Path) -> None:
    night("log4.csv")
    with pytest.raises(CheckFailed, match=r"all .* rows of log3\.csv come too late") as caught:
        night("log3.csv")
    assert caught.value.result is not None
    assert caught.value.result["outcome"] == "all late"


def test_an_export_follows_its_base(inside: Path) -> None:
    night("log3.csv")
    Path("base").rename("elsewhere")
    report = pipeline.update("log3.csv", Path("run"), None, Path("elsewhere"), SINK, least=1, promotion=ALWAYS)
    assert report["export"]["written"]
    made = read_json(Path("run/export/peft/adapter_config.json"))["base_model_name_or_path"]
    assert made == str(Path("elsewhere").resolve())
