"""Ctrl-C and SIGTERM inside the block that puts them off, real signals throughout."""

import signal
import threading
from typing import Any

import pytest

from cladapt.train.interrupt import Terminated, deferred_interrupt, terminate


def test_the_first_ctrl_c_is_only_remembered() -> None:
    with deferred_interrupt() as interrupted:
        assert interrupted() is None
        signal.raise_signal(signal.SIGINT)
        assert interrupted() is signal.SIGINT


@pytest.mark.parametrize("before", [signal.SIG_DFL, terminate], ids=["of the system", "of the command"])
def test_sigterm_is_remembered_as_ctrl_c_is(before: Any) -> None:
    previous = signal.signal(signal.SIGTERM, before)
    try:
        with deferred_interrupt() as interrupted:
            signal.raise_signal(signal.SIGTERM)
            assert interrupted() is signal.SIGTERM
            assert signal.getsignal(signal.SIGTERM) is before  # the second one acts at once
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_second_signal_of_the_other_kind_acts_at_once() -> None:
    def hurried() -> None:
        with deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(Terminated):
            hurried()
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    def impatient() -> None:
        with deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_afterwards_ctrl_c_is_what_it_was() -> None:
    with deferred_interrupt():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_handler_of_someone_else_is_left_alone() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupt() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert interrupted() is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_have_no_signals_to_put_off() -> None:
    found = []

    def work() -> None:
        with deferred_interrupt() as interrupted:
            found.append((interrupted(), signal.getsignal(signal.SIGINT) is signal.default_int_handler))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, True)]
