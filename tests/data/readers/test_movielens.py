"""The MovieLens family: every release reads alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cladapt.data.readers import RawLog, read
from cladapt.errors import DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def rows_of(log: RawLog) -> list[tuple[Any, ...]]:
    return list(log.events.select("user", "item", "timestamp").iter_rows())


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
    assert (log.dropped, log.notes) == ({}, {"movies_without_genres": 1, "ratings_ignored": 2})
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


def test_movietweetings_is_read_whole(real_data: Callable[[str], Path]) -> None:
    source = real_data("movietweetings-2013")
    log = read(source)
    assert log.source == "movielens"
    assert log.events.height == 141_695
    assert log.events["user"].n_unique() == 21_081
    assert log.events["item"].n_unique() == log.items.height == 12_611
    assert log.dropped == {}
    assert "The Adventures of Dollie (1908) | Action, Short" in log.items["text"]
