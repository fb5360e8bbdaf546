"""Base+tokens: what a preset is, what adding tokens to a checkpoint leaves alone, and what a directory guarantees."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cladapt.errors import ConfigError, DataError
from cladapt.model.load import (
    PRESETS,
    Base,
    extend_model,
    load_base,
    new_model,
    save_base,
    trie_softmax,
    weights_hash,
)
from cladapt.model.source import check_reach, check_supported
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import sid_token_ids
from cladapt.tokens.trie import Trie

SIDS = SidTable(("x", "y", "z"), np.array([[0, 1], [2, 0], [2, 1]]), (3, 2))
Checkpoint = Callable[..., Path]
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tables(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the embedding and of the head."""
    modules = cast("list[torch.nn.Module]", [model.get_input_embeddings(), model.get_output_embeddings()])
    embedding, head = (module.get_parameter("weight").detach() for module in modules)
    return embedding, head


def saved(folder: Path, fitted_block: int = 1, seed: int = 0) -> tuple[Path, PreTrainedModel]:
    model, tokenizer = new_model("tiny", SIDS, seed)
    save_base(folder, model, tokenizer, SIDS, {"fitted_block": fitted_block, "stream": "s"})
    return folder, model


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("tied", [True, False])
def test_a_preset_is_a_llama_over_the_id_tokens_alone(preset: str, tied: bool) -> None:
    model, tokenizer = new_model(preset, SIDS, seed=0, tie_embeddings=tied)
    assert len(tokenizer) == 4 + len(SIDS.tokens) == model.config.vocab_size
    assert model.config.hidden_size == PRESETS[preset]["hidden_size"]
    assert len(model.model.layers) == PRESETS[preset]["num_hidden_layers"]
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert (model.config.bos_token_id, model.config.pad_token_id) == (tokenizer.bos_token_id, tokenizer.pad_token_id)


def test_a_preset_follows_its_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    hashes = [weights_hash(new_model("tiny", SIDS, seed)[0]) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"base\.preset='huge' is not a preset") as caught:
        new_model("huge", SIDS, seed=0)
    assert caught.value.hint == "use one of tiny, small, medium"


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_leave_the_old_rows_as_they_were(
    checkpoint: Checkpoint, tmp_path: Path, family: str, tied: bool
) -> None:
    source = checkpoint(tmp_path, family, tied)
    before = FAMILIES[family][1].from_pretrained(source)
    model, tokenizer, new = extend_model(str(source), SIDS, seed=3)
    old_size = len(tokenizer) - len(SIDS.tokens)
    assert new == list(range(old_size, old_size + len(SIDS.tokens))) == sid_token_ids(tokenizer, SIDS).tolist()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    for old, extended in zip(tables(before), tables(model), strict=True):
        assert torch.equal(extended[:old_size], old[:old_size])
        rows = extended[new]
        assert rows.isfinite().all()
        assert len(rows.unique(dim=0)) == len(new)
        # near the mean of the old rows: a tenth of their spread away per dimension
        distance = (rows - old[:old_size].mean(dim=0)) / old[:old_size].std(dim=0)
        assert distance.abs().max() < 0.5
        assert distance.std().item() == pytest.approx(0.1, rel=0.3)
    for (name, old_value), value in zip(
        before.model.layers.state_dict().items(), model.model.layers.state_dict().values(), strict=True
    ):
        assert torch.equal(old_value, value), name
    ids = tokenizer.encode("next<a_2><b_1>item", add_special_tokens=False)
    assert [i for i in ids if i in new] == [new[2], new[4]]


def test_the_model_grows_no_further_than_it_must(checkpoint: Checkpoint, tmp_path: Path) -> None:
    roomy = checkpoint(tmp_path / "roomy", padding=7)
    model, tokenizer, _ = extend_model(str(roomy), SIDS, seed=0)
    assert len(tables(model)[0]) == len(tokenizer) - len(SIDS.tokens) + 7
    tight = checkpoint(tmp_path / "tight", padding=0)
    model, tokenizer, _ = extend_model(str(tight), SIDS, seed=0)
    assert len(tables(model)[0]) == len(tokenizer) == model.config.vocab_size


def test_new_rows_follow_the_seed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = str(checkpoint(tmp_path, tied=False))
    first, again, other = (extend_model(source, SIDS, seed)[0] for seed in (0, 0, 1))
    assert weights_hash(first) == weights_hash(again) != weights_hash(other)


def test_the_embedding_draws_its_noise_before_the_head(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(tmp_path, tied=False)
    old = tables(LlamaForCausalLM.from_pretrained(source))
    model, tokenizer, new = extend_model(str(source), SIDS, seed=4)
    size = len(tokenizer) - len(new)
    generator = torch.Generator().manual_seed(4)
    for before, after in zip(old, tables(model), strict=True):
        noise = torch.randn(len(new), before.shape[1], generator=generator)
        expected = before[:size].mean(dim=0) + 0.1 * noise * before[:size].std(dim=0)
        torch.testing.assert_close(after[new], expected)


def test_tokens_that_exist_already_are_not_new(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, tokenizer, new = extend_model(str(checkpoint(tmp_path / "a")), SIDS, seed=0)
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    larger = SidTable(SIDS.items, SIDS.codes, (3, 4))
    again, _, added = extend_model(str(tmp_path / "b"), larger, seed=0)
    assert added == [new[-1] + 1, new[-1] + 2]
    assert torch.equal(tables(again)[0][new], tables(model)[0][new])


def test_what_is_no_causal_lm_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot load a causal LM from") as caught:
        extend_model(str(tmp_path), SIDS, seed=0)
    assert caught.value.hint.startswith("give a local Hugging Face checkpoint directory")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "lfm2",
            {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
            "has layers of conv, whose tokens",
        ),
        ("falcon", {"alibi": True}, "adds a bias by the distance in a row"),
    ],
)
def test_a_model_whose_documents_would_see_each_other_is_refused(
    kind: str, settings: dict[str, Any], message: str
) -> None:
    model = torch.nn.Module()
    model.config = AutoConfig.for_model(kind, **settings)
    with pytest.raises(ConfigError, match=message):
        check_supported(model)


@pytest.mark.parametrize(
    ("kind", "settings", "what"),
    [
        ("mistral", {"sliding_window": 64}, "sliding window"),
        ("gemma3_text", {"sliding_window": 64}, "sliding window"),
        ("gpt2", {"n_positions": 64}, "table of positions"),
        ("opt", {"max_position_embeddings": 64}, "table of positions"),
    ],
)
def test_documents_longer_than_a_model_sees_are_refused(kind: str, settings: dict[str, Any], what: str) -> None:
    config = AutoConfig.for_model(kind, **settings)
    check_reach(config, 64)
    with pytest.raises(ConfigError, match=f"documents of up to 65 tokens, the model's {what} has 64"):
        check_reach(config, 65)


def test_models_without_such_limits_take_documents_of_any_length() -> None:
    for kind, settings in (
        ("llama", {"max_position_embeddings": 64}),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}),
        ("mistral", {"sliding_window": None}),
    ):
        check_reach(AutoConfig.for_model(kind, **settings), 10_000)


@pytest.mark.parametrize("key", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_model_that_transforms_its_logits_is_refused(key: str) -> None:
    model, _ = new_model("tiny", SIDS, seed=0)
    for harmless in (None, 1, 1.0):
        setattr(model.config, key, harmless)
        check_supported(model)
    setattr(model.config, key, 30.0)
    with pytest.raises(ConfigError, match=rf"LlamaForCausalLM transforms its logits \({key}=30\.0\)") as caught:
        check_supported(model)
    assert "Llama, Qwen and Mistral families" in caught.value.hint


def test_a_base_comes_back_frozen_and_bit_equal(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "base", fitted_block=2)
    base = load_base(folder)
    assert weights_hash(base.model) == weights_hash(model)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.sids.fingerprint == SIDS.fingerprint
    assert base.fitted_block == 2
    assert base.provenance["stream"] == "s"
    np.testing.assert_array_equal(sid_token_ids(base.tokenizer, SIDS), [4, 5, 6, 7, 8])
    assert base.item_tokens().tolist() == [[4, 8], [6, 7], [6, 8]]
    assert base.bos() == base.tokenizer.bos_token_id
    assert {p.name for p in tmp_path.iterdir()} == {"base"}


def test_the_fingerprint_is_of_weights_and_ids(tmp_path: Path) -> None:
    prints = [load_base(saved(tmp_path / f"{k}", seed=seed)[0]).fingerprint for k, seed in enumerate((0, 0, 1))]
    assert prints[0] == prints[1] != prints[2]
    model, tokenizer = new_model("tiny", SIDS, 0)
    swapped = SidTable(SIDS.items, SIDS.codes[::-1], SIDS.sizes)
    save_base(tmp_path / "swapped", model, tokenizer, swapped, {"fitted_block": 1})
    assert load_base(tmp_path / "swapped").fingerprint != prints[0]


def test_a_base_loads_in_the_asked_precision(tmp_path: Path) -> None:
    assert load_base(saved(tmp_path / "base")[0], torch.bfloat16).model.dtype == torch.bfloat16


def test_weights_hash_sees_every_bit() -> None:
    model, _ = new_model("tiny", SIDS, seed=0)
    before = weights_hash(model)
    weight = model.model.norm.weight
    with torch.no_grad():
        weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    assert weights_hash(model) != before


def test_ids_other_than_the_bases_are_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "base")
    other = SidTable(SIDS.items, SIDS.codes[::-1], SIDS.sizes)
    other.save(folder / "sids.parquet")
    expected = rf"has the hash {other.fingerprint}, the base was made with {SIDS.fingerprint}"
    with pytest.raises(DataError, match=expected):
        load_base(folder)


def test_the_ids_of_a_longer_stream_replace_the_bases(tmp_path: Path) -> None:
    base = load_base(saved(tmp_path / "base")[0])
    longer = SidTable((*SIDS.items, "new"), np.concatenate([SIDS.codes, [[0, 1]]]), SIDS.sizes)
    found = base.with_sids(longer)
    assert found.item_tokens().tolist() == [*base.item_tokens().tolist(), [4, 8]]
    assert (found.fingerprint, found.identity) == (base.fingerprint, base.identity)
    assert base.with_sids(longer.align(["new"])).sids.items == ("new",)


def test_ids_that_mean_other_items_are_refused(tmp_path: Path) -> None:
    base = load_base(saved(tmp_path / "base")[0])
    larger = SidTable(SIDS.items, SIDS.codes, (4, 2))
    with pytest.raises(
        DataError, match=r"levels of \[3, 2\] codes, the stream's IDs have levels of \[4, 2\]: the same"
    ):
        base.with_sids(larger)
    other = SidTable(("x", SIDS.items[1]), np.array([[0, 1], [1, 1]]), SIDS.sizes)
    expected = f"the base has the ID <a_2><b_0> for item '{SIDS.items[1]}', the stream has <a_1><b_1>: the same tokens"
    with pytest.raises(DataError, match=expected):
        base.with_sids(other)


def test_a_folder_that_is_no_base_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a base\+tokens directory: it has no cladapt\.json") as caught:
        load_base(tmp_path)
    assert caught.value.hint == "make one with `cladapt base pretrain` or `cladapt base init`"


def test_incomplete_provenance_names_what_is_missing(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "base")
    (folder / "cladapt.json").write_text(json.dumps({"sids": SIDS.fingerprint}))
    with pytest.raises(DataError, match=r"cladapt\.json lacks fingerprint, fitted_block"):
        load_base(folder)
    (folder / "cladapt.json").write_text("{")
    with pytest.raises(DataError, match=r"cladapt\.json:1:2: not valid JSON"):
        load_base(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_a_data_error(tmp_path: Path, name: str) -> None:
    folder, _ = saved(tmp_path / "base")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="base: cannot load the model"):
        load_base(folder)


def test_eos_opens_a_history_where_there_is_no_bos(tmp_path: Path) -> None:
    base = load_base(saved(tmp_path / "base")[0])
    base.tokenizer.bos_token = None
    assert base.bos() == base.tokenizer.eos_token_id
    base.tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a bos nor an eos token"):
        base.bos()


def test_the_trie_softmax_speaks_the_vocabulary_of_the_base() -> None:
    model, tokenizer = new_model("tiny", SIDS, seed=0)
    softmax = trie_softmax(Base(model, tokenizer, SIDS, {}), Trie.build(SIDS.codes))
    assert [tokens.tolist() for tokens in softmax.tokens] == [[4, 5, 6], [7, 8]]
    assert softmax.level.tolist() == [-1] * 4 + [0] * 3 + [1] * 2
    assert softmax.code.tolist() == [0] * 4 + [0, 1, 2, 0, 1]


@pytest.mark.parametrize("preset", PRESETS)
def test_heads_of_every_preset_are_wide_enough_for_servers(preset: str) -> None:
    sizes = PRESETS[preset]
    width, rest = divmod(sizes["hidden_size"], sizes["num_attention_heads"])
    assert (width >= 32, rest) == (True, 0)
