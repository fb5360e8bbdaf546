"""The run directory: what a run was asked, where it ran, what it wrote, and which run was the latest.

config.json  environment.json  log.jsonl  adapters/block_<t>/  method/  checkpoints/  users/  metrics.json  report.html
"""

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cladapt import __version__
from cladapt.artifacts import hash_value, is_leftover, read_json, write_json
from cladapt.config import RunConfig, resolve
from cladapt.errors import ConfigError, DataError

RUNS = Path("runs")
ENVIRONMENT = "environment.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Run:
    """An existing run directory, its resolved configuration and the fingerprints of its inputs by name."""

    path: Path
    config: RunConfig
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def config_hash(self) -> str:
        """Identity of everything that shapes the adapters; evaluation settings do not."""
        return hash_value(self.config.model_dump(mode="json", exclude={"eval"}))

    @property
    def adapters(self) -> dict[int, Path]:
        """Adapter directory of every finished block."""
        found = sorted((self.path / "adapters").glob("block_[0-9]*"))
        return {int(folder.name.removeprefix("block_")): folder for folder in found if folder.is_dir()}

    @classmethod
    def create(cls, path: Path, config: RunConfig, inputs: Mapping[str, str]) -> "Run":
        """Start a run in a new directory and make it the latest.

        `config.json` comes first and holds all that continuing needs, so a run is there whole or not at all.
        """
        if path.exists() and (not path.is_dir() or not all(is_leftover(entry) for entry in path.iterdir())):
            raise ConfigError(
                f"{path} exists and is not empty", f"continue it with --resume {path}, or choose another --out"
            )
        run = cls(path, config, inputs)
        record = {"schema_version": SCHEMA_VERSION, "config": config.model_dump(mode="json"), "inputs": dict(inputs)}
        write_json(path / "config.json", record)
        run.begin()
        return run

    def begin(self) -> None:
        """Record the machine, where none is recorded yet, and make this run the latest."""
        if not (self.path / ENVIRONMENT).is_file():
            write_json(self.path / ENVIRONMENT, environment())
        write_json(RUNS / "latest.json", {"run": os.path.relpath(self.path, RUNS)})

    def environment_changes(self) -> list[str]:
        """What differs between this machine and the one that the run began on, as `name: then -> now`."""
        if not (self.path / ENVIRONMENT).is_file():
            return []
        then, now = _flat(read_json(self.path / ENVIRONMENT)), _flat(environment())
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        return [f"{name}: {then.get(name)} -> {now.get(name)}" for name in names]

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open a run directory."""
        if not (path / "config.json").is_file():
            raise DataError(f"{path} is not a run directory: it has no config.json", "make one with `cladapt train`")
        record = read_json(path / "config.json")
        if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
            raise DataError(f"{path / 'config.json'} has an unknown form", f"expected schema_version {SCHEMA_VERSION}")
        config = resolve(RunConfig, record["config"], str(path / "config.json"))
        return cls(path, config, record.get("inputs", {}))

    @classmethod
    def latest(cls) -> "Run":
        """The run that was started last from this directory."""
        pointer = RUNS / "latest.json"
        if not pointer.is_file():
            raise DataError(
                f"no run here: {pointer} does not exist", "run `cladapt train` first, or name a run directory"
            )
        return cls.open(RUNS / read_json(pointer)["run"])


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
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": versions,
    }


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "packages"} | dict(found.get("packages", {}))
