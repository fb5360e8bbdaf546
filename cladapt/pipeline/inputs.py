"""What a run was made from, found again: the beginning of the stream that it has learned, and the same base."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from cladapt import workloads
from cladapt.artifacts import hash_file
from cladapt.config import RunSettings
from cladapt.errors import DataError
from cladapt.model.saved import ADAPTER_FILE
from cladapt.run import Run
from cladapt.workloads._base import FittedBase

RESTORE = "restore them, or start a new run from these"


def open_inputs(run: Run[Any], learning: bool = False) -> tuple[Any, FittedBase]:
    """The stream as the run is to learn it, however it has grown since, and the base; whole, unless it is to learn."""
    config = run.config
    if not learning and hasattr(config, "sharding"):
        config = config.model_copy(update={"sharding": "none"})
    stream, base = run.workload.open_inputs(config, partial(_known_part, run))
    return stream, base


def _known_part(run: Run[Any], stream: Any) -> Any:
    if "data" not in run.inputs:
        return stream
    found = run.workload.prefix(stream, run.inputs["data"])
    if found is None:
        raise DataError(
            f"{run.path} began with other inputs: data ({run.config.data}) is {stream.fingerprint}, it was "
            f"{run.inputs['data']}",
            RESTORE,
        )
    return found


def fingerprints(config: RunSettings, stream: Any, base: FittedBase) -> dict[str, str]:
    """Content of all that a run starts from, by name."""
    return {"data": stream.fingerprint, **_of_models(config, base)}


def _of_models(config: RunSettings, base: FittedBase) -> dict[str, str]:
    found = {"base": base.fingerprint}
    plain = {"quantisation": "none", "head": "linear"}
    # packed weights, and means that a head starts from, differ between machines, the saved ones not
    if all(getattr(config, key, as_saved) == as_saved for key, as_saved in plain.items()):
        found["base weights"] = base.weights
    if (start := workloads.get(config.task).starts_from(config)) is not None:
        file = start / ADAPTER_FILE
        if not file.is_file():
            raise DataError(f"no such file: {file}", "restore the adapter that the run starts from")
        found["from_adapter"] = hash_file(file)
    return found


def verify_inputs(run: Run[Any], base: FittedBase) -> list[str]:
    """`DataError` when base or adapter are not what the run began with; a note when that was not recorded."""
    if not run.inputs:
        return [f"{run.path} does not say which inputs it began with, so they are not compared"]
    found = _of_models(run.config, base)
    changed = _changed(run, {name: then for name, then in run.inputs.items() if name != "data"}, found)
    if changed:
        raise DataError(f"{run.path} began with other inputs: {'; '.join(changed)}", RESTORE)
    return []


def _changed(run: Run[Any], then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"{name} ({getattr(run.config, name.split()[0], 'unknown')}) is {now.get(name)}, it was {was}"
        for name, was in then.items()
        if now.get(name) != was
    ]
