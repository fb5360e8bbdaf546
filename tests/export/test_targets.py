"""Exports as their users load them: stock transformers and PEFT in a process that never sees cladapt."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cladapt.artifacts import read_json, read_tensors, write_json, write_tensors
from cladapt.config import AdapterConfig
from cladapt.errors import ConfigError, DataError
from cladapt.export.merge import logits, probe_tokens
from cladapt.export.targets import TARGETS, export, refuse_existing
from cladapt.model.adapter import adapter_parameters, create_adapter
from cladapt.model.load import load_base, new_model, save_base
from cladapt.model.saved import load_adapter, save_adapter
from cladapt.tokens.sids import SidTable

SIDS = SidTable(tuple(f"i{n}" for n in range(12)), np.array(list(np.ndindex(4, 3))), (4, 3))

STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import AutoPeftModelForCausalLM

merged, peft, tokens = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
with torch.no_grad():
    answers = {
        "merged": AutoModelForCausalLM.from_pretrained(merged)(input_ids=tokens).logits.tolist(),
        "peft": AutoPeftModelForCausalLM.from_pretrained(peft)(input_ids=tokens).logits.tolist(),
        "ids": AutoTokenizer.from_pretrained(merged).encode("<a_1><b_2>", add_special_tokens=False),
    }
answers["ours"] = [name for name in sys.modules if name.split(".")[0] in ("cladapt", "cladapt_kernels", "cladapt_cli")]
print(json.dumps(answers))
"""


def make_base(folder: Path, seed: int) -> Path:
    model, tokenizer = new_model("tiny", SIDS, seed)
    save_base(folder, model, tokenizer, SIDS, {"fitted_block": 1, "stream": "s"})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", 0)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    loaded = load_base(base)
    model = create_adapter(loaded, AdapterConfig(rank=3, rslora=True), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(tmp_path / "adapter", model, loaded, {"block": 3, "stream": "s"})
    return tmp_path / "adapter"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_stock_transformers_and_peft_answer_as_we_do(base: Path, adapter: Path, tmp_path: Path) -> None:
    export("merged", adapter, base, tmp_path / "merged")
    export("peft", adapter, base, tmp_path / "peft")
    loaded = load_base(base)
    probe = probe_tokens(loaded, rows=2)
    expected = logits(load_adapter(loaded, adapter), probe)
    arguments = [str(tmp_path / "merged"), str(tmp_path / "peft"), json.dumps(probe.tolist())]
    # -P and the other folder: nothing of this checkout is importable by accident
    result = subprocess.run(
        [sys.executable, "-P", "-c", STOCK, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    assert answers["ours"] == []
    for target in ("merged", "peft"):
        torch.testing.assert_close(torch.tensor(answers[target]), expected, atol=1e-4, rtol=0)
    assert answers["ids"] == [loaded.tokenizer.convert_tokens_to_ids(token) for token in ("<a_1>", "<b_2>")]


def test_a_peft_export_is_the_adapter_itself_pointing_to_its_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = files(adapter)
    report = export("peft", adapter, base, tmp_path / "out")
    assert files(adapter) == before
    after = files(tmp_path / "out")
    config = json.loads(after.pop("adapter_config.json"))
    assert config.pop("base_model_name_or_path") == str(base.resolve())
    original = json.loads(before.pop("adapter_config.json"))
    original.pop("base_model_name_or_path")
    assert config == original
    assert after.pop("README.md") != before.pop("README.md")  # the short card becomes an export's
    assert after == before
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert report == {
        "target": "peft",
        "out": str(tmp_path / "out"),
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "base": str(base),
        "block": 3,
    }


def test_a_merged_export_reports_its_check(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = export("merged", adapter, base, tmp_path / "out")
    assert 0.0 < report["mean_logit_difference"] <= report["max_logit_difference"] <= report["allowed"]
    assert (report["target"], report["out"], report["block"]) == ("merged", str(tmp_path / "out"), 3)
    assert not list((tmp_path / "out").rglob("adapter_*"))


def test_an_unknown_target_lists_the_known_ones(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"target 'onnx' is not known \(use one of peft, merged, vllm\)"):
        export("onnx", adapter, base, tmp_path / "out")


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_there_is_never_replaced(target: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for out in ("full", "file"):
        with pytest.raises(ConfigError, match=rf"{out} exists and is not empty \(choose another --out"):
            export(target, adapter, base, tmp_path / out)
    assert files(tmp_path / "full") == {"kept.txt": b"kept"}
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    export(target, adapter, base, tmp_path / "empty")
    refuse_existing(tmp_path / "new")


def truncate(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_tensor(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    write_tensors(path, dict(list(read_tensors(path).items())[1:]), {"format": "pt"})


def change_a_shape(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = read_tensors(path)
    name = next(iter(tensors))
    write_tensors(path, {**tensors, name: tensors[name][:-1]}, {"format": "pt"})


def lose_the_record(adapter: Path) -> None:
    (adapter / "cladapt.json").unlink()


def lose_the_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def lose_the_tensors(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def claim_another_base(adapter: Path) -> None:
    record = read_json(adapter / "cladapt.json")
    write_json(adapter / "cladapt.json", {**record, "base": "0123456789abcdef"})


DAMAGE = {
    truncate: "adapter_model.safetensors: not a readable safetensors file",
    lose_a_tensor: r"adapter_model\.safetensors has the hash [0-9a-f]{16}, cladapt\.json has recorded",
    change_a_shape: r"adapter_model\.safetensors has the hash [0-9a-f]{16}, cladapt\.json has recorded",
    lose_the_record: r"has no cladapt\.json",
    lose_the_config: "it has no adapter_config.json",
    lose_the_tensors: "no such file: .*adapter_model.safetensors",
    claim_another_base: "was trained on the base 0123456789abcdef, this base is",
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_adapter_is_refused_and_nothing_written(
    damage: object, target: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    damage(adapter)  # type: ignore[operator]
    with pytest.raises(DataError, match=DAMAGE[damage]):  # type: ignore[index]
        export(target, adapter, base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("target", TARGETS)
def test_another_base_is_refused(target: str, adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", 1)
    with pytest.raises(DataError, match="give the base directory that the adapter was trained on"):
        export(target, adapter, other, tmp_path / "out")
    with pytest.raises(DataError, match=r"adapter is not a base\+tokens directory: it has no cladapt\.json|lacks"):
        export(target, adapter, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_may_be_replaced_and_nothing_else(tmp_path: Path) -> None:
    earlier, mine = tmp_path / "earlier", tmp_path / "mine"
    base = tmp_path / "base"
    written = {
        earlier: ("cladapt.json", "README.md", "catalogue.parquet"),
        mine: ("notes.txt",),
        base: ("cladapt.json",),
    }
    for folder, names in written.items():
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
    refuse_existing(earlier, replace=True)
    for folder, replace in ((earlier, False), (mine, False), (mine, True), (base, True)):
        with pytest.raises(ConfigError, match="exists and is not empty"):
            refuse_existing(folder, replace)
