"""Which adapter of a run is current: judged, refused, promoted, taken back."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from cladapt.artifacts import read_json, write_json
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
from cladapt.errors import CheckFailed, ConfigError, DataError
from cladapt.eval.promotion import Decision
from cladapt.pipeline import bases, promote, runs, ship, streams
from cladapt.pipeline.promote import current_block, read_current
from cladapt.run import Run
from cladapt.train.sinks import MemorySink

SINK = MemorySink()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `stream`, `base` and a run `whole` with adapters of the blocks 2, 3 and 4."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        streams.simulate_data(Path("stream"), SimulateConfig(users=60, items=40, topics=4, blocks=4))
        streams.build_tokens(Path("stream"), TokensConfig(dimensions=8, levels=2, codes=4), None)
        bases.pretrain_base(Path("stream"), Path("base"), PretrainConfig(epochs=2), SINK)
        config = RunConfig(
            data="stream",
            base="base",
            method=MethodConfig(name="finetune"),
            train=Train(epochs=1, batch_tokens=1024),
            eval=EvalConfig(bootstrap=200),
        )
        runs.train(config, Path("whole"), SINK)
    return folder


@pytest.fixture
def run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run[Any]:
    monkeypatch.chdir(world)
    shutil.copytree("whole", tmp_path / "run")
    return Run.open(tmp_path / "run")


def decided(monkeypatch: pytest.MonkeyPatch, promoted: bool) -> list[tuple[int, int | None]]:
    """Every comparison ends like this; those that were made, as (challenger, current)."""
    asked = []

    def compare(run: Run[Any], config: PromoteConfig, block: int, current: int | None, sink: Any) -> Decision:
        asked.append((block, current))
        return Decision(promoted, ("because",), ())

    monkeypatch.setattr(promote, "compare", compare)
    return asked


def test_the_adapter_is_judged_on_the_validation_targets_of_its_block(run: Run[Any]) -> None:
    report = promote.promote(run.path, {"rule": "always", "bootstrap": 200}, 3, SINK)
    assert (report["decision"], report["current"]) == ("promoted", 3)
    assert {line["reference"] for line in report["differences"]} == {"frozen", "block popularity"}
    users = Run.open(run.path).workload.open_inputs(run.config)[0]
    from cladapt.eval.cases import held_out_cases

    tested = len(held_out_cases(users, 3, "valid", True).target)
    assert {line["users"] for line in report["differences"]} == {tested}
    report = promote.promote(run.path, {"rule": "always", "bootstrap": 200}, 4, SINK)
    lines = {(line["reference"], line["metric"]) for line in report["differences"]}
    assert lines == {
        ("frozen", "HR@10"),
        ("frozen", "log_likelihood"),
        ("current", "HR@10"),
        ("current", "log_likelihood"),
        ("block popularity", "HR@10"),
    }


def test_the_differences_are_those_of_an_evaluation_on_the_validation_targets(run: Run[Any]) -> None:
    from cladapt.eval.protocol import effects
    from cladapt.pipeline.evaluation import measure

    stream, base = run.workload.open_inputs(run.config)
    valid = run.config.eval.model_copy(update={"targets": "valid", "next_block": False})
    measures = measure(run, stream, base, valid, None, SINK)
    report = promote.promote(run.path, {"rule": "always", "bootstrap": 200}, 4, SINK)
    own = measures.rows.filter((measures.rows["model_block"] == 4) & (measures.rows["block"] == 4))
    base_rows = measures.rows.filter((measures.rows["model_block"] == 1) & (measures.rows["block"] == 4))
    expected = effects(own, base_rows, valid, ("HR@10", "log_likelihood"))
    for line in report["differences"]:
        if line["reference"] == "frozen":
            effect = expected[line["metric"]]
            assert effect is not None
            assert (line["effect"], line["low"], line["high"]) == (effect.mean, effect.low, effect.high)


def test_a_refused_adapter_leaves_the_current_one_and_ends_with_its_own_exit_code(
    run: Run[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decided(monkeypatch, True)
    promote.promote(run.path, {}, 2, SINK)
    decided(monkeypatch, False)
    with pytest.raises(CheckFailed, match="the adapter of block 4 is not promoted: because") as caught:
        promote.promote(run.path, {}, None, SINK)
    assert caught.value.exit_code == 5
    assert caught.value.result is not None
    assert caught.value.result["current"] == 2
    assert caught.value.hint.startswith("that of block 2 stays current")
    assert caught.value.hint.endswith(f"cladapt promote {run.path} --block 4 --promote always")
    assert current_block(run) == 2
    assert [event.action for event in read_current(run).history] == ["promoted", "refused"]


def test_a_decision_is_made_once_unless_it_is_asked_for_again(run: Run[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = decided(monkeypatch, False)
    config = PromoteConfig()
    for again in (False, False, True):
        assert promote.judge(run.path, config, 3, SINK, again=again)["decision"] == "refused"
    assert asked == [(3, None), (3, None)]
    assert read_current(run).block is None
    decided(monkeypatch, True)
    for again in (True, True, False):  # what is current already is not compared with itself
        assert promote.judge(run.path, config, 3, SINK, again=again)["decision"] == "promoted"
    assert len(read_current(run).history) == 3


def test_a_rollback_goes_back_one_promotion_or_to_a_block_and_is_not_undone_by_an_update(
    run: Run[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decided(monkeypatch, True)
    with pytest.raises(DataError, match="no earlier adapter to go back to: nothing is promoted"):
        promote.rollback(run.path, None)
    for block in (2, 3, 4):
        promote.promote(run.path, {}, block, SINK)
    assert promote.rollback(run.path, None)["current"] == 3
    assert current_block(run) == 3
    assert promote.judge(run.path, PromoteConfig(), 4, SINK, again=False)["current"] == 3
    assert promote.rollback(run.path, None)["current"] == 2
    with pytest.raises(DataError, match="block 2 was promoted first"):
        promote.rollback(run.path, None)
    promote.promote(run.path, {}, 4, SINK)
    with pytest.raises(ConfigError, match="--to 3: not current before") as caught:
        promote.rollback(run.path, 3)
    assert caught.value.hint == "the blocks that were: [2]"
    assert promote.rollback(run.path, 2)["before"] == 4
    assert len(read_current(run).history) == 7  # nothing is forgotten


def test_what_is_shipped_is_the_current_adapter(run: Run[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ship.find_source(run.path, None, None).adapter.name == "block_004"
    decided(monkeypatch, True)
    promote.promote(run.path, {}, 3, SINK)
    assert ship.find_source(run.path, None, None).adapter.name == "block_003"
    assert ship.find_source(run.path, None, 4).adapter.name == "block_004"


def test_a_current_adapter_that_was_changed_is_not_shipped(run: Run[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, True)
    promote.promote(run.path, {}, 3, SINK)
    shutil.rmtree(run.path / "adapters" / "block_003")
    with pytest.raises(DataError, match=r"names adapters/block_003, which is not there"):
        ship.find_source(run.path, None, None)
    shutil.copytree(run.path / "adapters" / "block_002", run.path / "adapters" / "block_003")
    with pytest.raises(DataError, match=r"has the weights .*, current.json has promoted"):
        ship.find_source(run.path, None, None)


@pytest.mark.parametrize("content", [[], {"schema_version": 2}, {"block": 0}, {"history": [{"action": "promoted"}]}])
def test_a_damaged_file_is_an_error_that_names_it(content: Any, run: Run[Any]) -> None:
    write_json(run.path / "current.json", content)
    with pytest.raises(DataError, match=r"current.json"):
        read_current(run)


def test_mistakes_of_the_caller(run: Run[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--block 9: .* has \[2, 3, 4\]"):
        promote.promote(run.path, {}, 9, SINK)
    with pytest.raises(ConfigError, match="rule"):
        promote.promote(run.path, {"rule": "sometimes"}, None, SINK)
    assert not (run.path / "current.json").exists()
    decided(monkeypatch, True)
    promote.promote(run.path, {}, 2, SINK)
    assert read_json(run.path / "current.json")["adapter"] == "adapters/block_002"


def test_a_block_that_the_current_adapter_has_learned_held_out_decides_nothing(run: Run[Any]) -> None:
    promote.promote(run.path, {"rule": "always", "bootstrap": 200}, 4, SINK)
    file = run.path / "adapters" / "block_004" / "cladapt.json"
    write_json(file, {**read_json(file), "held_out_blocks": [3]})
    with pytest.raises(ConfigError, match="has learned the validation targets of block 3") as caught:
        promote.promote(run.path, {"bootstrap": 200}, 3, SINK)
    assert "cladapt rollback" in caught.value.hint
    assert promote.promote(run.path, {"rule": "always", "bootstrap": 200}, 3, SINK)["current"] == 3
