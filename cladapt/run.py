"""The run directory: what a run was asked, where it ran, what it wrote, and which run was the latest.

config.json  environment.json  log.jsonl  adapters/block_<t>/  method/  checkpoints/  users/  metrics.json  report.html
"""

import importlib.metadata
import os
import platform
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, PositiveInt, StringConstraints

from cladapt import __version__, ranks, workloads
from cladapt.artifacts import check_writable, hash_value, is_leftover, read_json, read_record, write_json
from cladapt.config import RunConfig, RunSettings, resolve
from cladapt.errors import ConfigError, DataError, EnvironmentProblem
from cladapt.lock import LOCK

if TYPE_CHECKING:
    from cladapt.workloads._base import Workload

RUNS = Path("runs")
_BLOCK = re.compile(r"block_(?P<block>[0-9]+)")
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
SCHEMA_VERSION = 1
FOLDERS = ("data", "base", "from_adapter")
"""Settings that say where a run's inputs are; what they are, their fingerprints say."""
NEWER = ("quantisation", "head", "head_scale")
"""Settings that older runs do not have: at their defaults they identify nothing, so that those runs go on."""


def _known(task: str) -> str:
    if task not in workloads.names():
        raise ValueError(f"expected {' or '.join(workloads.names())}")
    return task


Block = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]


class RunRecord(BaseModel):
    """What config.json must hold; runs of older versions have no inputs, no paths and no task."""

    schema_version: Literal[1]
    task: Annotated[str, AfterValidator(_known)] = workloads.DEFAULT
    config: dict[str, Any]
    inputs: dict[str, str] = {}
    paths: dict[Literal["data", "base", "from_adapter"], str] = {}
    held_out: dict[Block, Literal["never", "next"]] = {}
    ids: dict[Block, PositiveInt] = {}


class MachineRecord(BaseModel):
    """What environment.json must hold."""

    packages: dict[str, str]


class PointerRecord(BaseModel):
    """What latest.json must hold."""

    run: str = Field(min_length=1)


C = TypeVar("C", bound=RunSettings)


@dataclass(frozen=True)
class Run(Generic[C]):
    """An existing run directory, its resolved configuration and the fingerprints of its inputs by name.

    `held_out` and `ids`: what `train.held_out` and `ids` are from a block on, where they were changed when the run was
    continued.
    """

    path: Path
    config: C
    inputs: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[int, str] = field(default_factory=dict)
    ids: Mapping[int, int] = field(default_factory=dict)

    @property
    def config_hash(self) -> str:
        """Identity of the settings that shape the adapters; inputs have fingerprints, wherever they lie."""
        left_out: dict[str, Any] = dict.fromkeys(("eval", "track", "sharding", "ids", *FOLDERS), True)
        left_out["train"] = {"checkpointing"}  # which changes no value
        for key, field_info in type(self.config).model_fields.items():
            if key in NEWER and getattr(self.config, key) == field_info.default:
                left_out[key] = True
        return hash_value(self.config.model_dump(mode="json", exclude=left_out))

    def config_at(self, block: int) -> C:
        """The configuration by which a block is learned."""
        changes: dict[str, Any] = {}
        for first, held_out in sorted(self.held_out.items()):
            if first <= block:
                changes["train"] = self.config.train.model_copy(update={"held_out": held_out})
        for first, version in sorted(self.ids.items()):
            if first <= block:
                changes["ids"] = version
        return self.config.model_copy(update=changes) if changes else self.config

    @property
    def adapters(self) -> dict[int, Path]:
        """Adapter directory of every finished block."""
        found = sorted((self.path / "adapters").glob("block_[0-9]*"))
        named = ((_BLOCK.fullmatch(folder.name), folder) for folder in found if folder.is_dir())
        return {int(match["block"]): folder for match, folder in named if match}

    def choose(self, block: int | None) -> int:
        """The block of an adapter that the run has: `block`, or its newest.

        `DataError` where the run has none, `ConfigError` where it has none of that block.
        """
        adapters = self.adapters
        if not adapters:
            raise DataError(
                f"{self.path} has no adapter (method {self.config.method.name})", "train with a method that adapts"
            )
        chosen = max(adapters) if block is None else block
        if chosen not in adapters:
            raise ConfigError(f"--block {chosen}: {self.path} has {sorted(adapters)}", "choose one of these blocks")
        return chosen

    @property
    def task(self) -> str:
        """What its base is adapted to do, as `--task` names it."""
        return self.config.task

    @property
    def workload(self) -> "Workload[C, Any, Any, Any]":
        """What runs of its task differ in from others."""
        return workloads.get(self.task)

    @classmethod
    def create(cls, path: Path, config: C, inputs: Mapping[str, str]) -> "Run[C]":
        """Start a run in a new directory and make it the latest.

        `config.json` comes first and holds all that continuing needs, so a run is there whole or not at all.
        """
        cls.refuse_existing(path)
        run = cls(path, config, inputs)
        record = {
            "schema_version": SCHEMA_VERSION,
            "task": run.task,
            "config": config.model_dump(mode="json"),
            "inputs": dict(inputs),
            "paths": run._paths(),
        }
        write_json(path / CONFIG, record)
        run.begin()
        return run

    def go_on(self, data: str, held_out: Mapping[int, str], ids: Mapping[int, int] | None = None) -> "Run[C]":
        """Have the run learn the stream of the fingerprint `data`, whose beginning it has learned.

        `config.json` is replaced at once, with where the inputs are now: from here on the run is one over that stream.
        """
        inputs = {**self.inputs, "data": data}
        later: dict[str, Any] = {"held_out": {**self.held_out, **held_out}, "ids": {**self.ids, **(ids or {})}}
        changed: dict[str, Any] = {"inputs": inputs, "paths": self._paths()}
        for key, values in later.items():
            if values:
                changed[key] = {str(block): value for block, value in values.items()}
        write_json(self.path / CONFIG, {**read_json(self.path / CONFIG), **changed})
        return replace(self, inputs=inputs, **later)

    def _paths(self) -> dict[str, str]:
        """Where the inputs are, from the run directory."""
        named = {key: getattr(self.config, key, "") for key in FOLDERS}
        here = os.path.realpath(self.path)
        return {key: os.path.relpath(os.path.realpath(folder), here) for key, folder in named.items() if folder}

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """A run never goes where something is, nor where nothing can be written."""
        if path.exists() and (not path.is_dir() or not all(e.name == LOCK or is_leftover(e) for e in path.iterdir())):
            raise ConfigError(
                f"{path} exists and is not empty", f"continue it with --resume {path}, or choose another --out"
            )
        check_writable(path)

    def begin(self) -> None:
        """Record the machine, where none is recorded yet, and make this run the latest."""
        if not os.path.lexists(self.path / ENVIRONMENT):
            write_json(self.path / ENVIRONMENT, environment())
        try:
            write_json(RUNS / "latest.json", {"run": os.path.relpath(self.path, RUNS)})
        except EnvironmentProblem as error:  # a job may start where nothing can be written, and name its run
            warnings.warn(f"{error.message}: name this run where a command takes the latest", stacklevel=2)

    def environment(self) -> dict[str, Any]:
        """The machine that the run began on."""
        hint = "restore this file; where it is lost, `cladapt train --resume` records the present machine"
        return read_record(self.path / ENVIRONMENT, MachineRecord, hint)

    @property
    def packages(self) -> Mapping[str, str]:
        """Versions on the machine that the run began on; none where that is not recorded."""
        return self.environment()["packages"] if os.path.lexists(self.path / ENVIRONMENT) else {}

    def environment_changes(self) -> list[str]:
        """What differs between this machine and the one that the run began on, as `name: then -> now`."""
        if not os.path.lexists(self.path / ENVIRONMENT):
            return []
        then, now = _flat(self.environment()), _flat(environment())
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        return [f"{name}: {then.get(name)} -> {now.get(name)}" for name in names]

    @classmethod
    def open(cls, path: Path) -> "Run[RunConfig]":
        """Open the directory of a run that recommends."""
        run = open_run(path)
        if not isinstance(run.config, RunConfig):
            raise ConfigError(f"{path} is a run of --task {run.task}", "this works for runs that recommend")
        return run

    @classmethod
    def latest(cls) -> "Run[RunConfig]":
        """The run that was started last from this directory, which must be one that recommends."""
        return cls.open(latest_run())


def open_run(path: Path, data: Path | None = None, base: Path | None = None) -> Run[Any]:
    """Open a run directory of any task; `data` and `base` say where its stream and base are now.

    Otherwise each input is where it was, seen from the run directory, or else where it was when the run began.
    """
    if not (path / CONFIG).is_file():
        raise DataError(f"{path} is not a run directory: it has no {CONFIG}", "make one with `cladapt train`")
    hint = f"restore this file; this version reads schema_version {SCHEMA_VERSION}"
    record = read_record(path / CONFIG, RunRecord, hint)
    config = resolve(workloads.get(record.get("task")).config, record["config"], str(path / CONFIG))
    places: dict[str, Any] = {
        key: _place(path / where, getattr(config, key, "")) for key, where in record.get("paths", {}).items()
    }
    places |= {key: str(where) for key, where in (("data", data), ("base", base)) if where is not None}
    if hasattr(config, "ids") and "ids" not in record["config"]:  # older runs have known one version alone
        places["ids"] = 1
    held_out, ids = ({int(block): value for block, value in record.get(key, {}).items()} for key in ("held_out", "ids"))
    return Run(path, config.model_copy(update=places), record.get("inputs", {}), held_out, ids)


def _place(moved: Path, given: str) -> str:
    """Of two places of one input, the one relative to the run where something is, by its given name if it has it."""
    if not moved.exists() or (os.path.exists(given) and moved.samefile(given)):
        return given
    return os.path.realpath(moved)


def latest_run() -> Path:
    """Where the run lies that was started last from this directory."""
    pointer = RUNS / "latest.json"
    if not pointer.is_file():
        raise DataError(f"no run here: {pointer} does not exist", "run `cladapt train` first, or name a run directory")
    hint = 'expected {"run": "<directory>"}; or name a run directory'
    return RUNS / read_record(pointer, PointerRecord, hint)["run"]


def new_run_path(method: str, seed: int) -> Path:
    """A fresh directory name under `runs/`: time, method, seed."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{method.replace('+', '_')}-s{seed}"
    path, count = RUNS / stem, 1
    while path.exists():
        count += 1
        path = RUNS / f"{stem}-{count}"
    return path


def environment() -> dict[str, Any]:
    """Versions and hardware that a result depends on."""
    import torch

    packages = (
        "torch",
        "triton",
        "transformers",
        "peft",
        "accelerate",
        "safetensors",
        "numpy",
        "scikit-learn",
        "polars",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cladapt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": ranks.ranks(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": versions,
    }


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "packages"} | found["packages"]
