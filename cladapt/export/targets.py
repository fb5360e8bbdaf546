"""Exports: what a team ships. `peft` is a self-contained adapter directory, `merged` one checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cladapt.artifacts import atomic_dir, read_json, write_json
from cladapt.errors import ConfigError
from cladapt.export.merge import merge
from cladapt.model.adapter import adapter_parameters, adapter_provenance, load_adapter
from cladapt.model.load import load_base


def export_peft(adapter: Path, base_folder: Path, out: Path) -> dict[str, Any]:
    """Copy the adapter in stock PEFT form, pointing to its base, after checking that the two belong together."""
    refuse_existing(out)
    parameters = adapter_parameters(load_adapter(load_base(base_folder), adapter))
    with atomic_dir(out) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        config = read_json(folder / "adapter_config.json")
        config["base_model_name_or_path"] = str(base_folder.resolve())
        write_json(folder / "adapter_config.json", config)
    return {
        "target": "peft",
        "out": str(out),
        "tensors": len(parameters),
        "parameters": sum(p.numel() for p in parameters.values()),
        "base": str(base_folder),
        "block": adapter_provenance(adapter).get("block"),
    }


def export_merged(adapter: Path, base_folder: Path, out: Path) -> dict[str, Any]:
    """Write base and adapter as one checkpoint; see `merge`."""
    refuse_existing(out)
    report = merge(adapter, base_folder, out)
    return {
        "target": "merged",
        "out": str(out),
        "max_logit_difference": report.max_difference,
        "mean_logit_difference": report.mean_difference,
        "allowed": report.bound,
        "block": adapter_provenance(adapter).get("block"),
    }


TARGETS: dict[str, Callable[[Path, Path, Path], dict[str, Any]]] = {"peft": export_peft, "merged": export_merged}


def export(target: str, adapter: Path, base_folder: Path, out: Path) -> dict[str, Any]:
    """Export an adapter to `target`; returns what was written."""
    if target not in TARGETS:
        raise ConfigError(f"target {target!r} is not known", f"use one of {', '.join(TARGETS)}")
    return TARGETS[target](adapter, base_folder, out)


def refuse_existing(out: Path) -> None:
    """An export never replaces a folder that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty", "choose another --out, or remove it")
