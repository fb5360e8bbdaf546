"""Blocks: the cut in time, the filters and their order, the catalogue, and a check that finds every broken stream."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.config import BlocksConfig
from cladapt.data.blocks import build_stream, check_stream
from cladapt.data.histories import split_block, training_sequences, user_kinds
from cladapt.data.readers import REJECTS, RawLog, read
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import ConfigError, DataError

DAY = 86_400
EVENTS = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64, "order": pl.Int64, "block": pl.Int32}


def make_log(
    rows: Sequence[tuple[str, str, int | None, int | None]],
    items: Mapping[str, str] | None = None,
    dropped: Mapping[str, int] | None = None,
) -> RawLog:
    frame = pl.DataFrame([(u, i, t, k, b) for k, (u, i, t, b) in enumerate(rows)], schema=EVENTS, orient="row")
    texts = items or {}
    table = pl.DataFrame(
        {"item": list(texts), "text": list(texts.values())}, schema={"item": pl.String, "text": pl.String}
    )
    return RawLog(frame, table, None, rejected(dropped or {}), {"log.csv": "0123"}, "csv")


def rejected(counts: Mapping[str, int]) -> pl.DataFrame:
    rows = [("log.csv", k, reason, "") for reason, count in counts.items() for k in range(count)]
    return pl.DataFrame(rows, schema=REJECTS, orient="row")


def timed(rows: Sequence[tuple[str, str, int]]) -> RawLog:
    return make_log([(u, i, t, None) for u, i, t in rows])


def cut(*fractions: float, min_events: int = 1, k_core: int = 0) -> BlocksConfig:
    return BlocksConfig(fractions=fractions, min_events=min_events, k_core=k_core)


def blocks_of(stream: Stream) -> list[tuple[str, str, int]]:
    return list(stream.interactions.select("user", "item", "block").iter_rows())


def test_cuts_by_count_of_interactions_in_time_order_whatever_the_source_order() -> None:
    stream = build_stream(timed([("a", f"i{t}", t) for t in (9, 2, 5, 0, 7, 1, 3, 8, 6, 4)]), cut(0.6, 0.2, 0.2))
    assert blocks_of(stream) == [("a", f"i{t}", 1 if t < 6 else 2 if t < 8 else 3) for t in range(10)]
    assert stream.interactions["position"].to_list() == list(range(10))


def test_a_cut_moves_to_the_end_of_a_tie() -> None:
    times = [0, 1, 2, 3, 5, 5, 5, 5, 8, 9]
    stream = build_stream(timed([("a", f"i{k}", t) for k, t in enumerate(times)]), cut(0.5, 0.5))
    assert stream.block.tolist() == [1] * 8 + [2] * 2


def test_ties_keep_the_source_order() -> None:
    stream = build_stream(timed([("a", "z", 1), ("a", "b", 1), ("a", "y", 0), ("a", "c", 1)]), cut(1.0))
    assert stream.interactions["item"].to_list() == ["y", "z", "b", "c"]


def test_without_times_the_row_order_is_the_time() -> None:
    stream = build_stream(make_log([(u, f"{u}{k}", None, None) for k in range(4) for u in "ab"]), cut(0.5, 0.5))
    assert blocks_of(stream) == [(u, f"{u}{k}", 1 + k // 2) for u in "ab" for k in range(4)]
    assert stream.interactions["timestamp"].null_count() == 8


def test_a_date_opens_its_block_at_midnight_utc() -> None:
    start = 1_704_067_200  # 2024-01-01
    log = timed([("a", "w", start - DAY), ("a", "x", start - 1), ("a", "y", start), ("a", "z", start + 31 * DAY)])
    stream = build_stream(log, BlocksConfig(dates=("2024-01-01", "2024-02-01"), min_events=1))
    assert stream.block.tolist() == [1, 1, 2, 3]


def test_the_least_events_decide_who_is_tested_and_drop_nothing() -> None:
    rows = [("a", i, t) for t, i in enumerate("xyxzyx")] + [("b", "rare", 6), ("b", "y", 7)]
    rows += [("b", i, 8 + t) for t, i in enumerate("xyzx")] + [("a", "x", 12), ("c", "rare", 13), ("c", "y", 14)]
    log = replace(timed(rows), items=pl.DataFrame({"item": ["y", "never", "x"], "text": ["why", "no", None]}))
    log = replace(log, rejects=rejected({"no_time": 3}), notes={"odd": 1})
    stream = build_stream(log, cut(8 / 15, 7 / 15, min_events=4))
    assert stream.interactions.height == len(rows)
    assert [row["tested"] for row in stream.manifest["blocks"]] == [1, 1]
    for block, user in ((1, "a"), (2, "b")):
        split = split_block(stream, block)
        assert [stream.users[u] for u in split.user[split.held_out]] == [user]
    # b was there before block 2, with too few events to be tested then
    kinds = dict(zip([stream.users[u] for u in split_block(stream, 2).user], user_kinds(stream, 2), strict=True))
    assert kinds == {"a": "returning", "b": "returning", "c": "new"}
    untested = split_block(stream, 2)
    short = [stream.users[u] for u in untested.user].index("c")
    assert len(untested.training(short)[0]) == 2  # both are learned
    assert list(stream.items.iter_rows()) == [("x", "", 1), ("y", "why", 1), ("z", "", 1), ("rare", "", 1)]
    assert stream.manifest["dropped"] == {"no_time": 3, "k_core": 0}
    assert stream.manifest["notes"] == {"odd": 1, "items_never_used": 1, "items_without_text": 3}


def test_losses_are_counted_in_events_and_users_and_large_ones_warned_of() -> None:
    rows = [("a", "x", t) for t in range(6)] + [("b", "x", 6), ("c", "once", 7), ("b", "x", 8), ("d", "x", 9)]
    stream = build_stream(timed(rows), cut(0.6, 0.4, min_events=5, k_core=2))
    # block 1: a alone; block 2: c and d have one event, once is one item's only; b has two
    assert stream.interactions["user"].unique().sort().to_list() == ["a", "b"]
    dropped, untested = stream.manifest["losses"]
    assert dropped == {"loss": "dropped by k_core", "events": 2, "events_share": 0.2, "users": 2, "users_share": 0.5}
    assert untested == {
        "loss": "kept, never tested", "events": 2, "events_share": 0.2, "users": 1, "users_share": 0.25
    }  # fmt: skip
    assert stream.manifest["warnings"] == [
        "k_core=2 drops 20% of the events and 50% of the users: lower it to keep them",
        "1 users (25%) have fewer than 5 events in every block: they are learned from and not tested there; lower "
        "min_events to test more of them",
        "block 2 tests nobody: none of its 1 users has 5 events there; lower min_events, or cut larger blocks",
    ]
    assert build_stream(timed(rows[:6]), cut(1.0)).manifest["warnings"] == []


def test_a_user_needs_three_events_to_be_tested_whatever_the_least() -> None:
    rows = [("a", "x", 0), ("a", "y", 1), ("b", "x", 2), ("b", "y", 3), ("b", "z", 4)]
    stream = build_stream(timed(rows), cut(1.0, min_events=1))
    assert stream.min_events == 3
    assert stream.manifest["blocks"][0]["tested"] == 1


def test_the_core_of_a_block_knows_the_blocks_before_it_and_none_after() -> None:
    pairs = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    later = [("lone", "x"), ("a", "x"), ("b", "y"), ("lone", "y"), ("new", "x"), ("a", "fresh")]
    rows = [(u, i, k) for k, (u, i) in enumerate([*pairs, ("lone", "once"), *later])]
    stream = build_stream(timed(rows), cut(5 / 11, 6 / 11, k_core=2))
    # `lone` has two events later, which block 1 cannot know; `new` and `fresh` never have two
    assert blocks_of(stream) == [
        ("a", "x", 1), ("a", "y", 1), ("a", "x", 2), ("b", "x", 1), ("b", "y", 1), ("b", "y", 2), ("lone", "x", 2),
        ("lone", "y", 2),
    ]  # fmt: skip
    assert stream.manifest["dropped"] == {"k_core": 3}
    first = build_stream(timed(rows[:5]), cut(1.0, k_core=2))
    assert blocks_of(first) == [row for row in blocks_of(stream) if row[2] == 1]


def test_fractions_within_a_rounding_of_one_are_scaled() -> None:
    rows = [("a", f"i{t}", t) for t in range(9)]
    stream = build_stream(timed(rows), cut(0.333, 0.333, 0.333))
    assert Counter(stream.block.tolist()) == {1: 3, 2: 3, 3: 3}
    assert sum(cut(0.3334, 0.3334, 0.3333).fractions) == pytest.approx(1.0, abs=1e-12)


Row = tuple[str, str, int]


def brute_core(rows: list[Row], k: int, before: list[Row]) -> list[Row]:
    """The rows whose user and item have k events among them and those before, by a plain loop."""
    while True:
        users, items = (Counter(row[place] for row in [*before, *rows]) for place in (0, 1))
        kept = [r for r in rows if users[r[0]] >= k and items[r[1]] >= k]
        if len(kept) == len(rows):
            return rows
        rows = kept


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("vwxyz"), st.integers(0, 12)), min_size=1),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    min_events=st.integers(1, 3),
    k_core=st.integers(0, 3),
)
def test_agrees_with_a_plain_loop(
    pairs: list[tuple[str, str, int]], sizes: list[int], min_events: int, k_core: int
) -> None:
    rows = sorted(pairs, key=lambda row: row[2])
    total = sum(sizes)
    bounds = [(2 * len(rows) * sum(sizes[: k + 1]) + total) // (2 * total) for k in range(len(sizes) - 1)]
    block = []
    for k, row in enumerate(rows):
        tied = k
        while tied and rows[tied - 1][2] == row[2]:
            tied -= 1
        block.append(1 + sum(tied >= max(bound, 1) for bound in bounds))
    expected: list[tuple[Any, ...]] = []
    for b in range(1, len(sizes) + 1):
        own = [row for row, of in zip(rows, block, strict=True) if of == b]
        expected += [(*row, b) for row in brute_core(own, k_core, [row[:3] for row in expected])]
    config = cut(*(size / sum(sizes) for size in sizes), min_events=min_events, k_core=k_core)
    if {row[3] for row in expected} != set(range(1, len(sizes) + 1)):
        with pytest.raises(DataError, match=r"is empty|leaves none"):
            build_stream(timed(pairs), config)
        return
    stream = build_stream(timed(pairs), config)
    found = list(stream.interactions.select("user", "item", "timestamp", "block").iter_rows())
    assert found == sorted(expected, key=lambda row: row[0])
    first: dict[str, int] = {}
    for row in expected:
        first.setdefault(row[1], row[3])
    assert dict(stream.items.select("item", "first_block").iter_rows()) == first
    counts = Counter((row[0], row[3]) for row in expected)
    for b in range(1, len(sizes) + 1):
        split = split_block(stream, b)
        tested = {stream.users[u] for u in split.user[split.held_out]}
        assert tested == {u for (u, of), n in counts.items() if of == b and n >= max(3, min_events)}
    assert check_stream(stream)["blocks"] == stream.manifest["blocks"]


def test_ready_made_blocks_are_kept_as_they_are() -> None:
    rows = [("b", "x", None, 2), ("a", "x", None, 1), ("b", "z", None, 1), ("a", "y", None, 2)]
    stream = build_stream(make_log(rows), BlocksConfig(min_events=1))
    assert blocks_of(stream) == [("a", "x", 1), ("a", "y", 2), ("b", "z", 1), ("b", "x", 2)]
    assert "blocks_renumbered_from_1" not in stream.manifest["notes"]


@pytest.mark.parametrize("numbers", [(0, 1), (1, 3), (2013, 2020), (-1, 0)])
def test_ready_made_blocks_are_numbered_anew_in_their_order(numbers: tuple[int, int]) -> None:
    first, second = numbers
    stream = build_stream(make_log([("a", "y", None, second), ("a", "x", None, first)]), BlocksConfig(min_events=1))
    assert blocks_of(stream) == [("a", "x", 1), ("a", "y", 2)]
    assert stream.manifest["notes"]["blocks_renumbered_from_1"] == 2


@pytest.mark.parametrize("config", [BlocksConfig(dates=("2024-01-01",)), cut(0.5, 0.5)], ids=["dates", "fractions"])
def test_a_cut_asked_for_beside_ready_made_blocks_is_refused(config: BlocksConfig) -> None:
    with pytest.raises(ConfigError, match=r"the log has ready-made blocks, so (dates|fractions) cannot apply"):
        build_stream(make_log([("a", "x", None, 1)]), config)


def test_ready_made_blocks_that_overlap_in_time_leak() -> None:
    with pytest.raises(
        DataError, match=r"block 1 leaks: its last event \(1970-01-01 00:00:09\) is after the first of b"
    ):
        build_stream(make_log([("a", "x", 9, 1), ("b", "y", 8, 2)]), BlocksConfig(min_events=1))


def test_a_block_that_equal_times_leave_empty_says_so() -> None:
    rows = [("a", f"i{k}", 7 if k else 0) for k in range(6)]
    with pytest.raises(DataError, match="block 2 of 2 is empty: no interaction falls into it") as error:
        build_stream(timed(rows), cut(0.5, 0.5))
    assert error.value.hint == (
        'the log has 2 distinct times, and equal times are never parted: use other fractions, or --timestamp "" to go '
        "by the order of the rows"
    )


def test_a_date_after_the_log_leaves_an_empty_block_and_the_hint_says_its_span() -> None:
    with pytest.raises(DataError, match="block 2 of 2 is empty") as error:
        build_stream(timed([("a", "x", 0), ("a", "x", DAY)]), BlocksConfig(dates=("2024-01-01",), min_events=1))
    assert error.value.hint == (
        "the log is from 1970-01-01 00:00:00 to 1970-01-02 00:00:00 UTC: choose dates inside it"
    )


def test_too_few_events_for_the_fractions_say_so() -> None:
    with pytest.raises(DataError, match="block 2 of 3 is empty") as error:
        build_stream(timed([("a", "x", 0), ("a", "y", 1)]), cut(0.5, 0.1, 0.4))
    assert error.value.hint == "2 interactions are too few for these fractions: cut fewer or larger blocks"


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (("2024-02-01", "2024-01-01"), "not in ascending order"),
        (("2024-01-01", "2024-01-01"), "not in ascending order"),
        (("01.02.2024",), "dates=01.02.2024: time data '01.02.2024' does not match"),
    ],
)
def test_bad_dates_are_refused(dates: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_stream(timed([("a", "x", 0)]), BlocksConfig(dates=dates, min_events=1))


def test_dates_need_times() -> None:
    with pytest.raises(DataError, match="blocks by date need timestamps"):
        build_stream(make_log([("a", "x", None, None)]), BlocksConfig(dates=("2024-01-01",), min_events=1))


def test_a_core_that_leaves_nothing_is_named() -> None:
    with pytest.raises(DataError, match="k_core=5 leaves none of the 2 interactions of block 1 of 1"):
        build_stream(timed([("a", "x", 0), ("a", "y", 1)]), cut(1.0, k_core=5))


@pytest.mark.parametrize("name", ["timestamp", "block"])
def test_a_partly_filled_column_is_refused(name: str) -> None:
    log = make_log([("a", "x", 1, 1), ("a", "y", 2, 1)])
    gap = pl.when(pl.col("order") == 0).then(pl.col(name)).alias(name)
    with pytest.raises(DataError, match=f"1 of 2 interactions have no {name}"):
        build_stream(replace(log, events=log.events.with_columns(gap)), BlocksConfig(min_events=1))


def test_the_manifest_survives_a_round_trip_and_says_where_the_data_is_from(tmp_path: Path) -> None:
    stream = build_stream(timed([("a", "x", 0), ("a", "y", 1)]), cut(0.5, 0.5))
    stream.save(tmp_path / "s")
    manifest = dict(Stream.load(tmp_path / "s").manifest)
    assert manifest["source"] == "csv"
    assert manifest["files"] == {"log.csv": "0123"}
    assert manifest["license"] == "see the source; this directory is derived from it"
    assert manifest["config"]["fractions"] == [0.5, 0.5]
    assert manifest["blocks"] == check_stream(stream)["blocks"]
    assert json.loads(json.dumps(stream.manifest)) == {k: manifest[k] for k in stream.manifest}


def stream_of(rows: Sequence[tuple[Any, ...]], first_block: Mapping[str, int]) -> Stream:
    items = [(item, "", block) for item, block in first_block.items()]
    return Stream(pl.DataFrame(rows, INTERACTIONS, orient="row"), pl.DataFrame(items, ITEMS, orient="row"))


GOOD = [("a", "x", 1, 0, 1), ("a", "y", 5, 1, 2), ("b", "x", 2, 0, 1), ("c", "y", 6, 0, 2), ("c", "z", 7, 1, 2)]


def test_counts_of_a_block() -> None:
    report = check_stream(stream_of(GOOD, {"x": 1, "y": 1, "z": 2, "unused": 2}))
    assert list(report["blocks"][0]) == [
        *(
            "block",
            "users",
            "tested",
            "new_users",
            "returning_users",
            "items",
            "new_items",
            "catalogue",
            "interactions",
        ),
        *("first", "last"),
    ]
    assert [list(row.values()) for row in report.pop("blocks")] == [
        [1, 2, 0, 2, 0, 1, 1, 2, 2, 1, 2],
        [2, 2, 0, 1, 1, 2, 1, 4, 3, 5, 7],
    ]
    assert report == {"users": 3, "items": 4, "interactions": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {1: ("a", "y", 5, 2, 2)},
            r"\(user 'a', position 2, item 'y', block 2\) is out of place: rows must be sorted by user, then by",
        ),
        ({1: ("d", "x", 2, 0, 1), 2: GOOD[1]}, r"\(user 'a', position 1, .* is out of place"),
        ({1: ("a", "y", 0, 1, 2)}, r"is out of time: its timestamp is before that of the previous position"),
        (
            {0: ("a", "x", 1, 0, 2), 1: ("a", "y", 5, 1, 1)},
            r"is out of time: its block is before that of the previous position",
        ),
        (
            {2: ("b", "x", 6, 0, 1)},
            r"block 1 leaks: its last event \(1970-01-01 00:00:06\) is after the first of block 2",
        ),
        (
            {0: ("a", "z", 1, 0, 1)},
            r"\(user 'a', position 0, item 'z', block 1\) leaks: its item's first_block is later",
        ),
        ({4: ("c", "z", 7, 1, 4)}, r"the blocks are 1, 2, 4, expected 1, 2, … without a gap"),
        ({4: ("c", "z", None, 1, 2)}, r"interactions have gaps in timestamp"),
        ({4: ("c", "z", 7, 1, None)}, r"interactions have gaps in block"),
    ],
)
def test_a_broken_stream_is_found(changes: dict[int, tuple[Any, ...]], message: str) -> None:
    rows = [changes.get(k, row) for k, row in enumerate(GOOD)]
    with pytest.raises(DataError, match=message):
        check_stream(stream_of(rows, {"x": 1, "y": 1, "z": 2}))


def test_an_error_shows_few_of_many_blocks() -> None:
    rows = [("a", "x", k, k, 2 * k + 1) for k in range(500)]
    with pytest.raises(DataError) as error:
        check_stream(stream_of(rows, {"x": 1}))
    assert error.value.message == "the blocks are 1, 3, 5, … (500 of them), expected 1, 2, … without a gap"


def weigh(events: pl.DataFrame) -> pl.DataFrame:
    return events.with_columns(weight=1.0 + pl.col("order") / 8)


def test_weights_stay_with_their_events_and_change_nothing_else() -> None:
    rows = [("b", "x", 5), ("a", "x", 0), ("a", "y", 9), ("lone", "z", 1), ("b", "y", 2), ("a", "y", 4), ("b", "x", 8)]
    log, config = timed(rows), cut(0.85, 0.15, min_events=1, k_core=2)
    plain, stream = build_stream(log, config), build_stream(replace(log, events=weigh(log.events)), config)
    weight_of = {row: 1 + k / 8 for k, row in enumerate(rows)}
    kept = stream.interactions.select("user", "item", "timestamp").rows()
    assert stream.interactions["weight"].to_list() == [weight_of[row] for row in kept]
    assert stream.interactions.drop("weight").equals(plain.interactions)
    assert stream.items.equals(plain.items)
    notes = dict(stream.manifest["notes"])
    assert notes.pop("weights_kept_but_unused_in_training") == len(kept) == 6
    assert {**stream.manifest, "notes": notes} == plain.manifest
    for block in (1, 2):
        for split in (split_block, user_kinds):
            assert_same(split(stream, block), split(plain, block))
        assert_same(training_sequences(stream, block), training_sequences(plain, block))


def assert_same(found: Any, expected: Any) -> None:
    if is_dataclass(expected):
        for each in fields(expected):
            assert np.array_equal(getattr(found, each.name), getattr(expected, each.name))
    else:
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), None])
def test_a_weight_that_is_no_weight_is_found(weight: float | None) -> None:
    good = stream_of(GOOD, {"x": 1, "y": 1, "z": 2})
    weights = pl.Series("weight", [1.0, 2.0, weight, 1.0, 1.0], dtype=pl.Float64)
    with pytest.raises(DataError, match=r"\(user 'b', position 0, .*\) has a weight that is not finite and above 0"):
        check_stream(replace(good, interactions=good.interactions.with_columns(weights)))


def test_rows_that_had_to_be_sorted_are_noted() -> None:
    rows = [("a", "x", 3), ("b", "x", 0), ("a", "y", 1), ("a", "z", 2), ("b", "y", 4)]
    assert build_stream(timed(rows), cut(1.0)).manifest["notes"]["rows_sorted_by_time"] == 1
    assert (
        "rows_sorted_by_time"
        not in build_stream(timed(sorted(rows, key=lambda row: row[2])), cut(1.0)).manifest["notes"]
    )


def test_peso_blocks_are_those_of_the_authors(real_data: Callable[[str], Path]) -> None:
    source = real_data("peso-cds")
    blocks = build_stream(read(source), BlocksConfig()).manifest["blocks"]
    assert [row["interactions"] for row in blocks] == [81_355, 8_686, 7_488, 9_468, 9_421]
    assert [row["users"] for row in blocks] == [8_494, 1_013, 866, 1_078, 1_074]
    assert blocks[-1]["catalogue"] == 39_191


def test_movietweetings_fits_the_protocol(real_data: Callable[[str], Path]) -> None:
    source = real_data("movietweetings-2013")
    stream = build_stream(read(source), BlocksConfig())
    blocks = stream.manifest["blocks"]
    assert [row["tested"] for row in blocks[1:]] == [723, 717, 732, 817]
    assert stream.interactions.height == 141_695
    assert blocks[-1]["catalogue"] == 12_611
    assert all(a["last"] < b["first"] for a, b in pairwise(blocks))
