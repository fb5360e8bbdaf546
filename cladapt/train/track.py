"""Runs in TensorBoard, W&B, trackio and MLflow: one sink for each name in the setting `track`.

Everything stays in `<run>/track/`, and nothing goes over a network, unless the user's own environment says otherwise
(WANDB_MODE, TRACKIO_DIR, TRACKIO_SPACE_ID, MLFLOW_TRACKING_URI). Series are named `block_<t>/step/<metric>` over the
optimiser steps of a block, `block_<t>/epoch/<metric>` over its epochs, and `block/<metric>` over the blocks.
"""

import importlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from cladapt.config import Settings, describe
from cladapt.errors import EnvironmentProblem
from cladapt.train.sinks import Fan, Sink

PROJECT = "cladapt"
MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
}
QUIET = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "GRADIO_ANALYTICS_ENABLED": "False"}
"""What keeps the packages from reporting home; a value that the user has set stays."""
AXES = {"step": "step", "epoch": "epoch", "block": "block", "spectrum": "block"}
"""Kinds of events that are tracked, and what their series run over."""


class Tracker(Protocol):
    """Takes points of series."""

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, str]) -> None:
        self._writer = _module("tensorboard").SummaryWriter(str(folder))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, at)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A W&B run, offline unless WANDB_MODE is set; `wandb sync` uploads it."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, str]) -> None:
        wandb = _module("wandb")
        self._axes: set[str] = set()
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            config=dict(config),
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        if axis not in self._axes:  # W&B counts its own steps, which only grow
            self._run.define_metric(axis)
            self._run.define_metric(f"{axis.rpartition('/')[0]}/*", step_metric=axis)
            self._axes.add(axis)
        self._run.log({**values, axis: at})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A trackio run in a local folder; where a process makes several runs, that of the first serves all."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, str]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder.absolute()))  # read when trackio is imported
        self._run = _module("trackio").init(project=PROJECT, name=name, config=dict(config), resume="allow")

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        self._run.log({**values, axis: at})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """An MLflow run in a local SQLite file unless MLFLOW_TRACKING_URI is set."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, str]) -> None:
        mlflow = _module("mlflow")
        local = f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        own = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = mlflow.MlflowClient(tracking_uri=own or local)
        self._metric = mlflow.entities.Metric
        known = self._client.get_experiment_by_name(PROJECT)
        place = None if own else (folder.absolute() / "artifacts").as_uri()
        experiment = known.experiment_id if known else self._client.create_experiment(PROJECT, place)
        self._id = self._client.create_run(experiment, run_name=name).info.run_id
        for key, value in config.items():
            self._client.log_param(self._id, key, value)

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        now = round(1000 * time.time())
        self._client.log_batch(self._id, metrics=[self._metric(key, value, now, at) for key, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: Mapping[str, Callable[[Path, str, Mapping[str, str]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}


class TrackSink:
    """Passes the figures of events on to a tracker; one that fails is left out, with a warning, and the run goes on."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self._tracker, self._lost = name, tracker, False

    def emit(self, event: Mapping[str, Any]) -> None:
        if event["kind"] in AXES:
            values, axis, at = points(event)
            self._try(lambda: self._tracker.log(values, axis, at))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, action: Callable[[], None]) -> None:
        if self._lost:
            return
        try:
            with redirect_stdout(sys.stderr):  # results alone go to stdout
                action()
        except Exception as error:  # whatever a package of others does, the run's own log has the event
            self._lost = True
            warnings.warn(
                f"track={self.name} ended: {type(error).__name__}: {error}; log.jsonl has every event", stacklevel=1
            )


def points(event: Mapping[str, Any]) -> tuple[dict[str, float], str, int]:
    """The finite figures of an event by series, the name of what they run over, and where they stand on it."""
    over = AXES[event["kind"]]
    group = over if over == "block" else f"block_{event['block']:03d}/{over}"
    figures = {
        f"{group}/{key}": float(value)
        for key, value in event.items()
        if key not in ("block", over) and isinstance(value, int | float) and math.isfinite(value)
    }
    return figures, f"{group}/{over}", int(event[over])


def require(names: str) -> None:
    """`EnvironmentProblem` where a package behind a name in `track` is missing, before anything is made."""
    for name in _split(names):
        _module(name)


@contextmanager
def tracking(names: str, run: Path, config: Settings) -> Iterator[Sink]:
    """A sink that sends a run's configuration and figures to every tracker in `names`, closed at the end."""
    settings = {row["key"]: str(row["value"]) for row in describe(config)}
    sinks: list[TrackSink] = []
    try:
        for name in _split(names):
            sinks.append(TrackSink(name, _open(name, run, settings)))
        yield Fan(sinks)
    finally:
        for sink in sinks:
            sink.close()


def _open(name: str, run: Path, settings: Mapping[str, str]) -> Tracker:
    folder = run / "track" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr):
            return TRACKERS[name](folder, run.absolute().name, settings)
    except EnvironmentProblem:
        raise
    except Exception as error:  # a package of others, with errors of its own
        raise EnvironmentProblem(
            f"track={name} cannot begin in {folder}: {type(error).__name__}: {error}",
            f"mend this, then: cladapt train --resume {run}",
        ) from error


def _split(names: str) -> list[str]:
    return [] if names == "none" else list(dict.fromkeys(names.split("+")))


def _module(name: str) -> Any:
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise EnvironmentProblem(
            f"track={name}: the package {name} is not installed: {error}", "pip install cladapt[track]"
        ) from error
