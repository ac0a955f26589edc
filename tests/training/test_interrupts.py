"""A first Ctrl-C waits for the end of the context; a second one does not."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pyro_vae.training.interrupts import HeldInterrupt


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def held(*actions):
    """Run actions in the context."""
    with HeldInterrupt() as interrupt:
        for action in actions:
            action(interrupt)


def test_it_is_raised_at_the_end():
    done = []

    def note(interrupt):
        done.append(interrupt.pending)

    with pytest.raises(KeyboardInterrupt):
        held(note, lambda _: ctrl_c(), note)
    assert done == [False, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_is_raised_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt):
        held(lambda _: ctrl_c(), done.append, lambda _: ctrl_c(), done.append)
    assert len(done) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_error_goes_first():
    with pytest.raises(ZeroDivisionError):
        held(lambda _: ctrl_c(), lambda _: 1 // 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_user_s_is_left_alone():
    seen = []

    def handler(number, frame):
        seen.append(number)

    signal.signal(signal.SIGINT, handler)
    try:
        with HeldInterrupt() as interrupt:
            ctrl_c()
            assert not interrupt.pending
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert seen == [signal.SIGINT]


def test_another_thread_holds_nothing():
    found = []

    def run():
        with HeldInterrupt():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
