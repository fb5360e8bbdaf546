"""Documents as a feed: packed rows cut into batches, and shares of them."""

import numpy as np
import pytest
import torch

from cladapt.tokens.prompts import Document, pack
from cladapt.train.feeds import MixedFeed, PackedFeed, batches_of, draw, shard


def documents(count: int, seed: int = 0, longest: int = 9) -> list[Document]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest + 1, size=count)
    return [Document(rng.integers(1, 12, size=n), np.arange(n) >= rng.integers(1, 3)) for n in lengths]


def test_batches_are_cut_to_their_longest_row() -> None:
    rows = pack(documents(9), 32, None)
    batches = list(batches_of(rows, 2))
    assert sum(len(b[0]) for b in batches) == len(rows.tokens)
    for first, (tokens, numbers, position, loss) in zip(range(0, 99, 2), batches, strict=False):
        assert tokens.shape == numbers.shape == position.shape == loss.shape
        assert (numbers[:, -1] > 0).any()
        full = rows.tokens[first : first + 2]
        np.testing.assert_array_equal(tokens.numpy(), full[:, : tokens.shape[1]])
        assert (rows.document[first : first + 2, tokens.shape[1] :] == 0).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shards_hold_every_target_once(ranks: int) -> None:
    for batch in batches_of(pack(documents(9), 32, None), 3):
        pieces = [shard(batch, rank, ranks) for rank in range(ranks)]
        assert all(len(piece[0]) for piece in pieces)
        targets = torch.cat([piece[0][piece[3]] for piece in pieces])
        assert sorted(targets.tolist()) == sorted(batch[0][batch[3]].tolist())


def test_a_feed_counts_targets_and_tokens_and_samples_whole_documents() -> None:
    train, valid = documents(10), documents(3, seed=1)
    feed = PackedFeed(train, valid, batch_tokens=64, row_tokens=16)
    assert (len(feed), feed.validation_targets) == (10, 3)
    batches = feed.epoch([0, 0])
    assert sum(map(feed.targets, batches)) == sum(int(d.loss.sum()) for d in train)
    assert sum(map(feed.used, batches)) == sum(len(d.tokens) for d in train)
    sampled = feed.sample(0.2)
    assert sum(map(feed.used, sampled)) == len(train[0].tokens) + len(train[9].tokens)
    assert sum(map(feed.used, feed.validation())) == sum(len(d.tokens) for d in valid)


@pytest.mark.parametrize("rows", [1, 3])
def test_single_examples_have_rows_of_their_own(rows: int) -> None:
    feed = PackedFeed(documents(10), documents(3, seed=1), batch_tokens=64, row_tokens=16)
    batches = list(feed.singles(1.0, rows))
    assert [len(batch[0]) for batch in batches] == [rows] * (10 // rows) + [10 % rows] * (10 % rows > 0)
    found = [row for batch in batches for row in zip(*batch, strict=True)]
    for (tokens, number, position, loss), d in zip(found, feed.documents, strict=True):
        n = len(d.tokens)
        assert number.tolist() == [1] * n + [0] * (len(number) - n)
        np.testing.assert_array_equal(tokens[:n], d.tokens)
        np.testing.assert_array_equal(position[:n], np.arange(n))
        np.testing.assert_array_equal(loss, np.r_[d.loss, np.zeros(len(loss) - n, bool)])
    assert [len(batch[0]) for batch in feed.singles(0.2, 1)] == [1, 1]  # the first and the last


def numbered(first: int, count: int) -> list[Document]:
    """Documents that are told apart by their second token."""
    return [Document(np.array([0, k]), np.array([False, True])) for k in range(first, first + count)]


def drawn(feed: MixedFeed, epoch: int) -> list[int]:
    """The second token of every document of an epoch, in ascending order."""
    return sorted(int(t) for tokens, *_, loss in feed.epoch([3, epoch]) for t in tokens[loss])


def test_a_mixed_feed_draws_each_task_by_its_weight_anew_each_epoch() -> None:
    main, half, more = numbered(100, 7), numbered(200, 10), numbered(300, 4)
    feed = MixedFeed([(main, 1.0), (half, 0.5), (more, 2.25)], main[:2], batch_tokens=8, row_tokens=4)
    epochs = [drawn(feed, epoch) for epoch in range(8)]
    for found in epochs:
        assert [t for t in found if t < 200] == list(range(100, 107))
        chosen = [t for t in found if 200 <= t < 300]
        assert len(chosen) == len(set(chosen)) == 5
        counts = np.bincount([t - 300 for t in found if t >= 300], minlength=4)
        assert sorted(counts) == [2, 2, 2, 3]
    assert len({tuple(found) for found in epochs}) > 1
    assert {t for found in epochs for t in found if 200 <= t < 300} == set(range(200, 210))
    assert drawn(feed, 0) == epochs[0]  # a function of seed and epoch alone
    assert (len(feed), feed.validation_targets) == (21, 2)


def test_a_mixed_feed_of_one_whole_task_is_the_packed_feed() -> None:
    documents = numbered(100, 9)
    mixed = MixedFeed([(documents, 1.0)], documents, 8, 4)
    packed = PackedFeed(documents, documents, 8, 4)
    for ours, theirs in zip(mixed.epoch([1, 2]), packed.epoch([1, 2]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_small_weight_draws_at_least_one_document() -> None:
    order = np.random.default_rng(0)
    assert len(draw([1, 2, 3], 0.01, order)) == 1
    assert draw([], 0.5, order) == []
    assert draw([1, 2], 0.0, order) == []
