"""MovieLens and what copies its files: `u.data`, `ratings.dat` (MovieTweetings too) and `ratings.csv`."""

from pathlib import Path

import polars as pl

from cladapt.data.readers._base import (
    NO_ITEMS,
    Columns,
    RawLog,
    clean_events,
    clean_items,
    hash_files,
    parse_events,
    refuse_columns,
)
from cladapt.data.readers.tables import header_line, load
from cladapt.errors import DataError

RATINGS = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}  # log -> its movies
RATING_LINES = {
    "u.data": r"^(?P<user>[^\t]+)\t(?P<item>[^\t]+)\t[^\t]*\t(?P<timestamp>[^\t]*)$",
    "ratings.dat": r"^(?P<user>[^:]+)::(?P<item>[^:]+)::[^:]*::(?P<timestamp>[^:]*)$",
}
MOVIE_LINE = r"^(?P<item>[^:]+)::(?P<title>.*?)(?:::(?P<genres>[^:]*))?$"
FLAGS_FROM = 5  # u.item: id | title | release | video release | address | one flag per genre


class MovieLensReader:
    """Reads one MovieLens log and the movies beside it; a rating is an interaction whatever its value."""

    name = "movielens"
    expects = "u.data, ratings.dat or ratings.csv (userId,movieId,…), or a folder with one of them"
    generic = False

    def detects(self, src: Path) -> bool:
        return bool(self._logs(src))

    def read(self, src: Path, columns: Columns) -> RawLog:
        refuse_columns(self, columns)
        logs = self._logs(src)
        if len(logs) != 1:
            found = " and ".join(path.name for path in logs) or "no MovieLens log"
            raise DataError(f"{src} has {found}, expected one log", f"expected {self.expects}")
        log = logs[0]
        parsed = _parse_csv(log) if log.suffix == ".csv" else _parse_lines(log)
        events, dropped = clean_events(parsed, str(log))
        movies = log.with_name(RATINGS[log.name])
        items, dropped_movies, notes = _read_movies(movies) if movies.is_file() else (NO_ITEMS, {}, {})
        beside = (movies, log.with_name("u.genre")) if log.name == "u.data" else (movies,)
        files = hash_files([log, *filter(Path.is_file, beside)], log.parent)
        return RawLog(events, items, None, dropped | dropped_movies, files, self.name, notes)

    def _logs(self, src: Path) -> list[Path]:
        found = [src / name for name in RATINGS] if src.is_dir() else [src] if src.name in RATINGS else []
        return [path for path in found if path.is_file() and (path.suffix != ".csv" or _is_movielens_csv(path))]


def _is_movielens_csv(path: Path) -> bool:
    return {"userId", "movieId", "timestamp"} <= set(header_line(path).split(","))


def _parse_csv(path: Path) -> pl.DataFrame:
    table = load(path, ["userId", "movieId", "timestamp"], "restore the header userId,movieId,rating,timestamp")
    return parse_events(table.rename({"userId": "user", "movieId": "item"}), str(path))


def _parse_lines(path: Path) -> pl.DataFrame:
    fields = _lines(path).str.extract_groups(RATING_LINES[path.name]).struct.unnest()
    malformed = pl.when(pl.col("user").is_null()).then(pl.lit("malformed_line")).alias("reason")
    return parse_events(fields.with_columns(malformed), str(path))


def _lines(path: Path) -> pl.Series:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # GroupLens' own files before 2015
    # not splitlines: it also cuts at characters that occur inside titles
    lines = pl.Series("line", text.split("\n"), dtype=pl.String).str.strip_chars_end("\r")
    return lines.filter(lines != "")


def _movies_dat(path: Path) -> pl.DataFrame:
    return _lines(path).str.extract_groups(MOVIE_LINE).struct.unnest()


def _movies_csv(path: Path) -> pl.DataFrame:
    table = load(path, ["movieId", "title", "genres"], "restore the header movieId,title,genres")
    return table.rename({"movieId": "item"})


def _u_item(path: Path) -> pl.DataFrame:
    genre_file = path.with_name("u.genre")
    names = _lines(genre_file).str.split("|").list.first().to_list() if genre_file.is_file() else []
    fields = pl.col("line").str.split("|")
    flags = [
        pl.when(fields.list.get(FLAGS_FROM + k, null_on_oob=True) == "1").then(pl.lit(name))
        for k, name in enumerate(names)
    ]
    genres = pl.concat_str(flags, separator="|", ignore_nulls=True) if flags else pl.lit(None, dtype=pl.String)
    return (
        _lines(path)
        .to_frame()
        .select(
            fields.list.get(0, null_on_oob=True).alias("item"),
            fields.list.get(1, null_on_oob=True).alias("title"),
            genres.alias("genres"),
        )
    )


MOVIES = {"u.item": _u_item, "movies.dat": _movies_dat, "movies.csv": _movies_csv}


def _read_movies(path: Path) -> tuple[pl.DataFrame, dict[str, int], dict[str, int]]:
    """Items with the text `title | genre, genre`, the rows dropped and the oddities seen."""
    movies = MOVIES[path.name](path)
    usable = movies.filter(pl.col("item").str.len_chars() > 0, pl.col("title").str.strip_chars().str.len_chars() > 0)
    named = ~pl.col("genres").is_in(["", "unknown", "(no genres listed)"])
    genres = pl.when(named).then(pl.col("genres").str.replace_all("|", ", ", literal=True))
    usable = usable.with_columns(genres=genres)
    items, dropped = clean_items(
        usable.select("item", pl.concat_str("title", "genres", separator=" | ", ignore_nulls=True).alias("text"))
    )
    malformed, unnamed = movies.height - usable.height, usable["genres"].null_count()
    return (
        items,
        dropped | ({"malformed_movie": malformed} if malformed else {}),
        {"movies_without_genres": unnamed} if unnamed else {},
    )
