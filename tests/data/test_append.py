"""Appending: a stream that grows log by log is the one imported whole; nothing late, known or waiting is lost."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.config import BlocksConfig, SimulateConfig
from cladapt.data.append import NO_ROWS, Growth, append, waiting_rows
from cladapt.data.blocks import build_stream, check_stream
from cladapt.data.readers import REJECTS, RawLog
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError, DataError

DAY = 86_400
START = 1_704_067_200  # 2024-01-01
MONTHS = ("2024-02-01", "2024-03-01", "2024-04-01")
STARTS = (0, 31, 60, 91, 121)  # first day of each month, counted from START
EVENTS = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64, "order": pl.Int64, "block": pl.Int32}
PLAIN = BlocksConfig(dates=MONTHS[:1], min_events=1)
Row = tuple[str, str, int]


def log_of(
    rows: Sequence[tuple[Any, ...]],
    texts: Sequence[str | None] | None = None,
    weights: Sequence[float] | None = None,
    items: dict[str, str] | None = None,
    blocks: Sequence[int] | None = None,
) -> RawLog:
    """A log of (user, item, day) rows, with lines from 2 as a csv file has them; a day None is no time."""
    frame = pl.DataFrame(
        {
            "user": [row[0] for row in rows],
            "item": [row[1] for row in rows],
            "timestamp": [None if row[2] is None else START + row[2] * DAY for row in rows],
            "order": range(len(rows)),
            "block": blocks or [None] * len(rows),
        },
        schema=EVENTS,
    )
    if weights is not None:
        frame = frame.with_columns(weight=pl.Series(weights, dtype=pl.Float64))
    if texts is not None:
        frame = frame.with_columns(text=pl.Series(texts, dtype=pl.String))
    table = items or {}
    described = pl.DataFrame(
        {"item": list(table), "text": list(table.values())}, schema={"item": pl.String, "text": pl.String}
    )
    lines = pl.DataFrame({"file": ["log.txt"] * len(rows), "line": range(2, len(rows) + 2)}, schema_overrides=PLACES)
    return RawLog(frame, described, None, pl.DataFrame(schema=REJECTS), {"log.txt": "0"}, "csv", places=lines)


PLACES = {"file": pl.String, "line": pl.Int64}


def content(stream: Stream) -> list[tuple[Any, ...]]:
    return stream.interactions.select("user", "item", "timestamp", "block").rows()


def events(stream: Stream) -> list[tuple[str, str, int, int]]:
    """(user, item, day, block) of every event, in the stream's order."""
    return [(u, i, (t - START) // DAY, b) for u, i, t, b in content(stream)]


def files(stream: Stream) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        stream.save(Path(folder))
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*.parquet"))}


row = st.tuples(
    st.sampled_from("abcdef"),
    st.sampled_from("uvwxyz"),
    st.integers(0, 120),
    st.sampled_from([None, "A", "B"]),
    st.sampled_from([0.5, 1.0, 2.0]),
)
ALWAYS = [("k", "w", start + n, "W", 1.0) for start in STARTS[:-1] for n in (0, 5, 20)]


@settings(max_examples=40, deadline=None)
@given(
    drawn=st.lists(row, max_size=60, unique_by=lambda r: r[:3]),
    k_core=st.sampled_from([0, 3]),
    cumulative=st.booleans(),
    described=st.sampled_from(["by rows", "by a table", "not"]),
    weighted=st.booleans(),
    first=st.integers(1, 3),
)
def test_a_stream_that_grows_is_the_one_imported_whole(
    drawn: list[Any], k_core: int, cumulative: bool, described: str, weighted: bool, first: int
) -> None:
    rows = [*drawn, *ALWAYS]

    def part(start: int, end: int) -> RawLog:
        own = [r for r in rows if start <= r[2] < end]
        return log_of(
            [r[:3] for r in own],
            [r[3] for r in own] if described == "by rows" else None,
            [r[4] for r in own] if weighted else None,
            {"u": "you", "x": "ex", "q": "never"} if described == "by a table" else None,
        )

    def config(dates: Sequence[str]) -> BlocksConfig:
        cut = {"dates": tuple(dates)} if dates else {"fractions": (1.0,)}
        return BlocksConfig(**cut, min_events=3, k_core=k_core)  # type: ignore[arg-type]

    whole = build_stream(part(0, 121), config(MONTHS))
    stream = build_stream(part(0, STARTS[first]), config(MONTHS[: first - 1]))
    for month in range(first, 4):
        found = append(stream, part(0 if cumulative else STARTS[month], STARTS[month + 1]))
        stream = found.stream
        assert stream.n_blocks == month + 1
        assert (found.counts["late"], found.pending.height) == (0, 0)
        again = append(stream, part(0, STARTS[month + 1]))
        assert again.stream is stream
        assert (again.counts["new_rows"], again.counts["late"]) == (0, 0)
        assert again.counts["known_rows"] == sum(r[2] < STARTS[month + 1] for r in rows) - again.counts[
            "left_out_by_k_core"
        ]  # fmt: skip
    assert stream.interactions.equals(whole.interactions)
    assert stream.items.equals(whole.items)
    assert files(stream) == files(whole)
    assert check_stream(stream) == check_stream(whole)
    assert stream.manifest["cuts"] == whole.manifest["cuts"]
    assert stream.manifest["blocks"] == whole.manifest["blocks"]
    left_out = sum(entry["dropped"]["k_core"] for entry in stream.manifest.get("appended", []))
    assert stream.manifest["dropped"]["k_core"] + left_out == whole.manifest["dropped"]["k_core"]
    for note in ("items_never_used", "items_without_text"):
        assert stream.manifest["notes"][note] == whole.manifest["notes"][note]
    # several blocks at once
    start = build_stream(part(0, STARTS[first]), config(MONTHS[: first - 1]))
    if first < 3:
        at_once = append(start, part(0, 121), dates=MONTHS[first:])
        assert files(at_once.stream) == files(whole)
        dates = append(start, part(0, 121), dates=MONTHS)  # those before the new rows open no block
        assert files(dates.stream) == files(whole)


JANUARY: list[Row] = [("a", "x", 0), ("b", "y", 1), ("a", "y", 10), ("b", "x", 30)]
FEBRUARY: list[Row] = [("a", "z", 31), ("b", "z", 33)]


def january(**options: Any) -> Stream:
    return build_stream(log_of(JANUARY), BlocksConfig(fractions=(1.0,), min_events=1, **options))


def test_rows_of_the_past_that_are_new_are_late_and_named_by_their_line() -> None:
    rows = [*JANUARY, ("c", "x", 5), *FEBRUARY, ("a", "x", 30)]
    found = append(january(), log_of(rows))
    assert found.late.rows() == [
        ("log.txt", 6, "late", f"c x {START + 5 * DAY}"),
        ("log.txt", 9, "late", f"a x {START + 30 * DAY}"),
    ]
    assert {name: found.counts[name] for name in ("new_rows", "known_rows", "late", "new_items")} == {
        "new_rows": 2, "known_rows": 4, "late": 2, "new_items": 1
    }  # fmt: skip
    assert [e for e in events(found.stream) if e[3] == 2] == [("a", "z", 31, 2), ("b", "z", 33, 2)]
    assert found.stream.manifest["appended"][0]["dropped"] == {"late": 2, "k_core": 0}


def test_late_rows_are_kept_in_order_in_the_new_block_where_that_is_asked_for() -> None:
    rows = [*JANUARY, ("a", "v", 20), ("a", "w", 5), *FEBRUARY, ("c", "x", 7)]
    found = append(january(), log_of(rows), late="keep")
    assert found.late.is_empty()
    assert (found.counts["new_rows"], found.counts["late"], found.counts["known_rows"]) == (5, 3, 4)
    # within a user the late ones follow what was there, then come the new ones
    assert events(found.stream) == [
        ("a", "x", 0, 1), ("a", "y", 10, 1), ("a", "w", 5, 2), ("a", "v", 20, 2), ("a", "z", 31, 2),
        ("b", "y", 1, 1), ("b", "x", 30, 1), ("b", "z", 33, 2), ("c", "x", 7, 2),
    ]  # fmt: skip
    assert found.stream.interactions["position"].to_list() == [0, 1, 2, 3, 4, 0, 1, 2, 0]
    assert found.stream.items["item"].to_list() == ["x", "y", "w", "v", "z"]
    assert [cut["late"] for cut in found.stream.manifest["cuts"]] == [0, 3]
    report = check_stream(found.stream)
    assert [(b["first"], b["last"]) for b in report["blocks"]] == [
        (START, START + 30 * DAY), (START + 5 * DAY, START + 33 * DAY)
    ]  # fmt: skip
    assert append(found.stream, log_of(rows), late="keep").stream is found.stream
    later = append(found.stream, log_of([("a", "x", 40), ("c", "x", 32)]))
    assert later.counts["late"] == 1  # after its own last event, but not after the end of the stream
    assert check_stream(later.stream)["blocks"][:2] == report["blocks"]


def test_a_stream_of_late_rows_with_another_count_than_recorded_is_broken() -> None:
    found = append(january(), log_of([*FEBRUARY, ("c", "x", 7)]), late="keep").stream
    cuts = found.manifest["cuts"]
    for count, said in ((0, "block 1 leaks"), (2, "block 2 has 1 events that came late, the manifest says 2")):
        wrong = replace(found, manifest={**found.manifest, "cuts": [cuts[0], {**cuts[1], "late": count}]})
        with pytest.raises(DataError, match=said):
            check_stream(wrong)
    times = dict(zip(["y", "x"], [START + 30 * DAY, START + DAY], strict=True))
    swapped = found.interactions.with_columns(
        timestamp=pl.when(pl.col("user") == "b", pl.col("block") == 1)
        .then(pl.col("item").replace_strict(times, default=0, return_dtype=pl.Int64))
        .otherwise("timestamp")
    )
    with pytest.raises(DataError, match="is out of time"):
        check_stream(replace(found, interactions=swapped))


def test_late_rows_alone_are_a_block_and_its_end_is_that_of_the_stream() -> None:
    found = append(january(), log_of([("c", "x", 7)]), late="keep").stream
    assert [e for e in events(found) if e[3] == 2] == [("c", "x", 7, 2)]
    assert found.manifest["cuts"][1] == {"until": START + 30 * DAY, "number": None, "late": 1}
    later = append(found, log_of([("c", "y", 8), ("c", "y", 31)]))
    assert later.counts["late"] == 1
    assert [b["interactions"] for b in check_stream(later.stream)["blocks"]] == [4, 1, 1]


def test_what_k_core_left_out_of_earlier_blocks_is_not_late_and_never_taken_up() -> None:
    once = [("c", "x", 30), ("c", "x", 29)]  # c has two events, the last of them after all that is kept
    rows = [("a", "x", 0), ("b", "x", 1), ("a", "x", 2), ("a", "x", 3), ("b", "x", 4), ("b", "x", 5), *once]
    config = BlocksConfig(fractions=(1.0,), min_events=1, k_core=3)
    stream = build_stream(log_of(rows), config)
    assert stream.interactions.height == 6
    assert stream.manifest["cuts"][0]["until"] == START + 30 * DAY
    new: list[Row] = [("c", "x", 31), ("c", "x", 32), ("c", "x", 33), ("a", "x", 34)]
    found = append(stream, log_of([*rows, ("b", "x", 6), *new]))
    assert found.counts["left_out_by_k_core"] == 2
    assert found.counts["late"] == 1  # b has three events by then, so it came late
    assert found.late["line"].to_list() == [10]
    kept = append(stream, log_of([*rows, ("b", "x", 6), *new]), late="keep")
    for grown, expected in ((found, 4), (kept, 5)):
        assert [e for e in events(grown.stream) if e[3] == 2 and e[0] == "c"] == [(*r, 2) for r in new[:3]]
        assert grown.stream.manifest["blocks"][1]["interactions"] == expected


def counted(found: Growth) -> tuple[int, int, int, int]:
    """Blocks, new rows, known rows and rows that wait."""
    return found.stream.n_blocks, found.counts["new_rows"], found.counts["known_rows"], found.pending.height


def test_rows_that_test_too_few_users_wait_and_are_taken_up_once() -> None:
    stream, nights = january(), [[("a", i, 31 + n) for i in "xy"] + [("c", "v", 31 + n)] for n in range(4)]
    found = append(stream, log_of(nights[0]), least=2)
    assert found.stream is stream
    assert counted(found) == (1, 3, 0, 3)
    again = append(stream, log_of(nights[0]), found.pending, least=2)  # the same night twice
    assert counted(again) == (1, 0, 3, 3)
    assert again.pending.equals(found.pending)
    second = append(stream, log_of([*JANUARY, *nights[0], *nights[1]]), found.pending, least=2)  # the whole log
    assert counted(second) == (1, 3, 7, 6)  # c has two events: a alone would be tested
    third = append(stream, log_of(nights[2]), second.pending, least=2)
    assert counted(third) == (2, 3, 0, 0)
    at_once = append(stream, log_of([*nights[0], *nights[1], *nights[2]]))
    assert files(third.stream) == files(at_once.stream)
    assert third.stream.manifest["blocks"][1]["tested"] == 2
    # what has waited is known
    assert counted(append(third.stream, log_of([*nights[0], *nights[2]]), least=2)) == (2, 0, 6, 0)
    # nothing new, but it need not wait any more
    assert counted(append(stream, log_of(nights[0]), second.pending, least=1)) == (2, 0, 3, 0)


def test_late_rows_wait_too() -> None:
    stream = january()
    found = append(stream, log_of([("c", "x", 7), *FEBRUARY]), late="keep", least=1)
    assert counted(found) == (1, 3, 0, 3)
    again = append(stream, log_of([("c", "x", 7)]), found.pending, least=1)  # known by now, so it is not rejected
    assert (again.counts["late"], again.counts["known_rows"], again.late.height) == (0, 1, 0)
    grown = append(stream, log_of([("a", "x", 35), ("a", "y", 36)]), again.pending, least=1).stream
    assert grown.manifest["cuts"][1]["late"] == 1
    assert [e[:3] for e in events(grown) if e[0] == "c"] == [("c", "x", 7)]
    check_stream(grown)


def test_of_several_new_blocks_a_small_one_is_joined_with_the_next() -> None:
    short, long = [("a", "x", 40)], [("a", i, 70 + n) for n, i in enumerate("xyz")]
    rest = [("b", "x", 100)]
    found = append(january(), log_of([*short, *long, *rest]), dates=("2024-03-01", "2024-04-01"), least=1)
    assert counted(found) == (2, 5, 0, 1)
    assert [e[:3] for e in events(found.stream) if e[3] == 2] == [*short, *long]
    assert found.pending.select("user", "item").rows() == [("b", "x")]
    follows = append(found.stream, log_of([]), found.pending)
    assert counted(follows) == (3, 0, 0, 0)


def test_a_core_that_leaves_nothing_is_an_error_or_waits() -> None:
    rows = [("a", "x", n) for n in range(3)]
    stream = build_stream(log_of(rows), BlocksConfig(fractions=(1.0,), min_events=1, k_core=3))
    new = log_of([("b", "y", 40)])
    with pytest.raises(DataError, match="k_core=3 leaves none of the 1 new interactions") as error:
        append(stream, new)
    assert error.value.hint.endswith("let them wait for the next one: --min-tested 1")
    assert counted(append(stream, new, least=1)) == (1, 1, 0, 1)


def numbered(rows: Sequence[tuple[Any, ...]], blocks: Sequence[int]) -> RawLog:
    return log_of(rows, blocks=blocks)


def test_ready_made_blocks_go_on_after_the_last_number_of_the_source() -> None:
    rows: list[Any] = [("a", "x", None), ("b", "x", None), ("a", "x", None), ("b", "y", None), ("a", "z", None)]
    rows += [("c", "z", None), ("a", "z", None), ("c", "x", None)]
    blocks = [3, 3, 3, 7, 7, 9, 9, 12]
    config = BlocksConfig(min_events=1)
    whole = build_stream(numbered(rows, blocks), config)
    assert [cut["number"] for cut in whole.manifest["cuts"]] == [3, 7, 9, 12]
    start = build_stream(numbered(rows[:5], blocks[:5]), config)
    for log in (numbered(rows, blocks), numbered(rows[5:], blocks[5:])):
        found = append(start, log)
        assert files(found.stream) == files(whole)
        assert found.stream.manifest["cuts"] == whole.manifest["cuts"]
        assert found.counts["known_rows"] == log.events.height - 3
    # x twice by a in block 3 is known twice, not three times; a new row of block 7 is late
    more = [*rows[:5], ("a", "x", None), ("c", "y", None)]
    late = append(start, numbered(more, [*blocks[:5], 3, 7]))
    assert late.stream is start
    assert [(r[1], r[3]) for r in late.late.rows()] == [(7, "a x"), (8, "c y")]


def test_a_small_ready_made_block_is_joined_with_the_next() -> None:
    config = BlocksConfig(min_events=1)
    start = build_stream(numbered([("a", "x", None)], [1]), config)
    rows = [("a", i, None) for i in "xyz"]
    first = append(start, numbered(rows[:2], [2, 2]), least=1)
    assert counted(first) == (1, 2, 0, 2)
    found = append(start, numbered(rows, [2, 2, 3]), first.pending, least=1)
    assert counted(found) == (2, 1, 2, 0)
    assert found.stream.manifest["cuts"][1]["number"] == 3
    assert append(found.stream, numbered(rows, [2, 2, 3]), least=1).counts["known_rows"] == 3


def test_a_stream_with_neither_times_nor_blocks_cannot_grow() -> None:
    config = BlocksConfig(fractions=(1.0,), min_events=1)
    stream = build_stream(log_of([("a", "x", None)]), config)
    with pytest.raises(DataError, match="the stream has neither times nor ready-made blocks") as error:
        append(stream, log_of([("a", "x", None)]))
    assert error.value.hint == "import the whole log again, with --timestamp COL or --block COL"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"late": "drop"}, ConfigError, r"--late 'drop' is not known \(choose reject or keep\)"),
        ({"dates": ("may",)}, ConfigError, "dates=may: "),
        ({"dates": ("2024-03-01",)}, DataError, "new block 2 of 2 is empty: no interaction falls into it"),
        ({"pending": NO_ROWS.with_columns(weight=1.0)}, None, ""),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception] | None, said: str) -> None:
    log = log_of(FEBRUARY)
    if error is None:
        append(january(), log, **options)  # no row waits, whatever columns it had
        return
    with pytest.raises(error, match=said):
        append(january(), log, **options)


def test_ready_made_blocks_take_no_dates_and_no_late_rows() -> None:
    stream = build_stream(numbered([("a", "x", None)], [1]), BlocksConfig(min_events=1))
    for options, flag in (({"dates": ("2024-03-01",)}, "--dates"), ({"late": "keep"}, "--late keep")):
        with pytest.raises(ConfigError, match=f"the stream has ready-made blocks, so {flag} cannot apply"):
            append(stream, numbered([("a", "x", None)], [2]), **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the stream has a block for every row, the log has none"):
        append(stream, log_of([("a", "x", None)]))
    with pytest.raises(DataError, match="the stream has no block for every row, the log has 2 of 2"):
        append(january(), numbered(FEBRUARY, [1, 2]))


def test_texts_of_new_items_come_along_and_those_of_known_ones_stay() -> None:
    stream = build_stream(log_of(JANUARY, ["ex", "why", "why", None]), BlocksConfig(fractions=(1.0,), min_events=1))
    rows = [*FEBRUARY, ("c", "z", 40), ("c", "x", 41), ("c", "y", 42)]
    found = append(stream, log_of(rows, ["zed", "zet", "zet", "EX", "why"]))
    assert dict(found.stream.items.select("item", "text").rows()) == {"x": "ex", "y": "why", "z": "zet"}
    assert found.counts["changed_texts"] == 1
    table = append(january(), log_of(rows, items={"x": "ex", "z": "zed", "q": "never"}))
    assert dict(table.stream.items.select("item", "text").rows()) == {"x": "", "y": "", "z": "zed"}
    assert table.counts["changed_texts"] == 1
    assert table.stream.manifest["notes"]["items_never_used"] == 1
    assert table.stream.manifest["notes"]["items_without_text"] == 2


def test_events_of_withdrawn_items_stay_and_are_counted() -> None:
    stream = january()
    stream = replace(stream, manifest={**stream.manifest, "withdrawn": [["x", 2, None], ["y", 1, 1]]})
    found = append(stream, log_of([("a", "x", 31), ("a", "y", 32), ("b", "x", 33)]))
    assert found.counts["withdrawn_events"] == 2
    assert found.stream.manifest["blocks"][1]["interactions"] == 3
    assert found.stream.manifest["blocks"][1]["catalogue"] == 1


def test_a_simulated_stream_goes_on_after_its_last_event() -> None:
    stream = simulate(SimulateConfig(users=10, items=20, topics=2, blocks=2)).stream
    last = int(stream.interactions["timestamp"].max())  # type: ignore[arg-type]
    rows = pl.DataFrame({"user": ["u0", "x"], "item": ["i00", "new"], "timestamp": [last, last + 1]})
    log = log_of([("u", "i", 0)] * 2)
    log = replace(log, events=log.events.with_columns(rows))
    found = append(stream, log)
    assert found.stream.n_blocks == 3
    assert found.stream.items.row(-1) == ("new", "", 3)
    assert found.counts["new_rows"] == 1


def test_waiting_rows_with_other_columns_are_refused(tmp_path: Path) -> None:
    assert waiting_rows(tmp_path, 1).equals(NO_ROWS)
    (tmp_path / "pending").mkdir()
    NO_ROWS.with_columns(x=1).write_parquet(tmp_path / "pending" / "block_00002.parquet")
    with pytest.raises(DataError, match=r"block_00002\.parquet has the columns .*'x'"):
        waiting_rows(tmp_path, 1)
    pending = append(january(), log_of(FEBRUARY), least=9).pending
    with pytest.raises(DataError, match="the rows that wait have the columns user, item, timestamp, block, the log gi"):
        append(january(), log_of(FEBRUARY, weights=[1.0, 1.0]), pending)
