"""Forgotten users leave every file of a stream; what was made before is still at home, and is named."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.artifacts import write_json
from cladapt.config import BlocksConfig, SimulateConfig
from cladapt.data.readers import ReadOptions
from cladapt.data.schema import Stream
from cladapt.data.simulate import load_truth
from cladapt.errors import DataError
from cladapt.pipeline import streams
from cladapt.pipeline.forget import COME_BACK, forget_users
from cladapt.pipeline.growth import append_data

ROWS = [("a", "x", 0), ("b", "y", 1), ("c", "x", 2), ("b", "x", 3)]  # block 1
ROWS += [("a", "z", 100), ("c", "y", 101), ("d", "z", 102)]  # block 2
ROWS += [("d", "x", 200), ("c", "w", 201)]  # block 3
CUTS = (50, 150)


def written(folder: Path, rows: list[tuple[Any, ...]], name: str = "log.csv") -> str:
    pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row").write_csv(folder / name)
    return str(folder / name)


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three blocks, each of users of its own but for c, and a file that is not the stream's."""
    monkeypatch.chdir(tmp_path)
    config = BlocksConfig(fractions=(1.0,), min_events=3)
    streams.import_data(written(tmp_path, ROWS[:4]), tmp_path / "stream", "auto", ReadOptions(), config)
    append_data(tmp_path / "stream", written(tmp_path, ROWS[:7]))
    append_data(tmp_path / "stream", written(tmp_path, ROWS))
    (tmp_path / "stream" / "notes").mkdir()
    (tmp_path / "stream" / "notes" / "mine.txt").write_text("mine")
    return tmp_path / "stream"


def users(*names: str) -> Path:
    Path("users.txt").write_text("\n".join(names))
    return Path("users.txt")


def texts_of(folder: Path) -> str:
    """All ids in all tables of a folder."""
    tables = [pl.read_parquet(path) for path in folder.rglob("*.parquet")]
    return " ".join(str(value) for table in tables for value in table.get_columns()[0].to_list())


def test_events_of_forgotten_users_leave_their_blocks_and_all_else_stays(stream: Path) -> None:
    old = Stream.load(stream)
    files = {path: path.read_bytes() for path in stream.rglob("*.parquet")}
    result = forget_users(stream, users("d", "nobody", "d"))
    assert {name: result[name] for name in list(result)[1:]} == {
        "users_forgotten": 1,
        "users_not_in_the_stream": 1,
        "events_removed": 2,
        "pending_removed": 0,
        "blocks_changed": [2, 3],
        "warnings": ["1 users are not in the stream: 'nobody'", COME_BACK],
        "runs": [],
        "bases": [],
        "exports": [],
    }
    new = Stream.load(stream)
    assert new.interactions.equals(old.interactions.filter(pl.col("user") != "d"))
    assert new.items.equals(old.items)
    changed = {str(path.relative_to(stream)) for path in files if path.read_bytes() != files[path]}
    assert changed == {"interactions/block_00002.parquet", "interactions/block_00003.parquet"}
    assert (stream / "notes" / "mine.txt").read_text() == "mine"
    assert new.fingerprints[0] == old.fingerprints[0]
    assert [new.home_of(fingerprint) for fingerprint in old.fingerprints] == [1, 2, 3]
    assert [new.home_of(fingerprint) for fingerprint in new.fingerprints] == [1, 2, 3]
    assert len({*old.fingerprints, *new.fingerprints}) == 5
    assert [row["users"] for row in streams.check_data(stream)["blocks"]] == [3, 2, 1]
    assert new.manifest["interactions"] == 7
    # and again: those of both times are at home
    forget_users(stream, users("b"))
    last = Stream.load(stream)
    assert [last.home_of(f) for f in (*old.fingerprints, *new.fingerprints)] == [1, 2, 3] * 2
    assert "b" not in texts_of(stream).split()


def test_forgetting_again_or_nobody_writes_nothing(stream: Path) -> None:
    forget_users(stream, users("a"))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in stream.rglob("*")}
    result = forget_users(stream, users("a", "nobody"))
    assert (result["users_forgotten"], result["users_not_in_the_stream"]) == (0, 2)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in stream.rglob("*")} == before


def test_a_block_is_never_emptied(stream: Path) -> None:
    before = {path: path.read_bytes() for path in stream.rglob("*.*")}
    with pytest.raises(DataError, match="block 3 of 3 would have no event left"):
        forget_users(stream, users("c", "d"))
    assert {path: path.read_bytes() for path in stream.rglob("*.*")} == before


def test_rows_of_a_forgotten_user_come_too_late_in_later_logs(stream: Path, tmp_path: Path) -> None:
    forget_users(stream, users("b"))
    result = append_data(stream, written(tmp_path, [*ROWS, ("a", "x", 300)]), rejects=tmp_path / "rejects.csv")
    assert (result["late"], result["known_rows"], result["new_rows"]) == (2, len(ROWS) - 2, 1)
    assert pl.read_csv(tmp_path / "rejects.csv").select("line", "reason").rows() == [(3, "late"), (5, "late")]
    assert "b" not in texts_of(stream).split()


def test_waiting_rows_are_forgotten_too(stream: Path, tmp_path: Path) -> None:
    append_data(stream, written(tmp_path, [("new", "x", 300), ("a", "v", 301)]), least=1)
    assert streams.check_data(stream)["pending"] == 2
    before = Stream.load(stream).fingerprints
    result = forget_users(stream, users("new"))
    assert (result["users_forgotten"], result["events_removed"], result["pending_removed"]) == (1, 0, 1)
    assert streams.check_data(stream)["pending"] == 1
    assert Stream.load(stream).fingerprints == before
    forget_users(stream, users("b"))
    assert streams.check_data(stream)["pending"] == 1
    forget_users(stream, users("a"))
    assert "pending" not in streams.check_data(stream)


def test_late_events_are_counted_anew(stream: Path, tmp_path: Path) -> None:
    late = [("e", "x", 5), ("a", "y", 6), ("a", "x", 300)]
    append_data(stream, written(tmp_path, late), late="keep")
    assert Stream.load(stream).manifest["cuts"][3]["late"] == 2
    forget_users(stream, users("e"))
    assert Stream.load(stream).manifest["cuts"][3]["late"] == 1
    streams.check_data(stream)


def test_a_simulated_truth_loses_them_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "simulated"
    streams.simulate_data(folder, SimulateConfig(users=10, items=20, topics=2, blocks=2))
    (tmp_path / "users.txt").write_text("u3")
    forget_users(folder, tmp_path / "users.txt")
    assert "u3" not in Stream.load(folder).users
    assert "u3" not in load_truth(folder)["user"]
    assert len(Stream.load(folder).users) == 9


def test_what_has_learned_from_them_is_named(stream: Path, tmp_path: Path) -> None:
    first, second, third = Stream.load(stream).fingerprints
    records = {
        "runs/one/adapters/block_2": {"stream": second, "block": 2},
        "runs/one/adapters/block_3": {"stream": third, "block": 3},
        "runs/old/adapters/block_2": {"stream": second, "block": 2},
        "runs/other/adapters/block_3": {"stream": "another", "block": 3},
        "runs/broken": {"stream": [1]},
        "away/base": {"stream": first, "fitted_block": 1},
        "away/merged": {"stream": third, "fitted_block": 3},
        "elsewhere/base": {"stream": first, "fitted_block": 1},
        "runs/one/export/peft": {"stream": third, "block": 3},
        "runs/fresh": {"stream": first, "fitted_block": 0},
    }
    for folder, record in records.items():
        write_json(tmp_path / folder / "cladapt.json", record)
    for run in ("one", "old", "other"):
        base = str(tmp_path / "elsewhere" / "base")
        write_json(tmp_path / "runs" / run / "config.json", {"config": {"base": base}})
    (tmp_path / "runs" / "junk").mkdir()
    (tmp_path / "runs" / "junk" / "config.json").write_text("{")
    result = forget_users(stream, users("d"), [Path("away")])  # first in block 2
    assert result["runs"] == [
        {"folder": "runs/old", "blocks": [2]},
        {"folder": "runs/one", "blocks": [2, 3]},
    ]
    assert result["bases"] == [{"folder": "away/merged", "block": 3}]
    assert result["exports"] == [{"folder": "runs/one/export/peft", "block": 3}]
    assert result["warnings"] == [
        "what is listed has learned from these users, and runs keep rows per user of what they were tested on: remove "
        "it, or train it again",
        COME_BACK,
    ]
    asked_again = forget_users(stream, users("d"), [Path("away")])  # they are gone, what has learned from them is not
    kinds = ("runs", "bases", "exports")
    assert {kind: asked_again[kind] for kind in kinds} == {kind: result[kind] for kind in kinds}
    # of a time before they are known by the chain of that time
    found = forget_users(stream, users("b"))  # in block 1
    assert [row["folder"] for row in found["bases"]] == [str(tmp_path / "elsewhere" / "base")]
    assert [row["folder"] for row in found["runs"]] == ["runs/old", "runs/one"]


def test_a_killed_forgetting_that_had_moved_the_stream_aside_is_undone(stream: Path) -> None:
    gone = stream.with_name(f".{stream.name}.999999999.old")
    half = stream.with_name(f".{stream.name}.999999999.tmp")
    shutil.copytree(stream, half)
    stream.rename(gone)
    assert forget_users(stream, users("d"))["events_removed"] == 2
    assert not gone.exists()
    assert not half.exists()
    assert json.loads((stream / "manifest.json").read_text())["interactions"] == 7
    shutil.copytree(stream, gone)  # it died after the new one was in its place: the old one has the users
    assert forget_users(stream, users("d"))["events_removed"] == 0
    assert not gone.exists()


def test_what_a_link_leads_to_is_forgotten(stream: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(stream.name)
    forget_users(tmp_path / "link", users("d"))
    assert (tmp_path / "link").is_symlink()
    assert "d" not in texts_of(stream).split()
    assert sorted(os.listdir(tmp_path)) == ["link", "log.csv", "stream", "users.txt"]


def test_runs_and_bases_beside_the_stream_are_found(stream: Path) -> None:
    third = Stream.load(stream).fingerprints[2]
    for name, record in {
        "base": {"stream": third, "fitted_block": 3},
        "run/adapters/block_3": {"stream": third, "block": 3},
    }.items():
        write_json(stream.parent / name / "cladapt.json", record)
    write_json(stream.parent / "run" / "config.json", {})
    result = forget_users(stream, users("d"))
    assert [Path(row["folder"]).name for row in (*result["runs"], *result["bases"])] == ["run", "base"]


def test_a_list_that_a_windows_editor_wrote_is_read(stream: Path) -> None:
    file = users("d")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert forget_users(stream, file)["users_forgotten"] == 1
