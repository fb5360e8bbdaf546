"""Readers: what each format holds, that nothing is dropped without a count, and errors that say which option helps."""

import json
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.artifacts import hash_file
from cladapt.data.readers import READERS, Columns, RawLog, read
from cladapt.data.readers._parse import to_ids, to_seconds
from cladapt.errors import ConfigError, DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def rows_of(log: RawLog) -> list[tuple[Any, ...]]:
    return list(log.events.select("user", "item", "timestamp").iter_rows())


# csv and parquet


def test_csv_columns_are_mapped_and_ids_stay_text(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "ts,who,price,what\n1700000001,007,9,x\n1700000000,8,9,y\n")
    log = read(source, columns=Columns(user="who", item="what", timestamp="ts"))
    assert dict(log.events.schema) == {
        "user": pl.String,
        "item": pl.String,
        "timestamp": pl.Int64,
        "order": pl.Int64,
        "block": pl.Int32,
    }
    assert list(log.events.iter_rows()) == [("007", "x", 1700000001, 0, None), ("8", "y", 1700000000, 1, None)]
    assert (log.source, log.index, log.dropped, log.items.height) == ("csv", None, {}, 0)
    assert log.files == {"log.csv": hash_file(source)}


@pytest.mark.parametrize(
    ("name", "separator"), [("l.csv", ","), ("l.csv", ";"), ("l.csv", "\t"), ("l.csv", "|"), ("l.tsv", "\t")]
)
def test_the_separator_comes_from_the_name_or_the_header(tmp_path: Path, name: str, separator: str) -> None:
    lines = (("user", "item", "timestamp"), ("a", '"x, or ; y"', "5"))
    source = write(tmp_path / name, "\ufeff" + "\r\n".join(separator.join(line) for line in lines) + "\r\n")
    assert rows_of(read(source)) == [("a", "x, or ; y", 5)]


def test_unusable_and_repeated_rows_are_dropped_and_counted_by_reason(tmp_path: Path) -> None:
    lines = [",x,1", "a,,1", "a,x,", "a,x,soon", "a,x,2024-02-30", "a,x,1", "a,x,1", "a,x,2", "b,x,1"]
    log = read(write(tmp_path / "log.csv", "user,item,timestamp\n" + "\n".join(lines)))
    assert rows_of(log) == [("a", "x", 1), ("a", "x", 2), ("b", "x", 1)]
    assert log.events["order"].to_list() == [5, 7, 8]
    assert log.dropped == {"bad_time": 2, "duplicate": 1, "no_item": 1, "no_time": 1, "no_user": 1}


def test_nothing_left_is_an_error_with_the_counts(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,x,soon\n,x,1\n")
    with pytest.raises(DataError, match=r"none of the 2 rows can be used \(bad_time: 1, no_user: 1\)"):
        read(source)
    with pytest.raises(DataError, match="none of the 0 rows can be used"):
        read(write(tmp_path / "none.csv", "user,item,timestamp\n"))


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("1700000000000", "it looks like milliseconds: divide the column by 1e3"),
        ("1700000000000000", "it looks like microseconds: divide the column by 1e6"),
        ("1700000000000000000", "it looks like nanoseconds: divide the column by 1e9"),
    ],
)
def test_times_finer_than_seconds_are_never_guessed(tmp_path: Path, value: str, hint: str) -> None:
    source = write(tmp_path / "log.csv", f"user,item,timestamp\na,x,{value}\n")
    with pytest.raises(DataError, match=rf"log.csv: timestamp: {value} is too large for unix seconds") as error:
        read(source)
    assert hint in error.value.hint
    table = pl.DataFrame({"user": ["a"], "item": ["x"], "timestamp": [int(value)]})
    table.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="too large for unix seconds"):
        read(tmp_path / "log.parquet")


def test_compact_dates_are_not_taken_for_seconds_of_1970(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="20240131 looks like a date written YYYYMMDD"):
        read(write(tmp_path / "log.csv", "user,item,timestamp\na,x,20240131\na,y,20240201\n"))


def test_without_times_the_row_order_stands_and_repeats_stay(tmp_path: Path) -> None:
    log = read(write(tmp_path / "log.csv", "user,item\nb,x\na,x\nb,x\n"), columns=Columns(timestamp=""))
    assert list(log.events.iter_rows()) == [
        ("b", "x", None, 0, None),
        ("a", "x", None, 1, None),
        ("b", "x", None, 2, None),
    ]
    assert log.dropped == {}


def test_order_keeps_what_whole_seconds_lose(tmp_path: Path) -> None:
    log = read(write(tmp_path / "log.csv", "user,item,timestamp\na,late,5.9\na,next,6\na,early,5.25\na,early,5.5\n"))
    assert list(log.events.sort("timestamp", "order")["item"]) == ["early", "early", "late", "next"]
    assert log.dropped == {}


def test_missing_columns_name_those_found_and_the_options(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "uid,item,ts\na,x,1\n")
    with pytest.raises(DataError, match=r"log.csv has no column 'user', 'timestamp'; it has: uid, item, ts") as error:
        read(source)
    assert error.value.hint == (
        'name the columns: --user COL --item COL --timestamp COL; --timestamp "" takes the row order as time'
    )


@pytest.mark.parametrize("content", ["", "user,item,timestamp\na,x,1,extra,fields\n"], ids=["empty", "ragged"])
def test_a_broken_csv_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"cannot read .*log\.csv: "):
        read(write(tmp_path / "log.csv", content))


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\nJos\u00e9,x,1\n", "latin-1")
    with pytest.raises(DataError, match=r"cannot read .*log\.csv"):
        read(source)


def test_ready_made_blocks_are_read_and_must_be_numbers(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp,part\na,x,1,1\na,y,2,2\n")
    assert read(source, columns=Columns(block="part")).events["block"].to_list() == [1, 2]
    bad = write(tmp_path / "bad.csv", "user,item,timestamp,part\na,x,1,1\na,y,2,second\n")
    with pytest.raises(DataError, match="column 'part' holds 'second', not a block number"):
        read(bad, columns=Columns(block="part"))
    with pytest.raises(DataError, match=r"no column 'day'") as error:
        read(source, columns=Columns(block="day"))
    assert "--block COL" in error.value.hint


@pytest.fixture
def table() -> pl.DataFrame:
    return pl.DataFrame({"user": [1, 2, 3], "item": ["x", "y", "z"], "timestamp": [10, 20, 30]})


def test_parquet_as_file_folder_and_glob_gives_the_same_events(tmp_path: Path, table: pl.DataFrame) -> None:
    (tmp_path / "log").mkdir()
    for k in range(3):
        table[k : k + 1].write_parquet(tmp_path / "log" / f"part-{k}.parquet")
    write(tmp_path / "log" / "_SUCCESS", "")
    write(tmp_path / "log" / "_delta" / "x.parquet", "not data")
    table.write_parquet(tmp_path / "log.parquet")
    single, folder = read(tmp_path / "log.parquet"), read(tmp_path / "log")
    pattern = read(str(tmp_path / "log" / "part-*.parquet"))
    assert rows_of(single) == rows_of(folder) == rows_of(pattern) == [("1", "x", 10), ("2", "y", 20), ("3", "z", 30)]
    assert set(folder.files) == set(pattern.files) == {f"part-{k}.parquet" for k in range(3)}
    assert folder.source == "parquet"


def test_a_partition_folder_is_a_column(tmp_path: Path, table: pl.DataFrame) -> None:
    for part in (1, 2):
        (tmp_path / "log" / f"part={part}").mkdir(parents=True)
        table[part - 1 : part].write_parquet(tmp_path / "log" / f"part={part}" / "0.parquet")
    log = read(tmp_path / "log", columns=Columns(block="part"))
    assert log.events["block"].to_list() == [1, 2]
    assert set(log.files) == {"part=1/0.parquet", "part=2/0.parquet"}


def test_csv_files_of_a_folder_follow_each_other_without_the_item_table(tmp_path: Path) -> None:
    write(tmp_path / "d" / "2.csv", "timestamp;item;user\n1;x;a\n")
    write(tmp_path / "d" / "1.csv", "user,item,timestamp\na,z,1\n")
    items = write(tmp_path / "d" / "items.csv", "item,name\nx,Ex\n")
    log = read(tmp_path / "d", columns=Columns(items=items))
    assert list(log.events.select("item", "order").iter_rows()) == [("z", 0), ("x", 1)]
    assert set(log.files) == {"1.csv", "2.csv", "items.csv"}


def test_item_texts_join_the_chosen_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,sku,timestamp\na,x,1\n")
    items = write(tmp_path / "t" / "items.csv", "sku,name,brand,size\nx,Ex,,9\ny, Why ,Acme,\nx,Again,,\n,None,,\n")
    every = read(source, columns=Columns(item="sku", items=items))
    assert list(every.items.iter_rows()) == [("x", "Ex | 9"), ("y", "Why | Acme")]
    assert every.dropped == {"item_row_without_id": 1, "item_row_repeated": 1}
    assert set(every.files) == {"log.csv", "t/items.csv"}
    some = read(source, columns=Columns(item="sku", items=items, text=("brand", "name")))
    assert list(some.items.iter_rows()) == [("x", "Ex"), ("y", "Acme | Why")]


def test_an_item_table_may_be_parquet_with_lists_and_integer_ids(tmp_path: Path, table: pl.DataFrame) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,12,1\n")
    frame = pl.DataFrame({"item": [12.0, None], "tags": [["red", "big"], []], "year": [1999, None]})
    frame.write_parquet(tmp_path / "items.parquet")
    log = read(source, columns=Columns(items=tmp_path / "items.parquet"))
    assert list(log.items.iter_rows()) == [("12", "red, big | 1999")]


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("id,name\nx,Ex\n", {}, r"items.csv has no column 'item'; it has: id, name"),
        ("item,name\nx,Ex\n", {"text": ("title",)}, r"items.csv has no column 'title'; it has: item, name"),
        ("item\nx\n", {}, r"items.csv has no column beside 'item'"),
    ],
)
def test_a_bad_item_table_is_an_error(tmp_path: Path, content: str, columns: Mapping[str, Any], message: str) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,x,1\n")
    items = write(tmp_path / "items.csv", content)
    with pytest.raises(DataError, match=message):
        read(source, columns=Columns(items=items, **columns))


def test_a_missing_item_table_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,x,1\n")
    with pytest.raises(DataError, match=r"no such item table: .*nowhere\.csv"):
        read(source, columns=Columns(items=tmp_path / "nowhere.csv"))


# times and ids

MOMENT = 1_706_963_696  # 2024-02-03 12:34:56 UTC


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1706963696", MOMENT),
        (" 1706963696.5 ", MOMENT + 0.5),
        ("-3600", -3600),
        ("2024-02-03", MOMENT - 12 * 3600 - 34 * 60 - 56),
        ("2024-02-03T12:34", MOMENT - 56),
        ("2024-02-03T12:34:56Z", MOMENT),
        ("2024-02-03 12:34:56 UTC", MOMENT),
        ("2024-02-03 12:34:56.250", MOMENT + 0.25),
        ("2024-02-03T14:34:56+02:00", MOMENT),
        ("2024-02-03T07:04:56-0530", MOMENT),
        ("2024-02-03 13:34:56+01", MOMENT),
        ("2024-13-03", None),
        ("03/02/2024", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_a_time_text_is_read_as_utc_seconds_or_not_at_all(text: str, seconds: float | None) -> None:
    assert to_seconds(pl.Series([text]), "t").to_list() == [seconds]


@settings(max_examples=50, deadline=None)
@given(
    st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)),
    st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)
def test_iso_texts_agree_with_the_standard_library(moment: datetime, zone: timezone) -> None:
    aware = moment.replace(tzinfo=zone)
    assert to_seconds(pl.Series([aware.isoformat()]), "t")[0] == pytest.approx(aware.timestamp(), abs=1e-5)


def test_typed_times_are_read_in_any_unit_and_zone() -> None:
    naive = pl.Series([datetime(2024, 2, 3, 12, 34, 56)])
    berlin = naive.dt.replace_time_zone("UTC").dt.convert_time_zone("Europe/Berlin")
    for series in (naive, berlin, *(naive.cast(pl.Datetime(unit)) for unit in ("ms", "ns"))):
        assert to_seconds(series, "t").to_list() == [MOMENT]
    assert to_seconds(pl.Series([date(1970, 1, 3), None]), "t").to_list() == [2 * 86_400, None]
    assert to_seconds(pl.Series([MOMENT], dtype=pl.UInt32), "t").to_list() == [MOMENT]


@pytest.mark.parametrize(
    ("ids", "texts"),
    [([1, None], ["1", None]), ([12.0, None, float("nan")], ["12", None, None]), (["", "a b"], [None, "a b"])],
)
def test_ids_become_text(ids: list[Any], texts: list[str | None]) -> None:
    assert to_ids(pl.Series(ids), "u").to_list() == texts


@pytest.mark.parametrize(
    ("convert", "series", "message"),
    [
        (to_ids, pl.Series([1.5]), "log: 1.5 is not an id"),
        (to_ids, pl.Series([[1]]), r"log: a column of type List\(Int64\) holds no ids"),
        (to_seconds, pl.Series([True]), "log: a column of type Boolean holds no times"),
    ],
)
def test_a_column_of_the_wrong_kind_is_an_error(
    convert: Callable[[pl.Series, str], pl.Series], series: pl.Series, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        convert(series, "log")


# MovieLens

GENRES = "unknown|0\nAction|1\nSci-Fi|2\n\n"
RATINGS = {
    "u.data": "1\t10\t5\t100\n2\t20\t3\t90\n",
    "ratings.dat": "1::10::5::100\r\n2::20::3::90\r\n",
    "ratings.csv": "userId,movieId,rating,timestamp\n1,10,5.0,100\n2,20,3.0,90\n",
}
MOVIES = {
    "u.item": "10|Alien\u00e9 (1979)|01-Jan-1979||http://x|0|1|1\n20|Heat (1995)|||y|1|0|0\n",
    "movies.dat": "10::Alien\u00e9 (1979)::Action|Sci-Fi\n20::Heat (1995)::\n",
    "movies.csv": "movieId,title,genres\n10,Alien\u00e9 (1979),Action|Sci-Fi\n20,Heat (1995),(no genres listed)\n",
}


@pytest.mark.parametrize(("log_name", "movies_name"), list(zip(RATINGS, MOVIES, strict=True)))
@pytest.mark.parametrize("given_as", ["folder", "file"])
def test_movielens_releases_read_alike(tmp_path: Path, log_name: str, movies_name: str, given_as: str) -> None:
    write(tmp_path / log_name, RATINGS[log_name])
    write(tmp_path / movies_name, MOVIES[movies_name], "utf-8" if movies_name.endswith("csv") else "latin-1")
    write(tmp_path / "u.genre", GENRES)
    log = read(tmp_path if given_as == "folder" else tmp_path / log_name)
    assert log.source == "movielens"
    assert rows_of(log) == [("1", "10", 100), ("2", "20", 90)]
    assert list(log.items.iter_rows()) == [("10", "Alien\u00e9 (1979) | Action, Sci-Fi"), ("20", "Heat (1995)")]
    assert (log.dropped, log.notes) == ({}, {"movies_without_genres": 1})
    assert set(log.files) == {log_name, movies_name} | ({"u.genre"} if log_name == "u.data" else set())


def test_malformed_movielens_lines_are_counted_and_titles_may_hold_colons(tmp_path: Path) -> None:
    write(tmp_path / "ratings.dat", "1::10::5::100\n1::10::5\nx\n\n1::11::5::never\n1::12::5::101\n")
    write(tmp_path / "movies.dat", "10::Star: A::B\u0085C::Drama\n11::No genres\n12\n::Untold::Drama\n13::::Drama\n")
    log = read(tmp_path)
    assert rows_of(log) == [("1", "10", 100), ("1", "12", 101)]
    assert list(log.items.iter_rows()) == [("10", "Star: A::B\u0085C | Drama"), ("11", "No genres")]
    assert log.dropped == {"bad_time": 1, "malformed_line": 2, "malformed_movie": 3}


def test_a_log_without_movies_or_genres_has_less_text(tmp_path: Path) -> None:
    write(tmp_path / "u.data", RATINGS["u.data"])
    assert read(tmp_path).items.is_empty()
    write(tmp_path / "u.item", MOVIES["u.item"])
    assert read(tmp_path).items["text"].to_list() == ["Alien\u00e9 (1979)", "Heat (1995)"]


def test_two_movielens_logs_in_a_folder_are_refused(tmp_path: Path) -> None:
    for name in ("u.data", "ratings.dat"):
        write(tmp_path / name, RATINGS[name])
    with pytest.raises(DataError, match=r"has u.data and ratings.dat, expected one log"):
        read(tmp_path)


def test_movietweetings_is_read_whole(shared_data: Path) -> None:
    source = shared_data / "movietweetings-2013"
    if not source.is_dir():
        pytest.skip(f"no folder {source}")
    log = read(source)
    assert log.source == "movielens"
    assert log.events.height == 141_695
    assert log.events["user"].n_unique() == 21_081
    assert log.events["item"].n_unique() == log.items.height == 12_611
    assert log.dropped == {}
    assert "The Adventures of Dollie (1908) | Action, Short" in log.items["text"]


# PESO

BLOCKS: list[dict[str, tuple[list[str], list[str]]]] = [
    {"a": ([], ["x", "y"]), "b": ([], ["y"])},
    {"c": ([], ["z", "z"]), "a": (["x", "y"], ["z"])},
    {"a": (["x", "y", "z"], ["x"]), "d": ([], [])},
]


def write_peso(folder: Path, blocks: list[dict[str, tuple[Any, Any]]] = BLOCKS, dataset: str = "CDs_0.6") -> Path:
    for k, block in enumerate(blocks):
        value = {user: {"previous_block": before, "current_block": now} for user, (before, now) in block.items()}
        write(folder / f"{dataset}.all.block_{k}.json", json.dumps(value))
    return folder


def test_peso_blocks_become_events_in_their_order(tmp_path: Path) -> None:
    log = read(write_peso(tmp_path))
    expected = [("a", "x", 1), ("a", "y", 1), ("b", "y", 1), ("c", "z", 2), ("c", "z", 2), ("a", "z", 2), ("a", "x", 3)]
    assert list(log.events.select("user", "item", "block").iter_rows()) == expected
    assert log.events["order"].to_list() == list(range(7))
    assert log.events["timestamp"].null_count() == 7
    assert (log.source, log.index, log.dropped, log.notes) == ("peso", None, {}, {})
    assert set(log.files) == {f"CDs_0.6.all.block_{k}.json" for k in range(3)}


def test_a_peso_index_is_found_and_lists_the_items(tmp_path: Path) -> None:
    index = {"x": ["<a_1>", "<b_2>"], "y": ["<a_1>", "<b_3>"], "never": ["<a_9>", "<b_9>"]}
    write(write_peso(tmp_path) / "CDs_0.6.index.epoch20.json", json.dumps(index))
    for source in (tmp_path, tmp_path / "CDs_0.6.all.block_0.json"):
        log = read(source)
        assert log.index == {item: tuple(tokens) for item, tokens in index.items()}
        assert list(log.items.iter_rows()) == [("x", ""), ("y", ""), ("never", "")]
        assert "CDs_0.6.index.epoch20.json" in log.files
    assert read(tmp_path).notes == {"items_missing_in_index": 1}


def test_a_previous_block_that_disagrees_is_counted(tmp_path: Path) -> None:
    wrong = [BLOCKS[0], {**BLOCKS[1], "a": (["y", "x"], ["z"])}, {**BLOCKS[2], "d": (["x"], ["y"])}]
    assert read(write_peso(tmp_path, wrong)).notes == {"previous_block_disagrees": 2}


def test_one_peso_file_keeps_its_block_number_and_says_what_it_could_not_check(tmp_path: Path) -> None:
    log = read(write_peso(tmp_path) / "CDs_0.6.all.block_1.json")
    assert log.events["block"].to_list() == [2, 2, 2]
    assert log.notes == {"previous_block_unchecked": 2}


def test_two_peso_datasets_in_a_folder_are_named(tmp_path: Path) -> None:
    write_peso(write_peso(tmp_path), dataset="Games")
    with pytest.raises(DataError, match=r"has the blocks of CDs_0.6 and Games, expected one dataset"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("D.all.block_0.json", "[]", r"D.all.block_0.json: expected {user: …}, found a list"),
        ("D.all.block_0.json", "{", r"D.all.block_0.json:1:2: not valid JSON"),
        ("D.all.block_0.json", '{"a": {"current_block": ["x"]}}', r"user 'a': previous_block is None, expected a list"),
        (
            "D.all.block_0.json",
            '{"a": {"previous_block": [], "current_block": [3]}}',
            r"user 'a': current_block is \[3\], expected a list of item ids",
        ),
        ("D.index.json", '{"x": []}', r"D.index.json: item 'x' has \[\], expected a list of tokens"),
        ("D.index.json", "3", r"D.index.json: expected {item: tokens}, found a int"),
    ],
)
def test_a_malformed_peso_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    write(write_peso(tmp_path, dataset="D") / name, content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_two_peso_indexes_are_refused(tmp_path: Path) -> None:
    write_peso(tmp_path, dataset="D")
    for name in ("D.index.json", "D.index.epoch5.json"):
        write(tmp_path / name, "{}")
    with pytest.raises(DataError, match=r"several semantic-ID indexes: D.index.epoch5.json and D.index.json"):
        read(tmp_path)


def test_the_released_peso_blocks_agree_with_themselves(shared_data: Path) -> None:
    source = shared_data / "peso-cds"
    if not source.is_dir():
        pytest.skip(f"no folder {source}")
    log = read(source)
    assert log.index is not None
    assert len(log.index) == log.items.height == 39_191
    assert len(set(log.index.values())) == 38_508
    counts = log.events.group_by("block").agg(pl.len(), pl.col("user").n_unique()).sort("block")
    assert counts["len"].to_list() == [81_355, 8_686, 7_488, 9_468, 9_421]
    assert counts["user"].to_list() == [8_494, 1_013, 866, 1_078, 1_074]
    assert (log.dropped, log.notes) == ({}, {})


# choosing the format


def test_every_reader_is_listed_under_its_own_name() -> None:
    assert list(READERS) == ["peso", "movielens", "csv", "parquet"]
    assert all(reader.name == name and reader.expects for name, reader in READERS.items())


def test_a_source_of_no_format_lists_what_each_expects(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "hello")
    with pytest.raises(DataError, match="has none of the formats that can be read") as error:
        read(tmp_path)
    assert error.value.hint == "; ".join(f"{reader.name}: {reader.expects}" for reader in READERS.values())


def test_a_source_of_two_formats_asks_which(tmp_path: Path, table: pl.DataFrame) -> None:
    write(tmp_path / "log.csv", "user,item,timestamp\na,x,1\n")
    table.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="fits several formats: csv, parquet") as error:
        read(tmp_path)
    assert error.value.hint == "choose one: --format csv or --format parquet, or name a single file"
    assert read(tmp_path, "parquet").events.height == 3


def test_a_movielens_csv_can_be_read_as_a_plain_csv(tmp_path: Path) -> None:
    source = write(tmp_path / "ratings.csv", RATINGS["ratings.csv"])
    columns = Columns(user="userId", item="movieId")
    assert rows_of(read(source, "csv", columns)) == rows_of(read(source))
    with pytest.raises(ConfigError, match="movielens format has fixed columns, so --user, --item cannot apply"):
        read(source, columns=columns)


def test_a_ratings_csv_of_another_kind_is_a_plain_csv(tmp_path: Path) -> None:
    assert read(write(tmp_path / "ratings.csv", "user,item,timestamp\na,x,1\n")).source == "csv"


@pytest.mark.parametrize("name", list(READERS))
def test_a_format_asked_for_in_vain_says_what_it_expects(tmp_path: Path, name: str) -> None:
    write(tmp_path / "notes.txt", "hello")
    with pytest.raises(DataError) as error:
        read(tmp_path, name)
    assert error.value.hint == f"expected {READERS[name].expects}"


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown format 'parket', did you mean 'parquet'"):
        read(tmp_path, "parket")


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv", "*.csv"])
def test_a_missing_source_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="no such file or folder: "):
        read(tmp_path / name)
