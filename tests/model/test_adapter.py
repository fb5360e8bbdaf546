"""Adapters: only LoRA factors train, directories are PEFT's own, and a base is given back as it was lent."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from cladapt.config import AdapterConfig
from cladapt.errors import ConfigError, DataError
from cladapt.model.adapter import adapted_lm, adapter_parameters, adapter_tensors, create_adapter, set_adapter_tensors
from cladapt.model.history import unload
from cladapt.model.load import Base, load_base, new_model, save_base, weights_hash
from cladapt.model.saved import adapter_provenance, load_adapter, read_adapter, save_adapter
from cladapt.tokens.sids import SidTable

SIDS = SidTable(tuple(f"i{k}" for k in range(6)), np.array([[k // 2, k % 2] for k in range(6)]), (3, 2))
PROBE = torch.tensor([[1, 4, 7, 5, 8, 6, 7]])
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    save_base(path, *new_model("tiny", SIDS, seed=0), SIDS, {"fitted_block": 1})
    return path


@pytest.fixture
def base(folder: Path) -> Base:
    return load_base(folder)


def trained(base: Base, config: AdapterConfig | None = None) -> PeftModel:
    """An adapter with values that no initialisation gives."""
    model = create_adapter(base, config or AdapterConfig(rank=3), seed=0).eval()
    generator = torch.Generator().manual_seed(9)
    values = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in adapter_tensors(model).items()}
    set_adapter_tensors(model, values)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(PROBE).logits


def test_only_lora_factors_of_the_linear_layers_train(base: Base) -> None:
    model = create_adapter(base, AdapterConfig(rank=3), seed=0)
    parameters = adapter_parameters(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parameters)
    assert len(parameters) == 2 * 2 * len(LINEAR) + 2  # A and B, two layers and the head
    assert modules(parameters) == {*LINEAR, "lm_head"}
    assert all(min(p.shape) == 3 and p.dtype == torch.float32 for p in parameters.values())


def modules(parameters: Mapping[str, object]) -> set[str]:
    return {n.split(".lora_")[0].rpartition(".")[2] for n in parameters}


def test_a_head_that_shares_its_weights_is_left_out_and_refused_when_named() -> None:
    model, tokenizer = new_model("tiny", SIDS, seed=0, tie_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    base = Base(model, tokenizer, SIDS, {})
    for targets in (("q_proj", "lm_head"), r".*(q_proj|lm_head)"):
        with pytest.raises(ConfigError, match="names the head 'lm_head', which shares its weights with the embedding"):
            create_adapter(base, AdapterConfig(targets=targets), seed=0)
    assert modules(adapter_parameters(create_adapter(base, AdapterConfig(), seed=0))) == LINEAR


def test_all_linear_leaves_the_head_out(base: Base) -> None:
    assert modules(adapter_parameters(create_adapter(base, AdapterConfig(targets="all-linear"), seed=0))) == LINEAR


def test_a_fresh_adapter_changes_nothing_and_follows_its_seed(base: Base, folder: Path) -> None:
    plain = logits(base.model)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = create_adapter(base, AdapterConfig(), seed=1)
    assert torch.equal(torch.rand(2), expected)  # the caller's generator is left alone
    assert torch.equal(logits(first.eval()), plain)
    again, other = (adapter_tensors(create_adapter(load_base(folder), AdapterConfig(), seed=s)) for s in (1, 2))
    assert all(torch.equal(t, again[n]) for n, t in adapter_tensors(first).items())
    assert any(not torch.equal(t, other[n]) for n, t in adapter_tensors(first).items())


def test_adapters_of_a_bfloat16_base_stay_in_float32(folder: Path) -> None:
    model = create_adapter(load_base(folder, torch.bfloat16), AdapterConfig(), seed=0)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(("q_proj", "v_proj"), {"q_proj", "v_proj"}), (r".*layers\.1\.mlp\.(up|down)_proj", {"up_proj", "down_proj"})],
)
def test_targets_choose_the_modules(base: Base, targets: str | tuple[str, ...], expected: set[str]) -> None:
    parameters = adapter_parameters(create_adapter(base, AdapterConfig(targets=targets), seed=0))
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in parameters} == expected


@pytest.mark.parametrize("targets", [("query",), "nothing_like_it", "(unclosed"])
def test_unknown_targets_list_the_linear_names_and_leave_the_base_usable(
    base: Base, targets: str | tuple[str, ...]
) -> None:
    plain = logits(base.model)
    with pytest.raises(ConfigError, match=r"^adapter\.targets=") as caught:
        create_adapter(base, AdapterConfig(targets=targets), seed=0)
    assert caught.value.hint == f"linear modules of this model end in: {', '.join(sorted({*LINEAR, 'lm_head'}))}"
    assert torch.equal(logits(create_adapter(base, AdapterConfig(), seed=0).eval()), plain)


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (("embed_tokens", "lm_head"), r"names what is no linear layer: model\.embed_tokens \(Embedding\)"),
        (("self_attn",), r"layers\.0\.self_attn \(LlamaAttention\), model\.layers\.1\.self_attn \(LlamaAttention\)"),
        (r".*norm", r"\(LlamaRMSNorm\), .* and 2 more"),
        (("q_proj", "qq_proj", "wv"), "no module is named by 'qq_proj', 'wv'"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(base: Base, targets: str | tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        create_adapter(base, AdapterConfig(targets=targets), seed=0)
    assert caught.value.message.startswith(f"adapter.targets={targets!r}")
    assert caught.value.hint == f"linear modules of this model end in: {', '.join(sorted({*LINEAR, 'lm_head'}))}"


def test_the_scale_is_alpha_over_rank_or_its_root(base: Base, folder: Path) -> None:
    for rslora, expected in ((False, 16 / 4), (True, 16 / 2)):
        config = AdapterConfig(rank=4, alpha=16, rslora=rslora)
        model = create_adapter(load_base(folder), config, seed=0)
        module = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert module.scaling == {"default": expected}


def test_anything_but_lora_that_would_train_is_refused(base: Base) -> None:
    model = create_adapter(base, AdapterConfig(), seed=0)
    base.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight would train beside the adapter"):
        adapter_parameters(model)


def test_a_directory_brings_the_adapter_back_bit_for_bit(base: Base, folder: Path, tmp_path: Path) -> None:
    config = AdapterConfig(rank=3, alpha=5, dropout=0.3, targets=("q_proj", "down_proj"), rslora=True)
    model = trained(base, config)
    save_adapter(tmp_path / "adapter", model, base, {"block": 2})
    loaded = load_adapter(load_base(folder), tmp_path / "adapter")
    assert not loaded.training
    expected, found = adapter_tensors(model), adapter_tensors(loaded)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    assert torch.equal(logits(loaded), logits(model))
    settings = loaded.peft_config["default"]
    assert isinstance(settings, LoraConfig)
    assert (settings.r, settings.lora_alpha, settings.lora_dropout, settings.use_rslora) == (3, 5, 0.3, True)
    assert read_adapter(tmp_path / "adapter", base).keys() == expected.keys()


def test_the_files_are_pefts_own_beside_the_provenance(base: Base, tmp_path: Path) -> None:
    model = trained(base)
    save_adapter(tmp_path / "adapter", model, base, {"block": 2, "parent": "block_001"})
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "cladapt.json",
    }
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    module = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    assert set(tensors) == {
        f"base_model.model.model.layers.{layer}.{part}.{name}.lora_{factor}.weight"
        for layer in range(2)
        for part, names in module.items()
        for name in names
        for factor in "AB"
    } | {f"base_model.model.lm_head.lora_{factor}.weight" for factor in "AB"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    LoraConfig(task_type="CAUSAL_LM").save_pretrained(str(tmp_path / "plain"))
    assert config.keys() == json.loads((tmp_path / "plain" / "adapter_config.json").read_text()).keys()
    record = adapter_provenance(tmp_path / "adapter")
    assert (record["block"], record["parent"]) == (2, "block_001")
    assert (record["base"], record["sids"]) == (base.fingerprint, SIDS.fingerprint)


def test_an_adapter_of_another_base_is_refused(base: Base, tmp_path: Path) -> None:
    save_base(tmp_path / "other", *new_model("tiny", SIDS, seed=1), SIDS, {"fitted_block": 1})
    other = load_base(tmp_path / "other")
    save_adapter(tmp_path / "adapter", trained(base), base, {})
    expected = f"was trained on the base {base.fingerprint}, this base is {other.fingerprint}"
    for use in (read_adapter, lambda folder, b: load_adapter(b, folder)):
        with pytest.raises(DataError, match=expected) as caught:
            use(tmp_path / "adapter", other)
        assert caught.value.hint == "give the base directory that the adapter was trained on"


def test_a_folder_that_is_no_adapter_is_told(base: Base, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not an adapter directory: it has no adapter_config\.json"):
        read_adapter(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"has no cladapt\.json") as caught:
        read_adapter(tmp_path, base)
    assert caught.value.hint == "give an adapter directory that cladapt wrote"


def test_tensors_that_do_not_fit_are_counted(base: Base) -> None:
    model = create_adapter(base, AdapterConfig(rank=3, targets=("q_proj", "v_proj")), seed=0)
    tensors = adapter_tensors(model)
    first = next(iter(tensors))
    with pytest.raises(DataError, match=f"does not fit this model: 1 tensors differ, the first {first}"):
        set_adapter_tensors(model, {n: t for n, t in tensors.items() if n != first})
    with pytest.raises(DataError, match="does not fit this model: 8 tensors differ"):
        set_adapter_tensors(model, {n: torch.zeros(7, 7) for n in tensors})
    assert all(torch.equal(t, tensors[n]) for n, t in adapter_tensors(model).items())


def test_adapter_tensors_are_a_copy(base: Base) -> None:
    model = create_adapter(base, AdapterConfig(), seed=0)
    before = adapter_tensors(model)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.add_(1)
    assert not any(torch.equal(t, before[n]) for n, t in adapter_tensors(model).items())


def test_unloading_gives_the_base_back_bit_for_bit(base: Base) -> None:
    before, plain = weights_hash(base.model), logits(base.model)
    model = trained(base)
    assert adapted_lm(model) is base.model
    assert not torch.equal(logits(base.model), plain)
    unload(model)
    assert weights_hash(base.model) == before
    assert torch.equal(logits(base.model), plain)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert torch.equal(logits(create_adapter(base, AdapterConfig(), seed=0).eval()), plain)  # and it can be lent again


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"r": "x"}, r"adapter_config\.json has r='x': Input should be a valid integer"),
        ({"r": 10**9}, "states rank 1000000000, the factors have at most 3"),
        ({"lora_alpha": None}, "has lora_alpha=None: Input should be a valid number"),
        ({"lora_alpha": float("inf")}, "has lora_alpha=inf: Input should be a finite number"),
        ({"peft_type": "LOHA"}, "has peft_type='LOHA': Input should be 'LORA'"),
        ({"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\] does not name lm_head, which has factors"),
        ({"target_modules": "("}, r"target_modules='\(' is no regular expression"),
    ],
)
def test_a_configuration_that_is_not_of_its_factors_is_refused(
    change: dict[str, object], text: str, base: Base, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", trained(base), base, {})
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    for use in (read_adapter, lambda folder, b: load_adapter(b, folder)):
        with pytest.raises(DataError, match=text) as caught:
            use(tmp_path / "adapter", base)
        assert caught.value.hint == "restore the adapter directory, or export it again"


def test_what_peft_cannot_apply_is_a_data_error(base: Base, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", trained(base), base, {})
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "nope"}))
    with pytest.raises(DataError, match=r"adapter_config\.json: PEFT cannot apply it to this base: "):
        load_adapter(base, tmp_path / "adapter")
