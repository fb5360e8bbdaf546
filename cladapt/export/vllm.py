"""For vLLM: `base`, the base+tokens checkpoint, once; `adapters/block_<t>`, one per block; and how to serve them.

An adapter whose modules differ in rank or scale is written with one rank (zeros fill up) and scale 1 (folded into B):
delta W = s B A = (s [B 0]) [A; 0], the same function in the only form that servers read.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cladapt.artifacts import atomic_dir, atomic_path, read_json, write_json
from cladapt.errors import ConfigError, DataError
from cladapt.export.card import CARD, Facts, adapter_card
from cladapt.export.catalogue import Offered
from cladapt.export.place import refuse_existing
from cladapt.export.preflight import MAX_LORA_RANKS, Finding, max_lora_rank, preflight, refuse, subject
from cladapt.model.generation import write_greedy
from cladapt.model.load import LEFT_OUT, PROVENANCE, base_provenance, load_base
from cladapt.model.saved import (
    CONFIG_FILE,
    adapter_provenance,
    adapter_settings,
    load_adapter,
    read_by,
    read_factors,
    write_factors,
)
from cladapt.tokens.sids import SidTable

GUIDE = "SERVING.md"


def export_vllm(
    adapter: Path, base_folder: Path, out: Path, facts: Facts, offered: Offered | None = None, replace: bool = False
) -> dict[str, Any]:
    """Add an adapter, and at first its base, to the serving folder `out`, which is never replaced as a whole.

    `CheckFailed` when vLLM would refuse it, `DataError` when `out` serves another base; what is there already and the
    same is kept, but for IDs and catalogue (`offered`), which are those of the stream now.
    """
    _refuse_foreign(out)
    config, tensors = servable(adapter, base_folder, offered)
    findings = preflight(subject(config, _shapes(tensors), base_folder), "vllm")
    refuse(str(adapter), findings)
    name = served_name(adapter)
    target = out / "adapters" / name
    base, levels = base_provenance(base_folder), SidTable.load(base_folder / "sids.parquet").levels
    kept = _same_base(out / "base", base["fingerprint"])
    config["base_model_name_or_path"] = "base"
    there = _same_adapter(target, config, tensors)
    _served(out)  # what is damaged there shows before anything is written
    if not kept:
        with atomic_dir(out / "base") as folder:
            shutil.copytree(base_folder, folder, dirs_exist_ok=True)
            base[LEFT_OUT] = {**base.get(LEFT_OUT, {}), **write_greedy(folder, levels)}
            write_json(folder / PROVENANCE, base)
    else:
        base = base_provenance(out / "base")
    if not there:
        with atomic_dir(target) as folder:
            write_json(folder / CONFIG_FILE, config)
            provenance = adapter_provenance(adapter)
            write_factors(folder, tensors, provenance)
            card = adapter_card("../../base", config, provenance, base, facts)
            (folder / CARD).write_text(card, encoding="utf-8")
            if offered is not None:
                offered.save(folder)
    elif offered is not None:
        offered.save(target)
    command = serve_command(out)
    with atomic_path(out / GUIDE) as temporary:
        temporary.write_text(_guide(out, command, findings), encoding="utf-8")
    return {
        "target": "vllm",
        "out": str(out),
        "adapter": str(target),
        "base": "kept" if kept else "written",
        "block": adapter_provenance(adapter).get("block"),
        "rank": config["r"],
        LEFT_OUT: dict(base.get(LEFT_OUT, {})),
        "serve": command,
        "notes": [finding.row() for finding in findings],
    }


def check(adapter: Path, base_folder: Path) -> list[Finding]:
    """What vLLM and llama.cpp would mind about this adapter as `export_vllm` would write it."""
    config, tensors = servable(adapter, base_folder)
    return preflight(subject(config, _shapes(tensors), base_folder))


def served_name(adapter: Path) -> str:
    """The name under which vLLM serves an adapter."""
    block = adapter_provenance(adapter).get("block")
    return adapter.resolve().name if block is None else f"block_{block}"


def servable(
    adapter: Path, base_folder: Path, offered: Offered | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors in the form that servers read, after checking that adapter and base fit."""
    from peft.tuners.lora import LoraLayer

    base = load_base(base_folder)
    model = load_adapter(base, adapter)
    if offered is not None:
        read_by(base, offered.sids, adapter)  # other IDs than it has learned by are refused
    config, tensors = adapter_settings(adapter), read_factors(adapter)
    if not (config.get("rank_pattern") or config.get("alpha_pattern")):
        return config, tensors
    scales = {name: m.scaling["default"] for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    return one_rank(config, tensors, scales)


def one_rank(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], scales: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same adapter with rank r = the largest rank and scale 1 in every module, float32.

    `scales`: what each module multiplies B A by, under the name before `.lora_A.weight`.
    """
    rank = max(t.shape[0] for name, t in tensors.items() if ".lora_A." in name)
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, side = name.rsplit(".lora_", 1)
        if side.startswith("A"):
            written[name] = pad(tensor.float(), (0, 0, 0, rank - tensor.shape[0]))
        else:
            written[name] = pad(tensor.float() * scales[module], (0, rank - tensor.shape[1]))
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return {**config, **plain}, written


def serve_command(out: Path) -> str:
    """The command that serves every adapter of `out`, to be run inside it."""
    configs = _served(out)
    rank = max_lora_rank(max(config["r"] for config in configs.values()))
    modules = " ".join(f"{name}=adapters/{name}" for name in configs)
    return f"vllm serve base --dtype bfloat16 --enable-lora --max-lora-rank {rank} --lora-modules {modules}"


def _served(out: Path) -> dict[str, dict[str, Any]]:
    """Configuration of every adapter in a serving folder, by its name there."""
    folders = sorted((out / "adapters").glob("*/"), key=lambda p: (len(p.name), p.name))
    return {folder.name: adapter_settings(folder) for folder in folders if not folder.name.startswith(".")}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _refuse_foreign(out: Path) -> None:
    """`out` is new, empty, or a serving folder."""
    if not (out / "base" / PROVENANCE).is_file():
        refuse_existing(out)


def _same_base(folder: Path, fingerprint: str) -> bool:
    if not folder.is_dir():
        return False
    found = base_provenance(folder)["fingerprint"]
    if found != fingerprint:
        raise DataError(
            f"{folder} is the base {found}, the adapter belongs to {fingerprint}", "choose another --out for this base"
        )
    return True


def _same_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    if not folder.is_dir():
        return False
    there = read_factors(folder)
    same = there.keys() == tensors.keys() and all(torch.equal(there[name], t) for name, t in tensors.items())
    if not same or adapter_settings(folder) != config:
        raise ConfigError(f"{folder} holds another adapter", "choose another --out, or remove it")
    return True


def _guide(out: Path, command: str, findings: list[Finding]) -> str:
    names = [part.partition("=")[0] for part in command.rpartition("--lora-modules ")[2].split()]
    prompt = read_json(out / "base" / "config.json").get("bos_token_id") or 0
    ranks = ", ".join(map(str, MAX_LORA_RANKS))
    limits = "\n".join(f"- {f.what} (`{f.where}`: {f.value}): {f.fix}" for f in findings)
    return (
        f"""# Serving with vLLM

In this folder:

    {command}

`base` is the base with its semantic-ID tokens, the same for every adapter; adapters hold linear layers alone, so vLLM
shares one copy of it. A request names the adapter as its model, and the base itself is the model `base`:

    curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{{"model": "{names[-1]}", "prompt": [{prompt}], "max_tokens": 3, "temperature": 0, "logprobs": 20}}'

The prompt is token ids: those of the history as the adapter was trained on it (`form` in its `cladapt.json`; `packed`
is the token that opens a history, then the tokens of each item's ID in time order; `prompt` is the bos token, if the
tokenizer has one, and the encoding of the words under `prompt` there, with IDs or titles in the place of `{{items}}`).

- A new block needs no restart: start the server with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True` (on trusted networks
  only) and post `{{"lora_name": "block_9", "lora_path": "/path/to/adapters/block_9"}}` to `/v1/load_lora_adapter`.
- `--max-loras N` lets one batch mix N adapters (default 1); `--max-lora-rank` is one of {ranks}.
- vLLM knows no catalogue: free decoding may name IDs that no item has, or one that is withdrawn. The IDs of all items
  are in each adapter's `sids.parquet`, the items that may be recommended in its `catalogue.parquet`. For rankings that
  are valid, distinct and full-width use `cladapt recommend HISTORIES --adapter adapters/NAME --base base`.
{limits}
""".rstrip()
        + "\n"
    )
