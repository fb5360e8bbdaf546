"""The cosine head against its formula in float64, and what is saved of it against stock layers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification

from cladapt.config import AdapterConfig, VitConfig
from cladapt.model.adapter import adapted_lm, create_adapter, quiet
from cladapt.model.cosine import CosineHead
from cladapt.model.saved import load_adapter, save_adapter
from cladapt.model.vit import ClassLoss, inputs_of, load_vision_base, new_vit, save_vision_base


def head(scale: float = 8.0) -> CosineHead:
    """Four rows of unequal length, the third not learned."""
    found = CosineHead(6, 4, scale)
    with torch.no_grad():
        found.weight.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
        found.weight.mul_(torch.tensor([[0.1], [1.0], [0.0], [30.0]]))
    return found


def features(count: int = 5) -> torch.Tensor:
    return 3.0 * torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


def test_logits_are_scaled_cosines() -> None:
    x, w = features().double(), head().weight.detach().double()
    found = head()(features())
    for i, row in enumerate(x):
        for c in (0, 1, 3):
            expected = 8.0 * (row @ w[c]) / (row.square().sum() * w[c].square().sum()).sqrt()
            assert found[i, c].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert not found[:, 2].any()
    assert torch.equal(2 * found, head(16.0)(features()))
    np.testing.assert_allclose(head()(7.0 * features()).detach(), found.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_are_across_the_rows_and_those_of_rows_without_one_are_zero() -> None:
    own = head()
    torch.nn.functional.cross_entropy(
        own(features()) + torch.tensor([0.0, 0.0, -torch.inf, 0.0]), torch.tensor([0] * 5)
    ).backward()
    gradient = own.weight.grad
    assert gradient is not None
    assert not gradient[2].any()
    assert gradient[[0, 1, 3]].abs().sum(1).min() > 0
    along = (gradient * own.weight).sum(1) / (gradient.norm(dim=1) * own.weight.norm(dim=1)).clamp_min(1e-9)
    torch.testing.assert_close(along, torch.zeros(4), rtol=0, atol=1e-5)
    double = CosineHead(6, 4, 8.0).double()
    weight = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def logits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(double, {"weight": w}, (x,))

    assert torch.autograd.gradcheck(logits, (features(2).double().requires_grad_(), weight))


def test_settled_rows_have_length_one_and_a_stock_linear_of_them_decides_alike() -> None:
    own, before = head(), head()(features())
    own.settle()
    torch.testing.assert_close(own.weight.norm(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(own(features()), before, rtol=1e-5, atol=1e-6)
    settled = own.weight.detach().clone()
    own.settle()
    assert torch.equal(own.weight, settled)
    stock = torch.nn.Linear(6, 4)
    stock.load_state_dict(own.state_dict())  # weight and bias, as a saved adapter has them
    logits = stock(features())
    torch.testing.assert_close(8.0 * logits / features().norm(dim=1, keepdim=True), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.argmax(1), before.argmax(1))


def test_imprinting_gives_rows_to_some_classes_alone() -> None:
    own, before = head(), head().weight.detach().clone()
    means = torch.nn.functional.normalize(features(2), dim=1)
    own.imprint(torch.tensor([2, 0]), means)
    assert torch.equal(own.weight[[2, 0]], means)
    assert torch.equal(own.weight[[1, 3]], before[[1, 3]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base whose linear head was learned, bias and all."""
    model = new_vit(VitConfig(hidden=32, layers=1, patch=4), 8, 1, 6)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.classifier.bias)
    save_vision_base(tmp_path / "base", model, "six", {"fitted_block": 1, "stream": "s"})
    return tmp_path / "base"


def test_a_base_takes_a_cosine_head_whose_rows_alone_learn(folder: Path) -> None:
    base = load_vision_base(folder)
    own = base.take_cosine_head(8.0)
    assert base.classifier is own
    assert not own.weight.any()
    assert not any(p.requires_grad for p in base.model.parameters())
    assert list(base.extra_parameters) == ["base_model.model.classifier.weight"]
    assert list(base.extra_tensors) == ["base_model.model.classifier.weight", "base_model.model.classifier.bias"]
    begun = []
    loss = ClassLoss(base.model, np.array([1, 4]), start=lambda: begun.append(True))
    loss.begin()
    assert begun == [True]
    own.imprint(torch.tensor([1, 4]), torch.nn.functional.normalize(torch.randn(2, 32), dim=1))
    images, label = torch.randn(3, 1, 8, 8), torch.tensor([1, 4, 4])
    with torch.no_grad():
        found = loss(images, label, torch.ones(3, dtype=torch.bool))
        logits = base.model(pixel_values=images).logits[:, [1, 4]].double()
    expected = torch.logsumexp(logits, 1) - logits[torch.arange(3), torch.tensor([0, 1, 1])]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_stock_peft_takes_the_same_class_of_a_saved_adapter(folder: Path, tmp_path: Path) -> None:
    base = load_vision_base(folder)
    base.take_cosine_head(8.0)
    model = create_adapter(base, AdapterConfig(rank=2), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        base.classifier.weight.copy_(torch.randn(6, 32) * torch.arange(1.0, 7.0)[:, None])
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(p, std=0.1)
    base.settle()
    save_adapter(tmp_path / "a", model, base, {"block": 1})
    images = torch.randn(40, 1, 8, 8)
    with torch.no_grad(), inputs_of(base.classifier) as seen, quiet():
        expected = adapted_lm(model).eval()(pixel_values=images).logits
        stock = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(folder), tmp_path / "a")
        logits = stock.eval()(pixel_values=images).logits
    torch.testing.assert_close(8.0 * logits / seen[0].norm(dim=1, keepdim=True), expected, rtol=1e-4, atol=1e-4)
    assert len(expected.argmax(1).unique()) > 2
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    other = load_vision_base(folder)
    other.take_cosine_head(8.0)
    with torch.no_grad():
        again = load_adapter(other, tmp_path / "a")(pixel_values=images).logits
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-6)
