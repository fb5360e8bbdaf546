"""`data check` of a raw log: what it prints, lists and writes, and what it refuses."""

import contextlib
import csv
import io
import json
from pathlib import Path

import pytest

from cladapt_cli.app import run

HEADER = "user,item,timestamp,note\n"
GOOD = "".join(f"u{k % 3},i{k % 4},{k},\n" for k in range(12))
BAD = 'u1,i1,soon,"two\nlines"\n,i1,5,\nu1,,6,\nu0,i0,0,\nu1,i2,NaN,\n'
REJECTS = [
    ("14", "bad_time", "soon"),
    ("16", "no_user", ""),
    ("17", "no_item", ""),
    ("18", "duplicate", "u0 i0 0.0"),
    ("19", "bad_time", "NaN"),
]


def cladapt(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(list(arguments))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text(HEADER + GOOD + BAD)
    return tmp_path


def test_a_log_is_explained_in_tables(folder: Path) -> None:
    code, out, err = cladapt("data", "check", "log.csv")
    assert (code, err) == (0, "")
    assert "format" in out
    for column in ("user", "item", "timestamp"):
        assert column in out
    assert "unix seconds, ISO 8601 or a datetime type" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "log.csv" in line]
    assert [tuple(row) for row in rows if row] == [("log.csv", *reject) for reject in REJECTS]
    assert sorted(path.name for path in folder.iterdir()) == ["log.csv"]


def test_json_holds_the_schema_and_every_reject() -> None:
    code, out, _ = cladapt("data", "check", "log.csv", "--json", "--quiet")
    report = json.loads(out)
    assert code == 0
    assert [report[key] for key in ("format", "interactions", "rejected")] == ["csv", 12, 5]
    assert report["dropped"] == {"bad_time": 2, "no_user": 1, "no_item": 1, "duplicate": 1}
    assert [row["part"] for row in report["schema"]] == ["user", "item", "timestamp"]
    found = [(row["file"], str(row["line"]), row["reason"], row["value"]) for row in report["rejects"]]
    assert found == [("log.csv", *reject) for reject in REJECTS]


def test_a_long_list_is_cut_in_the_tables_but_whole_in_json_and_in_the_file(folder: Path) -> None:
    (folder / "log.csv").write_text(HEADER + GOOD + "u,i,soon,\n" * 30)
    _, out, _ = cladapt("data", "check", "log.csv", "--rejects", "rejects.csv")
    assert "the first 20 rejects of 30; all: --json, or --rejects FILE" in out
    assert out.count("bad_time ") == 20
    _, out, _ = cladapt("data", "check", "log.csv", "--json")
    assert len(json.loads(out)["rejects"]) == 30
    with (folder / "rejects.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert rows == [{"file": "log.csv", "line": str(14 + k), "reason": "bad_time", "value": "soon"} for k in range(30)]


def test_a_clean_log_says_so() -> None:
    Path("log.csv").write_text(HEADER + GOOD)
    code, out, _ = cladapt("data", "check", "log.csv", "--rejects", "rejects.csv")
    assert code == 0
    assert any(line.split() == ["rejects", "none"] for line in out.splitlines())
    assert Path("rejects.csv").read_text() == "file,line,reason,value\n"


def test_a_log_of_bad_rows_alone_is_an_error_that_shows_some_and_writes_all(folder: Path) -> None:
    (folder / "log.csv").write_text(HEADER + "".join(line for line in BAD.splitlines(True) if "u0" not in line))
    code, out, err = cladapt("data", "check", "log.csv", "--rejects", "rejects.csv")
    assert (code, out) == (3, "")
    error, hint = err.splitlines()
    assert error.startswith("error: log.csv: none of the 4 rows can be used (bad_time: 2, no_item: 1, no_user: 1)")
    assert error.endswith("; the first: log.csv:2: bad_time 'soon', log.csv:4: no_user '', log.csv:5: no_item ''")
    assert hint.startswith("hint: check that the columns hold user ids")
    assert len((folder / "rejects.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["empty"], 3, "empty is not a stream directory"),
        (["nowhere"], 3, "nowhere is not a stream directory"),
        (["nowhere", "--format", "csv"], 3, "no such file or folder: nowhere"),
        (["empty", "--format", "csv"], 3, "empty has no .csv or .tsv file"),
        (["log.csv", "--format", "cvs"], 2, "unknown format 'cvs', did you mean 'csv'?"),
        (["log.csv", "--user", "who"], 3, "log.csv has no column 'who'; it has: user, item, timestamp, note"),
        (["log.csv", "--weight", ""], 3, "log.csv has no column ''"),
        (["log.csv", "--rejects", "log.csv"], 2, "log.csv exists"),
        (["log.csv", "--rejects", "log.csv/x.csv"], 4, "cannot write log.csv/x.csv"),
        (["empty", "--weight", "w"], 2, "empty is no raw log, so --format, --rejects and column options cannot apply"),
        (["empty", "--rejects", "r.csv"], 2, "empty is no raw log"),
    ],
)
def test_what_cannot_be_checked_is_two_lines_and_a_code(
    folder: Path, arguments: list[str], code: int, message: str
) -> None:
    (folder / "empty").mkdir()
    before = (folder / "log.csv").read_bytes()
    found, out, err = cladapt("data", "check", *arguments)
    assert (found, out) == (code, "")
    error, hint = err.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "log.csv"]
    assert (folder / "log.csv").read_bytes() == before


def test_weights_are_imported_and_the_manifest_says_they_are_not_trained_on(folder: Path) -> None:
    rows = GOOD.replace(",\n", ",2.5\n") + "u1,i1,20,0\n"
    (folder / "log.csv").write_text(HEADER + rows)
    cut = ("--fractions", "0.5,0.5", "--min-events", "1", "--weight", "note")
    code, out, err = cladapt("data", "import", "log.csv", "--out", "stream", *cut, "--json")
    assert code == 0, err
    assert json.loads(out)["dropped"]["bad_weight"] == 1
    manifest = json.loads((folder / "stream" / "manifest.json").read_text())
    assert manifest["notes"]["weights_kept_but_unused_in_training"] == 12
    assert cladapt("data", "check", "stream")[0] == 0
