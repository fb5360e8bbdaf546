"""Who is tested on what, against plain loops over a small stream."""

from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from cladapt.config import SimulateConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import DataError
from cladapt.eval.cases import Cases, first_event_cases, held_out_cases


@pytest.fixture(scope="module")
def stream() -> Stream:
    return simulate(SimulateConfig(users=60, items=40, topics=4, blocks=4, births=0.3)).stream


def events_of(stream: Stream) -> dict[str, list[tuple[str, int]]]:
    found: dict[str, list[tuple[str, int]]] = {}
    for user, item, block in stream.interactions.select("user", "item", "block").iter_rows():
        found.setdefault(user, []).append((item, block))
    return found


def names(stream: Stream, items: np.ndarray) -> list[str]:
    return stream.items["item"].gather(items).to_list()


def training_steps(stream: Stream, upto: int) -> set[tuple[str, str]]:
    """Successions in the training parts: every event of a block but the last two of users with three there."""
    steps = set()
    for events in events_of(stream).values():
        kept = []
        for block in range(1, upto + 1):
            own = [item for item, b in events if b == block]
            kept += own[:-2] if len(own) >= 3 else own
        steps |= set(pairwise(kept))
    return steps


@pytest.mark.parametrize(("which", "from_end"), [("test", 1), ("valid", 2)])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_held_out_events_by_a_loop(stream: Stream, which: str, from_end: int, exclude_seen: bool) -> None:
    cases = held_out_cases(stream, 3, which, exclude_seen)  # type: ignore[arg-type]
    expected = {}
    for user, events in events_of(stream).items():
        upto = [item for item, block in events if block <= 3]
        if sum(block == 3 for _, block in events) >= 3:
            expected[user] = upto[:-from_end], upto[-from_end]
    assert dict(zip(cases.users, zip_names(stream, cases), strict=True)) == expected
    known = stream.items.filter(pl.col("first_block") <= 3)["item"].to_list()
    assert names(stream, cases.catalogue) == known
    steps = training_steps(stream, 3)
    for user, allowed, one_hop in cases.frame.select("user", "allowed", "one_hop").iter_rows():
        history, target = expected[user]
        assert allowed == (not exclude_seen or target not in history)
        assert one_hop == ((history[-1], target) in steps)


def test_first_events_by_a_loop(stream: Stream) -> None:
    cases = first_event_cases(stream, 3, exclude_seen=True)
    expected = {}
    for user, events in events_of(stream).items():
        own = [item for item, block in events if block == 3]
        if own:
            expected[user] = [item for item, block in events if block < 3], own[0]
    assert dict(zip(cases.users, zip_names(stream, cases), strict=True)) == expected
    known = set(stream.items.filter(pl.col("first_block") <= 2)["item"])
    assert set(names(stream, cases.catalogue)) == known
    steps = training_steps(stream, 2)
    lines = cases.frame.select("user", "allowed", "one_hop", "new_item", "user_kind").iter_rows()
    for user, allowed, one_hop, new, kind in lines:
        history, target = expected[user]
        assert allowed == (target in known and target not in history)
        assert new == (target not in known)
        assert one_hop == (bool(history) and (history[-1], target) in steps)
        assert (kind == "new") == (not history)
    assert cases.frame["allowed"].n_unique() == cases.frame["new_item"].n_unique() == 2


def zip_names(stream: Stream, cases: Cases) -> list[tuple[list[str], str]]:
    targets = names(stream, cases.target)
    return [(names(stream, history), target) for history, target in zip(cases.histories, targets, strict=True)]


def test_a_sample_is_part_of_the_whole_and_depends_on_the_seed_alone(stream: Stream) -> None:
    for make in (
        lambda *a: held_out_cases(stream, 2, "test", True, *a),
        lambda *a: first_event_cases(stream, 2, True, *a),
    ):
        whole, some = make(), make(5, 1)
        assert some.frame.equals(make(5, 1).frame)
        assert some.frame.height == 5
        assert whole.frame.join(some.frame, on=some.frame.columns, how="semi", nulls_equal=True).equals(some.frame)
        assert len({tuple(make(5, seed).users) for seed in range(4)}) > 1
        assert make(10_000).frame.equals(whole.frame)


def test_a_block_that_tests_nobody_is_refused(stream: Stream) -> None:
    short = Stream(
        stream.interactions.filter(pl.len().over("user", "block") < 6), stream.items, {"config": {"min_events": 6}}
    )
    with pytest.raises(DataError, match=r"block 2 has no test user \(lower blocks.min_events"):
        held_out_cases(short, 2, "test", True)
    assert first_event_cases(short, 2, True).users  # they are there, and meet the next block's model
