"""What a model makes of every image, against a classifier that is right or wrong by construction."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from cladapt.data.images import ImageStream
from cladapt.eval.images import ROWS, image_rows

CLASSES = 6


class Reads(nn.Module):
    """A classifier that reads the class from the first pixel, and takes `confused` for others."""

    def __init__(self, confused: dict[int, int]) -> None:
        super().__init__()
        self.classifier = nn.Linear(CLASSES, CLASSES, bias=False)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.eye(CLASSES))
            for told, taken in confused.items():
                self.classifier.weight[taken, told] = 2.0

    def forward(self, pixel_values: Tensor) -> Any:
        number = ((pixel_values[:, 0, 0, 0] + 1) * 127.5 / 40).round().long()
        return SimpleNamespace(logits=self.classifier(nn.functional.one_hot(number, CLASSES).float()))


def stream() -> ImageStream:
    label = np.repeat(np.arange(CLASSES), 4)
    images = np.zeros((len(label), 2, 2, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = 40 * label
    split = np.tile([0, 0, 1, 2], CLASSES).astype(np.int8)
    return ImageStream(images, label, split, tuple("abcdef"), np.repeat([1, 2, 3], 2))


def told(confused: dict[int, int], model_block: int) -> dict[int, tuple[float | None, float]]:
    rows = image_rows(Reads(confused), stream(), model_block, "test", 3)  # type: ignore[arg-type]
    assert rows.schema == ROWS
    assert rows["image"].to_list() == sorted(rows["image"])
    cells = rows.group_by("block").agg(pl.col("correct").mean(), pl.col("probe").mean()).sort("block")
    return {block: (correct, probe) for block, correct, probe in cells.iter_rows()}


def test_a_head_is_judged_among_all_classes_seen_and_not_beyond() -> None:
    assert told({}, 2) == {1: (1.0, 1.0), 2: (1.0, 1.0), 3: (None, 1.0)}
    # class 0 is taken for 3, which is of block 2: no mistake before that block is seen
    assert told({0: 3}, 1)[1] == (1.0, 1.0)
    assert told({0: 3}, 2)[1] == (0.5, 1.0)
    # the probe looks at what goes into the head, so the head's mistakes do not reach it
    assert told({0: 1}, 3)[1] == (0.5, 1.0)
