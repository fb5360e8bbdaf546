"""From rows to a raw log: texts of the log itself, ratings, times at zero, and what each reason costs."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.data.readers import NoRows, ReadOptions, read
from cladapt.errors import ConfigError, DataError

TEXTS = ReadOptions(text=("title",))


def write(folder: Path, names: Sequence[str], rows: Sequence[Sequence[Any]], name: str = "log.csv") -> Path:
    lines = [",".join(map(str, row)) for row in (names, *rows)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def test_an_item_has_its_most_frequent_text_of_the_log_and_of_equals_the_earliest(tmp_path: Path) -> None:
    rows = [
        ("a", "x", 1, "Old"),
        ("a", "y", 2, ""),
        ("b", "x", 3, "New"),
        ("b", "x", 4, "New"),
        ("b", "z", 5, "First"),
        ("a", "z", 6, "Second"),
        ("a", "w", 7, ""),
        ("a", "y", 8, "Why"),
    ]
    log = read(write(tmp_path, ("user", "item", "timestamp", "title"), rows), options=TEXTS)
    assert dict(log.items.rows()) == {"x": "New", "y": "Why", "z": "First", "w": ""}
    assert log.notes == {"items_with_several_texts": 2}


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from(["A", "B", "C", ""])), min_size=1, max_size=12))
def test_texts_of_the_log_agree_with_a_plain_count(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("t")
    numbered = [("u", item, time, text) for time, (item, text) in enumerate(rows, start=1)]
    log = read(write(folder, ("user", "item", "timestamp", "title"), numbered), options=TEXTS)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item, text in rows:
        counts[item].update([text] if text else [])
    truth = {item: max(count, key=lambda text: count[text], default="") for item, count in counts.items()}
    assert dict(log.items.rows()) == truth
    assert log.notes.get("items_with_several_texts", 0) == sum(len(count) > 1 for count in counts.values())


def test_a_repeat_of_an_event_may_have_its_text(tmp_path: Path) -> None:
    rows = [("a", "x", 1, ""), ("a", "x", 1, "Ex"), ("b", "x", 2, "Other"), ("b", "x", 2, "Why")]
    log = read(write(tmp_path, ("user", "item", "timestamp", "title"), rows), options=TEXTS)
    assert log.events["text"].to_list() == ["Ex", "Other"]
    assert log.dropped == {"duplicate": 2}


def test_an_item_of_a_table_has_its_first_text_that_is_not_empty(tmp_path: Path) -> None:
    log = write(tmp_path, ("user", "item", "timestamp"), [("a", f"i{k}", k) for k in range(1, 5)])
    table = [("i2", ""), ("i1", "A"), ("i3", " "), ("i2", "C"), ("i1", "B"), ("i2", "D"), ("i3", ""), ("i4", "")]
    items = write(tmp_path, ("item", "title"), table, "items.csv")
    found = read(log, options=ReadOptions(items=items))
    assert dict(found.items.rows()) == {"i1": "A", "i2": "C", "i3": "", "i4": ""}
    assert found.dropped == {"item_row_repeated": 4}
    assert found.rejects["line"].to_list() == [2, 6, 7, 8]


def test_rows_that_are_filtered_or_rejected_give_no_text(tmp_path: Path) -> None:
    rows = [("a", "x", 1, "Good", 5), ("b", "x", 2, "damaged", -1), ("b", "x", 3, "damaged", -2), ("", "x", 4, "?", 1)]
    source = write(tmp_path, ("user", "item", "timestamp", "title", "n"), rows)
    log = read(source, options=ReadOptions(text=("title",), where=("n > 0",)))
    assert dict(log.items.rows()) == {"x": "Good"}
    joined = read(source, options=ReadOptions(text=("title", "n"), where=("n > 0",)))
    assert dict(joined.items.rows()) == {"x": "Good | 5"}


@pytest.mark.parametrize("folder", [False, True])
def test_the_item_table_may_be_the_log_itself(tmp_path: Path, folder: bool) -> None:
    rows = [("a", "x", 1, "Ex"), ("b", "x", 2, "Ex"), ("b", "y", 3, "Why")]
    frame = pl.DataFrame(rows, schema=["user", "item", "timestamp", "title"], orient="row")
    (tmp_path / "log").mkdir()
    frame.write_parquet(tmp_path / "log" / "p.parquet")
    source = tmp_path / "log" if folder else tmp_path / "log" / "p.parquet"
    for options in (ReadOptions(items=source), ReadOptions(items=source, text=("title",)), TEXTS):
        log = read(source, options=options)
        assert log.events.select("user", "item", "timestamp").rows() == [row[:3] for row in rows]
        assert dict(log.items.rows()) == {"x": "Ex", "y": "Why"}
        assert log.dropped == {}
        assert list(log.files) == ["p.parquet"]


RATED = [("a", "x", 1, 5), ("a", "y", 2, 2), ("b", "x", 3, "3.5"), ("b", "y", 4, ""), ("b", "z", 5, "good")]


@pytest.mark.parametrize("name", ["rating", "stars"])
def test_a_threshold_drops_low_ratings_and_rejects_unreadable_ones(tmp_path: Path, name: str) -> None:
    source = write(tmp_path, ("user", "item", "timestamp", name), RATED)
    log = read(source, options=ReadOptions(rating=name, min_rating=3.5))
    assert log.events["timestamp"].to_list() == [1, 3]
    assert log.dropped == {"below_min_rating": 1, "no_rating": 1, "bad_rating": 1}
    assert log.rejects.select("line", "reason", "value").rows() == [(5, "no_rating", ""), (6, "bad_rating", "good")]
    assert log.notes == {}
    ignored = read(source)
    assert (ignored.events.height, ignored.dropped, ignored.notes) == (5, {}, {"ratings_ignored": 5})
    weighted = read(source, options=ReadOptions(weight=name))
    assert "ratings_ignored" not in weighted.notes


def test_formats_that_know_their_ratings_need_no_column(tmp_path: Path) -> None:
    logs = {
        "u.data": "1\t10\t5\t100\n2\t20\t3\t90\n",
        "ratings.dat": "1::10::5::100\n2::20::3::90\n",
        "ratings.csv": "userId,movieId,rating,timestamp\n1,10,5,100\n2,20,3,90\n",
        "t.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t10\t5\t100\n2\t20\t3\t90\n",
        "Toys.json": '{"reviewerID": "1", "asin": "10", "overall": 5, "unixReviewTime": 100}\n'
        '{"reviewerID": "2", "asin": "20", "overall": 3, "unixReviewTime": 90}\n',
        "Toys.jsonl": '{"user_id": "1", "parent_asin": "10", "rating": 5, "timestamp": 100000}\n'
        '{"user_id": "2", "parent_asin": "20", "rating": 3, "timestamp": 90000}\n',
    }
    for name, text in logs.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text(text)
        log = read(folder, options=ReadOptions(min_rating=4))
        assert log.events.select("user", "item", "timestamp").rows() == [("1", "10", 100)], name
        assert (log.dropped, log.notes) == ({"below_min_rating": 1}, {})
        assert read(folder).notes == {"ratings_ignored": 2}


def test_a_threshold_without_a_column_or_a_column_without_a_threshold_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, ("user", "item", "timestamp", "rating"), RATED)
    with pytest.raises(ConfigError, match="--min-rating 4 without --rating"):
        read(source, options=ReadOptions(min_rating=4))
    with pytest.raises(ConfigError, match="--rating 'rating' alone changes nothing"):
        ReadOptions(rating="rating")
    with pytest.raises(ConfigError, match="--min-rating is not a number"):
        ReadOptions(rating="rating", min_rating=float("nan"))
    with pytest.raises(NoRows, match=r"none of the 5 rows can be used") as error:
        read(source, options=ReadOptions(rating="rating", min_rating=9))
    assert error.value.hint == "loosen --min-rating"


NOW = 1_700_000_000
DECADE = 10 * 365 * 86_400


def test_times_at_zero_among_real_ones_are_counted_with_a_warning(tmp_path: Path) -> None:
    times = [0, NOW, NOW + 1, 0, NOW + 2, NOW + 3]
    source = write(tmp_path, ("user", "item", "timestamp"), [("a", f"i{k}", time) for k, time in enumerate(times)])
    log = read(source)
    assert log.notes == {"time_zero": 2}
    (warning,) = log.warnings
    assert warning.startswith("2 rows have the time 0, 1970-01-01")
    assert '--where "timestamp > 0"' in warning
    cured = read(source, options=ReadOptions(where=("timestamp > 0",)))
    assert (cured.notes, cured.warnings, cured.dropped) == ({}, [], {"where": 2})


def test_times_that_are_mostly_zero_are_an_error_and_a_clock_that_starts_at_zero_is_none(tmp_path: Path) -> None:
    rows = [("a", f"i{k}", time) for k, time in enumerate([0, 0, 0, NOW, NOW + 1])]
    with pytest.raises(DataError, match=r"log\.csv: 3 of 5 rows have the time 0, 1970-01-01"):
        read(write(tmp_path, ("user", "item", "timestamp"), rows))
    relative = [("a", f"i{k}", k // 3) for k in range(6)]
    log = read(write(tmp_path, ("user", "item", "timestamp"), relative, "relative.csv"))
    assert (log.notes, log.warnings) == ({}, [])


def in_units(path: Path, seconds: Sequence[int], milliseconds: Sequence[int]) -> Path:
    times = [*seconds, *(1000 * time for time in milliseconds)]
    return write(path, ("user", "item", "timestamp"), [("a", f"i{k}", time) for k, time in enumerate(times)])


def test_times_in_two_units_are_a_warning_with_both_spans(tmp_path: Path) -> None:
    times = [NOW + k for k in range(300)]
    log = read(in_units(tmp_path, times, times), options=ReadOptions(time_unit="ms"))
    assert log.warnings == [
        "300 of 600 rows have times from 1970-01-20 16:13:20 to 1970-01-20 16:13:20, and 300 from 2023-11-14 22:13:20 "
        "to 2023-11-14 22:18:19 UTC: if they are in different units, write all in one and name it by --time-unit, or "
        "leave some out with --where on the time column"
    ]
    assert log.events.height == 600


@pytest.mark.parametrize(("early", "warned"), [(2, False), (3, True)])
def test_one_early_time_in_a_hundred_is_no_second_unit(tmp_path: Path, early: int, warned: bool) -> None:
    times = [NOW + k for k in range(200)]
    log = read(in_units(tmp_path, times[:early], times), options=ReadOptions(time_unit="ms"))
    assert len(log.warnings) == warned


@pytest.mark.parametrize(
    "times",
    [
        [DECADE * k // 100 for k in range(1, 500)],  # 1970 to 2020
        range(500),  # a clock of its own
        [0, 0, *(NOW + k for k in range(8))],  # warned of as times at zero
    ],
)
def test_times_of_one_unit_are_not_taken_for_two(tmp_path: Path, times: Sequence[int]) -> None:
    log = read(in_units(tmp_path, times, []))
    assert not any("different units" in warning for warning in log.warnings)


def test_a_reason_that_rejects_many_rows_is_a_warning_with_its_cure(tmp_path: Path) -> None:
    rows = [("a", f"i{k}", k, 0 if k % 2 else 1) for k in range(10)]
    log = read(write(tmp_path, ("user", "item", "timestamp", "w"), rows), options=ReadOptions(weight="w"))
    assert log.warnings == [
        "5 of 10 rows (50%) are rejected as bad_weight, the first '0': weights are finite and above 0: mend them, or "
        "leave out --weight"
    ]
    few = write(tmp_path, ("user", "item", "timestamp", "w"), [(*row[:3], int(row[2] != 4)) for row in rows], "few.csv")
    assert read(few, options=ReadOptions(where=("item <> 'i4'",))).warnings == []


@pytest.mark.parametrize(
    ("value", "names", "example", "hint"),
    [
        ("12/1/10 8:26", {}, "bad_time, for example '12/1/10 8:26'", "--time-format '%d-%m-%Y %H:%M'"),
        ("27-04-2015", {}, "bad_time, for example '27-04-2015'", "--time-format '%d-%m-%Y %H:%M'"),
        ("5", {"weight": "w"}, "bad_weight, for example '-1'", "leave out --weight"),
        ("5", {"user": "gap"}, "(no_user: 2)", "check --user"),
    ],
)
def test_nothing_left_names_the_commonest_reason_with_its_cure(
    tmp_path: Path, value: str, names: dict[str, str], example: str, hint: str
) -> None:
    rows = [("a", "x", value, -1, ""), ("b", "y", value, -1, "")]
    source = write(tmp_path, ("user", "item", "timestamp", "w", "gap"), rows)
    with pytest.raises(NoRows) as error:
        read(source, options=ReadOptions(**names))  # type: ignore[arg-type]
    assert example in error.value.message
    assert hint in error.value.hint
    assert "min_events" not in error.value.hint


word = st.sampled_from(["a", "b", "c", "d", ""])


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.tuples(word, st.sampled_from(["x", ""]), st.integers(-2, 3), st.integers(0, 3)), min_size=1))
def test_losses_are_those_of_filters_applied_one_after_the_other(
    rows: list[tuple[str, str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [*rows, ("keep", "x", 9, 3)]
    source = write(tmp_path_factory.mktemp("l"), ("user", "item", "timestamp", "n"), rows)
    log = read(source, options=ReadOptions(where=("timestamp >= 0",), rating="n", min_rating=1))
    left = rows
    users = {row[0] for row in rows} - {""}
    seen: set[tuple[str, str, int]] = set()
    stages = {
        "dropped by where": lambda row: row[2] >= 0,
        "dropped by below_min_rating": lambda row: row[3] >= 1,
        "rejected as no_item": lambda row: row[1] != "" or row[0] == "",
        "rejected as no_user": lambda row: row[0] != "",
        "rejected as duplicate": lambda row: row[:3] not in seen and not seen.add(row[:3]),
    }
    expected = []
    for name, keep in stages.items():
        kept = [row for row in left if keep(row)]
        gone = {row[0] for row in left} - {row[0] for row in kept} - {""}
        if len(kept) < len(left):
            events, lost = len(left) - len(kept), len(gone)
            shares = {"events_share": events / len(rows), "users_share": lost / len(users)}
            expected.append({"loss": name, "events": events, "users": lost, **shares})
        left = kept
    assert log.losses == expected
    assert log.events.height == len(left)
