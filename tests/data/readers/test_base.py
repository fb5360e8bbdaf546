"""What all readers share: known events come back from every format, and a rejected row is told by file and line."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.data.readers import READERS, REJECTS, NoRows, RawLog, ReadOptions, read

Row = tuple[str, str, str]  # user, item, time
EVENTS: list[Row] = [
    ("u1", "i1", "100"),
    ("u2", "ü 2", "100"),
    ("u1", "007", "200"),
    ("u2", "i1", "250"),
    ("u1", "i1", "300"),
]
INDEX = {"i1": ("<a_0>", "<b_0>"), "ü 2": ("<a_0>", "<b_1>"), "007": ("<a_7>", "<b_7>")}
TITLES = {"i1": "One, or 1", "ü 2": "Zwei", "007": "Seven"}


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def table(rows: Sequence[Sequence[str]], separator: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator="\n").writerows(rows)
    return out.getvalue()


def per_user(rows: Sequence[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for user, item, _ in rows:
        found.setdefault(user, []).append(item)
    return found


def write_csv(folder: Path, rows: Sequence[Row]) -> Path:
    put(folder / "items.csv", table([("item", "title"), *TITLES.items()]))
    return put(folder / "log.csv", table([("user", "item", "timestamp"), *rows]))


def write_parquet(folder: Path, rows: Sequence[Row]) -> Path:
    pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row").write_parquet(folder / "log.parquet")
    pl.DataFrame({"item": list(TITLES), "title": list(TITLES.values())}).write_parquet(folder / "items.parquet")
    return folder / "log.parquet"


def write_recbole(folder: Path, rows: Sequence[Row]) -> Path:
    put(folder / "toy.item", "".join(f"{a}\t{b}\n" for a, b in [("item_id:token", "title:token_seq"), *TITLES.items()]))
    header = ("user_id:token", "item_id:token", "timestamp:float")
    return put(folder / "toy.inter", "".join("\t".join(row) + "\n" for row in [header, *rows]))


def write_u_data(folder: Path, rows: Sequence[Row]) -> Path:
    put(folder / "u.item", "".join(f"{item}|{title}||\n" for item, title in TITLES.items()))
    return put(folder / "u.data", "".join(f"{user}\t{item}\t5\t{time}\n" for user, item, time in rows))


def write_ratings_dat(folder: Path, rows: Sequence[Row]) -> Path:
    put(folder / "movies.dat", "".join(f"{item}::{title}::\n" for item, title in TITLES.items()))
    return put(folder / "ratings.dat", "".join(f"{user}::{item}::5::{time}\n" for user, item, time in rows))


def write_ratings_csv(folder: Path, rows: Sequence[Row]) -> Path:
    put(folder / "movies.csv", table([("movieId", "title", "genres"), *((i, t, "") for i, t in TITLES.items())]))
    rated = [(user, item, "5.0", time) for user, item, time in rows]
    return put(folder / "ratings.csv", table([("userId", "movieId", "rating", "timestamp"), *rated]))


def write_minionerec(folder: Path, rows: Sequence[Row]) -> Path:
    samples = [("user_id", "history_item_id", "item_id", "item_title", "item_sid", "timestamp")]
    history: dict[str, list[str]] = {user: [] for user, _, _ in rows}
    for user, item, time in rows:
        sid = "".join(INDEX.get(item, ""))
        samples.append((user, repr(history[user]), item, TITLES.get(item, ""), sid, time))
        history[user].append(item)
    return put(folder / "Toy.train.csv", table(samples))


def write_lcrec(folder: Path, rows: Sequence[Row]) -> Path:
    put(folder / "Toy.item.json", json.dumps({item: {"title": title} for item, title in TITLES.items()}))
    put(folder / "Toy.index.json", json.dumps(INDEX))
    return put(folder / "Toy.inter.json", json.dumps(per_user(rows)))


def write_peso(folder: Path, rows: Sequence[Row]) -> Path:
    put(folder / "Toy.index.json", json.dumps(INDEX))
    for k, (before, now) in enumerate([(rows[:0], rows[:3]), (rows[:3], rows[3:])]):
        value = {
            user: {"previous_block": per_user(before).get(user, []), "current_block": items}
            for user, items in per_user(now).items()
        }
        put(folder / f"Toy.all.block_{k}.json", json.dumps(value))
    return folder


Writer = Callable[[Path, Sequence[Row]], Path]
ROWS: dict[str, tuple[str, Writer, int]] = {  # file -> reader, writer, line of the first row
    "log.csv": ("csv", write_csv, 2),
    "log.parquet": ("parquet", write_parquet, 1),
    "toy.inter": ("recbole", write_recbole, 2),
    "u.data": ("movielens", write_u_data, 1),
    "ratings.dat": ("movielens", write_ratings_dat, 1),
    "ratings.csv": ("movielens", write_ratings_csv, 2),
    "Toy.train.csv": ("minionerec", write_minionerec, 2),
}
SEQUENCES: dict[str, tuple[str, Writer]] = {"lcrec": ("lcrec", write_lcrec), "peso": ("peso", write_peso)}
ALL = {**{name: entry[:2] for name, entry in ROWS.items()}, **SEQUENCES}


def events_of(log: RawLog) -> list[Row]:
    rows = log.events.sort("timestamp", "order").select("user", "item", pl.col("timestamp").cast(pl.String))
    return list(rows.iter_rows())


def rejects_of(log: RawLog) -> list[tuple[str, int | None, str, str]]:
    return [(Path(file).name, line, reason, value) for file, line, reason, value in log.rejects.iter_rows()]


@pytest.mark.parametrize("name", ALL)
def test_known_events_items_and_ids_come_back_exactly(name: str, tmp_path: Path) -> None:
    reader, write = ALL[name]
    source = write(tmp_path, EVENTS)
    beside = tmp_path / f"items.{reader}"
    log = read(source, options=ReadOptions(items=beside if beside.is_file() else None))
    assert log.source == reader
    if name in ROWS:
        assert events_of(log) == EVENTS
    in_order = log.events.sort("order").select("user", "item", pl.lit("").alias("time"))
    assert per_user(list(in_order.iter_rows())) == per_user(EVENTS)
    if reader == "peso":
        blocks = log.events.group_by("block").agg(pl.struct("user", "item").alias("e")).sort("block")["e"].to_list()
        found = [sorted((e["user"], e["item"]) for e in block) for block in blocks]
        assert found == [sorted(row[:2] for row in part) for part in (EVENTS[:3], EVENTS[3:])]
    else:
        assert log.events["block"].null_count() == len(EVENTS)
    assert dict(log.items.iter_rows()) == (dict.fromkeys(INDEX, "") if reader == "peso" else TITLES)
    assert log.index == (INDEX if reader in ("peso", "lcrec", "minionerec") else None)
    assert dict(log.rejects.schema) == REJECTS
    assert (log.rejects.height, log.dropped, log.out_of_order) == (0, {}, 0)


BAD: list[tuple[Row, str, str]] = [
    (("", "i1", "400"), "no_user", ""),
    (("u1", "", "400"), "no_item", ""),
    (("u1", "i1", ""), "no_time", ""),
    (("u1", "i1", "NaN"), "bad_time", "NaN"),
    (("u1", "i1", "soon"), "bad_time", "soon"),
    (("u1", "i1", "2024-02-30"), "bad_time", "2024-02-30"),
    (("u1", "i1", "100"), "duplicate", "u1 i1 100.0"),
    (("", "", ""), "no_user", ""),
]


@pytest.mark.parametrize("name", ROWS)
def test_a_reject_has_its_file_line_reason_and_value(name: str, tmp_path: Path) -> None:
    reader, write, first = ROWS[name]
    rows = [*EVENTS[:2], *(row for row, _, _ in BAD), *EVENTS[2:]]
    log = read(write(tmp_path, rows), reader)
    assert events_of(log) == EVENTS
    assert rejects_of(log) == [(name, first + 2 + k, reason, value) for k, (_, reason, value) in enumerate(BAD)]
    assert sum(log.dropped.values()) == len(BAD)


@pytest.mark.parametrize("name", ROWS)
def test_a_log_of_bad_rows_alone_tells_them_all(name: str, tmp_path: Path) -> None:
    reader, write, first = ROWS[name]
    bad = [entry for entry in BAD if entry[1] != "duplicate"]
    source = write(tmp_path, [row for row, _, _ in bad])
    with pytest.raises(NoRows, match=r"none of the 7 rows can be used \(bad_time: 3, no_item: 1, .*\)") as error:
        read(source, reader)
    expected = [(str(tmp_path / name), first + k, reason, value) for k, (_, reason, value) in enumerate(bad)]
    assert list(error.value.rejects.iter_rows()) == expected


def test_sequences_without_times_tell_the_file_and_keep_repeats(tmp_path: Path) -> None:
    rows = [*EVENTS, ("", "i1", ""), ("u2", "i1", "")]
    lcrec, peso = tmp_path / "l", tmp_path / "p"
    log = read(write_lcrec(lcrec, [*rows, ("u1", "", "")]))
    assert sorted(rejects_of(log)) == [
        ("Toy.inter.json", None, "no_item", ""),
        ("Toy.inter.json", None, "no_user", ""),
    ]
    assert per_user(list(log.events.sort("order").select("user", "item", pl.lit("").alias("time")).rows()))["u2"] == [
        "ü 2",
        "i1",
        "i1",
    ]
    blocks = read(write_peso(peso, rows))
    assert rejects_of(blocks) == [("Toy.all.block_1.json", None, "no_user", "")]
    assert blocks.events.filter(user="u2")["item"].to_list() == ["ü 2", "i1", "i1"]


@pytest.mark.parametrize("name", ROWS)
def test_events_out_of_time_order_are_counted_and_none_is_lost(name: str, tmp_path: Path) -> None:
    reader, write, _ = ROWS[name]
    rows = [EVENTS[k] for k in (4, 0, 1, 3, 2)]  # u1: 300, 100, 200; u2: 100, 250
    log = read(write(tmp_path, rows), reader)
    assert events_of(log) == EVENTS
    assert log.out_of_order == 1
    assert log.rejects.is_empty()


def test_fractions_of_seconds_are_counted_in_the_order_of_the_file(tmp_path: Path) -> None:
    log = read(
        write_csv(tmp_path, [("u", "late", "5.9"), ("u", "early", "5.25"), ("u", "last", "6"), ("v", "x", "5.5")])
    )
    assert log.events.sort("order")["item"].to_list() == ["early", "x", "late", "last"]
    assert log.events["timestamp"].to_list() == [5, 5, 6, 5]


def test_lines_count_the_line_breaks_in_quoted_fields(tmp_path: Path) -> None:
    text = (
        '\n\nuser,item,timestamp,note\na,x,1,"two\nlines"\r\n,x,2,"\n\n"\na,x,soon,\n\na,y,3,"say ""hi""\n"\nb,,3,z\n'
    )
    log = read(put(tmp_path / "log.csv", text))
    assert [(line, reason) for _, line, reason, _ in rejects_of(log)] == [
        (6, "no_user"),
        (9, "bad_time"),
        (10, "no_user"),
        (13, "no_item"),
    ]
    titled = 'user_id,history_item_id,item_title,item_id\na,[],"A\nB",x\n,[],,y\na,"[]","C\n",z\nb,oops,,z\n'
    with pytest.raises(Exception, match=r"T\.csv:7: history_item_id is 'oops'"):
        read(put(tmp_path / "m" / "T.csv", titled))
    log = read(put(tmp_path / "m" / "T.csv", titled.replace("oops", "[]")))
    assert rejects_of(log) == [("T.csv", 4, "no_user", "")]
    movies = 'movieId,title,genres\nx,"X\ny",\n,None,\n'
    put(tmp_path / "r" / "movies.csv", movies)
    put(tmp_path / "r" / "ratings.csv", "userId,movieId,rating,timestamp\na,x,1,1\na,,1,1\n")
    assert rejects_of(read(tmp_path / "r")) == [
        ("ratings.csv", 3, "no_item", ""),
        ("movies.csv", 4, "malformed_movie", "None"),
    ]


cell = st.text(st.sampled_from('ab"\n, '), max_size=5)


@settings(max_examples=25, deadline=None)
@given(notes=st.lists(cell, min_size=1, max_size=6), bad=st.sets(st.integers(0, 5), min_size=1))
def test_the_line_of_a_reject_is_where_its_row_begins(
    notes: list[str], bad: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text, expected = table([("user", "item", "timestamp", "note")]), []
    for k, note in enumerate(notes):
        if k in bad:
            expected.append(text.count("\n") + 1)
        text += table([("" if k in bad else "u", "i", str(k), note)])
    source = put(tmp_path_factory.mktemp("l") / "log.csv", text + "u,i,99,\n")
    assert read(source).rejects["line"].to_list() == expected


def test_rejects_of_several_files_have_their_own_lines(tmp_path: Path) -> None:
    for k, bad in ((1, "soon"), (2, "never")):
        rows = [("user", "item", "timestamp", "note"), ("a", "x", str(k), "line\n" * k), ("a", "x", bad, "")]
        put(tmp_path / "log" / f"{k}.csv", table(rows))
        write_parquet(tmp_path, [("a", "x", str(k)), ("a", "x", bad)]).rename(tmp_path / "log" / f"{k}.parquet")
    assert rejects_of(read(tmp_path / "log", "csv")) == [
        ("1.csv", 4, "bad_time", "soon"),
        ("2.csv", 5, "bad_time", "never"),
    ]
    assert rejects_of(read(tmp_path / "log", "parquet")) == [
        ("1.parquet", 2, "bad_time", "soon"),
        ("2.parquet", 2, "bad_time", "never"),
    ]


def test_numbers_that_are_not_finite_are_no_times(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"user": [1, 1, 1, 1], "item": [1, 2, 3, 4], "timestamp": [1.0, float("nan"), float("inf"), None]}
    )
    frame.write_parquet(tmp_path / "log.parquet")
    assert [row[1:] for row in rejects_of(read(tmp_path / "log.parquet"))] == [
        (2, "bad_time", "NaN"),
        (3, "bad_time", "inf"),
        (4, "no_time", ""),
    ]


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    log = read(write_csv(tmp_path, [*EVENTS, ("u1", "i1", "x" * 500)]))
    assert log.rejects["value"].to_list() == ["x" * 80]


WEIGHTS = [
    ("0", "bad_weight"),
    ("-1", "bad_weight"),
    ("NaN", "bad_weight"),
    ("inf", "bad_weight"),
    ("heavy", "bad_weight"),
    ("", "no_weight"),
]


@pytest.mark.parametrize("format", ["csv", "recbole", "parquet"])
def test_good_weights_are_kept_and_bad_ones_rejected(format: str, tmp_path: Path) -> None:
    rows = [("a", "x", "1", "0.5"), *(("a", "x", "2", weight) for weight, _ in WEIGHTS), ("b", "y", "3", " 2e1 ")]
    names = ["user", "item", "timestamp", "w"]
    columns = ReadOptions(weight="w")
    if format == "csv":
        source, first = put(tmp_path / "log.csv", table([names, *rows])), 2
    elif format == "recbole":
        header = "user_id:token\titem_id:token\ttimestamp:float\tw:float\n"
        source, first = put(tmp_path / "toy.inter", header + "".join("\t".join(row) + "\n" for row in rows)), 2
    else:
        source, first = tmp_path / "log.parquet", 1
        pl.DataFrame(rows, schema=names, orient="row").write_parquet(source)
    log = read(source, options=columns)
    assert log.events["weight"].to_list() == [0.5, 20.0]
    expected = [(source.name, first + 1 + k, reason, weight) for k, (weight, reason) in enumerate(WEIGHTS)]
    assert rejects_of(log) == expected
    assert read(source).events.columns == [name for name in log.events.columns if name != "weight"]


def test_weights_may_be_numbers_and_what_cannot_be_one_is_refused(tmp_path: Path) -> None:
    base = pl.DataFrame({"user": ["a", "a", "a"], "item": ["x", "y", "z"], "timestamp": [1, 2, 3]})
    base.with_columns(w=pl.Series([3, 0, None])).write_parquet(tmp_path / "log.parquet")
    log = read(tmp_path / "log.parquet", options=ReadOptions(weight="w"))
    assert log.events["weight"].to_list() == [3.0]
    assert [row[1:] for row in rejects_of(log)] == [(2, "bad_weight", "0"), (3, "no_weight", "")]
    base.with_columns(w=pl.Series([True, False, None])).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(Exception, match=r"log\.parquet: weight: a column of type Boolean holds no weights"):
        read(tmp_path / "log.parquet", options=ReadOptions(weight="w"))


def test_the_schema_names_what_the_source_must_hold() -> None:
    for reader in READERS.values():
        schema = reader.schema(ReadOptions())
        assert schema
        assert all(schema.values())
    full = ReadOptions("u", "i", "", "b", "w", Path("t.csv"), ("title",))
    for name in ("csv", "jsonl", "parquet", "arrow"):
        assert list(READERS[name].schema(ReadOptions())) == ["user", "item", "timestamp"]
        assert list(READERS[name].schema(full)) == ["u", "i", "b", "w", "item table t.csv"]
    typed = ("<D>.inter user_id:token", "<D>.inter item_id:token", "<D>.inter timestamp:float", "<D>.inter w:float")
    assert list(READERS["recbole"].schema(ReadOptions(weight="w"))) == [*typed, "<D>.item item_id:token"]
