"""Where models come from: whole, in pieces, from a GGUF file, or drawn anew; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cladapt.errors import ConfigError, DataError, EnvironmentProblem
from cladapt.model.load import extend_model, load_base, save_base
from cladapt.model.rows import tables
from cladapt.model.source import open_source
from cladapt.model.weights import weights_hash
from cladapt.tokens.sids import SidTable

Checkpoint = Callable[..., Path]
SIDS = SidTable(("x", "y", "z"), np.array([[0, 1], [2, 0], [2, 1]]), (3, 2))


def test_a_checkpoint_in_pieces_is_the_same_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "whole")
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "pieces", max_shard_size="10KB")
    AutoTokenizer.from_pretrained(whole).save_pretrained(tmp_path / "pieces")
    assert len(list((tmp_path / "pieces").glob("model-*.safetensors"))) > 1
    models = [open_source(str(tmp_path / name), 0)[0] for name in ("whole", "pieces")]
    assert weights_hash(models[0]) == weights_hash(models[1])


def test_a_checkpoint_in_half_precision_is_read_in_full(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "full")
    half = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "half")
    for weights in ("pretrained", "random"):
        model, _ = open_source(str(tmp_path / "half"), 0, weights)  # type: ignore[arg-type]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.config.dtype == torch.float32
    model, _ = open_source(str(tmp_path / "half"), 0)
    assert all(torch.equal(p, dict(half.named_parameters())[name].float()) for name, p in model.named_parameters())


def test_pickled_weights_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    opened = tmp_path / "opened"
    (source / "pytorch_model.bin").write_text(f"cos\nsystem\n(S'touch {opened}'\ntR.")  # unpickling it runs touch
    (source / "model.safetensors").unlink()
    with pytest.raises(DataError, match="cannot load a causal LM from"):
        open_source(str(source), 0)
    assert not opened.exists()


def test_what_a_model_has_no_place_for_is_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(tmp_path, tied=False)
    file = source / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.bias": torch.ones(len(tensors["lm_head.weight"]))}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 of its tensors are left out, the first lm_head\.bias: a LlamaForCausalLM"):
        open_source(str(source), 0)


def test_a_head_of_its_own_is_used_though_the_config_denies_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table.clone()}, file, {"format": "pt"})
    model, _ = open_source(str(tmp_path), 0)
    assert model.config.tie_word_embeddings
    save_file({**tensors, "lm_head.weight": table + 1.0}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="says tie_word_embeddings=true, but its head has values of its own"):
        model, _ = open_source(str(tmp_path), 0)
    assert not model.config.tie_word_embeddings
    model.resize_token_embeddings(len(table) + 1, mean_resizing=False)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"][:-1], table + 1.0)
    assert torch.equal(saved["model.embed_tokens.weight"][:-1], table)


def test_weights_that_are_not_finite_are_refused_when_they_are_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"1 of 16 values of model\.norm\.weight are not finite") as caught:
        open_source(str(source), 0)
    assert caught.value.hint == "give another checkpoint: this one is damaged"


def test_tokens_without_rows_get_some_by_the_seed_and_are_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(tmp_path, padding=-7)

    def extended(seed: int) -> tuple[torch.Tensor, int]:
        with pytest.warns(UserWarning, match=r"the tokenizer has 279 tokens, the model rows for 272: the others"):
            model, _, new = extend_model(str(source), SIDS, seed)
        return tables(model)[0].detach(), min(new)

    (one, first), (again, _), (other, _) = extended(1), extended(1), extended(2)
    assert first == 279
    assert torch.equal(one, again)
    assert torch.equal(one[:272], other[:272])
    assert (one[272:] != other[272:]).all()
    spread = one[:272].std(dim=0)
    assert ((one[272:] - one[:272].mean(dim=0)).abs() < spread).all()  # a tenth of it by default


def test_random_weights_have_architecture_and_tokenizer_and_follow_the_seed(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = str(checkpoint(tmp_path, "qwen3"))
    (pretrained, words), (first, same), (again, _), (other, _) = (
        open_source(source, *asked)  # type: ignore[arg-type]
        for asked in ((0,), (2, "random"), (2, "random"), (3, "random"))
    )
    assert weights_hash(first) == weights_hash(again) != weights_hash(other)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (pretrained, first)]
    assert shapes[0] == shapes[1]
    assert same.get_vocab() == words.get_vocab()
    assert (tables(first)[0] != tables(pretrained)[0]).any(dim=1).all()
    assert first.get_input_embeddings().weight is first.get_output_embeddings().weight
    drawn = tables(first)[0]
    assert drawn.std().item() == pytest.approx(first.config.initializer_range, rel=0.1)
    state = torch.get_rng_state()
    open_source(source, 5, "random")
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_of_what_is_no_model_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot load a causal LM .*\(give a local .*, a \.gguf file, or a hub id"):
        open_source(str(tmp_path), 0, "random")


def test_logits_that_are_transformed_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "logit_scale": 2.0}))
    for weights in ("pretrained", "random"):
        with pytest.raises(ConfigError, match="transforms its logits"):
            open_source(str(source), 0, weights)  # type: ignore[arg-type]


def test_a_gguf_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot load a causal LM from '.*no\.gguf': there is no such file"):
        open_source(str(tmp_path / "no.gguf"), 0)


def test_without_the_package_a_gguf_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("cladapt.model.source.find_spec", lambda name: None)
    for weights in ("pretrained", "random"):
        with pytest.raises(EnvironmentProblem, match=r"a\.gguf is a GGUF file, and the package .* not installed") as e:
            open_source(str(tmp_path / "a.gguf"), 0, weights)  # type: ignore[arg-type]
        assert e.value.hint == "pip install 'cladapt[gguf]'"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A tiny Llama as a GGUF file: matrices in blocks of eight bits, the rest in float32."""
    gguf: Any = pytest.importorskip("gguf", reason="GGUF files need the package gguf: pip install 'cladapt[gguf]'")
    return write_gguf(gguf, tmp_path / "tiny.gguf")


def write_gguf(gguf: Any, path: Path) -> Path:
    """What llama.cpp's converter would write; queries and keys have their halves interleaved."""
    generator = np.random.default_rng(0)
    hidden, inner, heads, layers, words = 32, 64, 2, 1, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<s>", "</s>", *(chr(33 + k) for k in range(words - 3)), "AB"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (words - 2))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (words, hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden, hidden),
        "blk.0.attn_v": (hidden, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
    }
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        writer.add_tensor(
            f"{name}.weight",
            gguf.quants.quantize(generator.normal(size=shape, scale=0.2).astype(np.float32), kind),
            raw_dtype=kind,
        )
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", generator.normal(1.0, 0.1, hidden).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_an_ordinary_checkpoint(gguf_file: Path, tmp_path: Path) -> None:
    import gguf

    tensors = {t.name: t for t in gguf.GGUFReader(gguf_file).tensors}

    def unpacked(name: str) -> torch.Tensor:
        tensor = tensors[f"{name}.weight"]
        return torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))

    with pytest.warns(
        UserWarning, match=r"65 tokens, the model rows for 64: .*'<\|endoftext\|>'"
    ):  # of the pre-tokenizer
        model, tokenizer, _ = extend_model(str(gguf_file), SIDS, seed=0)
    found: Any = model.model
    assert torch.equal(found.embed_tokens.weight[:64], unpacked("token_embd"))
    assert torch.equal(found.layers[0].mlp.down_proj.weight, unpacked("blk.0.ffn_down"))
    query = unpacked("blk.0.attn_q").reshape(2, 8, 2, 32).swapaxes(1, 2).reshape(32, 32)  # halves lie apart again
    assert torch.equal(found.layers[0].self_attn.q_proj.weight, query)
    assert torch.equal(found.norm.weight, unpacked("output_norm"))
    assert tokenizer.bos_token_id == 0
    save_base(tmp_path / "base", model, tokenizer, SIDS, {"fitted_block": 0})
    assert "quantization_config" not in json.loads((tmp_path / "base" / "config.json").read_text())
    inputs = torch.arange(2, 14)[None]
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = model.eval()(inputs).logits
        assert torch.equal(stock(inputs).logits, expected)
        assert torch.equal(load_base(tmp_path / "base").model(inputs).logits, expected)
    drawn, _ = open_source(str(gguf_file), 0, "random")
    assert {p.dtype for p in drawn.parameters()} == {torch.float32}
    assert not hasattr(drawn.config, "quantization_config")


def test_a_damaged_gguf_file_is_told(gguf_file: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot load a causal LM from"):
        open_source(str(gguf_file), 0)
