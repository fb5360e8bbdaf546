"""Choosing the format of a source, and saying what was expected."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.data.readers import READERS, RawLog, ReadOptions, read
from cladapt.errors import ConfigError, DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def rows_of(log: RawLog) -> list[tuple[Any, ...]]:
    return list(log.events.select("user", "item", "timestamp").iter_rows())


@pytest.fixture
def table() -> pl.DataFrame:
    return pl.DataFrame({"user": [1, 2, 3], "item": ["x", "y", "z"], "timestamp": [10, 20, 30]})


def test_every_reader_is_listed_under_its_own_name() -> None:
    assert list(READERS) == [
        "peso",
        "movielens",
        "recbole",
        "lcrec",
        "minionerec",
        "amazon2018",
        "amazon2023",
        "mind",
        "steam",
        "csv",
        "jsonl",
        "parquet",
        "arrow",
    ]
    assert all(reader.name == name and reader.expects for name, reader in READERS.items())


def test_a_source_of_no_format_lists_the_formats_in_few_words(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "hello")
    with pytest.raises(DataError, match="has none of the formats that can be read") as error:
        read(tmp_path)
    assert error.value.hint.startswith(f"known: {', '.join(READERS)}; with --format NAME")
    assert len(error.value.hint) < 200


def test_a_source_of_two_formats_asks_which(tmp_path: Path, table: pl.DataFrame) -> None:
    write(tmp_path / "log.csv", "user,item,timestamp\na,x,1\n")
    table.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="fits several formats: csv, parquet") as error:
        read(tmp_path)
    assert error.value.hint == "choose one: --format csv or --format parquet, or name a single file"
    assert read(tmp_path, "parquet").events.height == 3


def test_a_movielens_csv_can_be_read_as_a_plain_csv(tmp_path: Path) -> None:
    source = write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,10,5.0,100\n2,20,3.0,90\n")
    columns = ReadOptions(user="userId", item="movieId")
    assert rows_of(read(source, "csv", columns)) == rows_of(read(source))
    with pytest.raises(ConfigError, match="movielens format has fixed columns, so --user, --item cannot apply"):
        read(source, options=columns)


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
