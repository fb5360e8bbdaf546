"""The run directory: created once, found again, identified by what shapes its adapters."""

import errno
import fcntl
import json
import os
import platform
from pathlib import Path

import pytest

from cladapt.config import EvalConfig, MethodConfig, RunConfig, TrainConfig
from cladapt.errors import ConfigError, DataError, EnvironmentProblem
from cladapt.lock import locked
from cladapt.run import Run, environment, new_run_path


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


CONFIG = RunConfig(seed=3, method=MethodConfig(options={"strength": 0.1}), train=TrainConfig(lr=0.1))
INPUTS = {"data": "abc", "base": "def"}


def test_what_is_opened_is_what_was_created() -> None:
    run = Run.create(Path("runs/a"), CONFIG, INPUTS)
    assert Run.open(Path("runs/a")) == run
    assert run.inputs == INPUTS
    assert run.adapters == {}
    found = json.loads(Path("runs/a/environment.json").read_text())
    assert found["packages"].keys() >= {"torch", "transformers", "peft"}
    assert found == environment()


def test_the_latest_is_the_one_created_last_wherever_it_lies(tmp_path: Path) -> None:
    Run.create(Path("runs/a"), CONFIG, INPUTS)
    Run.create(tmp_path / "elsewhere" / "b", RunConfig(), INPUTS)
    latest = Run.latest()
    assert latest.path.resolve() == (tmp_path / "elsewhere" / "b").resolve()
    assert latest.config == RunConfig()


def test_no_latest_run_says_how_to_make_one() -> None:
    with pytest.raises(DataError, match=r"no run here: runs/latest\.json does not exist") as caught:
        Run.latest()
    assert caught.value.hint == "run `cladapt train` first, or name a run directory"


def test_a_directory_that_holds_something_is_never_taken(tmp_path: Path) -> None:
    Run.create(Path("runs/a"), CONFIG, INPUTS)
    with pytest.raises(ConfigError, match="runs/a exists and is not empty") as caught:
        Run.create(Path("runs/a"), CONFIG, INPUTS)
    assert caught.value.hint == "continue it with --resume runs/a, or choose another --out"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file exists and is not empty"):
        Run.create(tmp_path / "file", CONFIG, INPUTS)
    (tmp_path / "empty").mkdir()
    assert Run.create(tmp_path / "empty", CONFIG, INPUTS).config == CONFIG


def test_what_a_killed_creation_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f".config.json.{os.getpid()}.tmp").write_text('{"sche')
    run = Run.create(tmp_path / "a", CONFIG, INPUTS)
    assert Run.open(run.path) == run
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f".config.json.{os.getppid()}.tmp").write_text('{"sche')  # its writer lives
    with pytest.raises(ConfigError, match="b exists and is not empty"):
        Run.create(tmp_path / "b", CONFIG, INPUTS)


def test_a_run_begun_again_keeps_its_first_machine_and_tells_another(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a", CONFIG, INPUTS)
    assert run.environment_changes() == []
    then = json.loads((run.path / "environment.json").read_text())
    then["packages"]["torch"], then["threads"] = "1.0", 99
    (run.path / "environment.json").write_text(json.dumps(then))
    now = environment()
    expected = [f"threads: 99 -> {now['threads']}", f"torch: 1.0 -> {now['packages']['torch']}"]
    assert run.environment_changes() == expected
    Run.create(tmp_path / "b", CONFIG, INPUTS)
    run.begin()
    assert run.environment_changes() == expected
    assert Run.latest().path.resolve() == run.path
    (run.path / "environment.json").unlink()  # killed before it was written
    assert run.environment_changes() == []
    run.begin()
    assert json.loads((run.path / "environment.json").read_text()) == now


def test_what_is_no_run_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a run directory: it has no config\.json"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text('{"schema_version": 99}')
    with pytest.raises(DataError, match=r"config\.json lacks config; has schema_version=99: ") as caught:
        Run.open(tmp_path)
    assert caught.value.hint == "restore this file; this version reads schema_version 1"
    (tmp_path / "config.json").write_text('{"schema_version": 1, "config": {"sed": 1}}')
    with pytest.raises(ConfigError, match=r"config\.json: 1 mistake: unknown key 'sed', did you mean 'seed'"):
        Run.open(tmp_path)


def test_adapters_are_the_finished_blocks_alone() -> None:
    run = Run.create(Path("runs/a"), CONFIG, INPUTS)
    for name in ("block_002", "block_010", ".block_011.77.tmp", "start"):
        (run.path / "adapters" / name).mkdir(parents=True)
    assert run.adapters == {2: run.path / "adapters" / "block_002", 10: run.path / "adapters" / "block_010"}


def test_the_hash_follows_what_shapes_the_adapters_and_ignores_the_evaluation() -> None:
    hashed = Run(Path("a"), CONFIG).config_hash
    assert Run(Path("b"), CONFIG).config_hash == hashed
    assert Run(Path("a"), CONFIG.model_copy(update={"eval": EvalConfig(beams=50)})).config_hash == hashed
    assert Run(Path("a"), CONFIG.model_copy(update={"track": "wandb"})).config_hash == hashed
    for change in ({"seed": 4}, {"train": TrainConfig(lr=0.2)}, {"method": MethodConfig(options={"strength": 0.2})}):
        assert Run(Path("a"), CONFIG.model_copy(update=change)).config_hash != hashed


def test_a_new_path_names_method_and_seed_and_is_fresh() -> None:
    first = new_run_path("peso+eisam", 7)
    assert first.parent == Path("runs")
    assert first.name.endswith("-peso_eisam-s7")
    first.mkdir(parents=True)
    assert new_run_path("peso+eisam", 7) != first


def test_a_run_is_held_by_one_command_which_the_other_hears_of() -> None:
    path = Path("runs/a")
    with locked(path):
        with pytest.raises(EnvironmentProblem) as caught, locked(path):
            pytest.fail("two at once")
        assert caught.value.message == (f"{path} is in use: process {os.getpid()} on {platform.node()} writes into it")
        assert caught.value.hint == "wait until it ends, or stop it; then try again"
        (path / "config.json").touch()
    assert [p.name for p in path.iterdir()] == ["config.json"]
    with locked(path):
        pass


def test_a_lock_leaves_no_folder_where_no_run_was_begun_and_none_of_a_dead_process_counts() -> None:
    with pytest.raises(KeyboardInterrupt), locked(Path("new/run")):
        raise KeyboardInterrupt
    assert [*Path("new").iterdir()] == []
    Path("left").mkdir()
    Path("left/.lock").write_text("process 1 on elsewhere")  # as after a kill
    Run.refuse_existing(Path("left"))
    with locked(Path("left")):
        assert Path("left/.lock").read_text() == f"process {os.getpid()} on {platform.node()}"
    assert [*Path("left").iterdir()] == []


def test_a_lock_that_cannot_be_written_names_the_file() -> None:
    Path("file").touch()
    with pytest.raises(EnvironmentProblem, match=r"^cannot write file/\.lock: "), locked(Path("file")):
        pytest.fail("held")


def test_a_lock_removed_while_it_was_waited_for_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, tries = Path("run"), fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        real(handle, how)
        tries.append(how)
        if len(tries) == 1:  # the holder ends between our opening and our locking
            (path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(path):
        assert len(tries) == 2
        with pytest.raises(EnvironmentProblem), locked(path):
            pytest.fail("two at once")


def test_where_locks_are_not_known_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"run cannot be locked \(No locks available\)"), locked(Path("run")):
        pass
