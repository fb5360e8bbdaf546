"""Every finding from a crafted adapter: what, where, the value and the fix; and none for a plain one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cladapt.artifacts import write_json
from cladapt.errors import CheckFailed
from cladapt.export.preflight import MAX_LORA_RANKS, Subject, max_lora_rank, preflight, refuse, subject

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
STEM = "base_model.model.model.layers.0"


def factors(*modules: str, rank: int = 8) -> dict[str, tuple[int, ...]]:
    names = [f"base_model.model.{m}" if m == "lm_head" else f"{STEM}.{m}" for m in modules]
    return {f"{n}.lora_{s}.weight": (rank, 256) if s == "A" else (256, rank) for n in names for s in "AB"}


PLAIN = Subject(CONFIG, factors("self_attn.q_proj", "mlp.down_proj"), LLAMA)


def configured(**changes: Any) -> Subject:
    return replace(PLAIN, config={**CONFIG, **changes})


def on(adapted: Subject = PLAIN, **changes: Any) -> Subject:
    return replace(adapted, base={**LLAMA, **changes})


def with_tensor(name: str) -> Subject:
    return replace(PLAIN, shapes={**PLAIN.shapes, name: (4, 256)})


HEAD = replace(PLAIN, shapes=factors("self_attn.q_proj", "lm_head"))
BOTH = ("llama.cpp", "vllm")
ERRORS: dict[str, tuple[Subject, tuple[str, ...], str, str, str]] = {
    # name: subject, servers that refuse it, what, where, value
    "another kind": (configured(peft_type="OFT"), BOTH, "not a LoRA adapter", "peft_type", "OFT"),
    "modules_to_save": (configured(modules_to_save=["lm_head"]), BOTH, "whole modules", "modules_to_save", "lm_head"),
    "token rows": (
        configured(trainable_token_indices={"embed_tokens": [1, 2]}),
        BOTH,
        "rows of single tokens are trained",
        "trainable_token_indices",
        "1 entries",
    ),
    "dora": (configured(use_dora=True), BOTH, "DoRA", "use_dora", "True"),
    "bias": (configured(bias="all"), BOTH, "biases are trained", "bias", "all"),
    "lora_bias": (configured(lora_bias=True), BOTH, "the factors have a bias", "lora_bias", "True"),
    "replication": (configured(layer_replication=[[0, 2]]), BOTH, "layers of the base are", "layer_replication", "2"),
    "variant": (configured(kasa_config={"beta": 1}), BOTH, "a variant of LoRA", "kasa_config", "beta"),
    "rank_pattern": (configured(rank_pattern={"q_proj": 4}), BOTH, "differ in rank or scale", "rank_pattern", "1 ent"),
    "alpha_pattern": (configured(alpha_pattern={"q": 4}), BOTH, "differ in rank or scale", "alpha_pattern", "1 ent"),
    "another rank": (configured(r=4), BOTH, "the factors have rank 8", "r", "4"),
    "rank": (
        replace(configured(r=600), shapes=factors("self_attn.q_proj", rank=600)),
        ("vllm",),
        "rank above 512, the largest --max-lora-rank",
        "r",
        "600",
    ),
    "embedding factors": (
        with_tensor("base_model.model.model.embed_tokens.lora_embedding_A"),
        BOTH,
        "1 factors of an embedding",
        "adapter_model.safetensors",
        "embed_tokens.lora_embedding_A",
    ),
    "token deltas": (
        with_tensor("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
        BOTH,
        "1 rows of single tokens",
        "adapter_model.safetensors",
        "trainable_tokens_delta",
    ),
    "magnitudes": (
        with_tensor(f"{STEM}.self_attn.q_proj.lora_magnitude_vector"),
        BOTH,
        "1 magnitudes of DoRA",
        "adapter_model.safetensors",
        "lora_magnitude_vector",
    ),
    "factor bias": (
        with_tensor(f"{STEM}.self_attn.q_proj.lora_B.bias"),
        BOTH,
        "1 biases in the file",
        "adapter_model.safetensors",
        "lora_B.bias",
    ),
    "whole head": (
        with_tensor("base_model.model.lm_head.weight"),
        BOTH,
        "1 tensors that are no LoRA factors",
        "adapter_model.safetensors",
        "lm_head.weight",
    ),
    "nothing": (replace(PLAIN, shapes={}), BOTH, "no LoRA factors", "adapter_model.safetensors", "0"),
    "strange module": (
        replace(PLAIN, shapes=factors("mlp.router")),
        ("vllm",),
        "does not adapt these modules of LlamaForCausalLM",
        "target_modules",
        "router",
    ),
    "qwen2 head": (
        on(HEAD, architectures=["Qwen2ForCausalLM"]),
        ("vllm",),
        "vLLM does not adapt the head of Qwen2ForCausalLM",
        "target_modules",
        "lm_head",
    ),
    "tied head": (on(HEAD, tie_word_embeddings=True), BOTH, "shares its weights", "target_modules", "lm_head"),
    "large head": (on(HEAD, vocab_size=258_049), ("vllm",), "at most 258048 tokens", "vocab_size", "258049"),
    "no class": (on(architectures=None), BOTH, "the base names no model class", "architectures", "None"),
    "no tokenizer": (replace(PLAIN, tokenizer=None), BOTH, "no tokenizer files", "tokenizer.json or", "missing"),
    "rslora": (configured(use_rslora=True), ("llama.cpp",), "llama.cpp scales by alpha / r", "use_rslora", "True"),
    "words": (
        replace(PLAIN, tokenizer="WordLevel"),
        ("llama.cpp",),
        "does not know this tokenizer",
        "tokenizer.json",
        "WordLevel",
    ),
}
NOTES: dict[str, tuple[Subject, str, str, str]] = {
    "head": (HEAD, "the head is adapted: recent vLLM takes it for LlamaForCausalLM", "target_modules", "lm_head"),
    "architecture": (on(architectures=["NewForCausalLM"]), "not known here", "architectures", "NewForCausalLM"),
    "precision": (on(dtype="float32"), "in 16 bits only", "dtype", "float32"),
    "head size": (on(num_attention_heads=16), "several attention backends lack", "head_dim", "16"),
}


def test_a_plain_adapter_has_no_findings() -> None:
    assert preflight(PLAIN) == []
    assert preflight(configured(use_rslora=True), "vllm") == []  # vLLM knows alpha / sqrt(r)
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert preflight(on(replace(PLAIN, shapes=factors(*every)), architectures=[name])) == []
    refuse("this", [])


@pytest.mark.parametrize("case", ERRORS)
def test_what_would_be_refused_is_found(case: str) -> None:
    checked, servers, what, where, value = ERRORS[case]
    found = [f for f in preflight(checked) if f.level == "error" and what in f.what]
    assert tuple(sorted(f.server for f in found)) == servers
    assert all(where in f.where and value in f.value and f.fix for f in found)
    others = [f for f in preflight(checked) if f not in found and f.level == "error"]
    assert others == []


@pytest.mark.parametrize("case", NOTES)
def test_limits_are_noted_and_refuse_nothing(case: str) -> None:
    checked, what, where, value = NOTES[case]
    (found,) = preflight(checked, "vllm")
    assert (found.level, found.where, found.value) == ("note", where, value)
    assert what in found.what
    refuse("this", [found])


def test_the_refusal_lists_every_error_and_its_fix() -> None:
    findings = preflight(configured(use_dora=True, bias="all", modules_to_save=["lm_head"]), "vllm")
    with pytest.raises(CheckFailed) as failure:
        refuse("adapter", findings)
    assert failure.value.exit_code == 5
    assert failure.value.message.startswith("vllm would not serve adapter as it is: 3 found: ")
    for part in ("modules_to_save=['lm_head']", "DoRA: use_dora=True", "bias=all"):
        assert part in failure.value.message
    assert failure.value.hint == "use --target merged"


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (257, 320), (321, 512), (512, 512)])
def test_the_served_rank_is_the_smallest_allowed(rank: int, allowed: int) -> None:
    assert max_lora_rank(rank) == allowed
    assert allowed in MAX_LORA_RANKS


def test_no_served_rank_holds_more_than_the_largest() -> None:
    with pytest.raises(CheckFailed, match=r"rank 513 is above vLLM's largest, 512 \(use --target merged"):
        max_lora_rank(513)


def test_the_base_folder_says_class_and_tokenizer(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", LLAMA)
    assert subject(CONFIG, {}, tmp_path).tokenizer is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert subject(CONFIG, {}, tmp_path).tokenizer == ""
    write_json(tmp_path / "tokenizer.json", {"model": {"type": "BPE"}})
    read = subject(CONFIG, {}, tmp_path)
    assert (read.tokenizer, read.architecture) == ("BPE", "LlamaForCausalLM")
