"""The first Ctrl-C asks, the second interrupts, and afterwards everything is as before."""

import signal

from shared.interrupt import Interrupt

import pytest


def test_first_ctrl_c_only_asks():
    with Interrupt() as interrupt:
        assert not interrupt.asked
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked


def test_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt):
        with Interrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


def test_sigterm_asks_and_never_interrupts():
    """torchrun ends its processes with SIGTERM."""
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked


def test_handlers_are_put_back_even_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError):
        with Interrupt():
            raise ValueError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_new_interrupt_starts_unasked():
    with Interrupt():
        signal.raise_signal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.asked
