"""A merged checkpoint against base + adapter: weights by the formula, logits, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from cladapt.artifacts import hash_file, read_json, read_tensors, write_json, write_tensors
from cladapt.config import AdapterConfig
from cladapt.errors import CheckFailed, DataError
from cladapt.export.merge import logits, merge, probe_tokens
from cladapt.model.adapter import adapter_parameters, create_adapter
from cladapt.model.load import load_base, new_model, save_base
from cladapt.model.saved import load_adapter, save_adapter
from cladapt.tokens.sids import SidTable

SIDS = SidTable(tuple(f"i{n}" for n in range(12)), np.array(list(np.ndindex(4, 3))), (4, 3))
SETTINGS = AdapterConfig(rank=3, alpha=12.0)


def make_base(folder: Path, seed: int, tied: bool = False) -> Path:
    model, tokenizer = new_model("tiny", SIDS, seed, tied)
    save_base(folder, model, tokenizer, SIDS, {"fitted_block": 1, "stream": "s"})
    return folder


def make_adapter(folder: Path, base_folder: Path) -> Path:
    base = load_base(base_folder)
    model = create_adapter(base, SETTINGS, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(folder, model, base, {"block": 3, "stream": "s", "method": "peso"})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", 0)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base)


@pytest.mark.parametrize(("tied", "modules"), [(True, 14), (False, 15)])
def test_the_merged_weights_are_w_plus_scale_b_a(tied: bool, modules: int, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", 0, tied)
    adapter = make_adapter(tmp_path / "adapter", base)
    report = merge(adapter, base, tmp_path / "out")
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in factors}
    assert len(adapted) == modules  # seven linear layers in each of two blocks, and a head of its own
    assert before.keys() == after.keys()
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        expected = weight.double()
        if module in adapted:
            a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
            expected = expected + 12.0 / 3 * b @ a
        torch.testing.assert_close(after[name].double(), expected, atol=1e-6, rtol=0)
    assert 0.0 < report.max_difference <= report.bound
    assert report.mean_difference <= report.max_difference


def test_the_merged_checkpoint_answers_as_base_and_adapter_do(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(adapter, base, tmp_path / "out")
    plain = load_base(base)
    probe = probe_tokens(plain)
    bare = logits(plain.model, probe)
    expected = logits(load_adapter(plain, adapter), probe)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    difference = (logits(merged, probe) - expected).abs().max().item()
    assert difference == pytest.approx(report.max_difference, rel=0.5, abs=1e-6)
    assert (bare - expected).abs().max().item() > 100 * report.bound  # the adapter says something


def test_the_merged_base_says_what_it_has_seen_and_where_it_comes_from(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merge(adapter, base, tmp_path / "out")
    parent, merged = load_base(base), load_base(tmp_path / "out")
    # a run that adapts it further must start after the adapter's block, or it would learn that block twice
    assert merged.fitted_block == 3
    assert merged.provenance["stream"] == "s"
    assert merged.provenance["parent_base"] == parent.fingerprint != merged.fingerprint
    assert merged.provenance["merged"]["method"] == "peso"
    assert merged.sids.fingerprint == parent.sids.fingerprint


def test_probes_are_seeded_histories_of_items(base: Path) -> None:
    loaded = load_base(base)
    probe = probe_tokens(loaded)
    assert probe.shape == (8, 1 + 32)
    assert torch.equal(probe, probe_tokens(loaded))
    assert (probe[:, 0] == loaded.bos()).all()
    assert {tuple(item) for item in probe[:, 1:].unflatten(1, (-1, 2)).flatten(0, 1).tolist()} <= {
        tuple(item) for item in loaded.item_tokens().tolist()
    }


def scale_one_factor(self: LoraModel, *args: Any, **kwargs: Any) -> Any:
    next(p for name, p in self.named_parameters() if "lora_B" in name).data.mul_(1.5)
    return LORA_MERGE(self, *args, **kwargs)


LORA_MERGE = LoraModel.merge_and_unload


def test_a_merge_that_changes_the_answers_is_refused_and_nothing_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraModel, "merge_and_unload", scale_one_factor)
    with pytest.raises(CheckFailed, match=r"merging .*adapter changes the logits by .*, allowed .*\(serve the adapter"):
        merge(adapter, base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_tolerance_is_what_the_check_goes_by(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="allowed 0 "):
        merge(adapter, base, tmp_path / "out", tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


def broken_adapter(folder: Path, base: Path, value: float) -> Path:
    """An adapter with one other value, which its record agrees with."""
    broken = make_adapter(folder, base)
    file = broken / "adapter_model.safetensors"
    tensors = read_tensors(file)
    next(iter(tensors.values()))[0, 0] = value
    write_tensors(file, tensors, {"format": "pt"})
    write_json(broken / "cladapt.json", {**read_json(broken / "cladapt.json"), "weights": hash_file(file)})
    return broken


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(base: Path, bad: float, tmp_path: Path) -> None:
    broken = broken_adapter(tmp_path / "adapter", base, bad)
    expected = rf"adapter_model\.safetensors: 1 of \d+ values of base_model\..* are not finite, the first is {bad}"
    with pytest.raises(DataError, match=expected):
        merge(broken, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_answers_are_not_finite_is_refused(base: Path, tmp_path: Path) -> None:
    broken = broken_adapter(tmp_path / "adapter", base, 3e38)
    with pytest.raises(CheckFailed, match=r"merging .*adapter: its logits are not finite \(train it again"):
        merge(broken, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", 1)
    with pytest.raises(DataError, match=r"was trained on the base .*, this base is .*give the base directory"):
        merge(adapter, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_what_is_written_wrongly_is_found_by_reading_it_back(
    value: float, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedModel.save_pretrained

    def save_with_a_fault(self: PreTrainedModel, folder: Path, **more: Any) -> None:
        save(self, folder, **more)
        tensors = read_tensors(folder / "model.safetensors")
        tensors["model.norm.weight"][0] = value
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_with_a_fault)
    with pytest.raises(CheckFailed, match=r"merging .*adapter: what was written is not what was merged: "):
        merge(adapter, base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_generation_settings_of_the_base_are_not_passed_on(adapter: Path, base: Path, tmp_path: Path) -> None:
    """A base of before, which still has them, is what `merge` and `export` meet."""
    old = shutil.copytree(base, tmp_path / "old")
    write_json(old / "generation_config.json", {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 3]})
    report = merge(adapter, old, tmp_path / "out")
    assert report.left_out == {"do_sample": True, "temperature": 0.6}
    written = read_json(tmp_path / "out" / "generation_config.json")
    del written["transformers_version"]
    assert written == {"do_sample": False, "eos_token_id": [2, 3], "max_new_tokens": 2}
