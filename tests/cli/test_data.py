"""`data check` of a raw log: what it prints, lists and writes, and what it refuses."""

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from cladapt.config import BlocksConfig, ImagesConfig
from cladapt.data.readers import READERS
from cladapt_cli.app import app, run
from cladapt_cli.log_options import FORMATS

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
    assert code == 0
    assert all(line.startswith("warning: ") for line in err.splitlines())
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
    assert report["dropped"] == {"bad_time": 2, "no_user": 1, "no_item": 1, "duplicate": 1, "k_core": 0}
    assert [row["part"] for row in report["schema"]] == ["user", "item", "timestamp"]
    found = [(row["file"], str(row["line"]), row["reason"], row["value"]) for row in report["rejects"]]
    assert found == [("log.csv", *reject) for reject in REJECTS]


def test_a_long_list_is_cut_in_the_tables_but_whole_in_json_and_in_the_file(folder: Path) -> None:
    (folder / "log.csv").write_text(HEADER + GOOD + "u,i,soon,\n" * 30)
    _, out, _ = cladapt("data", "check", "log.csv", "--rejects", "rejects.csv")
    assert "the first 20 rejects of 30; all: --json, or --rejects FILE" in out
    assert out.count("│ bad_time ") == 20
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
    assert "; bad_time, for example 'soon'; rejected rows: 4" in error
    assert error.endswith(
        "; rejected rows: 4, the first: log.csv:2: bad_time 'soon', log.csv:4: no_user '', log.csv:5: no_item ''"
    )
    assert hint.startswith("hint: say how times are written: --time-format")
    assert len((folder / "rejects.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["empty"], 3, "empty is not a stream directory"),
        (["nowhere"], 3, "nowhere is not a stream directory"),
        (["nowhere", "--format", "csv"], 3, "no such file or folder: nowhere"),
        (["empty", "--format", "csv"], 3, "empty has no csv file"),
        (["log.csv", "--format", "cvs"], 2, "unknown format 'cvs', did you mean 'csv'?"),
        (["log.csv", "--user", "who"], 3, "log.csv has no column 'who'; it has: 'user', 'item', 'timestamp', 'note'"),
        (["log.csv", "--weight", ""], 3, "log.csv has no column ''"),
        (["log.csv", "--rejects", "log.csv"], 2, "log.csv exists"),
        (["log.csv", "--rejects", "log.csv/x.csv"], 4, "cannot write log.csv/x.csv"),
        (
            ["empty", "--weight", "w"],
            2,
            "empty is no raw log, so --format, --rejects, column and block options cannot apply",
        ),
        (["empty", "--rejects", "r.csv"], 2, "empty is no raw log"),
        (["empty", "--min-events", "3"], 2, "empty is no raw log"),
        (
            ["log.csv", "--where", "prize > 0"],
            2,
            "--where 'prize > 0' cannot be applied to log.csv: there is no column",
        ),
        (["log.csv", "--min-rating", "3"], 2, "--min-rating 3 without --rating"),
        (["log.csv", "--time-unit", "h"], 2, "--time-unit 'h' is no unit of time"),
        (["log.csv", "--time-format", "%H:%M"], 2, "--time-format '%H:%M' does not say a moment"),
        (["log.csv", "--fractions", "0.5"], 2, "data check: 1 mistake"),
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


PAIRS = ("users", "items", "interactions", "items_with_text", "dropped", "notes", "warnings", "losses", "blocks")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--fractions", "0.5,0.5", "--min-events", "3"),
        ("--fractions", "0.75,0.25", "--k-core", "2"),
        ("--where", "timestamp > 1", "--where", "item <> 'i3'", "--fractions", "0.5,0.5", "--text", "note"),
    ],
)
def test_check_and_import_agree(options: tuple[str, ...], folder: Path) -> None:
    code, out, err = cladapt("data", "check", "log.csv", *options, "--json")
    assert code == 0, err
    checked = json.loads(out)
    assert sorted(path.name for path in folder.iterdir()) == ["log.csv"]
    code, out, err = cladapt("data", "import", "log.csv", "--out", "stream", *options, "--json")
    assert code == 0, err
    imported = json.loads(out)
    assert {name: checked[name] for name in PAIRS} == {name: imported[name] for name in PAIRS}


def test_an_import_prints_what_is_lost_and_its_blocks_and_warns_on_stderr(folder: Path) -> None:
    code, out, err = cladapt("data", "import", "log.csv", "--out", "stream", "--fractions", "0.5,0.5")
    assert code == 0
    for text in ("losses", "rejected as bad_time", "kept, never tested", "blocks", "tested", "events_share"):
        assert text in out
    assert "fewer than 5 events in every block" in err
    assert all(line.startswith("warning: ") for line in err.splitlines())
    assert "warnings" not in out
    # a job at night is quiet, and loses no warning
    assert cladapt("data", "import", "log.csv", "--out", "quiet", "--fractions", "0.5,0.5", "--quiet")[2] == err


def test_a_check_of_what_cannot_be_imported_fails_as_the_import(folder: Path) -> None:
    (folder / "log.csv").write_text(HEADER + "u,i,1,\nu,j,2,\n,k,3,\n")
    code, out, err = cladapt("data", "check", "log.csv")
    found, nothing, import_err = cladapt("data", "import", "log.csv", "--out", "stream")
    assert (code, out, found, nothing) == (3, "", 3, "")
    error, hint = err.splitlines()
    import_error, import_hint = import_err.splitlines()
    assert error == f"{import_error}; rejected rows: 1, the first: log.csv:4: no_user ''"
    assert hint == import_hint
    assert not (folder / "stream").exists()


def test_the_help_names_every_format_and_every_default() -> None:
    assert tuple(READERS) == FORMATS
    command: Any = typer.main.get_command(app)
    commands = {
        name: {option.opts[0]: option for option in each.params if option.param_type_name == "option"}
        for name, each in command.commands["data"].commands.items()
    }
    images = ImagesConfig()
    for name in ("blocks", "size", "channels", "seed"):
        assert f"default: {getattr(images, name)}." in commands["images"][f"--{name}"].help
    assert "default: none" in commands["images"]["--exclude"].help
    for name in ("import", "check"):
        options = commands[name]
        assert all(format in options["--format"].help for format in FORMATS)
        for option in options.values():
            shown = option.default not in (None, False) and option.show_default
            assert shown or "default: " in option.help or option.required or option.is_flag, option.opts
        blocks = BlocksConfig()
        assert ",".join(map(str, blocks.fractions)) in options["--fractions"].help
        assert f"default: {blocks.min_events}." in options["--min-events"].help
        assert "nothing is dropped" in options["--min-events"].help
        assert f"default: {blocks.k_core}" in options["--k-core"].help
        assert "drop events" in options["--k-core"].help


def test_the_help_of_tokens_shows_the_form_of_an_index() -> None:
    code, out, _ = cladapt("tokens", "build", "--help")
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    assert '{"item": ["<a_1>", "<b_7>"], …}' in text
