"""The `cladapt` command. Nothing heavy is imported here: `cladapt --help` answers without torch."""

import os
import shlex
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import typer

import cladapt
from cladapt import __version__, ranks
from cladapt.errors import CladaptError, ConfigError, EnvironmentProblem
from cladapt.train.interrupt import terminate
from cladapt_cli import adapters, base, bench, compare, config, data, demo, doctor, tokens, train, update
from cladapt_cli._verb import INTERRUPTED, Stopped, fail, output, say

# typer carries its own copy of click or uses the installed one, by version: its public names lead to either
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
EXIT_CODES = (
    "0 ok, 1 internal, 2 usage or configuration, 3 data, 4 environment, 5 a check failed, 130 Ctrl-C, 143 SIGTERM"
)

app = typer.Typer(
    name="cladapt",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Keep an LLM-based recommender up to date: one small LoRA adapter per time block, measured and shipped.",
    epilog="Start with `cladapt demo`, or `cladapt train`, `cladapt eval` and `cladapt export`, all without arguments. "
    f"Exit codes: {EXIT_CODES}.",
)
for command in (demo, train, compare, update, adapters, doctor):
    command.register(app)
for name, group in (
    ("data", data.app),
    ("tokens", tokens.app),
    ("base", base.app),
    ("bench", bench.app),
    ("config", config.app),
):
    app.add_typer(group, name=name)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, show_default="off", help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: runs a command and turns every failure into its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    code = run(sys.argv[1:])
    ranks.leave(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code, see `EXIT_CODES`."""
    output.debug = "--debug" in arguments
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # takes what it does not show as *_
    try:
        _check_text(arguments)
        code = app(arguments, prog_name="cladapt", standalone_mode=False)
        if code == INTERRUPTED:  # how newer versions of typer pass Ctrl-C on
            raise KeyboardInterrupt
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _reader_left()
    except SystemExit as error:  # so typer and rich end where a pipe is closed
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _reader_left()
    except (KeyboardInterrupt, Exception) as error:
        return ranks.first_to_fail(partial(_report, error))


def _reader_left() -> int:
    """Nobody reads stdout any more, as after `| head`: no failure, and what remains to be written must not say so."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - stays open until the interpreter ends
    with suppress(OSError, ValueError):  # no file of the system's in a test
        os.dup2(sys.stdout.fileno(), sys.__stdout__.fileno())  # type: ignore[union-attr]
    return 0


def _check_text(arguments: list[str]) -> None:
    """Every argument may end up in a JSON file, as the name of a folder for example."""
    for argument in arguments:
        if "\0" in argument or argument.encode(errors="ignore").decode() != argument:
            raise ConfigError(f"the argument {argument!r} is no UTF-8 text", "rename the file, or mend the argument")


def _problem(error: BaseException) -> BaseException:
    """What the system refuses, wherever it does, is a problem of the machine and no bug."""
    hint = "check the path, the permissions and the free space and memory"
    if isinstance(error, MemoryError):
        return EnvironmentProblem(f"out of memory: {error or 'the system gives no more'}", hint)
    if ranks.other_ended(error):
        again = "" if output.run is None else f"; continue the run: cladapt train --resume {shlex.quote(output.run)}"
        return EnvironmentProblem("another process of this command ended", f"its launcher says how{again}")
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        return EnvironmentProblem(f"{where}{error.strerror or error}", hint)
    return error


def _report(error: BaseException) -> int:
    """Report a failure on stderr; its exit code."""
    if output.debug and not isinstance(error, UsageError | Stopped | KeyboardInterrupt | typer.Abort):
        traceback.print_exception(error)
    error = _problem(error)
    if isinstance(error, CladaptError):
        return fail(error)
    if isinstance(error, UsageError):
        return _usage(error)
    if isinstance(error, Stopped):
        say(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        say("interrupted")
        return INTERRUPTED
    say(f"error: internal: {type(error).__name__}: {' '.join(str(error).split())}")
    say("hint: run again with --debug and report the traceback")
    return 1


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """One `warning:` line for what the engine warns of; other packages' warnings only under `--debug`."""
    ours = filename.startswith(os.path.dirname(cladapt.__file__) + os.sep)
    if output.debug or (ours and ranks.is_main()):
        say(f"warning: {' '.join(str(message).split())}")


def _usage(error: Any) -> int:
    """A usage mistake in two lines; no command at all shows the help."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(message)
        return 0
    command = error.ctx.command_path if error.ctx else "cladapt"
    say(f"error: {' '.join(message.rstrip('.').split())}")
    say(f"hint: see `{command} --help`")
    return 2


if __name__ == "__main__":
    main()
