"""Weights on disk: what was changed after saving is found, in every precision, and so is what is no number."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from cladapt.artifacts import hash_value, read_json, read_tensors, write_json, write_tensors
from cladapt.config import VitConfig
from cladapt.errors import DataError
from cladapt.model.load import load_base, new_model, save_base
from cladapt.model.vit import load_vision_base, new_vit, save_vision_base
from cladapt.model.weights import check_finite, saved_weights_hash, weights_hash
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import make_tokenizer

SIDS = SidTable(("x", "y", "z"), np.array([[0, 1], [2, 0], [2, 1]]), (3, 2))
CHANGED = r"base: its weights have the fingerprint [0-9a-f]{16}, cladapt\.json has recorded [0-9a-f]{16}"


def base(folder: Path, tied: bool = False, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    model, tokenizer = new_model("tiny", SIDS, 0, tied)
    if family == "qwen2":  # with biases
        config = Qwen2Config(
            vocab_size=len(make_tokenizer(SIDS)),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
        model = Qwen2ForCausalLM(config)
    save_base(folder / "base", model.to(dtype), tokenizer, SIDS, {"fitted_block": 1, "stream": "s"})
    return folder / "base"


def change(file: Path, name: str, value: float) -> None:
    tensors = read_tensors(file)
    tensors[name][3, 1] = value
    write_tensors(file, tensors, {"format": "pt"})


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_hash_on_disk_is_that_of_the_model_that_was_saved(
    family: str, tied: bool, loaded: torch.dtype, saved: torch.dtype, tmp_path: Path
) -> None:
    folder = base(tmp_path, tied, family, saved)
    model = load_base(folder, loaded).model
    assert model.dtype == loaded
    own = saved_weights_hash(folder, model, "")
    assert own == saved_weights_hash(folder, load_base(folder, saved).model, "")
    assert own == weights_hash(load_base(folder, saved).model)
    assert read_json(folder / "cladapt.json")["fingerprint"] == hash_value([own, SIDS.fingerprint])


def test_the_hash_is_of_names_shapes_dtypes_and_bytes() -> None:
    model = torch.nn.Linear(2, 1)
    digest = hashlib.sha256()
    for name, tensor in (("bias", model.bias), ("weight", model.weight)):
        digest.update(f"{name}{tuple(tensor.shape)}torch.float32".encode() + tensor.detach().numpy().tobytes())
    assert weights_hash(model) == digest.hexdigest()[:16]


def test_a_checkpoint_of_several_files_is_one_model(tmp_path: Path) -> None:
    folder = base(tmp_path)
    model = load_base(folder).model
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 1
    assert saved_weights_hash(folder, load_base(folder).model, "") == weights_hash(model)
    change(files[-1], next(n for n, t in read_tensors(files[-1]).items() if t.ndim == 2), 0.5)
    with pytest.raises(DataError, match=CHANGED):
        load_base(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "value"), [("lm_head.weight", 1e38), ("lm_head.weight", 0.25), ("model.embed_tokens.weight", 0.25)]
)
def test_a_weight_that_was_changed_is_found_on_loading(
    name: str, value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = base(tmp_path)
    change(folder / "model.safetensors", name, value)
    with pytest.raises(DataError, match=CHANGED) as caught:
        load_base(folder, dtype)
    assert caught.value.hint == "restore the base directory, or make the base again"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_not_finite_is_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = base(tmp_path)
    change(folder / "model.safetensors", "lm_head.weight", value)
    expected = (
        rf"model\.safetensors: 1 of 576 values of lm_head\.weight are not finite, the first is {value} at \[3, 1\]"
    )
    with pytest.raises(DataError, match=expected) as caught:
        load_base(folder, dtype)
    assert caught.value.hint == "restore the base directory, or make the base again"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_floating_dtype_is_checked(dtype: torch.dtype) -> None:
    good = torch.full((3, 4), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    check_finite("here", {"a": good, "none": good[:0], "count": torch.arange(3)}, "cure")
    bad = good.float() if dtype != torch.float64 else good.clone()
    bad[1, 2] = bad[2, 0] = torch.nan
    with pytest.raises(
        DataError, match=r"^here: 2 of 12 values of a are not finite, the first is nan at \[1, 2\] \(cure\)$"
    ):
        check_finite("here", {"a": bad.to(dtype)}, "cure")


def test_a_model_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model, tokenizer = new_model("tiny", SIDS, 0)
    with torch.no_grad():
        model.lm_head.weight[2, 5] = torch.inf
    with pytest.raises(DataError, match=r"to be saved: 1 of 576 values of lm_head\.weight .* inf at \[2, 5\]"):
        save_base(tmp_path / "base", model, tokenizer, SIDS, {"fitted_block": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_vision_base_is_checked_likewise(tmp_path: Path) -> None:
    model = new_vit(VitConfig(hidden=32, layers=1, patch=4), 8, 1, 6)
    save_vision_base(tmp_path / "base", model, "six", {"fitted_block": 0, "stream": "s"})
    load_vision_base(tmp_path / "base")
    change(tmp_path / "base" / "model.safetensors", "classifier.weight", 0.5)
    with pytest.raises(DataError, match=CHANGED):
        load_vision_base(tmp_path / "base")
    change(tmp_path / "base" / "model.safetensors", "classifier.weight", math.nan)
    with pytest.raises(DataError, match=r"1 of 192 values of classifier\.weight are not finite"):
        load_vision_base(tmp_path / "base")


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    """A tensor that lies there under another name is known only in the dtype that it was saved in."""
    folder = base(tmp_path)
    model = load_base(folder).model
    tensors = read_tensors(folder / "model.safetensors")
    tensors["other"] = tensors.pop("model.norm.weight")
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    assert saved_weights_hash(folder, model, "") == weights_hash(model)
    assert saved_weights_hash(folder, model.to(torch.bfloat16), "") is None


def test_a_fingerprint_that_was_changed_is_found(tmp_path: Path) -> None:
    folder = base(tmp_path)
    write_json(folder / "cladapt.json", {**read_json(folder / "cladapt.json"), "fingerprint": "0" * 16})
    with pytest.raises(DataError, match="has recorded 0000000000000000: one of them was changed"):
        load_base(folder)
