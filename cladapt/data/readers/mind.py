"""MIND's `behaviors.tsv` (impressions of news with the clicked ones marked) and `news.tsv` (the items).

The events are the clicked items of each impression at its time, and before a user's first impression the history that
it lists, at the same time: MIND gives histories no time of their own. The log's `notes` count them.
"""

from dataclasses import replace
from pathlib import Path

import polars as pl

from cladapt.data.readers._base import (
    NO_ITEMS,
    NO_REJECTS,
    RawLog,
    ReadOptions,
    files_of,
    hash_files,
    one_log,
    refuse_options,
)
from cladapt.data.readers._clean import Items, assemble, clean_items, parse_events
from cladapt.data.readers._parse import join_text, to_seconds
from cladapt.data.readers._scan import header_line
from cladapt.errors import DataError

LOGS = ("behaviors.tsv", "behaviours.tsv")
NEWS = "news.tsv"
FIELDS = ("impression", "user", "timestamp", "history", "impressions")
NEWS_FIELDS = ("item", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
TIME_FORMAT = "%m/%d/%Y %I:%M:%S %p"
CLICKED = "-1"


class MindReader:
    """Reads one log of impressions and its news."""

    name = "mind"
    expects = "behaviors.tsv (impression, user, time, history, impressions; no header) or its folder, with news.tsv"
    generic = False

    def schema(self, options: ReadOptions) -> dict[str, str]:
        return {
            "behaviors.tsv 2": "user id",
            "behaviors.tsv 3": "time such as 11/11/2019 9:05:58 AM",
            "behaviors.tsv 4": "item ids of the history, oldest first, spaces between",
            "behaviors.tsv 5": "item ids of the impression, spaces between: N1-1 clicked, N2-0 not",
            "news.tsv": "item id, category, subcategory, title, …; may be missing",
        }

    def detects(self, src: Path) -> bool:
        return bool(_logs(src))

    def read(self, src: Path, options: ReadOptions) -> RawLog:
        refuse_options(self, options)
        log = one_log(src, _logs(src), self, "behaviors.tsv")
        rows = _load(log, FIELDS)
        events, notes = _events(rows, str(log))
        parsed = parse_events(events, str(log), replace(options, time_format=TIME_FORMAT))
        news = log.with_name(NEWS)
        items = _read_news(news) if news.is_file() else (NO_ITEMS, NO_REJECTS)
        files = hash_files([log, *([news] if news.is_file() else [])], log.parent)
        return assemble(self.name, parsed, str(log), files, items, notes=notes)


def _logs(src: Path) -> list[Path]:
    return [path for path in files_of(src) if path.name in LOGS]


def _load(path: Path, fields: tuple[str, ...]) -> pl.DataFrame:
    """The lines of a MIND file that are not empty, by field, and `line`; `DataError` for another number of fields."""
    found = header_line(path).count("\t") + 1
    if found != len(fields):
        raise DataError(
            f"{path}: a line has {found} fields, expected {len(fields)}", f"tab between {', '.join(fields)}"
        )
    try:
        lines = pl.scan_lines(path, name="text", row_index_name="line", row_index_offset=1, glob=False)
        rows = lines.filter(pl.col("text").str.strip_chars() != "").collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}", "expected a UTF-8 text file") from error
    parts = rows["text"].str.split("\t")
    odd = rows.filter(parts.list.len() != len(fields))
    if not odd.is_empty():
        raise DataError(
            f"{path}:{odd['line'][0]}: the line has not {len(fields)} fields", f"tab between {', '.join(fields)}"
        )
    return pl.DataFrame({name: parts.list.get(k) for k, name in enumerate(fields)} | {"line": rows["line"]})


def _events(rows: pl.DataFrame, where: str) -> tuple[pl.DataFrame, dict[str, int]]:
    """user, item, timestamp and line of every event in the order of the log, and the oddities."""
    seconds = to_seconds(rows["timestamp"], f"{where}: timestamp", format=TIME_FORMAT)
    rows = rows.with_row_index("row").with_columns(seconds=seconds)
    ids = pl.col("impressions").str.split(" ").list.eval(pl.element().filter(pl.element().str.ends_with(CLICKED)))
    clicks = rows.with_columns(ids.list.eval(pl.element().str.strip_suffix(CLICKED)).alias("item"))
    first = rows.drop_nulls("seconds").sort("seconds", "row").unique("user", keep="first", maintain_order=True)
    history = first.with_columns(
        pl.col("history").str.split(" ").list.eval(pl.element().filter(pl.element() != "")).alias("item")
    )
    parts = [
        part.explode("item").drop_nulls("item").with_columns(part=pl.lit(k)) for k, part in enumerate((history, clicks))
    ]
    events = pl.concat(parts).sort("row", "part", maintain_order=True)
    unlabelled = rows["impressions"].str.contains(r"(^|\s)[^\s-]+(\s|$)")
    notes = {
        "events_from_first_histories": parts[0].height,
        "impressions_without_click": int((clicks["item"].list.len() == 0).sum()),
        "impressions_without_labels": int(unlabelled.sum()),
    }
    chosen = events.select("user", "item", "timestamp", pl.col("line").cast(pl.Int64))
    return chosen, {name: count for name, count in notes.items() if count}


def _read_news(path: Path) -> Items:
    """Items with the text `title | category | subcategory`."""
    rows = _load(path, NEWS_FIELDS)
    text = join_text(rows.select("title", "category", "subcategory"), str(path))
    item = rows["item"].set(rows["item"].str.strip_chars() == "", None)
    return clean_items(pl.DataFrame({"item": item, "text": text, "line": rows["line"]}), str(path))
