"""Trackers behind the sink protocol: tiny packages stand in for the real ones, or TensorBoard itself."""

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cladapt.config import RunConfig, resolve
from cladapt.errors import ConfigError, EnvironmentProblem
from cladapt.train.track import QUIET, points, require, tracking
from cladapt.workloads.classify import ClassifyConfig

EVENTS: list[dict[str, Any]] = [
    {"kind": "kernels", "ops": {}},
    {"kind": "note", "text": "hello"},
    {"kind": "step", "block": 2, "step": 1, "progress": 0.5, "loss": 3.0, "grad_norm": float("inf")},
    {"kind": "step", "block": 2, "step": 2, "progress": 1.0, "loss": 2.0, "peso/term": 0.25},
    {"kind": "epoch", "block": 2, "epoch": 1, "valid_log_likelihood": -1.5},
    {"kind": "spectrum", "block": 2, "rank": 4, "modules": {"q": [1.0]}},
    {"kind": "block", "block": 2, "kept_epoch": 1, "valid_log_likelihood": -1.5, "steps": 2, "seconds": 0.1},
    {"kind": "step", "block": 3, "step": 1, "progress": 0.5, "loss": 1.0},
]
SERIES = {
    "block_002/step/progress": {1: 0.5, 2: 1.0},
    "block_002/step/loss": {1: 3.0, 2: 2.0},
    "block_002/step/peso/term": {2: 0.25},
    "block_002/epoch/valid_log_likelihood": {1: -1.5},
    "block/rank": {2: 4.0},
    "block/kept_epoch": {2: 1.0},
    "block/valid_log_likelihood": {2: -1.5},
    "block/steps": {2: 2.0},
    "block/seconds": {2: 0.1},
    "block_003/step/progress": {1: 0.5},
    "block_003/step/loss": {1: 1.0},
}
CONFIG = RunConfig(seed=7, track="tensorboard+wandb+trackio+mlflow")


class Store:
    """What the packages were told."""

    def __init__(self) -> None:
        self.series: dict[str, dict[int, float]] = {}
        self.config: dict[str, str] = {}
        self.started: dict[str, Any] = {}
        self.closed = 0

    def point(self, key: str, value: float, at: int) -> None:
        self.series.setdefault(key, {})[at] = value

    def close(self) -> None:
        self.closed += 1


class Rows(Store):
    """A run that takes dicts, as those of W&B and trackio do: what a series runs over is one of the figures."""

    def __init__(self) -> None:
        super().__init__()
        self.axes: dict[str, str] = {}

    def define_metric(self, name: str, step_metric: str = "") -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float]) -> None:
        (axis,) = (key for key in values if key.rpartition("/")[2] in ("step", "epoch", "block"))
        for key, value in values.items():
            if key != axis:
                self.point(key, value, int(values[axis]))

    def finish(self) -> None:
        self.close()


class Writer:
    """TensorBoard's writer."""

    def __init__(self, folder: str, store: Store) -> None:
        self.store, store.started = store, {"folder": folder}

    def add_text(self, _: str, text: str) -> None:
        self.store.config = {
            key.strip(): value for key, _, value in (line.partition(": ") for line in text.splitlines())
        }

    def add_scalar(self, key: str, value: float, at: int) -> None:
        self.store.point(key, value, at)

    def close(self) -> None:
        self.store.close()


class Client:
    """MLflow's client."""

    def __init__(self, store: Store, tracking_uri: str) -> None:
        self.store, store.started = store, {"uri": tracking_uri}

    def get_experiment_by_name(self, _: str) -> None:
        return None

    def create_experiment(self, name: str, place: str | None) -> str:
        self.store.started |= {"project": name, "place": place}
        return "1"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.store.started |= {"experiment": experiment, "name": run_name}
        return SimpleNamespace(info=SimpleNamespace(run_id="r"))

    def log_param(self, _: str, key: str, value: str) -> None:
        self.store.config[key] = value

    def log_batch(self, _: str, metrics: list[Any]) -> None:
        for key, value, stamp, at in metrics:
            assert stamp > 1e12
            self.store.point(key, value, at)

    def set_terminated(self, _: str) -> None:
        self.store.close()


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What each of the stand-ins was told; the environment is put back."""
    found: dict[str, Any] = {"tensorboard": Store(), "wandb": Rows(), "trackio": Rows(), "mlflow": Store()}

    def package(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    def init(name: str) -> Any:
        def start(config: dict[str, str], **given: Any) -> Any:
            print("welcome")  # as trackio does, on stdout
            found[name].config, found[name].started = config, given
            return found[name]

        return start

    package("torch.utils.tensorboard", SummaryWriter=lambda folder: Writer(folder, found["tensorboard"]))
    package("wandb", init=init("wandb"), Settings=dict)
    package("trackio", init=init("trackio"))
    entities = SimpleNamespace(Metric=lambda *point: point)
    package("mlflow", MlflowClient=lambda tracking_uri: Client(found["mlflow"], tracking_uri), entities=entities)
    for variable in (*QUIET, "WANDB_MODE", "TRACKIO_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, "")  # so that it is removed or put back at the end
        monkeypatch.delenv(variable)
    return found


def track(names: str, run: Path, events: Iterable[dict[str, Any]] = EVENTS) -> None:
    with tracking(names, run, CONFIG) as sink:
        for event in events:
            sink.emit(event)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_tracker_gets_the_configuration_and_every_finite_figure(
    name: str, stores: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    track(name, tmp_path / "run")
    assert stores[name].series == SERIES
    assert (stores[name].config["seed"], stores[name].config["train.lr"]) == ("7", "0.002")
    assert stores[name].closed == 1
    assert capsys.readouterr().out == ""
    assert [store.started for other, store in stores.items() if other != name] == [{}, {}, {}]


def test_several_are_joined_and_closed_whatever_happens(stores: dict[str, Any], tmp_path: Path) -> None:
    def stopped() -> Iterator[dict[str, Any]]:
        yield EVENTS[2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        track(CONFIG.track, tmp_path / "run", stopped())
    assert {name: (store.closed, len(store.series)) for name, store in stores.items()} == dict.fromkeys(stores, (1, 2))


def test_nothing_leaves_the_run_unless_the_environment_asks(
    stores: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with tracking(CONFIG.track, run, CONFIG):
        pass
    assert stores["tensorboard"].started == {"folder": str(run / "track" / "tensorboard")}
    assert stores["wandb"].started["mode"] == "offline"
    assert stores["wandb"].started["dir"] == str(run / "track" / "wandb")
    assert os.environ["TRACKIO_DIR"] == str(run / "track" / "trackio")
    assert stores["mlflow"].started["uri"] == f"sqlite:///{run / 'track' / 'mlflow' / 'mlflow.db'}"
    assert stores["mlflow"].started["place"] == (run / "track" / "mlflow" / "artifacts").as_uri()
    assert {name: os.environ[name] for name in QUIET} == dict(QUIET)
    asked = {"WANDB_MODE": "online", "TRACKIO_DIR": "mine", "MLFLOW_TRACKING_URI": "http://mine"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with tracking(CONFIG.track, run, CONFIG):
        pass
    assert stores["wandb"].started["mode"] == "online"
    assert os.environ["TRACKIO_DIR"] == "mine"
    assert (stores["mlflow"].started["uri"], stores["mlflow"].started["place"]) == ("http://mine", None)


def test_wandb_hears_what_each_series_runs_over(stores: dict[str, Any], tmp_path: Path) -> None:
    track("wandb", tmp_path / "run")
    assert stores["wandb"].axes == {
        axis + tail: step
        for axis in ("block_002/step", "block_002/epoch", "block", "block_003/step")
        for tail, step in ((f"/{axis.rpartition('/')[2]}", ""), ("/*", f"{axis}/{axis.rpartition('/')[2]}"))
    }


def test_none_makes_nothing(stores: dict[str, Any], tmp_path: Path) -> None:
    track("none", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert all(store.started == {} for store in stores.values())
    require("none")


def test_a_tracker_that_fails_is_left_out_with_one_warning_and_the_others_go_on(
    stores: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(stores["wandb"], "log", fail)
    text = r"^track=wandb ended: RuntimeError: gone; log\.jsonl has every event$"
    with pytest.warns(UserWarning, match=text) as found:
        track("wandb+tensorboard", tmp_path / "run")
    assert len(found) == 1
    assert stores["tensorboard"].series == SERIES


def test_a_tracker_that_cannot_begin_is_an_environment_problem(stores: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "track").touch()
    with pytest.raises(EnvironmentProblem) as caught, tracking("wandb", tmp_path, CONFIG):
        pytest.fail("begun")
    assert caught.value.message.startswith(f"track=wandb cannot begin in {tmp_path / 'track' / 'wandb'}: ")
    assert caught.value.hint == f"mend this, then: cladapt train --resume {tmp_path}"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.utils.tensorboard", "tensorboard", "wandb", "trackio", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    for variable in QUIET:
        monkeypatch.setenv(variable, "")
    with pytest.raises(EnvironmentProblem, match=rf"^track={name}: the package {name} is not installed") as caught:
        require(name)
    assert caught.value.hint == "pip install cladapt[track]"


@pytest.mark.parametrize("kind", [RunConfig, ClassifyConfig])
def test_the_setting_takes_known_names_joined_by_plus(kind: type[RunConfig] | type[ClassifyConfig]) -> None:
    assert kind().track == "none"
    for names in ("wandb", "tensorboard+mlflow", "trackio+wandb+mlflow"):
        assert kind(track=names).track == names
    for names in ("", "wandb+", "wandb,mlflow", "none+wandb", "wand"):
        with pytest.raises(ConfigError, match=r"1 mistake: track=.*tensorboard\|wandb\|trackio\|mlflow"):
            resolve(kind, {"track": names})


def test_points_are_named_after_their_block() -> None:
    event = {"kind": "step", "block": 12, "step": 3, "loss": 1, "text": "x", "lost": float("nan")}
    assert points(event) == ({"block_012/step/loss": 1.0}, "block_012/step/step", 3)


def test_real_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard comes with the track extra")
    track("tensorboard", tmp_path / "run")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "track" / "tensorboard")).Reload()
    read = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert read == {key: pytest.approx(series) for key, series in SERIES.items()}
