"""What a model makes of every image, against a classifier that is right or wrong by construction."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from cladapt.artifacts import read_parquet
from cladapt.data.images import ImageStream
from cladapt.errors import DataError
from cladapt.eval.biases import fit_biases
from cladapt.eval.images import PROTOTYPES, ROWS, Answers, image_rows, prototype_frame, prototypes_of

CLASSES = 6


class Reads(nn.Module):
    """A classifier that reads the class from the first pixel, takes `confused` for others, and prefers some by bias."""

    def __init__(self, confused: Mapping[int, int], preferred: Sequence[float] = (0.0,) * CLASSES) -> None:
        super().__init__()
        self.classifier = nn.Linear(CLASSES, CLASSES)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.eye(CLASSES))
            self.classifier.bias.copy_(torch.tensor(preferred))
            for told, taken in confused.items():
                self.classifier.weight[taken, told] = 2.0

    def forward(self, pixel_values: Tensor) -> Any:
        number = ((pixel_values[:, 0, 0, 0] + 1) * 127.5 / 40).round().long()
        return SimpleNamespace(logits=self.classifier(nn.functional.one_hot(number, CLASSES).float()))


def stream(split: Sequence[int] = (0, 0, 1, 2)) -> ImageStream:
    label = np.repeat(np.arange(CLASSES), 4)
    images = np.zeros((len(label), 2, 2, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = 40 * label
    splits = np.tile(split, CLASSES).astype(np.int8)
    return ImageStream(images, label, splits, tuple("abcdef"), np.repeat([1, 2, 3], 2))


def answers(model: nn.Module, model_block: int, prototypes: Tensor | None = None, split: str = "test") -> Answers:
    given = torch.empty(0) if prototypes is None else prototypes
    return image_rows(model, stream(), model_block, split, 3, given)  # type: ignore[arg-type]


def cells(rows: pl.DataFrame, *names: str) -> dict[int, tuple[float | None, ...]]:
    """Means of columns by block."""
    assert rows.schema == ROWS
    assert rows["image"].to_list() == sorted(rows["image"])
    means = rows.group_by("block").agg(pl.col(name).mean() for name in names).sort("block")
    return {block: tuple(values) for block, *values in means.iter_rows()}


def told(confused: dict[int, int], model_block: int) -> dict[int, tuple[float | None, ...]]:
    return cells(answers(Reads(confused), model_block).rows, "correct", "probe")


def test_a_head_is_judged_among_all_classes_seen_and_not_beyond() -> None:
    assert told({}, 2) == {1: (1.0, 1.0), 2: (1.0, 1.0), 3: (None, 1.0)}
    # class 0 is taken for 3, which is of block 2: no mistake before that block is seen
    assert told({0: 3}, 1)[1] == (1.0, 1.0)
    assert told({0: 3}, 2)[1] == (0.5, 1.0)
    # the probe looks at what goes into the head, so the head's mistakes do not reach it
    assert told({0: 1}, 3)[1] == (0.5, 1.0)


def test_a_bias_for_each_block_mends_what_is_between_blocks_and_nothing_within_one() -> None:
    # every image of block 1 is taken for one of block 2, and of block 1 also class 0 for class 1
    found = answers(Reads({0: 1}, [0.0, 0.0, 3.0, 3.0, 0.0, 0.0]), 2)
    assert cells(found.rows, "correct", "biased") == {1: (0.0, 0.5), 2: (1.0, 1.0), 3: (None, None)}
    assert found.biases.select("model", "block").rows() == [(2, 1), (2, 2)]
    one, two = found.biases["bias"]
    assert one > 0 > two
    assert one + two == pytest.approx(0.0)
    # what the biases of three blocks are: those of the same logits by themselves
    logits = np.eye(CLASSES) + np.array([0.0, 0.0, 3.0, 3.0, 0.0, 0.0])
    expected = fit_biases(logits, np.repeat([1, 2, 3], 2), np.repeat([1, 2, 3], 2))
    model = Reads({}, [0.0, 0.0, 3.0, 3.0, 0.0, 0.0])
    assert answers(model, 3).biases["bias"].to_list() == pytest.approx(expected.tolist())


def test_biases_are_not_judged_on_the_images_that_they_are_fitted_on() -> None:
    found = answers(Reads({}), 2, split="valid")
    assert found.rows["biased"].null_count() == found.rows.height
    assert found.biases.is_empty()
    assert cells(found.rows, "correct", "prototype") == {1: (1.0, 1.0), 2: (1.0, 1.0), 3: (None, None)}
    model: Any = Reads({})
    without = image_rows(model, stream((0, 0, 0, 2)), 2, "test", 3, torch.empty(0))
    assert without.rows["biased"].null_count() == without.rows.height


def test_prototypes_are_what_each_block_left() -> None:
    # the head takes class 0 for 3, its features tell them apart
    found = answers(Reads({0: 3}), 2)
    assert cells(found.rows, "correct", "prototype") == {1: (0.5, 1.0), 2: (1.0, 1.0), 3: (None, None)}
    assert torch.equal(found.prototypes, torch.eye(CLASSES)[:4])
    # an earlier model left the prototypes of classes 0 and 1 the other way round: the head does not mind
    swapped = torch.eye(CLASSES)[[1, 0]]
    found = answers(Reads({}), 2, swapped)
    assert cells(found.rows, "correct", "prototype", "probe")[1] == (1.0, 0.0, 1.0)
    assert cells(found.rows, "correct", "prototype", "probe")[2] == (1.0, 1.0, 1.0)
    assert torch.equal(found.prototypes, torch.cat([swapped, torch.eye(CLASSES)[2:4]]))
    # a prototype of block 1 where block 2 lies takes images of it, once block 1 is left behind
    found = answers(Reads({}), 2, torch.eye(CLASSES)[[2, 1]])
    assert cells(found.rows, "correct", "prototype")[2] == (1.0, 0.5)


def test_a_base_that_knows_no_class_has_no_prototype_and_no_bias() -> None:
    found = answers(Reads({}), 0)
    assert cells(found.rows, "correct", "biased", "prototype") == {block: (None, None, None) for block in (1, 2, 3)}
    assert (len(found.prototypes), found.biases.height) == (0, 0)
    assert prototypes_of(prototype_frame(found.prototypes)).numel() == 0
    again = answers(Reads({}), 1, prototypes_of(prototype_frame(found.prototypes)))
    assert torch.equal(again.prototypes, torch.eye(CLASSES)[:2])


def test_prototypes_go_through_a_frame_bit_for_bit(tmp_path: Path) -> None:
    vectors = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    frame = prototype_frame(vectors)
    frame.write_parquet(tmp_path / "prototypes.parquet")
    assert torch.equal(prototypes_of(read_parquet(tmp_path / "prototypes.parquet", PROTOTYPES)), vectors)
    gap, uneven = frame.filter(pl.col("class") != 2), frame.with_columns(pl.col("vector").list.head(pl.col("class")))
    for wrong in (gap, uneven, frame.with_columns(pl.lit(None, PROTOTYPES["vector"]).alias("vector"))):
        with pytest.raises(DataError, match=r"prototypes of the classes .*expected one of each class from 0 on"):
            prototypes_of(wrong)
