"""The help of every command of the tree: nothing of its text is lost, and every option shows its default."""

import inspect
import re
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
import typer

from cladapt.config import RunConfig
from cladapt.workloads.classify import ClassifyConfig
from cladapt_cli._help import documented
from cladapt_cli.app import EXIT_CODES, app, run

Capture = pytest.CaptureFixture[str]
AT_ONCE = {"--help", "--install-completion", "--show-completion"}  # these print and end, they have no default


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


TREE = dict(walk(typer.main.get_command(app)))


def help_of(path: tuple[str, ...], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> str:
    """The printed help as one line of words, frames left out."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    assert run([*path, "--help"]) == 0
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("path", TREE, ids=lambda path: " ".join(path) or "cladapt")
def test_every_bracket_of_the_sources_is_printed(
    path: tuple[str, ...], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = help_of(path, capsys, monkeypatch)
    command = TREE[path]
    texts = [command.help, command.epilog, *(getattr(parameter, "help", None) for parameter in command.params)]
    meant = [text.replace("\\[", "[") for text in texts if text]
    brackets = [found for text in meant for found in re.findall(r"\[[^\]]*\]", text)]
    assert [found for found in brackets if found not in printed] == []
    assert [text for text in meant if " ".join(text.split("\n\n")[0].split()) not in printed] == []


def test_there_are_brackets_to_print() -> None:
    texts = [parameter.help or "" for command in TREE.values() for parameter in command.params if parameter.help]
    assert sum("[" in text for text in texts) > 0


@pytest.mark.parametrize("path", TREE, ids=lambda path: " ".join(path) or "cladapt")
def test_every_option_shows_its_default(
    path: tuple[str, ...], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = help_of(path, capsys, monkeypatch)
    for parameter in TREE[path].params:
        if parameter.required or AT_ONCE & {*parameter.opts}:
            continue
        text = " ".join(parameter.help.split()).replace("\\[", "[")
        said = "default: " in text or "(default)" in text
        assert said or re.search(rf"{re.escape(text)} \[default: [^\]]+\]", printed), (
            f"{parameter.opts} of {path} shows no default"
        )


@pytest.mark.parametrize("path", [path for path in TREE if path], ids=" ".join)
def test_every_command_says_in_one_line_what_it_does(path: tuple[str, ...]) -> None:
    text = TREE[path].help
    assert text
    assert "\n" not in text
    assert text.endswith(".")


def test_the_help_on_tokens_states_what_the_code_does() -> None:
    from cladapt.config import TokensConfig
    from cladapt.tokens.extend import MORE_COLLISIONS, MOST_ERROR

    build, extend = ({p.name: p for p in TREE["tokens", name].params} for name in ("build", "extend"))
    assert f"above {MOST_ERROR} times block 1's" in extend["stream"].help
    assert f"above block 1's + {MORE_COLLISIONS * 100:.0f} %" in extend["stream"].help
    assert build["capacity"].show_default == str(TokensConfig().capacity)
    assert f"at least {TokensConfig().codes} (-o codes)" in build["index"].help


def test_the_exit_codes_stand_below_the_help(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"Exit codes: {EXIT_CODES}." in help_of((), capsys, monkeypatch)
    for code in ("0 ok", "1 internal", "2 usage", "3 data", "4 environment", "5 a check", "130 Ctrl-C", "143 SIGTERM"):
        assert code in EXIT_CODES


def test_defaults_that_train_states_are_those_of_its_settings() -> None:
    run_config = RunConfig()
    found = {p.opts[0]: p.show_default for p in TREE["train",].params if p.opts[0].startswith("--")}
    assert found["--method"] == run_config.method.name
    assert found["--seed"] == str(run_config.seed)
    assert found["--lr"] == f"{run_config.train.lr:g}" == f"{ClassifyConfig().train.lr:g}"
    assert found["--epochs"] == f"{run_config.train.epochs}; of images {ClassifyConfig().train.epochs}"
    assert found["--rank"] == str(run_config.adapter.rank)


def test_one_option_shared_by_two_commands_is_mended_once_in_each() -> None:
    option = typer.Option("--x", help="a list [of these]")
    parameter = inspect.Parameter(
        "x", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Annotated[str | None, option]
    )
    for _ in range(2):
        (mended,) = documented(parameter).annotation.__metadata__
        assert mended.help == r"a list \[of these]"
        assert mended.show_default == "none"
    assert (option.help, option.show_default) == ("a list [of these]", True)
