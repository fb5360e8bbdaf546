"""Vision bases: heads with a row per class, the loss of one block's classes, and what a directory must hold."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cladapt.config import AdapterConfig, VitConfig
from cladapt.errors import ConfigError, DataError
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter
from cladapt.model.anchors import module_of
from cladapt.model.saved import load_adapter, save_adapter
from cladapt.model.vit import (
    ClassLoss,
    load_vision_base,
    new_vit,
    pixels_of,
    pretrained_vit,
    save_vision_base,
    with_classes,
)

SMALL = VitConfig(hidden=32, layers=1, patch=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_vision_base(tmp_path / "base", new_vit(SMALL, 8, 1, 6), "six", {"fitted_block": 0, "stream": "s"})
    return tmp_path / "base"


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_seed_alone_decides_the_weights_and_the_head_starts_at_zero() -> None:
    one, same, other = (new_vit(SMALL.model_copy(update={"seed": s}), 8, 1, 6) for s in (0, 0, 1))
    states = [m.state_dict() for m in (one, same, other)]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert any(not torch.equal(t, states[2][n]) for n, t in states[0].items())
    assert not one.classifier.weight.any()
    assert one.config.num_labels == one.classifier.out_features == 6


def test_the_loss_is_the_softmax_over_the_blocks_classes_alone() -> None:
    model = new_vit(SMALL, 8, 1, 6)
    torch.nn.init.normal_(model.classifier.weight)
    label, counted = torch.tensor([1, 4, 1, 4, 5]), torch.tensor([True, True, False, True, True])
    losses = ClassLoss(model.eval(), np.array([1, 4, 5]))(images(), label, counted)
    logits = model(pixel_values=images()).logits.double()
    expected = torch.logsumexp(logits[:, [1, 4, 5]], 1) - logits[torch.arange(5), label]
    torch.testing.assert_close(losses.double(), expected[counted], rtol=1e-5, atol=1e-6)
    losses.sum().backward()
    gradient = model.classifier.weight.grad
    assert gradient is not None
    assert not gradient[[0, 2, 3]].any()
    assert gradient[[1, 4, 5]].abs().sum(1).min() > 0


def test_pixels_run_from_minus_one_to_one() -> None:
    pixels = pixels_of(np.array([[[[0], [255]], [[51], [204]]]], dtype=np.uint8))
    assert pixels.shape == (1, 1, 2, 2)
    torch.testing.assert_close(pixels[0, 0], torch.tensor([[-1.0, 1.0], [-0.6, 0.6]]))


def test_a_base_goes_through_its_directory(folder: Path) -> None:
    base = load_vision_base(folder)
    assert (base.fitted_block, base.identity, base.task_type) == (0, {"classes": "six"}, None)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert list(base.extra_parameters) == ["base_model.model.classifier.weight", "base_model.model.classifier.bias"]
    expected = new_vit(SMALL, 8, 1, 6).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in base.model.state_dict().items())


def test_an_adapter_brings_its_classifier(folder: Path, tmp_path: Path) -> None:
    base = load_vision_base(folder)
    model = create_adapter(base, AdapterConfig(rank=2), 0)
    torch.nn.init.normal_(base.classifier.weight)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1)
    save_adapter(tmp_path / "a", model, base, {"block": 1})
    again = load_adapter(load_vision_base(folder), tmp_path / "a")
    with torch.no_grad():
        expected = model.eval()(pixel_values=images()).logits
        torch.testing.assert_close(again(pixel_values=images()).logits, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(adapted_lm(again)(pixel_values=images()).logits, expected, rtol=0, atol=1e-6)


def test_adapters_take_every_linear_but_the_classifier(folder: Path) -> None:
    base = load_vision_base(folder)
    parameters = adapter_parameters(create_adapter(base, AdapterConfig(), 0))
    names = {module_of(name).rpartition(".")[2] for name in parameters}
    assert "classifier" not in names
    assert {"fc1", "fc2", "q_proj"} <= names
    with pytest.raises(ConfigError, match="names the classifier, which learns as a whole"):
        create_adapter(load_vision_base(folder), AdapterConfig(targets=("q_proj", "classifier")), 0)


def test_a_patch_that_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError, match="patch=4 does not divide the side of 9 pixels"):
        new_vit(SMALL, 9, 1, 3)
    with pytest.raises(ValueError, match="hidden=20 is not a multiple of 16"):
        VitConfig(hidden=20)


def test_a_given_classifier_gets_a_head_of_the_streams_classes(folder: Path) -> None:
    model = with_classes(pretrained_vit(str(folder)), 9)
    assert model(pixel_values=images()).logits.shape == (5, 9)
    assert not model.classifier.weight.any()


def test_what_is_no_base_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a vision base: it has no cladapt\.json"):
        load_vision_base(tmp_path)
    with pytest.raises(DataError, match="cannot load an image classifier from"):
        pretrained_vit(str(tmp_path))
    record = json.loads((folder / "cladapt.json").read_text())
    del record["classes"]
    (folder / "cladapt.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="classes"):
        load_vision_base(folder)
