"""Csv and parquet: columns, separators, times, folders, item tables."""

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.artifacts import hash_file
from cladapt.data.readers import RawLog, ReadOptions, read
from cladapt.errors import ConfigError, DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def rows_of(log: RawLog) -> list[tuple[Any, ...]]:
    return list(log.events.select("user", "item", "timestamp").iter_rows())


def test_csv_columns_are_mapped_and_ids_stay_text(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "ts,who,price,what\n1700000001,007,9,x\n1700000000,8,9,y\n")
    log = read(source, options=ReadOptions(user="who", item="what", timestamp="ts"))
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
        ("1700000000000", "it looks like milliseconds: --time-unit ms"),
        ("1700000000000000", "it looks like microseconds: --time-unit us"),
        ("1700000000000000000", "it looks like nanoseconds: --time-unit ns"),
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
    log = read(write(tmp_path / "log.csv", "user,item\nb,x\na,x\nb,x\n"), options=ReadOptions(timestamp=""))
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
    with pytest.raises(
        DataError, match=r"log.csv has no column 'user', 'timestamp'; it has: 'uid', 'item', 'ts'"
    ) as error:
        read(source)
    assert error.value.hint == (
        'name the columns: --user COL --item COL --timestamp COL; --timestamp "" takes the row order as time'
    )


def test_an_empty_csv_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*log\.csv: "):
        read(write(tmp_path / "log.csv", ""))


def test_a_row_with_too_many_fields_is_named_with_its_line(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", '\nuser,item,timestamp\na,"x\ny",1\n\na,x,1,extra,fields\n')
    with pytest.raises(DataError, match=r"log\.csv:6: the row has 5 fields, the header 3") as error:
        read(source)
    assert error.value.hint == "quote a field that holds the separator, or mend the row"


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\nJos\u00e9,x,1\n", "latin-1")
    with pytest.raises(DataError, match=r"cannot read .*log\.csv"):
        read(source)


def test_ready_made_blocks_are_read_and_must_be_numbers(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp,part\na,x,1,1\na,y,2,2\n")
    assert read(source, options=ReadOptions(block="part")).events["block"].to_list() == [1, 2]
    bad = write(tmp_path / "bad.csv", "user,item,timestamp,part\na,x,1,1\na,y,2,second\n")
    with pytest.raises(DataError, match="the block column holds 'second', not a block number"):
        read(bad, options=ReadOptions(block="part"))
    with pytest.raises(DataError, match=r"no column 'day'") as error:
        read(source, options=ReadOptions(block="day"))
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
    log = read(tmp_path / "log", options=ReadOptions(block="part"))
    assert log.events["block"].to_list() == [1, 2]
    assert set(log.files) == {"part=1/0.parquet", "part=2/0.parquet"}


def test_csv_files_of_a_folder_follow_each_other_without_the_item_table(tmp_path: Path) -> None:
    write(tmp_path / "d" / "2.csv", "timestamp;item;user\n1;x;a\n")
    write(tmp_path / "d" / "1.csv", "user,item,timestamp\na,z,1\n")
    items = write(tmp_path / "d" / "items.csv", "item,name\nx,Ex\n")
    log = read(tmp_path / "d", options=ReadOptions(items=items))
    assert list(log.events.select("item", "order").iter_rows()) == [("z", 0), ("x", 1)]
    assert set(log.files) == {"1.csv", "2.csv", "items.csv"}


def test_item_texts_join_the_chosen_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,sku,timestamp\na,x,1\n")
    items = write(tmp_path / "t" / "items.csv", "sku,name,brand,size\nx,Ex,,9\ny, Why ,Acme,\nx,Again,,\n,None,,\n")
    every = read(source, options=ReadOptions(item="sku", items=items))
    assert list(every.items.iter_rows()) == [("x", "Ex | 9"), ("y", "Why | Acme")]
    assert every.dropped == {"item_row_without_id": 1, "item_row_repeated": 1}
    assert set(every.files) == {"log.csv", "t/items.csv"}
    some = read(source, options=ReadOptions(item="sku", items=items, text=("brand", "name")))
    assert list(some.items.iter_rows()) == [("x", "Ex"), ("y", "Acme | Why")]


def test_an_item_table_may_be_parquet_with_lists_and_integer_ids(tmp_path: Path, table: pl.DataFrame) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,12,1\n")
    frame = pl.DataFrame({"item": [12.0, None], "tags": [["red", "big"], []], "year": [1999, None]})
    frame.write_parquet(tmp_path / "items.parquet")
    log = read(source, options=ReadOptions(items=tmp_path / "items.parquet"))
    assert list(log.items.iter_rows()) == [("12", "red, big | 1999")]


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("id,name\nx,Ex\n", {}, r"items.csv has no column 'item'; it has: 'id', 'name'"),
        ("item,name\nx,Ex\n", {"text": ("title",)}, r"items.csv has no column 'title'; it has: 'item', 'name'"),
        ("item\nx\n", {}, r"items.csv has no column but 'item'"),
    ],
)
def test_a_bad_item_table_is_an_error(tmp_path: Path, content: str, columns: Mapping[str, Any], message: str) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,x,1\n")
    items = write(tmp_path / "items.csv", content)
    with pytest.raises(DataError, match=message):
        read(source, options=ReadOptions(items=items, **columns))


def test_a_missing_item_table_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,x,1\n")
    with pytest.raises(DataError, match=r"no such item table: .*nowhere\.csv"):
        read(source, options=ReadOptions(items=tmp_path / "nowhere.csv"))


def test_a_column_that_is_not_in_use_is_never_read(tmp_path: Path) -> None:
    """The pages of a wide column are spoilt: reading it fails, a folder and a glob give what one whole file gives."""
    wide = pl.Series("note", [f"<{k:04}>" + "~" * 400 for k in range(300)])
    table = pl.DataFrame({"user": [k % 7 for k in range(300)], "item": range(300), "timestamp": range(300)})
    table.write_parquet(tmp_path / "log.parquet")
    (tmp_path / "log").mkdir()
    for k in range(3):
        part = tmp_path / "log" / f"{k}.parquet"
        rows = slice(100 * k, 100 * k + 100)
        table[rows].with_columns(wide[rows]).write_parquet(part, compression="uncompressed", statistics=False)
        content = part.read_bytes()
        first, last = content.index(b"<0"), content.rindex(b"~~~")
        part.write_bytes(content[:first] + b"\xff" * (last - first) + content[last:])
        with pytest.raises(pl.exceptions.PolarsError):
            pl.read_parquet(part)
    expected = read(tmp_path / "log.parquet").events
    for source in (tmp_path / "log", tmp_path / "log" / "*.parquet", str(tmp_path / "log" / "[0-2].parquet")):
        log = read(source)
        assert log.events.equals(expected)
        assert log.rejects.is_empty()
        assert len(log.files) == 3


def test_a_column_may_be_called_line_or_file(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,line,timestamp,reason\na,U7,1,x\na,,2,y\n")
    items = write(tmp_path / "t" / "items.csv", "line,file,value\nU7,north,1\n,south,2\n")
    log = read(source, options=ReadOptions(item="line", items=items))
    assert rows_of(log) == [("a", "U7", 1)]
    assert list(log.items.iter_rows()) == [("U7", "north | 1")]
    assert log.rejects["line"].to_list() == [3, 3]
    named = read(source, options=ReadOptions(user="line", item="reason"))
    assert rows_of(named) == [("U7", "x", 1)]
    atomic = write(tmp_path / "d" / "toy.inter", "user_id:token\titem_id:token\ttimestamp:float\nu\tU7\t1\n").parent
    write(atomic / "toy.item", "item_id:token\tline:token_seq\nU7\tnorth\n")
    assert list(read(atomic).items.iter_rows()) == [("U7", "north")]


def test_spaces_around_names_in_the_header_do_not_count(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user , item, timestamp,unit price\na,x,1,5\n")
    assert rows_of(read(source)) == [("a", "x", 1)]
    assert rows_of(read(source, options=ReadOptions(item=" item", where=('"unit price" > 4',)))) == [("a", "x", 1)]
    with pytest.raises(DataError, match=r"has no column 'sku'; it has: 'user', 'item', 'timestamp', 'unit price'"):
        read(source, options=ReadOptions(item="sku"))


@pytest.mark.parametrize("header", ["user,item,timestamp,item", "user,item, item,timestamp"])
def test_two_columns_of_one_name_are_an_error_where_the_name_is_used(tmp_path: Path, header: str) -> None:
    source = write(tmp_path / "log.csv", f"{header}\na,1,2,3\n")
    with pytest.raises(DataError, match=r"log\.csv has 2 columns named 'item'") as error:
        read(source)
    assert error.value.hint == "give each column its own name"
    unused = write(tmp_path / "unused.csv", "user,item,timestamp,,\na,x,1,,\n")
    assert rows_of(read(unused)) == [("a", "x", 1)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.jsonl"])
def test_utf_16_is_named_with_its_cure(tmp_path: Path, name: str, encoding: str) -> None:
    source = write(tmp_path / name, "user,item,timestamp\na,x,1\n", encoding)
    with pytest.raises(DataError, match=rf"{name} is written in UTF-16, expected UTF-8") as error:
        read(source)
    assert error.value.hint.startswith("convert it to UTF-8: iconv -f UTF-16 -t UTF-8 ")


def test_rejects_of_packed_csv_have_their_lines(tmp_path: Path) -> None:
    text = 'user,item,timestamp,note\na,x,1,"two\nlines"\n,x,2,\na,y,3,\n'
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text.encode()))
    log = read(tmp_path / "log.csv.gz")
    assert rows_of(log) == [("a", "x", 1), ("a", "y", 3)]
    assert log.rejects["line"].to_list() == [4]
    frame = pl.DataFrame({"user": ["a", ""], "item": ["x", "y"], "timestamp": [1, 2], "n": ["two\nlines", ""]})
    frame.lazy().sink_csv(tmp_path / "log.csv.zst", compression="zstd")
    assert read(tmp_path / "log.csv.zst").rejects["line"].to_list() == [4]
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(DataError, match=r"cannot read .*cut\.csv\.gz"):
        read(tmp_path / "cut.csv.gz")


def test_json_lines_are_read_by_line_whatever_the_types_of_their_values(tmp_path: Path) -> None:
    lines = [
        '{"user": 7, "item": "x", "timestamp": 1, "tags": ["a", ["b"]]}',
        "",
        '{"user": "7", "item": "y", "timestamp": "2024-01-01", "tags": null}',
        '{"item": "y", "timestamp": 3}',
        '{"user": 7, "item": "z", "timestamp": 4',
        "[1]",
    ]
    source = write(tmp_path / "log.jsonl", "\n".join(lines) + "\n")
    log = read(source, options=ReadOptions(text=("tags",)))
    assert rows_of(log) == [("7", "x", 1), ("7", "y", 1_704_067_200)]
    assert dict(log.items.rows()) == {"x": "a, b", "y": ""}
    assert log.rejects.select("line", "reason", "value").rows() == [
        (4, "no_user", ""),
        (5, "malformed_line", lines[4]),
        (6, "malformed_line", "[1]"),
    ]
    with pytest.raises(DataError, match=r"log\.jsonl has no column 'sku'; it has: 'user', 'item', 'timestamp', 'tags'"):
        read(source, options=ReadOptions(item="sku"))


def test_an_item_table_may_be_a_folder_and_of_another_type(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,x,1\na,y,2\n")
    write(tmp_path / "items" / "1.jsonl", '{"item": "x", "name": "Ex"}\noops\n')
    pl.DataFrame({"item": ["y", "x"], "name": ["Why", "Again"]}).write_parquet(tmp_path / "items" / "2.parquet")
    log = read(source, options=ReadOptions(items=tmp_path / "items"))
    assert dict(log.items.rows()) == {"x": "Ex", "y": "Why"}
    assert [(Path(f).name, line, reason) for f, line, reason, _ in log.rejects.iter_rows()] == [
        ("1.jsonl", 2, "malformed_line"),
        ("2.parquet", 2, "item_row_repeated"),
    ]


def test_ids_in_the_names_of_partitions_keep_their_zeros(tmp_path: Path) -> None:
    place = tmp_path / "log" / "day=2024-01-02" / "item=007"
    place.mkdir(parents=True)
    pl.DataFrame({"user": ["a"]}).write_parquet(place / "0.parquet")
    log = read(tmp_path / "log", options=ReadOptions(timestamp="day"))
    assert rows_of(log) == [("a", "007", 1_704_153_600)]


def test_times_of_one_unit_are_read_in_it_and_nothing_else(tmp_path: Path) -> None:
    for unit, factor in (("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        table = pl.DataFrame({"user": ["a", "a"], "item": ["x", "y"], "timestamp": [1_700_000_001 * factor, -factor]})
        table.write_parquet(tmp_path / "log.parquet")
        log = read(tmp_path / "log.parquet", options=ReadOptions(time_unit=unit))
        assert log.events["timestamp"].to_list() == [1_700_000_001, -1]
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,x,5000\na,y,2024-01-01\n")
    log = read(source, options=ReadOptions(time_unit="ms"))
    assert (rows_of(log), log.dropped) == ([("a", "x", 5)], {"bad_time": 1})
    with pytest.raises(ConfigError, match="--time-unit 'min' is no unit of time"):
        ReadOptions(time_unit="min")


def test_times_are_read_by_the_form_that_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,x,12/1/10 8:26\na,y,1/2/11 18:05\na,z,2011-01-03\n")
    log = read(source, options=ReadOptions(time_format="%m/%d/%y %H:%M"))
    assert rows_of(log) == [("a", "x", 1_291_191_960), ("a", "y", 1_293_991_500)]
    assert log.rejects.select("reason", "value").rows() == [("bad_time", "2011-01-03")]
    compact = pl.DataFrame({"user": ["a"], "item": ["x"], "timestamp": [20240131]})
    compact.write_parquet(tmp_path / "log.parquet")
    assert rows_of(read(tmp_path / "log.parquet", options=ReadOptions(time_format="%Y%m%d"))) == [
        ("a", "x", 1_706_659_200)
    ]
    compact.with_columns(pl.from_epoch("timestamp")).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="holds times already"):
        read(tmp_path / "log.parquet", options=ReadOptions(time_format="%Y%m%d"))


@pytest.mark.parametrize("format", ["", "%H:%M", "%d-%m", "day", "%Q", "%I:%M %Y"])
def test_a_form_that_says_no_moment_is_refused(format: str) -> None:
    with pytest.raises(ConfigError, match=r"--time-format .* does not say a moment") as error:
        ReadOptions(time_format=format)
    assert "%d-%m-%Y %H:%M" in error.value.hint


def test_blocks_may_be_any_whole_numbers_and_nothing_else(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp,b,f\na,x,1,0,1.5\na,y,2,7,2\n")
    assert read(source, options=ReadOptions(block="b")).events["block"].to_list() == [0, 7]
    frame = pl.read_csv(source)
    frame.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"the block column holds 1\.5, not a block number"):
        read(tmp_path / "log.parquet", options=ReadOptions(block="f"))
    dropped = read(source, options=ReadOptions(block="f", where=("f > 1.7",)))
    assert dropped.events["block"].to_list() == [2]


def test_files_of_a_folder_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    log = "user,item,timestamp\na,x,1\n"
    folder = write(tmp_path / "d" / "a.csv", log).parent
    items = write(folder / "items.csv", "item,name\nx,Ex\n")
    for name in ("README.txt", "LICENSE", "_SUCCESS", ".a.csv.crc", "a.csv.crc", ".hidden/b.csv", "notes.md"):
        write(folder / name, "")
    whole = read(folder, options=ReadOptions(items=items))
    assert (whole.notes, list(whole.warnings)) == ({}, [])
    for name in ("b.csv.bz2", "c.txt", "_f.csv", "in/g.csv.zip"):
        write(folder / name, log)
    write(tmp_path / "elsewhere" / "h.csv", log)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    part = read(folder, options=ReadOptions(items=items))
    assert rows_of(part) == [("a", "x", 1)]
    assert part.notes == {"files_not_read": 5}
    (warning,) = part.warnings
    assert warning.startswith(
        "files not read: _f.csv, b.csv.bz2, c.txt and 2 more; --format csv reads csv or tsv files"
    )
    alone = read(folder / "a.csv")
    assert (alone.notes, list(alone.warnings)) == ({}, [])


def test_ids_with_line_breaks_are_rejects_with_a_warning(tmp_path: Path) -> None:
    rows = "".join(f"u{k},x,{k}\n" for k in range(1, 20))
    text = f'user,item,timestamp\n{rows}b,"x,1\nc,y,2\nd,z",3\n"e\r\nf",x,4\ng,x,5\n'
    source = write(tmp_path / "log.csv", text)
    log = read(source)
    assert rows_of(log)[-1] == ("g", "x", 5)
    assert log.rejects.select("line", "reason", "value").rows() == [
        (21, "bad_item", "x,1\nc,y,2\nd,z"),
        (24, "bad_user", "e\r\nf"),
    ]
    (warning,) = log.warnings
    assert warning.startswith(
        f"rows with a line break in an id: 2, the first at {source}:21: a quote that is not closed"
    )
    items = write(tmp_path / "t" / "items.csv", 'item,name\nx,Ex\n"y,Why\nz",Zed\n')
    described = read(write(tmp_path / "b.csv", "user,item,timestamp\na,x,1\n"), options=ReadOptions(items=items))
    assert described.rejects.select("line", "reason", "value").rows() == [(3, "bad_item", "y,Why\nz")]
    assert "rows with a line break in an id: 1" in described.warnings[0]


def test_a_text_column_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", "user,item,timestamp\na,x,1\n")
    items = write(tmp_path / "t" / "items.csv", "item,title\nx,Ex\n")
    own = read(source, options=ReadOptions(text=("item", " item")))
    assert list(own.items.iter_rows()) == [("x", "x")]
    other = read(source, options=ReadOptions(items=items, text=("title", "title")))
    assert list(other.items.iter_rows()) == [("x", "Ex")]
