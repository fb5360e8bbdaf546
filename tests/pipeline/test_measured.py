"""Evaluations that keep what was measured before: the figures of measuring everything, and no more work than needed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.artifacts import read_json, write_json
from cladapt.config import AdapterConfig, MethodConfig, RunConfig, TrainConfig
from cladapt.errors import ConfigError, DataError
from cladapt.eval.metrics import summarise
from cladapt.pipeline import evaluation, runs
from cladapt.train.sinks import MemorySink

EVAL: dict[str, Any] = {"bootstrap": 100, "max_users": 4, "beams": 10}
CELLS = 4 * 4 + 2 + 2  # and the first events of block 3 and 4: the base's, and those of the models before them
ADAPTER = AdapterConfig(rank=2, targets=("q_proj",))


@pytest.fixture(scope="module")
def evaluated(growth: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three adapters over the whole stream, evaluated."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parent)
        config = RunConfig(
            data=str(growth / "stream"),
            base=str(growth / "base"),
            adapter=ADAPTER,
            method=MethodConfig(name="finetune"),
            train=TrainConfig(epochs=1),
        )
        runs.train(config, run, MemorySink())
        evaluation.evaluate(run, EVAL, None, MemorySink())
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run."""
    shutil.copytree(evaluated, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def written(run: Path) -> dict[str, bytes]:
    page = (run / "report.html").read_bytes().partition(b"<h2>Provenance</h2>")[0]  # the rest says where it lies
    return {path.name: path.read_bytes() for path in (*run.glob("users/*"), run / "metrics.json")} | {"page": page}


def evaluate(run: Path, block: int | None = None, everything: bool = False, **settings: Any) -> tuple[Any, list[str]]:
    """What an evaluation gave, and its notes."""
    sink = MemorySink()
    report = evaluation.evaluate(run, {**EVAL, **settings}, block, sink, everything=everything)
    return report, [event["text"] for event in sink.events if event["kind"] == "note"]


def test_what_was_measured_is_kept(run: Path) -> None:
    before = written(run)
    report, notes = evaluate(run)
    assert report["cells"] == {"measured": 0, "kept": CELLS}
    assert notes == []
    assert written(run) == before
    report, _ = evaluate(run, everything=True)
    assert report["cells"] == {"measured": CELLS, "kept": 0}
    assert written(run) == before


def test_figures_are_made_anew_without_measuring(run: Path) -> None:
    report, _ = evaluate(run, top_k=(3,), bootstrap=200)
    assert report["cells"]["measured"] == 0
    frames = [pl.read_parquet(path) for path in sorted(run.glob("users/block_*.parquet"))]
    means = summarise(pl.concat(frames), (3,), beams=10).sort("model_block", "block").to_dicts()
    matrix = [{k: v for k, v in cell.items() if k != "learned"} for cell in read_json(run / "metrics.json")["matrix"]]
    assert [{k: pytest.approx(v) for k, v in cell.items()} for cell in means] == matrix
    evaluate(run, everything=True, top_k=(3,), bootstrap=200)
    assert read_json(run / "metrics.json")["table"] == report["table"]


def other_weights(run: Path) -> None:
    """Block 3 has another adapter: it was trained again."""
    target, source = run / "adapters" / "block_003", run / "adapters" / "block_002"
    record = read_json(source / "cladapt.json")
    shutil.copy(source / "adapter_model.safetensors", target)
    write_json(target / "cladapt.json", {**read_json(target / "cladapt.json"), "weights": record["weights"]})


def other_scale(run: Path) -> None:
    file = run / "adapters" / "block_003" / "adapter_config.json"
    write_json(file, {**read_json(file), "lora_alpha": 7.0})


@pytest.mark.parametrize("change", [other_weights, other_scale])
def test_the_cells_of_a_changed_adapter_are_measured_again(change: Callable[[Path], None], run: Path) -> None:
    change(run)
    report, _ = evaluate(run)
    assert report["cells"] == {"measured": 5, "kept": 15}  # four blocks, and the first events of block 4
    kept = written(run)
    evaluate(run, everything=True)
    assert written(run) == kept


def damaged_rows(run: Path) -> None:
    frame = pl.read_parquet(run / "users" / "block_002.parquet")
    frame.with_columns(log_likelihood=pl.lit(-1.0)).write_parquet(run / "users" / "block_002.parquet")


def torn_rows(run: Path) -> None:
    (run / "users" / "block_002.parquet").write_bytes(b"x")


def rows_gone(run: Path) -> None:
    (run / "users" / "next_block.parquet").unlink()


def strange_rows(run: Path) -> None:
    shutil.copy(run / "users" / "block_002.parquet", run / "users" / "mine.parquet")


def no_record(run: Path) -> None:
    metrics = read_json(run / "metrics.json")
    del metrics["measured"]
    write_json(run / "metrics.json", metrics)


def recorded(**changes: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        metrics = read_json(run / "metrics.json")
        write_json(run / "metrics.json", {**metrics, "measured": {**metrics["measured"], **changes}})

    return change


def torn_metrics(run: Path) -> None:
    (run / "metrics.json").write_text("{")


CANNOT = "all is measured anew: the earlier evaluation cannot be used, "
WAS_OF = "all is measured anew: the earlier evaluation was of "


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (damaged_rows, f"{CANNOT}block_002.parquet in run/users are not what it wrote"),
        (torn_rows, f"{CANNOT}run/users/block_002.parquet: not a readable parquet file"),
        (rows_gone, f"{CANNOT}next_block.parquet in run/users"),
        (strange_rows, f"{CANNOT}mine.parquet in run/users"),
        (no_record, f"{CANNOT}run/metrics.json lacks measured"),
        (torn_metrics, f"{CANNOT}run/metrics.json:1:2: not valid JSON"),
        (recorded(base="abc"), f"{WAS_OF}base abc, now "),
        (recorded(cladapt="0.0"), f"{WAS_OF}cladapt 0.0, now "),
        (recorded(stream="abc"), f"{WAS_OF}another stream or other IDs"),
        (recorded(meaning="abc"), f"{WAS_OF}another stream or other IDs"),
    ],
)
def test_what_cannot_be_trusted_is_measured_anew_and_told(change: Callable[[Path], None], note: str, run: Path) -> None:
    before = written(run)
    change(run)
    report, notes = evaluate(run)
    assert notes[0].startswith(note), notes[0]
    assert report["cells"]["kept"] == 0
    assert written(run) == before


@pytest.mark.parametrize(("change", "why"), [(torn_rows, "not a readable parquet file"), (no_record, "lacks measured")])
def test_one_block_does_not_take_the_place_of_rows_that_cannot_be_trusted(
    change: Callable[[Path], None], why: str, run: Path
) -> None:
    change(run)
    before = written(run)
    with pytest.raises(DataError, match=f"--block 3: .*{why}.* rows would be lost .leave out --block"):
        evaluate(run, 3)
    assert written(run) == before


def test_one_block_does_not_take_the_place_of_rows_without_their_metrics(run: Path) -> None:
    (run / "metrics.json").unlink()
    rows = sorted(path.name for path in (run / "users").iterdir())
    with pytest.raises(
        DataError, match=r"--block 3: run/metrics.json is missing, so the other blocks' rows would be lost"
    ):
        evaluate(run, 3)
    assert sorted(path.name for path in (run / "users").iterdir()) == rows


def test_other_settings_of_a_row_measure_all_anew(run: Path) -> None:
    report, notes = evaluate(run, beams=30)
    assert notes[0] == f"{WAS_OF}beams=10, now 30"
    assert report["cells"]["kept"] == 0


def test_one_block_is_measured_beside_the_others_and_printed_alone(run: Path) -> None:
    shutil.rmtree(run / "users")
    (run / "metrics.json").unlink()
    report, _ = evaluate(run, 3)
    assert report["cells"] == {"measured": 4 + 2, "kept": 0}
    assert sorted(path.stem for path in run.glob("users/block_*")) == ["block_003"]
    alone = report["table"]
    report, _ = evaluate(run, 4)
    assert report["cells"] == {"measured": 4 + 2, "kept": 4 + 2}
    assert sorted(path.stem for path in run.glob("users/block_*")) == ["block_003", "block_004"]
    assert {row["block"] for row in read_json(run / "metrics.json")["matrix"]} == {3, 4}
    both = read_json(run / "metrics.json")["table"]
    assert both[0]["MRR"] == pytest.approx((alone[0]["MRR"] + report["table"][0]["MRR"]) / 2)
    again, _ = evaluate(run, 3, everything=True)
    assert again["cells"] == {"measured": 4 + 2, "kept": 4 + 2}
    assert again["table"] == alone
    evaluate(run)
    kept = written(run)
    evaluate(run, everything=True)
    assert written(run) == kept


def test_a_block_by_other_settings_does_not_stand_beside_the_others(run: Path) -> None:
    before = written(run)
    with pytest.raises(ConfigError, match=r"--block 3: run is evaluated on the blocks \[2, 4\] too.*beams=10, now 5"):
        evaluate(run, 3, beams=5, top_k=(3,))
    with pytest.raises(ConfigError, match=r"next_block=True, now False"):
        evaluate(run, 3, next_block=False)
    assert written(run) == before
    report, _ = evaluate(run, 3, top_k=(3,))
    assert "HR@3" in report["table"][0]
    assert report["cells"]["measured"] == 0
