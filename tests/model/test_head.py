"""Rows of the head against the head itself: equal logits, the same gradients in the same parameters, in float64."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from cladapt.config import AdapterConfig
from cladapt.model import head as module
from cladapt.model.adapter import NAME, Parameters, create_adapter, lora_layers
from cladapt.model.head import all_logits, cross_entropy, embedded, head_logits, vocabulary_log_prob
from cladapt.model.history import history_of, set_history
from cladapt.model.load import Base
from cladapt.model.lora_layer import LoraLinear, register

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning", "ignore::UserWarning:peft")

VOCABULARY, WIDTH = 40, 12
ROWS = torch.tensor([31, 5, 6, 7, 39, 20])
LEARNED = [5, 7, 31, 33]
Model = Callable[[], tuple[nn.Module, nn.Module]]


def lm(tied: bool = False, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, tie_word_embeddings=tied, pad_token_id=0, **sizes)
    model = LlamaForCausalLM(config)
    if bias:
        model.lm_head = nn.Linear(WIDTH, VOCABULARY)
    return model.double().requires_grad_(False)


def random_(model: nn.Module) -> None:
    """Learned tensors away from where they start, B = 0 above all."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).double())


def plain(bias: bool = False, learns: bool = False) -> tuple[nn.Module, nn.Module]:
    model = lm(bias=bias)
    model.lm_head.requires_grad_(learns)
    return model, model.lm_head


def with_lora(fused: bool = False, bias: bool = False, **changes: Any) -> tuple[nn.Module, nn.Module]:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"], "lora_dropout": 0.3, **changes}
    config = LoraConfig(**settings)
    if fused:
        register(config)
    model = get_peft_model(lm(bias=bias), config)
    model.double()
    random_(model)
    return model, model.get_base_model().get_output_embeddings()


def two_adapters(fused: bool) -> tuple[nn.Module, nn.Module]:
    model, head = with_lora(fused)
    cast(Any, model).add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    cast(Any, model).base_model.set_adapter(["default", "other"])
    return model.double(), head


def changed(name: str, fused: bool = False) -> tuple[nn.Module, nn.Module]:
    model, head = with_lora(fused, bias=True)
    getattr(cast(Any, model).base_model, name)()
    return model, head


def ours(learns: Parameters) -> tuple[nn.Module, nn.Module]:
    base = Base(lm(), cast(Any, None), cast(Any, None), {})
    model = create_adapter(base, AdapterConfig(rank=2, targets=("lm_head",)), 0, learns)
    model.double()
    random_(model)
    return model, cast(Any, model).get_base_model().get_output_embeddings()


def with_history(folded: bool, fused: bool = False) -> tuple[nn.Module, nn.Module]:
    model = lm()
    base = Base(model if folded else model.double(), cast(Any, None), cast(Any, None), {})
    if folded:
        model.float()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cladapt.ops.uses_kernel", lambda *_: fused)
        adapted = create_adapter(base, AdapterConfig(rank=2, targets=("lm_head",)), 0)
    (name,) = lora_layers(adapted)
    generator = torch.Generator().manual_seed(3)
    shapes = {"lora_A": (4, WIDTH), "lora_B": (VOCABULARY, 4)}
    tensors = {f"{name}.{f}.{NAME}.weight": torch.randn(s, generator=generator) for f, s in shapes.items()}
    set_history(adapted, tensors)
    assert history_of(adapted).keys() == tensors.keys()
    return adapted.double(), cast(Any, adapted).get_base_model().get_output_embeddings()


def with_tokens(tied: bool = False, bias: bool = False, disabled: bool = False) -> tuple[nn.Module, nn.Module]:
    model = lm(tied, bias)
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    wrapped = get_peft_model(model, TrainableTokensConfig(token_indices=LEARNED, target_modules=names))
    random_(wrapped)
    if disabled:
        cast(Any, wrapped).base_model.disable_adapter_layers()
    return wrapped, model.get_output_embeddings()


def with_hook() -> tuple[nn.Module, nn.Module]:
    model, head = plain(learns=True)
    head.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return model, head


class Scaled(nn.Linear):
    """A head that nothing here knows."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 3 * super().forward(hidden)


def unknown() -> tuple[nn.Module, nn.Module]:
    model = lm()
    model.lm_head = Scaled(WIDTH, VOCABULARY).double()
    return model, model.lm_head


HEADS: dict[str, Model] = {
    "frozen": plain,
    "learned, with bias": lambda: plain(bias=True, learns=True),
    "LoRA": with_lora,
    "LoRA with bias": lambda: with_lora(bias=True),
    "fused LoRA": lambda: with_lora(fused=True),
    "fused LoRA with bias": lambda: with_lora(fused=True, bias=True),
    "LoRA bias": lambda: with_lora(lora_bias=True, bias=True),
    "DoRA": lambda: with_lora(use_dora=True, lora_dropout=0.0),
    "two adapters": lambda: two_adapters(False),
    "two adapters, fused": lambda: two_adapters(True),
    "disabled": lambda: changed("disable_adapter_layers"),
    "disabled, fused": lambda: changed("disable_adapter_layers", True),
    "merged": lambda: changed("merge_adapter"),
    "factors": lambda: ours("factors"),
    "directions": lambda: ours("directions"),
    "weights": lambda: ours("weights"),
    "folded history": lambda: with_history(True),
    "history beside": lambda: with_history(False),
    "history beside, fused": lambda: with_history(False, fused=True),
    "tokens": with_tokens,
    "tokens, tied": lambda: with_tokens(tied=True),
    "tokens on a head with bias": lambda: with_tokens(bias=True),
    "tokens, disabled": lambda: with_tokens(disabled=True),
    "hook": with_hook,
    "unknown": unknown,
}
PICKED = {name for name in HEADS if name not in ("DoRA", "hook", "unknown")}


def results(model: nn.Module, logits: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of everything that has one, of a loss that no column leaves alone."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (weights * logits.square()).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "hidden": cast(Tensor, hidden.grad), **found}


def both(
    make: Model,
    function: Callable[[nn.Module, Tensor], Tensor],
    expected: Callable[[nn.Module, Tensor], Tensor],
    training: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found = []
    for call in (function, expected):
        model, head = make()
        model.train(training)
        hidden = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
        torch.manual_seed(4)
        found.append(results(model, call(head, hidden), hidden))
    return found[0], found[1]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_rows_are_those_of_the_whole_head_and_learn_the_same(name: str, training: bool) -> None:
    found, expected = both(
        HEADS[name], lambda head, x: head_logits(head, x, ROWS), lambda h, x: h(x)[..., ROWS], training
    )
    assert expected["logits"].abs().max() > 0.1
    assert_same(found, expected)


@pytest.mark.parametrize("name", HEADS)
def test_all_rows_are_the_head(name: str) -> None:
    assert_same(*both(HEADS[name], all_logits, lambda head, x: head(x), training=True))


@pytest.mark.parametrize("name", HEADS)
def test_no_other_row_is_multiplied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    widest = 0
    multiply = F.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal widest
        widest = max(widest, len(weight))
        return multiply(x, weight, bias)

    model, head = HEADS[name]()
    model.eval()
    monkeypatch.setattr(F, "linear", watched)
    with torch.no_grad():
        head_logits(head, torch.randn(9, WIDTH).double(), ROWS)
    if "fused" not in name:  # the op is one product of the picked rows
        assert (widest < VOCABULARY) == (name in PICKED)


def test_the_fused_head_is_one_op_over_the_picked_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from cladapt import ops

    shapes = []
    real = ops.lora_linear

    def watched(x: Tensor, weight: Tensor, *factors: Any) -> Tensor:
        shapes.append(tuple(weight.shape))
        return real(x, weight, *factors)

    monkeypatch.setattr(ops, "lora_linear", watched)
    _, head = with_lora(fused=True, bias=True)
    assert type(head) is LoraLinear
    head_logits(head, torch.randn(9, WIDTH).double(), ROWS)
    assert shapes == [(len(ROWS), WIDTH)]


@pytest.mark.parametrize("name", ["frozen", "LoRA", "fused LoRA", "weights", "tokens"])
def test_the_gradient_of_a_frozen_head_is_still_to_be_had(name: str) -> None:
    gradients = []
    for call in (lambda h, x: head_logits(h, x, ROWS), lambda h, x: h(x)[..., ROWS]):
        model, head = HEADS[name]()
        model.eval()
        weight = cast(Any, head.get_base_layer() if hasattr(head, "get_base_layer") else head).weight
        weight.requires_grad_(True)
        hidden = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2)).double()
        gradients += torch.autograd.grad(call(head, hidden).square().sum(), [weight])
    assert gradients[1].shape == (VOCABULARY, WIDTH)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["frozen", "learned, with bias", "LoRA", "fused LoRA", "directions", "tokens, tied"])
def test_cross_entropy_in_chunks_is_that_of_all_logits_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4 * VOCABULARY)  # nine tokens in three chunks
    target = torch.arange(9) * 4

    def whole(head: nn.Module, hidden: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), target, reduction="none")

    found, expected = both(HEADS[name], lambda head, x: cross_entropy(head, x, target), whole)
    assert found["logits"].dtype == torch.float32
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


def test_chunks_drop_the_same_when_they_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # the value of the loss and its gradient belong to one draw: a finite difference under the same seed shows it
    monkeypatch.setattr(module, "CHUNK", 4 * VOCABULARY)
    model, head = with_lora()
    model.train()
    hidden = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    factor = cast(Any, head).lora_B["default"].weight

    def loss() -> Tensor:
        torch.manual_seed(5)
        return cross_entropy(head, hidden, torch.arange(9)).double().sum()

    loss().backward()
    direction = torch.randn(factor.shape, generator=torch.Generator().manual_seed(6)).double()
    slope = (factor.grad * direction).sum().item()
    with torch.no_grad():
        factor.add_(1e-3 * direction)
        above = loss().item()
        factor.sub_(2e-3 * direction)
        below = loss().item()
    assert (above - below) / 2e-3 == pytest.approx(slope, rel=5e-3)


def test_no_more_logits_than_a_chunk_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2 * VOCABULARY)
    _, head = plain(learns=True)
    most = 0

    def counted(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal most
        most = max(most, output.numel())

    head.register_forward_hook(counted)
    hidden = torch.randn(9, WIDTH).double().requires_grad_()
    cross_entropy(head, hidden, torch.arange(9)).sum().backward()
    vocabulary_log_prob(head, hidden.detach(), ROWS)
    assert most == 2 * VOCABULARY
    monkeypatch.setattr(module, "CHUNK", 1)  # a chunk is a token at least
    assert cross_entropy(head, hidden, torch.arange(9)).shape == (9,)


@pytest.mark.parametrize("name", ["frozen", "LoRA", "tokens", "unknown"])
@pytest.mark.parametrize("chunk", [VOCABULARY, 100 * VOCABULARY])
def test_log_probabilities_over_the_vocabulary(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    model, head = HEADS[name]()
    model.eval()
    hidden = torch.randn(9, WIDTH).double()
    with torch.no_grad():
        expected = head(hidden).float().log_softmax(-1)[:, ROWS]
        torch.testing.assert_close(vocabulary_log_prob(head, hidden, ROWS), expected, rtol=1e-5, atol=1e-5)


TOKENS = torch.tensor([[31, 4, 5, 5], [0, 7, 33, 39]])


def embedding_results(make: Model, function: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Tensor]:
    model, _ = make()
    embedding = cast(Any, model).get_base_model().get_input_embeddings()
    vectors = function(embedding, TOKENS)
    (torch.linspace(-1, 1, vectors.numel()).double().view_as(vectors) * vectors.square()).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"vectors": vectors.detach(), **cast(dict[str, Tensor], found)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_learned_tokens_are_embedded_as_by_the_table_that_holds_them(tied: bool, scale: float | None) -> None:
    def make() -> tuple[nn.Module, nn.Module]:
        model, head = with_tokens(tied)
        if scale is not None:
            table = cast(Any, model).get_base_model().get_input_embeddings().base_layer
            table.embed_scale = torch.tensor(scale)
        return model, head

    expected = embedding_results(make, lambda table, tokens: table(tokens))
    assert len(expected) == 2
    assert_same(embedding_results(make, lambda table, tokens: cast(Tensor, embedded(table, tokens))), expected)


def test_tables_that_nothing_copies_are_left_to_themselves() -> None:
    model, _ = plain()
    assert embedded(cast(Any, model).get_input_embeddings(), TOKENS) is None
    for change in ("disabled", "padding", "norm", "hook"):
        model, _ = with_tokens(disabled=change == "disabled")
        table = cast(Any, model).get_base_model().get_input_embeddings()
        if change == "padding":
            table.base_layer.padding_idx = 5
        elif change == "norm":
            table.base_layer.max_norm = 1.0
        elif change == "hook":
            table.register_forward_hook(lambda _module, _inputs, output: output)
        assert embedded(table, TOKENS) is None, change
