"""Exports: what a team ships. `peft` is a self-contained adapter directory, `merged` one checkpoint, `vllm` a folder
that serves adapters of several blocks over one base."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cladapt.artifacts import atomic_dir, atomic_path, write_json
from cladapt.errors import ConfigError
from cladapt.export.card import CARD, Facts, adapter_card, merged_card
from cladapt.export.catalogue import Offered
from cladapt.export.merge import merge
from cladapt.export.place import refuse_existing
from cladapt.export.vllm import export_vllm
from cladapt.model.adapter import adapter_parameters
from cladapt.model.load import LEFT_OUT, base_provenance, load_base
from cladapt.model.saved import CONFIG_FILE, adapter_provenance, adapter_settings, load_adapter, read_by


def export_peft(
    adapter: Path, base_folder: Path, out: Path, facts: Facts, offered: Offered | None, replace: bool
) -> dict[str, Any]:
    """Copy the adapter in stock PEFT form, pointing to its base, after checking that the two belong together."""
    refuse_existing(out, replace)
    base = load_base(base_folder)
    parameters = adapter_parameters(load_adapter(base, adapter))
    if offered is not None:
        read_by(base, offered.sids, adapter)  # other IDs than it has learned by are refused
    provenance = adapter_provenance(adapter)
    with atomic_dir(out) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        if offered is not None:
            offered.save(folder)
        config = adapter_settings(folder)
        config["base_model_name_or_path"] = str(base_folder.resolve())
        write_json(folder / CONFIG_FILE, config)
        path = os.path.relpath(base_folder.resolve(), out.resolve())
        card = adapter_card(path, config, provenance, base.provenance, facts)
        (folder / CARD).write_text(card, encoding="utf-8")
    return {
        "target": "peft",
        "out": str(out),
        "tensors": len(parameters),
        "parameters": sum(p.numel() for p in parameters.values()),
        "base": str(base_folder),
        "block": provenance.get("block"),
    }


def export_merged(
    adapter: Path, base_folder: Path, out: Path, facts: Facts, offered: Offered | None, replace: bool
) -> dict[str, Any]:
    """Write base and adapter as one checkpoint; see `merge`."""
    refuse_existing(out, replace)
    report = merge(adapter, base_folder, out, offered=offered)
    provenance = adapter_provenance(adapter)
    base, merged = base_provenance(base_folder), base_provenance(out)
    with atomic_path(out / CARD) as temporary:
        temporary.write_text(merged_card(provenance, base, merged, facts), encoding="utf-8")
    return {
        "target": "merged",
        "out": str(out),
        "max_logit_difference": report.max_difference,
        "mean_logit_difference": report.mean_difference,
        "allowed": report.bound,
        LEFT_OUT: dict(report.left_out),
        "block": provenance.get("block"),
    }


TARGETS: dict[str, Callable[[Path, Path, Path, Facts, Offered | None, bool], dict[str, Any]]] = {
    "peft": export_peft,
    "merged": export_merged,
    "vllm": export_vllm,
}


def export(
    target: str,
    adapter: Path,
    base_folder: Path,
    out: Path,
    facts: Facts | None = None,
    offered: Offered | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Export an adapter to `target`; returns what was written.

    `facts` fill its model card; `offered`, the IDs of the stream and its catalogue, are written with it. `replace`: an
    earlier export may be in the place.
    """
    if target not in TARGETS:
        raise ConfigError(f"target {target!r} is not known", f"use one of {', '.join(TARGETS)}")
    return TARGETS[target](adapter, base_folder, out, facts or Facts(), offered, replace)
