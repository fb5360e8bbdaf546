"""PEFT's tensor names and the fields that servers read, as they were: a release that renames them shows here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cladapt.artifacts import read_json, read_tensors
from cladapt.config import AdapterConfig
from cladapt.export.card import Facts
from cladapt.export.vllm import export_vllm
from cladapt.model.adapter import create_adapter
from cladapt.model.load import load_base, new_model, save_base
from cladapt.model.saved import save_adapter
from cladapt.tokens.sids import SidTable

GOLDEN = Path(__file__).parent / "golden"
SIDS = SidTable(tuple(f"i{n}" for n in range(12)), np.array(list(np.ndindex(4, 3))), (4, 3))
CASES: dict[str, dict[str, Any]] = {"lora": {}, "full_rank": {"learns": "weights"}}
FIELDS = (
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "fan_in_fan_out",
    "target_modules", "modules_to_save", "layers_to_transform", "layer_replication", "rank_pattern", "alpha_pattern",
    "inference_mode",
)  # fmt: skip


def described(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "adapter_config.json")
    fields = {field: config[field] for field in FIELDS}
    fields["target_modules"] = sorted(fields["target_modules"])
    tensors = read_tensors(folder / "adapter_model.safetensors")
    return {"config": fields, "tensors": {name: list(tensors[name].shape) for name in sorted(tensors)}}


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_fields_are_as_they_were(case: str, tmp_path: Path) -> None:
    model, tokenizer = new_model("tiny", SIDS, 0)
    save_base(tmp_path / "base", model, tokenizer, SIDS, {"fitted_block": 1, "stream": "s"})
    base = load_base(tmp_path / "base")
    save_adapter(
        tmp_path / "adapter", create_adapter(base, AdapterConfig(rank=3), 0, **CASES[case]), base, {"block": 2}
    )
    export_vllm(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", Facts())
    found = {"saved": described(tmp_path / "adapter"), "served": described(tmp_path / "out" / "adapters" / "block_2")}
    assert found == json.loads((GOLDEN / f"{case}.json").read_text())
