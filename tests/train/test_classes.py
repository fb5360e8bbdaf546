"""Images as a feed: every one once an epoch, in an order of the seed; warping as the formula says."""

import numpy as np
import pytest
import torch

from cladapt.data.images import ImageStream
from cladapt.train.classes import ImageFeed, warped
from cladapt.train.feeds import evenly, shard


def stream() -> ImageStream:
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(4), 8)
    images = rng.integers(0, 256, size=(len(label), 6, 6, 1)).astype(np.uint8)
    split = np.tile([0] * 5 + [1, 2, 2], 4).astype(np.int8)
    return ImageStream(images, label, split, tuple("abcd"), np.array([1, 1, 2, 2]))


def feed(warp: float = 0.0) -> ImageFeed:
    return ImageFeed(stream(), stream().rows(2, "train"), stream().rows(2, "valid"), 3, warp)


def test_an_epoch_has_every_image_once_in_an_order_of_its_seed() -> None:
    one, same, other = (feed().epoch([7, e]) for e in (0, 0, 1))
    assert [len(batch[0]) for batch in one] == [3, 3, 3, 1]
    for a, b in zip(one, same, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))
    pixels = torch.cat([batch[0] for batch in one])
    expected = torch.from_numpy(stream().images[stream().rows(2, "train")].transpose(0, 3, 1, 2) / 127.5 - 1)
    found, wanted = (sorted(each.double().sum((1, 2, 3)).tolist()) for each in (pixels, expected))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert sum(map(feed().targets, one)) == sum(map(feed().used, one)) == len(feed()) == 10
    assert torch.cat([batch[1] for batch in one]).bincount().tolist() == [0, 0, 5, 5]


def test_validation_and_samples_are_in_order() -> None:
    assert [batch[1].tolist() for batch in feed().validation()] == [[2, 3]]
    assert feed().validation_targets == 2
    (sample,) = feed().sample(0.2)
    assert sample[1].tolist() == [2, 3]  # the first and the last of ten
    assert evenly(range(7), 0.01) == [0]
    assert evenly(range(7), 1.0) == list(range(7))


def test_single_images_are_rows_in_order() -> None:
    (whole,) = ImageFeed(stream(), stream().rows(2, "train"), stream().rows(2, "valid"), 10).sample(1.0)
    for rows in (1, 4):
        batches = list(feed().singles(1.0, rows))
        assert [len(batch[1]) for batch in batches] == [1] * 10 if rows == 1 else [4, 4, 2]
        assert all(
            torch.equal(torch.cat(parts), all_) for parts, all_ in zip(zip(*batches, strict=True), whole, strict=True)
        )


def test_a_shard_without_a_row_counts_nothing() -> None:
    last = feed().epoch([0, 0])[-1]
    first, second = (shard(last, rank, 2) for rank in range(2))
    assert (feed().targets(first), feed().targets(second)) == (1, 0)
    assert len(second[0]) == 1


def test_warping_moves_each_image_in_its_own_way_and_by_nothing_where_the_amount_is_nothing() -> None:
    pixels = torch.zeros(2, 1, 9, 9)
    pixels[:, :, 4, 4] = 1.0
    still = warped(pixels, 0.0, np.random.default_rng(0))
    torch.testing.assert_close(still, pixels, rtol=0, atol=1e-6)
    moved = warped(pixels, 0.2, np.random.default_rng(0))
    assert not torch.allclose(moved[0], moved[1])
    assert moved.shape == pixels.shape
    torch.testing.assert_close(warped(torch.ones(2, 1, 9, 9), 0.2, np.random.default_rng(0)), torch.ones(2, 1, 9, 9))
    one, same = (feed(0.2).epoch([7, e])[0][0] for e in (0, 0))
    assert torch.equal(one, same)
    assert not torch.equal(one, feed().epoch([7, 0])[0][0])
