"""The serving folder: the base once, adapters in the form servers read, nothing changed and nothing replaced."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cladapt.artifacts import read_json, write_json
from cladapt.config import AdapterConfig
from cladapt.errors import CheckFailed, ConfigError, DataError
from cladapt.export.card import Facts
from cladapt.export.merge import logits, probe_tokens
from cladapt.export.vllm import check, export_vllm, one_rank, servable
from cladapt.model.adapter import Parameters, create_adapter
from cladapt.model.load import load_base, new_model, save_base
from cladapt.model.saved import load_adapter, save_adapter
from cladapt.tokens.sids import SidTable

SIDS = SidTable(tuple(f"i{n}" for n in range(12)), np.array(list(np.ndindex(4, 3))), (4, 3))


def make_base(folder: Path, seed: int) -> Path:
    model, tokenizer = new_model("tiny", SIDS, seed)
    save_base(folder, model, tokenizer, SIDS, {"fitted_block": 1, "stream": "s"})
    return folder


def make_adapter(folder: Path, base: Path, block: int, learns: Parameters = "factors", **settings: Any) -> Path:
    loaded = load_base(base)
    model = create_adapter(loaded, AdapterConfig(**{"rank": 3, **settings}), 0, learns)
    generator = torch.Generator().manual_seed(block)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(folder, model, loaded, {"block": block, "stream": "s"})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", 0)


def as_vllm_reads(folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + scale B A by vLLM's rules: one scale, from r and lora_alpha of the configuration alone."""
    config, factors = read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    adapted = dict(weights)
    for name, a in factors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = factors[name.replace(".lora_A.", ".lora_B.")]
            adapted[f"{module}.weight"] = weights[f"{module}.weight"] + scale * b @ a
    return adapted


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"learns": "weights"}, {"targets": "all-linear"}],
    ids=["plain", "rslora", "full rank", "without the head"],
)
def test_what_vllm_reads_answers_as_the_adapter_does(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, 3, **settings)
    export_vllm(adapter, base, tmp_path / "out", Facts())
    loaded = load_base(base)
    probe = probe_tokens(loaded, rows=2)
    plain = logits(loaded.model, probe)
    served = as_vllm_reads(tmp_path / "out" / "adapters" / "block_3", loaded.model.state_dict())
    expected = logits(load_adapter(loaded, adapter), probe)
    again = load_base(tmp_path / "out" / "base")
    again.model.load_state_dict(served)
    torch.testing.assert_close(logits(again.model, probe), expected, atol=1e-5, rtol=0)
    assert (plain - expected).abs().max() > 1e-3
    config = read_json(tmp_path / "out" / "adapters" / "block_3" / "adapter_config.json")
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]


def test_an_exported_full_rank_adapter_still_loads_in_peft(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, 3, learns="weights")
    export_vllm(adapter, base, tmp_path / "out", Facts())
    probe = probe_tokens(load_base(base), rows=2)
    before = logits(load_adapter(load_base(base), adapter), probe)
    after = logits(load_adapter(load_base(base), tmp_path / "out" / "adapters" / "block_3"), probe)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_one_rank_keeps_every_product() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors, scales = {}, {"x.p": 0.5, "x.q": 3.0}
    for module, rank in (("x.p", 2), ("x.q", 5)):
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, 7, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(6, rank, generator=generator)
    config, written = one_rank({"r": 2, "rank_pattern": {"q": 5}, "kept": 1}, tensors, scales)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["kept"]) == (5, 5, {}, 1)
    for module, scale in scales.items():
        product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        a, b = written[f"{module}.lora_A.weight"], written[f"{module}.lora_B.weight"]
        assert a.shape == (5, 7)
        assert b.shape == (6, 5)
        torch.testing.assert_close(b @ a, scale * product)


def test_the_base_is_written_once_and_serves_every_block(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = export_vllm(make_adapter(tmp_path / "two", base, 2), base, out, Facts())
    stamp = (out / "base" / "model.safetensors").stat().st_mtime_ns
    second = export_vllm(make_adapter(tmp_path / "ten", base, 10, rank=9), base, out, Facts())
    assert (first["base"], second["base"]) == ("written", "kept")
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    assert second["serve"] == (
        "vllm serve base --dtype bfloat16 --enable-lora --max-lora-rank 16 "
        "--lora-modules block_2=adapters/block_2 block_10=adapters/block_10"
    )
    assert second["serve"] in (out / "SERVING.md").read_text()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "sids.parquet", "cladapt.json"):
        assert (out / "base" / name).read_bytes() == (base / name).read_bytes()
    again = export_vllm(tmp_path / "two", base, out, Facts())
    assert again["serve"] == second["serve"]
    with pytest.raises(ConfigError, match=r"block_2 holds another adapter \(choose another --out"):
        export_vllm(make_adapter(tmp_path / "other", base, 2, rank=4), base, out, Facts())


def test_a_folder_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    export_vllm(make_adapter(tmp_path / "a", base, 2), base, tmp_path / "out", Facts())
    other = make_base(tmp_path / "other", 1)
    adapter = make_adapter(tmp_path / "b", other, 3)
    with pytest.raises(DataError, match=r"out/base is the base .*, the adapter belongs to .* \(choose another --out"):
        export_vllm(adapter, other, tmp_path / "out", Facts())
    assert [p.name for p in (tmp_path / "out" / "adapters").iterdir()] == ["block_2"]


def test_what_vllm_refuses_is_not_written(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, 2)
    config = read_json(base / "config.json")
    qwen = tmp_path / "qwen"
    qwen.mkdir()
    for path in base.iterdir():
        (qwen / path.name).write_bytes(path.read_bytes())
    write_json(qwen / "config.json", {**config, "architectures": ["Qwen2ForCausalLM"]})
    with pytest.raises(CheckFailed, match=r"vllm would not serve .*head of Qwen2.*target_modules=lm_head.*all-linear"):
        export_vllm(adapter, qwen, tmp_path / "out", Facts())
    assert not (tmp_path / "out").exists()


def test_the_check_speaks_of_what_would_be_written(base: Path, tmp_path: Path) -> None:
    findings = check(make_adapter(tmp_path / "a", base, 2, learns="weights"), base)
    assert not [f for f in findings if f.server == "vllm" and f.level == "error"]
    assert {f.where for f in findings} == {"target_modules", "dtype", "tokenizer.json"}
    config, tensors = servable(make_adapter(tmp_path / "b", base, 2), base)
    assert config == read_json(tmp_path / "b" / "adapter_config.json")
    assert tensors.keys() == load_file(tmp_path / "b" / "adapter_model.safetensors").keys()
