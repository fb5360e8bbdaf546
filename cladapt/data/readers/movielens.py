"""MovieLens and what copies its files: `u.data`, `ratings.dat` (MovieTweetings too) and `ratings.csv`."""

from pathlib import Path

import polars as pl

from cladapt.data.readers._base import (
    NO_ITEMS,
    NO_REJECTS,
    RawLog,
    ReadOptions,
    hash_files,
    one_log,
    refuse_options,
)
from cladapt.data.readers._clean import Items, assemble, clean_items, select_rows
from cladapt.data.readers._scan import Table, header_line, load
from cladapt.data.readers._where import columns_of
from cladapt.errors import DataError

RATINGS = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}  # log -> its movies
RATING_LINES = {
    "u.data": r"^(?P<user>[^\t]*)\t(?P<item>[^\t]*)\t(?P<rating>[^\t]*)\t(?P<timestamp>[^\t]*)$",
    "ratings.dat": r"^(?P<user>[^:]*)::(?P<item>[^:]*)::(?P<rating>[^:]*)::(?P<timestamp>[^:]*)$",
}
LINE_NAMES = {"user": "user", "item": "item", "timestamp": "timestamp", "rating": "rating"}
CSV_NAMES = {"user": "userId", "item": "movieId", "timestamp": "timestamp", "rating": "rating"}
MOVIE_LINE = r"^(?P<item>[^:]+)::(?P<title>.*?)(?:::(?P<genres>[^:]*))?$"
FLAGS_FROM = 5  # u.item: id | title | release | video release | address | one flag per genre


class MovieLensReader:
    """Reads one MovieLens log and its movies; a rating is an interaction whatever its value, unless `--min-rating`."""

    name = "movielens"
    expects = "u.data, ratings.dat or ratings.csv (userId,movieId,…), or a folder with one of them"
    generic = False

    def schema(self, options: ReadOptions) -> dict[str, str]:
        return {
            "u.data": "user id, item id, rating, unix seconds, tab between",
            "ratings.dat": "user::item::rating::unix seconds",
            "ratings.csv": "userId,movieId,rating,timestamp",
            **{name: f"the movies of {log}: id, title, genres" for log, name in RATINGS.items()},
        }

    def detects(self, src: Path) -> bool:
        return bool(self._logs(src))

    def read(self, src: Path, options: ReadOptions) -> RawLog:
        refuse_options(self, options, ("where", "min_rating"))
        log = one_log(src, self._logs(src), self, "MovieLens log")
        is_csv = log.suffix == ".csv"
        names = dict(CSV_NAMES if is_csv else LINE_NAMES)
        table = _csv_table(log) if is_csv else _line_table(log)
        conditions = columns_of(options.where, table.data.columns, log)
        rated = names["rating"] in table.data.columns
        if options.min_rating is None or not rated:
            names.pop("rating")
        if options.min_rating is not None and not rated:
            raise DataError(f"{log} has no column 'rating', which --min-rating needs", "leave out --min-rating")
        parsed = select_rows(table, names, options, log)
        movies = log.with_name(RATINGS[log.name])
        items, notes = _read_movies(movies) if movies.is_file() else ((NO_ITEMS, NO_REJECTS), {})
        if rated and options.min_rating is None and "rating" not in conditions:
            notes["ratings_ignored"] = parsed.height
        others = (movies, log.with_name("u.genre")) if log.name == "u.data" else (movies,)
        files = hash_files([log, *filter(Path.is_file, others)], log.parent)
        return assemble(self.name, parsed, str(log), files, items, notes=notes)

    def _logs(self, src: Path) -> list[Path]:
        found = [src / name for name in RATINGS] if src.is_dir() else [src] if src.name in RATINGS else []
        return [path for path in found if path.is_file() and (path.suffix != ".csv" or _is_movielens_csv(path))]


def _is_movielens_csv(path: Path) -> bool:
    return {"userId", "movieId", "timestamp"} <= set(header_line(path).split(","))


def _csv_table(path: Path) -> Table:
    wanted = [name for name in CSV_NAMES.values() if name != "rating" or "rating" in header_line(path).split(",")]
    return load(path, wanted, "restore the header userId,movieId,rating,timestamp")


def _line_table(path: Path) -> Table:
    lines = numbered_lines(path)
    fields = lines["text"].str.extract_groups(RATING_LINES[path.name]).struct.unnest()
    malformed = lines["text"].set(fields["user"].is_not_null(), None)
    return Table(fields, lines["line"].cast(pl.Int64), malformed, tuple(fields.columns))


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
    return table.data.select(
        table.line, pl.col("movieId").alias("item"), "title", "genres", pl.col("title").alias("text")
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


def _read_movies(path: Path) -> tuple[Items, dict[str, int]]:
    """Items with the text `title | genre, genre` and the rejected rows; and the oddities seen."""
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
    items = clean_items(rows.with_columns(text=texts), str(path))
    return items, {"movies_without_genres": unnamed} if unnamed else {}
