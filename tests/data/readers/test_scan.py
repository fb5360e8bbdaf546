"""Tables by file type: folders that are columns, rows that are too long, header lines that are none."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.data.readers import RawLog, ReadOptions, read
from cladapt.errors import DataError


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def rows_of(log: RawLog) -> list[tuple[Any, ...]]:
    return list(log.events.select("user", "item", "timestamp").iter_rows())


def test_folders_above_the_source_are_no_partitions(tmp_path: Path) -> None:
    place = tmp_path / "user=evil" / "item=bad"
    place.mkdir(parents=True)
    table = pl.DataFrame({"user": [f"u{k}" for k in range(20)], "item": ["x"] * 20, "timestamp": range(20)})
    table.write_parquet(place / "log.parquet")
    expected = list(table.iter_rows())
    for source in (place / "log.parquet", place, place / "*.parquet"):
        assert rows_of(read(source)) == expected
    with pytest.raises(DataError, match=r"log\.parquet has a column 'user', and its folder user=evil gives it another"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("folder", "user"),
    [("user=a=b", "a=b"), ("user=a%2Fb", "a/b"), ("user=007", "007")],
)
def test_the_value_of_a_partition_follows_the_first_equals_sign(tmp_path: Path, folder: str, user: str) -> None:
    (tmp_path / "log" / folder).mkdir(parents=True)
    pl.DataFrame({"item": ["x"], "timestamp": [1]}).write_parquet(tmp_path / "log" / folder / "0.parquet")
    assert rows_of(read(tmp_path / "log")) == rows_of(read(tmp_path / "log" / "user=*" / "0.parquet"))
    assert rows_of(read(tmp_path / "log")) == [(user, "x", 1)]


def test_a_partition_without_a_value_gives_rejects(tmp_path: Path) -> None:
    for k, name in enumerate(("user=a", "user=__HIVE_DEFAULT_PARTITION__")):
        (tmp_path / name).mkdir()
        pl.DataFrame({"item": [f"x{k}"], "timestamp": [k + 1]}).write_parquet(tmp_path / name / "0.parquet")
    log = read(tmp_path)
    assert (rows_of(log), log.dropped) == ([("a", "x0", 1)], {"no_user": 1})


@pytest.mark.parametrize(
    "options",
    [
        ReadOptions(),
        ReadOptions(rating="stars", min_rating=1.0),
        ReadOptions(text=("stars",)),
        ReadOptions(timestamp=""),
    ],
)
@pytest.mark.parametrize("row", ["a,x,1,2,extra", "a,x,1,2,"])
def test_a_row_with_too_many_fields_is_refused_whatever_columns_are_read(
    tmp_path: Path, options: ReadOptions, row: str
) -> None:
    source = write(tmp_path / "log.csv", f"user,item,timestamp,stars\na,x,1,2\n{row}\n")
    with pytest.raises(DataError, match=r"log\.csv:3: the row has 5 fields, the header 4"):
        read(source, options=options)


@pytest.mark.parametrize("name", ["log.csv", "log.tsv"])
@pytest.mark.parametrize("options", [ReadOptions(), ReadOptions(where=("item = 'x'",))])
def test_carriage_returns_as_line_ends_are_named_with_their_cure(
    tmp_path: Path, name: str, options: ReadOptions
) -> None:
    text = 'user,item,timestamp\ra,x,1\r"b",x,1\r'
    source = write(tmp_path / name, text.replace(",", "\t") if name.endswith("tsv") else text)
    with pytest.raises(DataError, match=rf"{name}: lines end in carriage returns alone, expected line feeds") as error:
        read(source, options=options)
    assert error.value.hint == f"convert them: tr '\\r' '\\n' < {name} > lines-{name}"


def test_a_header_that_cannot_be_cut_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", f"user,item,timestamp,{'x' * 200_000}\na,x,1,2\n")
    with pytest.raises(DataError, match=r"log\.csv: the header cannot be read: field larger than field limit"):
        read(source)
