"""Splits against a brute-force reading of the protocol, on a hand-made stream and on random ones."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.data.histories import split_block, training_sequences, user_kinds
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import DataError

Log = dict[str, list[tuple[str, int]]]  # user -> (item, block) in time order

HAND_MADE: Log = {
    "ann": [(item, 1) for item in "abcde"] + [(item, 2) for item in "fgh"],
    "bob": [("c", 1), ("d", 1), ("e", 3)],
    "cat": [(item, 2) for item in "hgfea"] + [(item, 3) for item in "bcd"],
    "dan": [("a", 1), ("h", 1), ("g", 1)] + [(item, 3) for item in "bdfe"],
}


def make_stream(log: Log) -> Stream:
    events = [(user, item, None, n, block) for user, run in log.items() for n, (item, block) in enumerate(run)]
    interactions = pl.DataFrame(events, schema=INTERACTIONS, orient="row")
    names = sorted(set(interactions["item"]))
    items = pl.DataFrame({"item": names, "text": [""] * len(names), "first_block": [1] * len(names)}, schema=ITEMS)
    return Stream(interactions, items)


def names(stream: Stream, items: np.ndarray) -> str:
    return "".join(stream.items["item"].gather(items))


@st.composite
def logs(draw: st.DrawFn) -> Log:
    runs = draw(st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=1, max_size=6))
    runs[0][-1] = max(runs[0][-1], 1)  # the last block has an event
    log, pool = {}, "abcdefgh"
    for u, counts in enumerate(runs):
        blocks = [b for b, count in enumerate(counts, start=1) for _ in range(count)]
        if blocks:
            log[f"u{u}"] = [(pool[draw(st.integers(0, 7))], b) for b in blocks]
    return log


def test_hand_made_block_has_the_expected_context_targets_and_held_out_users() -> None:
    stream = make_stream(HAND_MADE)
    split = split_block(stream, 3)
    assert [stream.users[u] for u in split.user] == ["bob", "cat", "dan"]
    assert split.held_out.tolist() == [False, True, True]
    assert split.n_test == 2
    assert split.test_users.tolist() == [1, 2]
    assert [(names(stream, items), first) for items, first in map(split.training, range(3))] == [
        ("cde", 2),
        ("hgfeab", 5),
        ("ahgbd", 3),
    ]
    assert names(stream, split.targets("valid")) == "cf"
    assert names(stream, split.targets("test")) == "de"
    assert names(stream, split.history(1, "valid")) == "hgfeab"
    assert names(stream, split.history(1, "test")) == "hgfeabc"


def test_dtypes_and_shapes_are_the_documented_ones() -> None:
    split = split_block(make_stream(HAND_MADE), 2)
    dtypes = {name: getattr(split, name).dtype for name in ("user", "events", "offsets", "start", "train_stop")}
    assert dtypes == dict(zip(dtypes, map(np.dtype, ("int32", "int32", "int64", "int64", "int64")), strict=True))
    assert split.held_out.dtype == bool
    assert split.targets("test").dtype == np.int32
    assert split.offsets.shape == (len(split.user) + 1,)
    log = training_sequences(make_stream(HAND_MADE), 2)
    assert {a.dtype for a in (log.user, log.item, log.block)} == {np.dtype("int32")}


@settings(max_examples=60, deadline=None)
@given(log=logs())
def test_random_streams_split_as_brute_force_says(log: Log) -> None:
    stream = make_stream(log)
    for block in range(1, stream.n_blocks + 1):
        split, kinds = split_block(stream, block), user_kinds(stream, block)
        active = [user for user, run in log.items() if any(b == block for _, b in run)]
        assert [stream.users[u] for u in split.user] == active
        valid, test = iter(split.targets("valid")), iter(split.targets("test"))
        for i, user in enumerate(active):
            seen = "".join(item for item, b in log[user] if b < block)
            here = "".join(item for item, b in log[user] if b == block)
            held_out = len(here) >= 3
            items, first = split.training(i)
            assert (names(stream, items), first) == (seen + (here[:-2] if held_out else here), len(seen))
            assert split.held_out[i] == held_out
            if held_out:
                assert names(stream, np.array([next(valid), next(test)])) == here[-2:]
                assert names(stream, split.history(i, "valid")) == seen + here[:-2]
                assert names(stream, split.history(i, "test")) == seen + here[:-1]
            before = {b for _, b in log[user] if b < block}
            assert kinds[i] == ("new" if not before else "returning" if block - 1 in before else "dormant")
        assert next(valid, None) is None
        assert next(test, None) is None


@settings(max_examples=60, deadline=None)
@given(log=logs())
def test_training_sequences_hold_exactly_the_training_targets_of_every_block(log: Log) -> None:
    stream = make_stream(log)
    for upto in range(1, stream.n_blocks + 1):
        expected = []
        for user, run in log.items():
            for block in range(1, upto + 1):
                here = [(user, item, block) for item, b in run if b == block]
                expected += here[:-2] if len(here) >= 3 else here
        found = training_sequences(stream, upto)
        users = [stream.users[u] for u in found.user]
        assert list(zip(users, names(stream, found.item), found.block.tolist(), strict=True)) == expected


def test_no_held_out_event_leaks_into_training_sequences() -> None:
    runs = {f"u{u}": [(f"i{u}-{n}", 1 + n // 5) for n in range(15)] for u in range(4)}  # every item occurs once
    stream = make_stream(runs)
    trained = set(training_sequences(stream, 3).item.tolist())
    for block in (1, 2, 3):
        split = split_block(stream, block)
        assert trained.isdisjoint(split.targets("valid"))
        assert trained.isdisjoint(split.targets("test"))
    assert len(trained) == 4 * 3 * 3


def test_user_kinds_tell_new_returning_and_dormant_apart() -> None:
    stream = make_stream(HAND_MADE)
    assert user_kinds(stream, 1).tolist() == ["new"] * 3
    assert user_kinds(stream, 2).tolist() == ["returning", "new"]
    assert user_kinds(stream, 3).tolist() == ["dormant", "returning", "dormant"]


@pytest.mark.parametrize("block", [0, 4])
def test_a_block_outside_the_stream_is_named(block: int) -> None:
    stream = make_stream(HAND_MADE)
    for function in (split_block, training_sequences, user_kinds):
        with pytest.raises(DataError, match=rf"the stream has no block {block} \(choose one of 1\.\.3\)"):
            function(stream, block)


def test_a_user_without_held_out_events_has_no_test_history() -> None:
    split = split_block(make_stream(HAND_MADE), 3)
    with pytest.raises(DataError, match=r"user row 0 of block 3 has no test target: its 1 events there are too few"):
        split.history(0, "test")


def test_unsorted_interactions_are_refused() -> None:
    stream = make_stream(HAND_MADE)
    shuffled = Stream(pl.concat([stream.interactions[1:], stream.interactions[:1]]), stream.items)
    with pytest.raises(DataError, match=r"interaction row 25 comes before its predecessor.*sort the interactions"):
        split_block(shuffled, 1)


def test_a_block_without_users_gives_an_empty_split() -> None:
    split = split_block(make_stream({"ann": [("a", 1), ("b", 3)]}), 2)
    assert (len(split.user), len(split.events), split.n_test, split.offsets.tolist()) == (0, 0, 0, [0])
    assert len(split.targets("test")) == 0
