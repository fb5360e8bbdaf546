"""MovieLens and what copies its files: `u.data`, `ratings.dat` (MovieTweetings too) and `ratings.csv`."""

from pathlib import Path

import polars as pl

from cladapt.data.readers._base import (
    NO_ITEMS,
    NO_REJECTS,
    Columns,
    NoRows,
    RawLog,
    clean_events,
    clean_items,
    hash_files,
    parse_events,
    refuse_columns,
)
from cladapt.data.readers.tables import exact_rejects, header_line, load, row_numbers
from cladapt.errors import DataError

RATINGS = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}  # log -> its movies
RATING_LINES = {
    "u.data": r"^(?P<user>[^\t]*)\t(?P<item>[^\t]*)\t[^\t]*\t(?P<timestamp>[^\t]*)$",
    "ratings.dat": r"^(?P<user>[^:]*)::(?P<item>[^:]*)::[^:]*::(?P<timestamp>[^:]*)$",
}
MOVIE_LINE = r"^(?P<item>[^:]+)::(?P<title>.*?)(?:::(?P<genres>[^:]*))?$"
FLAGS_FROM = 5  # u.item: id | title | release | video release | address | one flag per genre


class MovieLensReader:
    """Reads one MovieLens log and the movies beside it; a rating is an interaction whatever its value."""

    name = "movielens"
    expects = "u.data, ratings.dat or ratings.csv (userId,movieId,…), or a folder with one of them"
    generic = False

    def schema(self, columns: Columns) -> dict[str, str]:
        return {
            "u.data": "user id, item id, rating, unix seconds, tab between",
            "ratings.dat": "user::item::rating::unix seconds",
            "ratings.csv": "userId,movieId,rating,timestamp",
            **{name: f"the movies of {log}: id, title, genres" for log, name in RATINGS.items()},
        }

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
        try:
            events, rejects = clean_events(parsed, str(log))
        except NoRows as error:
            raise NoRows(error.message, error.hint, exact_rejects(error.rejects)) from error
        movies = log.with_name(RATINGS[log.name])
        items, movie_rejects, notes = _read_movies(movies) if movies.is_file() else (NO_ITEMS, NO_REJECTS, {})
        beside = (movies, log.with_name("u.genre")) if log.name == "u.data" else (movies,)
        all_rejects = exact_rejects(pl.concat([rejects, movie_rejects]))
        files = hash_files([log, *filter(Path.is_file, beside)], log.parent)
        return RawLog(events, items, None, all_rejects, files, self.name, notes)

    def _logs(self, src: Path) -> list[Path]:
        found = [src / name for name in RATINGS] if src.is_dir() else [src] if src.name in RATINGS else []
        return [path for path in found if path.is_file() and (path.suffix != ".csv" or _is_movielens_csv(path))]


def _is_movielens_csv(path: Path) -> bool:
    return {"userId", "movieId", "timestamp"} <= set(header_line(path).split(","))


def _parse_csv(path: Path) -> pl.DataFrame:
    table = load(path, ["userId", "movieId", "timestamp"], "restore the header userId,movieId,rating,timestamp")
    named = table.select(
        row_numbers(path, table), pl.col("userId").alias("user"), pl.col("movieId").alias("item"), "timestamp"
    )
    return parse_events(named, str(path))


def _parse_lines(path: Path) -> pl.DataFrame:
    lines = numbered_lines(path)
    fields = lines.with_columns(lines["text"].str.extract_groups(RATING_LINES[path.name]).struct.unnest())
    malformed = pl.when(pl.col("user").is_null())
    reason, value = malformed.then(pl.lit("malformed_line")), malformed.then(pl.col("text"))
    return parse_events(fields.with_columns(reason=reason, value=value), str(path))


def numbered_lines(path: Path) -> pl.DataFrame:
    """The lines of a text file that are not empty: line Int64 from 1, text String."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # GroupLens' own files before 2015
    # not splitlines: it also cuts at characters that occur inside titles
    lines = pl.Series("text", [text]).str.split("\n").explode().str.strip_chars_end("\r").to_frame()
    return lines.select(pl.int_range(1, pl.len() + 1).alias("line"), "text").filter(pl.col("text") != "")


def _movies_dat(path: Path) -> pl.DataFrame:
    lines = numbered_lines(path)
    return lines.with_columns(lines["text"].str.extract_groups(MOVIE_LINE).struct.unnest())


def _movies_csv(path: Path) -> pl.DataFrame:
    table = load(path, ["movieId", "title", "genres"], "restore the header movieId,title,genres")
    return table.select(
        row_numbers(path, table), pl.col("movieId").alias("item"), "title", "genres", pl.col("title").alias("text")
    )


def _u_item(path: Path) -> pl.DataFrame:
    genre_file = path.with_name("u.genre")
    names = numbered_lines(genre_file)["text"].str.split("|").list.first().to_list() if genre_file.is_file() else []
    fields = pl.col("text").str.split("|")
    flags = [
        pl.when(fields.list.get(FLAGS_FROM + k, null_on_oob=True) == "1").then(pl.lit(name))
        for k, name in enumerate(names)
    ]
    genres = pl.concat_str(flags, separator="|", ignore_nulls=True) if flags else pl.lit(None, dtype=pl.String)
    return numbered_lines(path).select(
        "line",
        fields.list.get(0, null_on_oob=True).alias("item"),
        fields.list.get(1, null_on_oob=True).alias("title"),
        genres.alias("genres"),
        "text",
    )


MOVIES = {"u.item": _u_item, "movies.dat": _movies_dat, "movies.csv": _movies_csv}


def _read_movies(path: Path) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Items with the text `title | genre, genre`, the rejected rows and the oddities seen."""
    movies = MOVIES[path.name](path)
    whole = (pl.col("item").str.len_chars() > 0) & (pl.col("title").str.strip_chars().str.len_chars() > 0)
    malformed = pl.when(~whole.fill_null(False))
    named = ~pl.col("genres").is_in(["", "unknown", "(no genres listed)"])
    rows = movies.select(
        "line",
        "item",
        malformed.then(pl.lit("malformed_movie")).alias("reason"),
        malformed.then(pl.col("text")).alias("value"),
        "title",
        pl.when(named).then(pl.col("genres").str.replace_all("|", ", ", literal=True)).alias("genres"),
    )
    unnamed = rows.filter(pl.col("reason").is_null())["genres"].null_count()
    texts = pl.concat_str("title", "genres", separator=" | ", ignore_nulls=True)
    items, rejects = clean_items(rows.with_columns(text=texts), str(path))
    return items, rejects, {"movies_without_genres": unnamed} if unnamed else {}
