"""Documents as a feed: packed rows cut into batches, and shares of them."""

import numpy as np
import pytest
import torch

from cladapt.tokens.prompts import Document, pack
from cladapt.train.feeds import PackedFeed, batches_of, shard


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
