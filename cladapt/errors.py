"""Errors that a user can act on: what went wrong, where, with which value, and how to fix it.

Every expected failure is a `CladaptError`. The command line prints it as one `error:` line and one `hint:` line and
ends with the class's exit code; anything else is a bug and ends with 1.
"""

from typing import Any


class CladaptError(Exception):
    """An expected failure: `message` says what, where and the value; `hint` says how to fix it."""

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})"


class ConfigError(CladaptError):
    """A usage or configuration mistake."""

    exit_code = 2


class DataError(CladaptError):
    """Input data, an artefact or a file that cannot be used as it is."""

    exit_code = 3


class EnvironmentProblem(CladaptError):
    """The machine lacks something: a package, a device, space, a permission."""

    exit_code = 4


class ExampleWarning(UserWarning):
    """What the examples of a block leave out, cannot teach, or know too early."""


class CheckFailed(CladaptError):
    """A verification of a result failed; `result` is what the command has to print nevertheless."""

    exit_code = 5

    def __init__(self, message: str, hint: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message, hint)
        self.result = result
