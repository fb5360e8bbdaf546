"""Stream directories that grow: equal files, nothing half written, rows that wait, items that are withdrawn."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.config import BlocksConfig
from cladapt.data import schema
from cladapt.data.readers import NoRows, ReadOptions
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError, EnvironmentProblem
from cladapt.lock import locked
from cladapt.pipeline import growth, streams
from cladapt.pipeline.growth import append_data, retire_items

DAY, START = 86_400, 1_704_067_200  # 2024-01-01
MONTHS = ("2024-02-01", "2024-03-01", "2024-04-01")
ENDS = [START + days * DAY for days in (0, 31, 60, 91, 121)]
OPTIONS = ReadOptions("who", "what", "when", weight="stars", text=("title",), where=("stars > 1",), time_unit="ms")


def made(seed: int = 0, n: int = 400) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = [
        {
            "who": f"u{draw.randrange(15)}",
            "what": f"i{draw.randrange(25)}",
            "when": 1000 * draw.randrange(START, ENDS[-1]),
            "stars": draw.randrange(1, 6),
            "title": draw.choice(["", 'two "words"', "x,y"]),
        }
        for _ in range(n)
    ]
    return sorted(found, key=lambda row: row["when"])


def written(path: Path, rows: list[dict[str, Any]], start: int = 0, end: int = ENDS[-1]) -> str:
    pl.DataFrame([row for row in rows if 1000 * start <= row["when"] < 1000 * end]).write_csv(path)
    return str(path)


def config(dates: tuple[str, ...], k_core: int = 0) -> BlocksConfig:
    return BlocksConfig(dates=dates, min_events=3, k_core=k_core)


def parts(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*.*")}


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """A stream of January and February of `made()`."""
    log = written(tmp_path / "log.csv", made(), end=ENDS[2])
    streams.import_data(log, tmp_path / "stream", "auto", OPTIONS, config(MONTHS[:1]))
    return tmp_path / "stream"


@pytest.mark.parametrize("k_core", [0, 3])
@pytest.mark.parametrize("cumulative", [True, False], ids=["whole logs", "increments"])
def test_months_appended_one_by_one_are_the_whole_import(k_core: int, cumulative: bool, tmp_path: Path) -> None:
    rows, whole, stream = made(), tmp_path / "whole", tmp_path / "stream"
    report = streams.import_data(written(tmp_path / "all.csv", rows), whole, "auto", OPTIONS, config(MONTHS, k_core))
    log = written(tmp_path / "log.csv", rows, end=ENDS[1])
    one = BlocksConfig(fractions=(1.0,), min_events=3, k_core=k_core)
    streams.import_data(log, stream, "auto", OPTIONS, one)
    for month in (1, 2, 3):
        written(tmp_path / "log.csv", rows, 0 if cumulative else ENDS[month], ENDS[month + 1])
        found = append_data(stream, log)
        assert found["appended_blocks"] == [month + 1]
        assert found["blocks"] == [report["blocks"][month]]
    assert parts(stream) == parts(whole)
    checked, expected = streams.check_data(stream), streams.check_data(whole)
    assert checked.pop("stream") != expected.pop("stream")
    assert checked == expected
    assert Stream.load(stream).fingerprints == Stream.load(whole).fingerprints
    manifest = json.loads((stream / "manifest.json").read_text())
    assert [entry["blocks"] for entry in manifest["appended"]] == [[2], [3], [4]]
    if not cumulative:
        dropped = [manifest["dropped"], *(entry["dropped"] for entry in manifest["appended"])]
        total = {name: sum(each.get(name, 0) for each in dropped) for name in ("where", "k_core")}
        assert total == {name: report["dropped"][name] for name in ("where", "k_core")}
        assert total["where"] == sum(row["stars"] <= 1 for row in rows)


def test_the_result_counts_and_shows_the_new_block(grown: Path, tmp_path: Path) -> None:
    rows = [row for row in made() if row["when"] < 1000 * ENDS[3]]
    result = append_data(grown, written(tmp_path / "log.csv", rows))
    good = [row for row in rows if row["stars"] > 1]
    old = [row for row in good if row["when"] < 1000 * ENDS[2]]
    assert {**result, "losses": 0, "blocks": 0, "warnings": 0} == {
        "stream": str(grown),
        "outcome": "appended block 3",
        "appended_blocks": [3],
        "new_rows": len(good) - len(old),
        "known_rows": len(old),
        "late": 0,
        "pending": 0,
        "waiting": False,
        "new_items": len({row["what"] for row in good} - {row["what"] for row in old}),
        "changed_texts": result["changed_texts"],
        "dropped": {"where": len(rows) - len(good), "k_core": 0},
        "losses": 0,
        "warnings": 0,
        "blocks": 0,
    }
    assert [(row["block"], row["interactions"]) for row in result["blocks"]] == [(3, len(good) - len(old))]


def test_the_same_log_again_writes_nothing_and_says_so(grown: Path, tmp_path: Path) -> None:
    before = everything(grown)
    result = append_data(grown, str(tmp_path / "log.csv"))
    assert (result["outcome"], result["appended_blocks"], result["blocks"]) == (
        "nothing appended: no row is new", [], []
    )  # fmt: skip
    assert everything(grown) == before
    (tmp_path / "empty.csv").write_text("who,what,when,stars,title\n")
    result = append_data(grown, str(tmp_path / "empty.csv"))
    assert (result["outcome"], result["new_rows"]) == ("nothing appended: no row is new", 0)
    assert everything(grown) == before


def test_a_log_of_bad_rows_alone_is_an_error(grown: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("who,what,when,stars,title\nu,i,soon,5,\n")
    before = everything(grown)
    with pytest.raises(NoRows, match="none of the 1 rows can be used"):
        append_data(grown, str(tmp_path / "bad.csv"), rejects=tmp_path / "rejects.csv")
    assert pl.read_csv(tmp_path / "rejects.csv")["reason"].to_list() == ["bad_time"]
    assert everything(grown) == before


def test_late_rows_are_told_by_file_and_line_like_all_rejects(grown: Path, tmp_path: Path) -> None:
    log, when = tmp_path / "late.csv", 1000 * (ENDS[2] + 5)
    lines = ["who,what,when,stars,title", f'u1,new,{when},5,"two', 'lines"', f"u2,i1,{1000 * START + 1},3,x"]
    log.write_text("\n".join([*lines, f"u3,,{when},2,", f"u3,i2,{when},1,"]) + "\n")
    result = append_data(grown, str(log), rejects=tmp_path / "rejects.csv")
    assert (result["late"], result["new_rows"], result["new_items"]) == (1, 1, 1)
    assert result["dropped"] == {"where": 1, "no_item": 1, "late": 1, "k_core": 0}
    assert pl.read_csv(tmp_path / "rejects.csv").fill_null("").rows() == [
        (str(log), 5, "no_item", ""),
        (str(log), 4, "late", f"u2 i1 {START}"),
    ]
    assert result["warnings"][-1] == (
        f"1 rows come too late, they are not after the end of the stream: {log}:4; --rejects FILE lists all, "
        "--late keep takes them"
    )
    assert Stream.load(grown).items.row(-1) == ("new", "two\nlines", 3)
    with pytest.raises(ConfigError, match=r"rejects\.csv exists"):
        append_data(grown, str(log), rejects=tmp_path / "rejects.csv")
    kept = append_data(grown, str(log), late="keep")
    assert (kept["appended_blocks"], kept["late"], kept["known_rows"]) == ([4], 1, 1)
    assert "late" not in kept["dropped"]
    streams.check_data(grown)


def test_an_append_that_dies_before_the_manifest_leaves_the_old_stream(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = written(tmp_path / "log.csv", made())
    before, old = streams.check_data(grown), everything(grown)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(schema, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            append_data(grown, log, dates=MONTHS[2:], least=1)
    assert streams.check_data(grown) == before
    assert {name: value for name, value in everything(grown).items() if name in old} == old
    assert (grown / "interactions" / "block_00004.parquet").is_file()
    # another log makes another block 3, and what was left of block 4 goes
    written(tmp_path / "log.csv", made(), end=ENDS[3])
    append_data(grown, log)
    assert streams.check_data(grown)["blocks"][2]["last"] < ENDS[3]
    assert sorted(p.name for p in (grown / "items").iterdir()) == [f"block_0000{n}.parquet" for n in (1, 2, 3)]
    assert append_data(grown, written(tmp_path / "log.csv", made()))["appended_blocks"] == [4]


def test_rows_wait_in_the_directory_and_are_told_of(grown: Path, tmp_path: Path) -> None:
    rows, manifest = made(), (grown / "manifest.json").read_bytes()
    days = [ENDS[2] + n * DAY for n in range(4)]
    results = [
        append_data(grown, written(tmp_path / "log.csv", rows, start, start + DAY), least=12) for start in days[:3]
    ]
    assert [result["waiting"] for result in results] == [True] * 3
    assert results[-1]["pending"] == sum(result["new_rows"] for result in results) > 0
    assert results[-1]["outcome"] == (
        f"nothing appended: {results[-1]['pending']} rows wait for more, they would test too few users"
    )
    assert (grown / "manifest.json").read_bytes() == manifest
    assert streams.check_data(grown)["pending"] == results[-1]["pending"]
    before = everything(grown)
    assert append_data(grown, str(tmp_path / "log.csv"), least=12)["pending"] == results[-1]["pending"]
    assert everything(grown) == before
    final = append_data(grown, written(tmp_path / "log.csv", rows, days[3], ENDS[3]), least=12)
    assert (final["appended_blocks"], final["waiting"], final["pending"]) == ([3], False, 0)
    assert final["blocks"][0]["tested"] >= 12
    assert "pending" not in streams.check_data(grown)
    assert [*(grown / "pending").iterdir()] == []
    whole = tmp_path / "whole"
    streams.import_data(written(tmp_path / "all.csv", rows, end=ENDS[3]), whole, "auto", OPTIONS, config(MONTHS[:2]))
    assert parts(grown) == parts(whole)


def test_waiting_rows_survive_a_death_between_them_and_the_manifest(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = made()
    append_data(grown, written(tmp_path / "log.csv", rows, ENDS[2], ENDS[2] + 5 * DAY), least=100)
    waiting = streams.check_data(grown)["pending"]
    later = written(tmp_path / "log.csv", rows, ENDS[2] + 5 * DAY, ENDS[3] + 3 * DAY)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(schema, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            append_data(grown, later, dates=MONTHS[2:], least=10)
    assert streams.check_data(grown)["pending"] == waiting
    result = append_data(grown, later, dates=MONTHS[2:], least=10)
    assert result["appended_blocks"] == [3]
    assert result["pending"] == streams.check_data(grown)["pending"] > 0
    assert result["outcome"].startswith("appended block 3; ")
    kept = [r for r in rows if 1000 * ENDS[2] <= r["when"] < 1000 * (ENDS[3] + 3 * DAY) and r["stars"] > 1]
    assert result["pending"] + result["blocks"][0]["interactions"] == len(kept)
    assert [p.name for p in (grown / "pending").iterdir()] == ["block_00004.parquet"]


def test_a_second_command_is_refused_while_the_first_writes(grown: Path, tmp_path: Path) -> None:
    before = everything(grown)
    (tmp_path / "ids.txt").write_text("i1\n")
    with locked(grown):
        for command in (
            lambda: append_data(grown, str(tmp_path / "log.csv")),
            lambda: retire_items(grown, tmp_path / "ids.txt"),
        ):
            with pytest.raises(EnvironmentProblem, match=f"{grown} is in use: process {os.getpid()} on "):
                command()
    assert everything(grown) == before
    with pytest.raises(DataError, match="nowhere is not a stream directory"):
        append_data(tmp_path / "nowhere", str(tmp_path / "log.csv"))
    assert not (tmp_path / "nowhere").exists()


def test_the_item_table_of_the_import_is_read_again_or_another_one(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(f"user,item,timestamp\na,x,{START}\n")
    (tmp_path / "items.csv").write_text("item,text\nx,ex\ny,why\n")
    options = ReadOptions(items=tmp_path / "items.csv")
    stream, log = tmp_path / "stream", str(tmp_path / "log.csv")
    one = BlocksConfig(fractions=(1.0,), min_events=3)
    streams.import_data(log, stream, "auto", options, one)
    for n, item in enumerate("yz", start=1):
        (tmp_path / "log.csv").write_text(f"user,item,timestamp\na,{item},{START + n}\n")
        (tmp_path / "new.csv").write_text("item,text\nx,EX\nz,zed\n")
        result = append_data(stream, log, items=tmp_path / "new.csv" if item == "z" else None)
        assert (result["new_items"], result["changed_texts"]) == (1, int(item == "z"))
    assert Stream.load(stream).items["text"].to_list() == ["ex", "why", "zed"]
    (tmp_path / "items.csv").unlink()
    with pytest.raises(DataError, match=r"no such item table: .*items\.csv"):
        append_data(stream, log)


def test_a_log_that_is_its_own_item_table_stays_one(tmp_path: Path) -> None:
    first, later, stream = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "stream"
    first.write_text(f"user,item,timestamp,title\na,x,{START},ex\n")
    later.write_text(f"user,item,timestamp,title\na,y,{START + 1},why\n")
    one = BlocksConfig(fractions=(1.0,), min_events=3)
    streams.import_data(str(first), stream, "auto", ReadOptions(items=first), one)
    first.unlink()
    append_data(stream, str(later))
    assert Stream.load(stream).items.select("item", "text").rows() == [("x", "ex"), ("y", "why")]


def test_released_blocks_are_appended_file_by_file(tmp_path: Path) -> None:
    blocks = [{"a": ["x", "y"], "b": ["x"]}, {"b": ["y", "z"]}, {"a": ["x", "x"], "c": ["w"]}]
    for name, numbers in (("all", (0, 1, 2)), ("first", (0, 1)), ("third", (2,))):
        (tmp_path / name).mkdir()
        for k in numbers:
            rows = {user: {"previous_block": [], "current_block": items} for user, items in blocks[k].items()}
            (tmp_path / name / f"T.all.block_{k}.json").write_text(json.dumps(rows))
    for name in ("all", "first"):
        streams.import_data(str(tmp_path / name), tmp_path / f"s-{name}", "auto", ReadOptions(), BlocksConfig())
    result = append_data(tmp_path / "s-first", str(tmp_path / "third"))
    assert (result["appended_blocks"], result["new_rows"], result["new_items"]) == ([3], 3, 1)
    assert append_data(tmp_path / "s-first", str(tmp_path / "all"))["known_rows"] == 8
    assert parts(tmp_path / "s-first") == parts(tmp_path / "s-all")


def test_a_manifest_that_does_not_say_how_its_log_was_read_is_named(grown: Path, tmp_path: Path) -> None:
    manifest = json.loads((grown / "manifest.json").read_text())
    for wrong in ({"format": "csv"}, 5, {**manifest["import"], "colour": "red"}):
        (grown / "manifest.json").write_text(json.dumps({**manifest, "import": wrong}))
        with pytest.raises(DataError, match="the manifest does not say how the stream's log was read"):
            append_data(grown, str(tmp_path / "log.csv"))


def ids(folder: Path, *items: str) -> Path:
    (folder / "ids.txt").write_text("\n".join(items) + "\n\n")
    return folder / "ids.txt"


def test_withdrawn_items_leave_what_is_offered_and_come_back(grown: Path, tmp_path: Path) -> None:
    plain = Stream.load(grown)
    result = retire_items(grown, ids(tmp_path, "i4", "i7", "i4"))
    assert result == {
        "stream": str(grown), "withdrawn": 2, "unchanged": 0, "unknown": 0, "from_block": 3, "withdrawn_items": 2,
        "offered_items": plain.n_items - 2,
    }  # fmt: skip
    stream = Stream.load(grown)
    assert stream.fingerprints == plain.fingerprints  # nothing of the blocks there are has changed
    assert {"i4", "i7"} == {*stream.items["item"]} - {stream.items["item"][int(i)] for i in stream.offered()}
    before = everything(grown)
    again = retire_items(grown, ids(tmp_path, "i4"))
    assert (again["withdrawn"], again["unchanged"], again["withdrawn_items"]) == (0, 1, 2)
    assert everything(grown) == before
    # before another block they come back as if nothing had been
    assert retire_items(grown, ids(tmp_path, "i7", "i8"), undo=True)["offered_again"] == 1
    assert Stream.load(grown).withdrawn == (("i4", 3, None),)
    rows = made()
    result = append_data(grown, written(tmp_path / "log.csv", rows, end=ENDS[3]))
    events = [r for r in rows if r["what"] == "i4" and ENDS[2] * 1000 <= r["when"] < ENDS[3] * 1000 and r["stars"] > 1]
    assert result["withdrawn_events"] == len(events) > 0
    assert retire_items(grown, ids(tmp_path, "i4"), undo=True)["from_block"] == 4
    append_data(grown, written(tmp_path / "log.csv", rows))
    stream = Stream.load(grown)
    assert stream.withdrawn == (("i4", 3, 3),)
    sizes = [stream.catalogue(t).size for t in range(1, 5)]
    assert [known - size for known, size in zip((stream.known(t).size for t in range(1, 5)), sizes, strict=True)] == [
        0, 0, 1, 0
    ]  # fmt: skip
    assert [row["catalogue"] for row in streams.check_data(grown)["blocks"]] == sizes
    assert stream.offered().size == stream.n_items


def test_unknown_items_are_named_or_left_out(grown: Path, tmp_path: Path) -> None:
    before = everything(grown)
    with pytest.raises(DataError, match=r"2 of the 3 items of .*ids\.txt are not in the stream: 'no', 'way'") as error:
        retire_items(grown, ids(tmp_path, "no", "i4", "way"))
    assert "--ignore-unknown" in error.value.hint
    assert everything(grown) == before
    result = retire_items(grown, ids(tmp_path, "no", "i4", "way"), ignore_unknown=True)
    assert (result["withdrawn"], result["unknown"]) == (1, 2)
    with pytest.raises(DataError, match="lists no item"):
        retire_items(grown, ids(tmp_path, ""))
    assert growth.named([f"u{n}" for n in range(7)]) == "'u0', 'u1', 'u2', 'u3', 'u4', … (7 of them)"


def test_new_items_of_a_stream_with_ids_say_how_to_get_theirs(grown: Path, tmp_path: Path) -> None:
    (grown / "sids.parquet").write_bytes(b"")
    log = tmp_path / "new.csv"
    log.write_text(f"who,what,when,stars,title\nu1,new,{1000 * ENDS[2] + 1000},5,t\n")
    result = append_data(grown, str(log))
    assert result["semantic_ids"] == f"1 new items have none yet: cladapt tokens extend {grown}"


@pytest.mark.slow
def test_online_retail_appended_month_by_month_is_the_whole_import(
    real_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = real_data("online-retail/online_retail.parquet")
    valid = "Quantity > 0 AND UnitPrice > 0 AND CustomerID IS NOT NULL"
    options = ReadOptions("CustomerID", "StockCode", "InvoiceDate", text=("Description",), where=(valid,))
    dates = tuple(f"2011-{month:02d}-01" for month in range(5, 13))
    streams.import_data(str(source), tmp_path / "whole", "auto", options, BlocksConfig(dates=dates))
    frame, log, stream = pl.read_parquet(source), tmp_path / "log.parquet", tmp_path / "stream"
    days = pl.col("InvoiceDate").dt.strftime("%Y-%m-%d")
    frame.filter(days < dates[0]).write_parquet(log)
    streams.import_data(str(log), stream, "auto", options, BlocksConfig(fractions=(1.0,)))
    for month, (start, end) in enumerate(zip(dates, (*dates[1:], "2012"), strict=True)):
        # in turn the whole log so far and what came since
        frame.filter(days < end, days >= ("" if month % 2 else start)).write_parquet(log)
        assert append_data(stream, str(log))["appended_blocks"] == [month + 2]
    assert parts(stream) == parts(tmp_path / "whole")
