"""Outputs of an image classifier batch by batch, and means of classes against a loop."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cladapt.errors import DataError
from cladapt.model.features import class_means, outputs_on


class Linear(nn.Module):
    """Features are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.dropout = nn.Linear(4, 3), nn.Dropout(0.5)

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(logits=self.classifier(self.dropout(pixel_values.flatten(1))))


def test_outputs_are_of_every_image_without_dropout_and_features_have_length_one() -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(7, 2, 2, 1)).astype(np.uint8)
    model: Any = Linear().train()
    logits, features = outputs_on(model, images, 3)
    pixels = torch.from_numpy(images).flatten(1).double() / 127.5 - 1
    weight, bias = (p.detach().double() for p in model.classifier.parameters())
    torch.testing.assert_close(logits.double(), pixels @ weight.mT + bias, rtol=1e-5, atol=1e-6)
    expected = pixels / pixels.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_class_mean_has_length_one_and_the_direction_of_the_mean() -> None:
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([5, 2, 5, 2, 2, 5, 7, 7, 5])
    found = class_means(features, label, torch.tensor([2, 5]))
    for row, c in zip(found, (2, 5), strict=True):
        mean = torch.stack([f for f, own in zip(features, label, strict=True) if own == c]).double().mean(0)
        torch.testing.assert_close(row.double(), mean / mean.norm(), rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"class 3 has no training image: it has no mean \(import the images anew"):
        class_means(features, label, torch.tensor([2, 3]))
