"""Ctrl-C and SIGTERM, put off to a moment from which an exact continuation can start."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send some time before they kill: it is obeyed as Ctrl-C is."""


def terminate(*_: Any) -> None:
    """Signal handler that raises `Terminated`, as Python's own for SIGINT raises `KeyboardInterrupt`."""
    raise Terminated


STOPS: Mapping[signal.Signals, type[KeyboardInterrupt]] = {
    signal.SIGTERM: Terminated,
    signal.SIGINT: KeyboardInterrupt,
}
"""Signals that stop a command, and what they raise."""
_PLAIN = (signal.default_int_handler, signal.SIG_DFL, terminate)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], signal.Signals | None]]:
    """Inside, the first signal of `STOPS` is only returned by the yielded function; a second one acts at once.

    Nothing is put off in other threads than the main one, nor where a signal already has a handler of its own.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {s: handler for s in STOPS if main and (handler := signal.getsignal(s)) in _PLAIN}
    came: signal.Signals | None = None

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(number: int, _: Any) -> None:
        nonlocal came
        came = signal.Signals(number)
        restore()

    for number in before:
        signal.signal(number, remember)
    try:
        yield lambda: came
    finally:
        restore()
