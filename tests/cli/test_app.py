"""The contract of the command line whatever the command: exit codes, two lines per failure, clean output streams."""

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import cladapt
from cladapt import __version__
from cladapt.errors import CheckFailed, CladaptError, ConfigError, DataError, EnvironmentProblem
from cladapt.methods import available
from cladapt.pipeline import streams
from cladapt.train.interrupt import terminate
from cladapt_cli._verb import Stopped, output
from cladapt_cli.app import main, run
from cladapt_cli.options import method_names
from cladapt_cli.progress import Progress

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], None]:
    """Makes `cladapt data check x` do what it is given."""
    monkeypatch.chdir(tmp_path)

    def does(action: Any) -> None:
        def check_data(_: Path) -> Any:
            if isinstance(action, BaseException):
                raise action
            return action() if callable(action) else action

        monkeypatch.setattr(streams, "check_data", check_data)

    return does


@pytest.mark.parametrize("kind", [ConfigError, DataError, EnvironmentProblem, CheckFailed])
@pytest.mark.parametrize("flags", [[], ["--json"], ["--quiet"]])
def test_an_expected_failure_is_two_lines_and_its_class_s_code(
    kind: type[CladaptError], flags: list[str], command: Callable[[Any], None], capsys: Capture
) -> None:
    command(kind("what went\nwrong", "how to\n  mend it"))
    codes = {ConfigError: 2, DataError: 3, EnvironmentProblem: 4, CheckFailed: 5}
    assert run(["data", "check", "x", *flags]) == codes[kind]
    found = capsys.readouterr()
    assert found.err == "error: what went wrong\nhint: how to mend it\n"
    assert found.out == ""


def test_a_bug_is_two_lines_and_one(command: Callable[[Any], None], capsys: Capture) -> None:
    command(RuntimeError("boom\nbang"))
    assert run(["data", "check", "x"]) == 1
    found = capsys.readouterr()
    assert (
        found.err == "error: internal: RuntimeError: boom bang\nhint: run again with --debug and report the traceback\n"
    )
    assert found.out == ""


@pytest.mark.parametrize("error", [DataError("wrong", "mend"), RuntimeError("boom")])
def test_debug_shows_the_traceback_and_still_the_two_lines(
    error: Exception, command: Callable[[Any], None], capsys: Capture
) -> None:
    command(error)
    assert run(["data", "check", "x", "--debug"]) == getattr(error, "exit_code", 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2].startswith("error: ")
    assert lines[-1].startswith("hint: ")
    run(["data", "check", "x"])  # it does not stick
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_is_130_and_sigterm_143_and_one_line(
    command: Callable[[Any], None], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, handler, code, word in (
        (signal.SIGINT, signal.default_int_handler, 130, "interrupted"),
        (signal.SIGTERM, terminate, 143, "terminated"),
    ):
        previous = signal.signal(number, handler)
        try:
            command(partial(signal.raise_signal, number))
            assert run(["data", "check", "x"]) == code
        finally:
            signal.signal(number, previous)
        assert capsys.readouterr().err == f"{word}: what was finished is kept, and no file is half written\n"


def test_the_command_answers_sigterm_unless_it_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cladapt", "--version"])
    for before, after in ((signal.SIG_DFL, terminate), (signal.SIG_IGN, signal.SIG_IGN)):
        previous = signal.signal(signal.SIGTERM, before)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 0
            assert signal.getsignal(signal.SIGTERM) is after
        finally:
            signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize(
    ("name", "told", "text"),
    [
        ("train", None, "interrupted: no run was begun"),
        (
            "train",
            "runs/a b",
            "interrupted: what was finished is kept; continue the run: cladapt train --resume 'runs/a b'",
        ),
        ("eval", "runs/a", "interrupted: the run keeps its adapters; this evaluation has to start again"),
        ("pretrain", None, "interrupted: no base is written"),
    ],
)
def test_who_is_stopped_hears_what_is_left_and_only_train_of_resuming(name: str, told: str | None, text: str) -> None:
    output.run = told
    assert str(Stopped(name, KeyboardInterrupt())) == text
    output.run = None


def test_a_reader_that_went_away_is_no_failure(command: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    command(BrokenPipeError())
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # restored afterwards: it is replaced by a sink
    assert run(["data", "check", "x"]) == 0
    sys.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "text", "hint"),
    [
        (["nope"], "No such command 'nope'", "cladapt"),
        (["data", "nope"], "No such command 'nope'", "cladapt data"),
        (["train", "--nope"], "No such option: --nope", "cladapt train"),
        (["train", "--lr", "fast"], "Invalid value for '--lr'", "cladapt train"),
        (["train", "--lr"], "Option '--lr' requires an argument", "cladapt"),
        (["data", "check"], "Missing argument 'stream'", "cladapt data check"),
        (["data", "check", "a", "b"], "unexpected extra argument", "cladapt data check"),
        (["merge"], "Missing option '--out'", "cladapt merge"),
        (["demo", "--seed", "-1"], "Invalid value for '--seed'", "cladapt demo"),
    ],
)
def test_a_usage_mistake_is_two_lines_and_two(arguments: list[str], text: str, hint: str, capsys: Capture) -> None:
    assert run(arguments) == 2
    found = capsys.readouterr()
    error, help_line = found.err.splitlines()
    assert error.startswith("error: ")
    assert text in error
    assert help_line == f"hint: see `{hint} --help`"
    assert found.out == ""


@pytest.mark.parametrize("arguments", [["--help"], ["config", "show"], ["config", "show", "--json"], ["--version"]])
def test_a_closed_pipe_ends_with_zero_and_without_a_word(arguments: list[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        result = subprocess.run(
            [sys.executable, "-m", "cladapt_cli", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def test_work_goes_on_where_nobody_reads_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Closed())
        for _ in range(2):
            Progress().emit({"kind": "note", "text": "hello"})
        assert sys.stderr.name == os.devnull
        sys.stderr.close()


@pytest.mark.parametrize("arguments", [[], ["data"], ["tokens"], ["base"], ["config"]])
def test_a_group_alone_shows_its_help_and_is_zero(arguments: list[str], capsys: Capture) -> None:
    assert run(arguments) == 0
    found = capsys.readouterr()
    assert (found.out + found.err).count("Usage:") == 1


def test_version_and_help(capsys: Capture) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert run(["train", "--help"]) == 0
    assert "--resume" in capsys.readouterr().out


def test_json_is_one_object_and_null_where_json_has_no_number(command: Callable[[Any], None], capsys: Capture) -> None:
    result = {"score": float("nan"), "rows": [{"a": float("-inf"), "b": (1, 0.5)}], "path": Path("x"), "text": "ä"}
    command(result)
    assert run(["data", "check", "x", "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out, parse_constant=lambda name: pytest.fail(name)) == {
        "schema_version": 1,
        "score": None,
        "rows": [{"a": None, "b": [1, 0.5]}],
        "path": "x",
        "text": "ä",
    }
    assert found.out.count("\n") == 1
    assert found.err == ""


def test_without_json_it_is_lines_and_tables(command: Callable[[Any], None], capsys: Capture) -> None:
    command({"users": 3, "ok": True, "nothing": None, "rows": [{"name": "[x]", "HR": 0.25}, {"name": "b", "more": 1}]})
    assert run(["data", "check", "x"]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[:3]] == [["users", "3"], ["ok", "yes"], ["nothing", "-"]]
    for text in ("rows", "name", "HR", "more", "[x]", "0.2500"):
        assert text in out


@pytest.mark.parametrize(("value", "shown"), [(-9e-18, "0.0000"), (-0.0, "0.0000"), (-2e-5, "-2e-05"), (1.0, "1.0000")])
def test_what_rounding_leaves_of_a_zero_is_shown_as_one(
    value: float, shown: str, command: Callable[[Any], None], capsys: Capture
) -> None:
    command({"forward transfer": value})
    assert run(["data", "check", "x"]) == 0
    assert capsys.readouterr().out.split() == ["forward", "transfer", shown]
    assert run(["data", "check", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forward transfer"] == value


def test_warnings_of_the_engine_are_one_line_others_are_for_debugging(
    command: Callable[[Any], None], capsys: Capture
) -> None:
    ours = str(Path(cladapt.__file__).parent / "tokens" / "build.py")

    def warn() -> dict[str, Any]:
        warnings.simplefilter("always")
        warnings.warn_explicit("fewer\n codes", UserWarning, ours, 1)
        warnings.warn_explicit("theirs", UserWarning, "/home/cladapt/site-packages/peft/x.py", 1)
        return {}

    command(warn)
    for flags, expected in (
        ([], "warning: fewer codes\n"),
        (["--quiet"], "warning: fewer codes\n"),  # a job at night is quiet, and loses no warning
        (["--debug"], "warning: fewer codes\nwarning: theirs\n"),
    ):
        with warnings.catch_warnings():
            assert run(["data", "check", "x", "--json", *flags]) == 0
        found = capsys.readouterr()
        assert found.err == expected
        assert json.loads(found.out) == {"schema_version": 1}


def test_progress_is_taken_off_the_terminal_however_a_command_ends(
    command: Callable[[Any], None], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(Progress, "close", lambda self: closed.append(self))
    for ending, code in (({}, 0), (DataError("a", "b"), 3), (KeyboardInterrupt(), 130)):

        def start(ending: Any = ending) -> Any:
            Progress()
            if isinstance(ending, BaseException):
                raise ending
            return ending

        command(start)
        assert run(["data", "check", "x"]) == code
    assert len(closed) == 3
    assert output.progress is None


STEP: dict[str, Any] = {
    "kind": "step",
    "block": 2,
    "progress": 0.5,
    "loss": 1.0,
    "tokens_per_second": 10.0,
    "peso/term": 0.1,
}


def test_progress_is_a_line_per_epoch_away_from_a_terminal_and_a_bar_on_one(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[dict[str, Any]] = [
        {"kind": "run", "path": "runs/a"},
        {"kind": "note", "text": "hello"},
        STEP,
        {"kind": "epoch", "block": 2, "valid_log_likelihood": -1.23456},
    ]
    output.quiet = False
    for event in events:
        Progress().emit(event)
    assert capsys.readouterr().err == "run: runs/a\nhello\nepoch: block 2, valid_log_likelihood -1.235\n"
    output.quiet, output.run = True, None
    for event in events:
        Progress().emit(event)
    output.quiet = False
    assert capsys.readouterr().err == ""
    assert output.run == "runs/a"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress()
    for event in (STEP, {**STEP, "block": 3}, {"kind": "block", "block": 3, "steps": 2}):
        progress.emit(event)
    progress.close()
    assert "block: block 3, steps 2" in capsys.readouterr().err


def test_help_answers_without_the_engine_s_libraries() -> None:
    script = (
        "import sys; from cladapt_cli.app import run\n"
        "codes = [run(['--help']), run(['train', '--help']), run(['methods', '--help'])]\n"
        "heavy = {'torch', 'transformers', 'peft', 'polars', 'numpy', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "print(codes, sorted(heavy), file=sys.stderr)"
    )
    paths = [path for path in sys.path if path]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {script}"], capture_output=True, text=True
    )
    assert result.stderr == "[0, 0, 0] []\n"
    assert ", ".join(method_names()) in " ".join(result.stdout.replace("│", " ").split())


def test_the_options_of_train_name_the_methods_of_the_folder() -> None:
    assert method_names() == sorted(available())


def test_an_option_of_a_method_in_the_wrong_place_is_answered_by_its_spelling(capsys: Capture) -> None:
    assert run(["train", "--method", "replay", "-o", "size=100"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert "unknown key 'size'" in error
    assert hint == "hint: options of a method are given as -o method.options.size=100"


def test_methods_and_doctor(capsys: Capture) -> None:
    assert run(["methods", "--json"]) == 0
    assert {row["method"] for row in json.loads(capsys.readouterr().out)["methods"]} == set(available())
    assert run(["doctor", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert kernels
    assert all(row["op"] and row["implementation"] and row["reason"] for row in kernels)
    assert run(["methods", "peso", "--json"]) == 0
    assert {row["method"] for row in json.loads(capsys.readouterr().out)["options"]} == {"peso"}
    assert run(["methods", "pesto"]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: no method 'pesto'", "hint: did you mean 'peso'?"]
    for name in ("methods", "doctor"):
        assert run([name]) == 0
        assert {"methods": "peso", "doctor": "torch"}[name] in capsys.readouterr().out
