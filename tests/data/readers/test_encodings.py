"""One log in every encoding that is read gives equal events and equal item texts."""

import gzip
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.data.readers import READERS, ReadOptions, read

DAY = 86_400
START = 1_573_430_400 + 9 * 3600 + 5 * 60  # 2019-11-11 09:05 UTC
Event = tuple[str, str, int]
EVENTS: list[Event] = [  # with a tie, a repeated pair and an id that is no number
    ("u1", "N1", START),
    ("u2", "N 2", START),
    ("u1", "007", START + DAY),
    ("u2", "N1", START + 2 * DAY + 30 * 60),
    ("u1", "N1", START + 30 * DAY),
]
WORDS = [(user, item.replace(" ", "_"), time) for user, item, time in EVENTS]  # where spaces part ids
TITLES = {"N1": "One, or 1", "N 2": "Zwei", "N_2": "Zwei", "007": "Seven"}


def title(item: str) -> str:
    return TITLES[item]


def moments(form: str) -> list[str]:
    return [datetime.fromtimestamp(time, UTC).strftime(form) for _, _, time in EVENTS]


def frame(times: list[Any] | None = None) -> pl.DataFrame:
    users, items, seconds = zip(*EVENTS, strict=True)
    columns = {"user": users, "item": items, "timestamp": times or seconds, "title": [title(item) for item in items]}
    return pl.DataFrame({name: list(values) for name, values in columns.items()})


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def csv_file(name: str, separator: str = ",", times: list[Any] | None = None) -> Callable[[Path], Path]:
    return lambda folder: put(folder / name, frame(times).write_csv(separator=separator))


def packed_csv(name: str, compression: Any, separator: str = ",") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        frame().write_csv(folder / name, compression=compression, separator=separator, check_extension=False)
        return folder / name

    return write


def parquet_folder(folder: Path) -> Path:
    (folder / "log").mkdir()
    for k in range(2):
        frame()[3 * k : 3 * k + 3].write_parquet(folder / "log" / f"part-{k}.parquet")
    return folder / "log"


def hive_folder(folder: Path) -> Path:
    """Partitioned by item: the ids are in the names of folders."""
    rows = frame().with_row_index("n")
    for n, row in enumerate(rows.partition_by("n")):
        place = folder / "log" / f"part={n}" / f"item={row['item'][0].replace(' ', '%20')}"
        place.mkdir(parents=True)
        row.drop("item", "n").write_parquet(place / "0.parquet")
    return folder / "log"


def arrow_stream(folder: Path) -> Path:
    frame().write_ipc_stream(folder / "log.arrow")
    return folder / "log.arrow"


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def u_data(folder: Path) -> Path:
    put(folder / "u.item", "".join(f"{item}|{title(item)}||\n" for item in ("N1", "N 2", "007")))
    return put(folder / "u.data", "".join(f"{user}\t{item}\t5\t{time}\n" for user, item, time in EVENTS))


def ratings_dat(folder: Path) -> Path:
    put(folder / "movies.dat", "".join(f"{item}::{title(item)}::\n" for item in ("N1", "N 2", "007")))
    return put(folder / "ratings.dat", "".join(f"{user}::{item}::5::{time}\n" for user, item, time in EVENTS))


def ratings_csv(folder: Path) -> Path:
    rows = frame().select(userId="user", movieId="item", rating=pl.lit(4.5), timestamp="timestamp")
    movies = frame().select(movieId="item", title="title", genres=pl.lit("")).unique("movieId", maintain_order=True)
    put(folder / "movies.csv", movies.write_csv())
    return put(folder / "ratings.csv", rows.write_csv())


def recbole(folder: Path) -> Path:
    put(folder / "toy.item", "item_id:token\ttitle:token_seq\n" + "".join(f"{i}\t{t}\n" for i, t in TITLES.items()))
    lines = "".join("\t".join(map(str, row)) + "\n" for row in EVENTS)
    return put(folder / "toy.inter", "user_id:token\titem_id:token\ttimestamp:float\n" + lines)


def sequences() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for user, item, _ in EVENTS:
        found.setdefault(user, []).append(item)
    return found


def lcrec(folder: Path) -> Path:
    put(folder / "Toy.item.json", json.dumps({item: {"title": text} for item, text in TITLES.items()}))
    return put(folder / "Toy.inter.json", json.dumps(sequences()))


def peso(folder: Path) -> Path:
    value = {user: {"previous_block": [], "current_block": items} for user, items in sequences().items()}
    return put(folder / "Toy.all.block_0.json", json.dumps(value)).parent


def minionerec(folder: Path) -> Path:
    before: dict[str, list[str]] = {}
    rows = []
    for user, item, time in EVENTS:
        past = before.setdefault(user, [])
        sample = {"user_id": user, "history_item_id": repr(past), "item_id": item}
        rows.append({**sample, "item_title": title(item), "timestamp": time})
        past.append(item)
    return put(folder / "Toy.train.csv", pl.DataFrame(rows).write_csv())


def amazon2018(user_field: str, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        rows = [{"overall": 5.0, user_field: u, "asin": i, "unixReviewTime": t, "summary": "x"} for u, i, t in EVENTS]
        meta = [{"asin": item, "title": text, "description": ["a", "b"]} for item, text in TITLES.items()]
        content, products = json_lines(rows).encode(), json_lines(meta).encode()
        packed = name.endswith(".gz")
        put(folder / f"meta_{name}", gzip.compress(products) if packed else products)
        return put(folder / name, gzip.compress(content) if packed else content)

    return write


def amazon2023(folder: Path) -> Path:
    rows = [
        {"rating": 4.0, "title": "?", "asin": "variant", "parent_asin": i, "user_id": u, "timestamp": t * 1000 + 250}
        for u, i, t in EVENTS
    ]
    meta = [{"title": text, "store": None, "categories": [], "parent_asin": item} for item, text in TITLES.items()]
    put(folder / "meta_Toys.jsonl", json_lines(meta))
    return put(folder / "Toys.jsonl", json_lines(rows))


def amazon2023_csv(folder: Path) -> Path:
    rows = frame().select(user_id="user", parent_asin="item", rating=pl.lit(5.0), timestamp=pl.col("timestamp") * 1000)
    put(folder / "meta_Toys.jsonl", json_lines([{"title": t, "parent_asin": i} for i, t in TITLES.items()]))
    return put(folder / "Toys.csv", rows.write_csv())


def mind(folder: Path) -> Path:
    """An impression an event, with others that were not clicked; nobody has a history."""
    lines = []
    for n, (user, item, time) in enumerate(WORDS):
        moment = datetime.fromtimestamp(time, UTC)
        when = f"{moment:%m/%d/%Y} {moment.hour % 12 or 12}:{moment:%M:%S %p}"
        lines.append(f"{n}\t{user}\t{when}\t\tN9-0 {item}-1 N8-0\n")
    put(folder / "news.tsv", "".join(f"{item}\t\t\t{text}\t\t\t\t\n" for item, text in TITLES.items()))
    return put(folder / "behaviors.tsv", "".join(lines))


def steam(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        lines = [
            f"{{u'username': {user!r}, u'product_id': u{item!r}, u'date': u'{day}', u'text': u'it\\'s', 'n': 0.1}}\n"
            for (user, item, _), day in zip(EVENTS, moments("%Y-%m-%d"), strict=True)
        ]
        games = [f"{{u'app_name': {text!r}, u'price': 4.99, u'id': {item!r}}}\n" for item, text in TITLES.items()]
        out = io.BytesIO("".join(lines).encode())
        put(folder / "steam_games.json", "".join(games))
        return put(folder / name, gzip.compress(out.getvalue()) if name.endswith(".gz") else out.getvalue())

    return write


FROM_LOG = ReadOptions(text=("title",))
Encoding = tuple[str, Callable[[Path], Path], ReadOptions]
ENCODINGS: dict[str, Encoding] = {
    "csv": ("csv", csv_file("log.csv"), FROM_LOG),
    "csv ;": ("csv", csv_file("log.csv", ";"), FROM_LOG),
    "csv |": ("csv", csv_file("log.csv", "|"), FROM_LOG),
    "tsv": ("csv", csv_file("log.tsv", "\t"), FROM_LOG),
    "csv.gz": ("csv", packed_csv("log.csv.gz", "gzip"), FROM_LOG),
    "csv.zst": ("csv", packed_csv("log.csv.zst", "zstd"), FROM_LOG),
    "tsv.gz": ("csv", packed_csv("log.tsv.gz", "gzip", "\t"), FROM_LOG),
    "csv, ISO dates": ("csv", csv_file("log.csv", times=moments("%Y-%m-%dT%H:%M:%SZ")), FROM_LOG),
    "csv, a form of its own": (
        "csv",
        csv_file("log.csv", times=moments("%d-%m-%Y %H:%M")),
        ReadOptions(text=("title",), time_format="%d-%m-%Y %H:%M"),
    ),
    "csv, ms": (
        "csv",
        csv_file("log.csv", times=[1000 * time + 250 for _, _, time in EVENTS]),
        ReadOptions(text=("title",), time_unit="ms"),
    ),
    "parquet": ("parquet", lambda folder: _written(frame().write_parquet, folder / "log.parquet"), FROM_LOG),
    "parquet, datetimes": (
        "parquet",
        lambda folder: _written(frame().with_columns(pl.from_epoch("timestamp")).write_parquet, folder / "log.parquet"),
        FROM_LOG,
    ),
    "parquet folder": ("parquet", parquet_folder, FROM_LOG),
    "parquet, hive": ("parquet", hive_folder, FROM_LOG),
    "jsonl": ("jsonl", lambda folder: put(folder / "log.jsonl", json_lines(frame().to_dicts())), FROM_LOG),
    "ndjson": ("jsonl", lambda folder: put(folder / "log.ndjson", json_lines(frame().to_dicts())), FROM_LOG),
    "jsonl.gz": (
        "jsonl",
        lambda folder: put(folder / "log.jsonl.gz", gzip.compress(json_lines(frame().to_dicts()).encode())),
        FROM_LOG,
    ),
    "arrow": ("arrow", lambda folder: _written(frame().write_ipc, folder / "log.arrow"), FROM_LOG),
    "feather": (
        "arrow",
        lambda folder: _written(lambda path: frame().write_ipc(path, compression="lz4"), folder / "log.feather"),
        FROM_LOG,
    ),
    "arrow stream": ("arrow", arrow_stream, FROM_LOG),
    "u.data": ("movielens", u_data, ReadOptions()),
    "ratings.dat": ("movielens", ratings_dat, ReadOptions()),
    "ratings.csv": ("movielens", ratings_csv, ReadOptions()),
    "recbole": ("recbole", recbole, ReadOptions()),
    "lcrec": ("lcrec", lcrec, ReadOptions()),
    "peso": ("peso", peso, ReadOptions()),
    "minionerec": ("minionerec", minionerec, ReadOptions()),
    "amazon2018": ("amazon2018", amazon2018("reviewerID", "Toys_5.json"), ReadOptions()),
    "amazon2018, gz": ("amazon2018", amazon2018("reviewerID", "Toys.json.gz"), ReadOptions()),
    "amazon2018, ReviewerID": ("amazon2018", amazon2018("ReviewerID", "Toys.jsonl"), ReadOptions()),
    "amazon2023": ("amazon2023", amazon2023, ReadOptions()),
    "amazon2023, csv": ("amazon2023", amazon2023_csv, ReadOptions()),
    "mind": ("mind", mind, ReadOptions()),
    "steam": ("steam", steam("steam_reviews.json"), ReadOptions()),
    "steam, gz": ("steam", steam("steam_reviews.json.gz"), ReadOptions()),
}
UNTIMED = ("lcrec", "peso")


def _written(write: Callable[[Path], Any], path: Path) -> Path:
    write(path)
    return path


def test_every_format_is_covered() -> None:
    assert {format for format, _, _ in ENCODINGS.values()} == set(READERS)
    assert len(ENCODINGS) >= 20


@pytest.mark.parametrize("name", ENCODINGS)
def test_one_log_in_any_encoding_gives_equal_events(name: str, tmp_path: Path) -> None:
    format, write, options = ENCODINGS[name]
    source = write(tmp_path)
    log = read(source, options=options)
    truth = WORDS if format == "mind" else EVENTS
    if format == "steam":  # its times are days
        truth = [(user, item, time - time % DAY) for user, item, time in truth]
    assert log.source == format
    assert (log.dropped, log.out_of_order, log.warnings, log.losses) == ({}, 0, [], [])
    if format in UNTIMED:
        found: dict[str, list[str]] = {}
        for user, item in log.events.sort("order").select("user", "item").iter_rows():
            found.setdefault(user, []).append(item)
        assert found == sequences()
        assert log.events["timestamp"].null_count() == len(truth)
    else:
        assert log.events.sort("timestamp", "order").select("user", "item", "timestamp").rows() == truth
    assert log.rejects.is_empty()
    texts = dict(log.items.rows())
    assert format == "peso" or {item: texts[item] for _, item, _ in truth} == {i: title(i) for _, i, _ in truth}
    again_as, again = ReadOptions.from_settings(json.loads(json.dumps(log.settings)))
    assert (again_as, again) == (format, options)
    assert read(source, again_as, again).events.equals(log.events)
