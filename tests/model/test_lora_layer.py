"""The fused layer inside PEFT: the same logits and gradients as PEFT's own, and PEFT's way where it steps aside."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cladapt.model.head import head_logits
from cladapt.model.lora_layer import LoraLinear, register
from cladapt_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning", "ignore::UserWarning:peft")

TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, attention_bias=True, **sizes))


def adapted(base: nn.Module, fused: bool, **changes: Any) -> Any:
    """A copy of the base with a LoRA of random factors."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
    if fused:
        register(config)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def logits_and_gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(input_ids=TOKENS).logits
    logits.square().mean().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def test_logits_and_gradients_are_those_of_peft(base: nn.Module) -> None:
    stock, fused = adapted(base, False), adapted(base, True)
    assert len(layers(fused)) == 14
    expected, found = logits_and_gradients(stock), logits_and_gradients(fused)
    assert found.keys() == expected.keys()
    assert len(found) == 1 + 28
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_dropout_falls_on_the_low_rank_term_alone_while_training(base: nn.Module) -> None:
    model = adapted(base, True, lora_dropout=0.4)
    layer, x = layers(model)[0], torch.randn(50, 32)
    w, bias = layer.get_base_layer().weight, layer.get_base_layer().bias
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.manual_seed(3)
    found = layer.train()(x)
    torch.manual_seed(3)
    keep = reference.keep_mask(torch.randint(2**62, (1,)), 50, 32, 0.4)
    torch.testing.assert_close(found, reference.lora_linear(x, w, bias, a, b, 1.5 / 0.6, keep))
    torch.testing.assert_close(layer.eval()(x), reference.lora_linear(x, w, bias, a, b, 1.5))


def second_adapter(model: Any) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def with_history(model: Any, dropout: float = 0.0) -> None:
    """A second adapter, frozen and at the scale of the first."""
    generator = torch.Generator().manual_seed(5)
    model.add_adapter("history", LoraConfig(r=6, lora_alpha=9, lora_dropout=dropout, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "history"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".history." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator)).requires_grad_(False)


def test_a_frozen_second_adapter_is_more_ranks_of_the_op(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, fused = adapted(base, False), adapted(base, True)
    for model in (stock, fused):
        with_history(model)
    expected = logits_and_gradients(stock)
    monkeypatch.setattr("peft.tuners.lora.Linear.forward", None)  # no layer takes PEFT's way
    found = logits_and_gradients(fused)
    assert found.keys() == expected.keys()
    assert len(found) == 1 + 28
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_second_adapter_that_learns_is_added_to_the_op(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, fused = adapted(base, False), adapted(base, True)
    for model in (stock, fused):
        with_history(model)
        for name, parameter in model.named_parameters():
            if ".lora_B.history." in name:
                parameter.requires_grad_(True)
    expected = logits_and_gradients(stock)
    layer, hidden = layers(fused)[0], torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    whole = layer(hidden)
    monkeypatch.setattr("peft.tuners.lora.Linear.forward", None)  # no layer takes PEFT's way
    found = logits_and_gradients(fused)
    assert found.keys() == expected.keys()
    assert len(found) == 1 + 42
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    rows = torch.tensor([7, 0, 3])
    torch.testing.assert_close(head_logits(layer, hidden, rows), whole[:, rows])


def a_history_with_dropout(model: Any) -> None:
    with_history(model, dropout=0.1)
    model.eval()  # the new adapter too


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.base_model.disable_adapter_layers(), "adapters are disabled or merged"),
        (lambda model: model.base_model.merge_adapter(), "adapters are disabled or merged"),
        (second_adapter, "2 adapters are active"),
        (a_history_with_dropout, "2 adapters are active"),
        (lambda model: model.base_model.requires_grad_(True), "the weights themselves train"),
    ],
    ids=["disabled", "merged", "two adapters", "two with dropout", "full training"],
)
def test_what_is_not_plain_lora_takes_peft_s_way(change: Callable[[Any], Any], reason: str, base: nn.Module) -> None:
    stock, fused = adapted(base, False).eval(), adapted(base, True).eval()
    for model in (stock, fused):
        torch.manual_seed(4)
        change(model)
    assert {layer.stock_reason(torch.zeros(1, 32)) for layer in layers(fused)} == {reason}
    with torch.no_grad():
        assert torch.equal(fused(input_ids=TOKENS).logits, stock(input_ids=TOKENS).logits)


def test_another_dtype_of_x_takes_peft_s_way_except_under_autocast(base: nn.Module) -> None:
    layer, x = layers(adapted(base, True))[0], torch.zeros(1, 32, dtype=torch.bfloat16)
    assert layer.stock_reason(x) == "x is torch.bfloat16, the weight torch.float32"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.stock_reason(x) == ""
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "bias"])
def test_variants_are_left_to_peft(changes: dict[str, Any], base: nn.Module) -> None:
    assert layers(adapted(base, True, **changes)) == []


def test_a_subclass_of_linear_is_left_to_peft() -> None:
    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(Quantised(4, 4), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["0", "1"])
    register(config)
    assert len(layers(get_peft_model(model, config))) == 1  # type: ignore[arg-type]


def test_what_is_saved_is_peft_s_and_loads_without_the_layer(base: nn.Module, tmp_path: Path) -> None:
    from peft import PeftModel

    fused = adapted(base, True).eval()
    fused.save_pretrained(str(tmp_path))
    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()  # type: ignore[arg-type]
    assert layers(stock) == []
    with torch.no_grad():
        torch.testing.assert_close(fused(input_ids=TOKENS).logits, stock(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_a_4_bit_base_goes_through_its_own_dequantised_weight() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def adapted_4_bit(fused: bool) -> Any:
        quantised = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32, quant_type="nf4")
        values = torch.linspace(-1, 1, 48 * 64).view(48, 64)
        quantised.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
        nn.init.zeros_(quantised.bias)
        model: Any = nn.Sequential(quantised).to("cpu")
        model.is_loaded_in_4bit = True  # as transformers marks it
        config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        if fused:
            register(config)
        torch.manual_seed(1)
        return get_peft_model(model, config)

    stock, fused = adapted_4_bit(False), adapted_4_bit(True)
    assert type(fused.base_model.model[0]).__name__ == "Lora4bit"
    x = torch.randn(5, 64)
    found = {}
    for name, model in (("stock", stock), ("fused", fused)):
        given = x.clone().requires_grad_()
        y = model(given)
        y.square().mean().backward()
        found[name] = [y, given.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(found["fused"]) == 4
    for one, two in zip(found["stock"], found["fused"], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
