"""Handlers for the signals that ask for an end: installed, taken back, and nohup respected."""

from __future__ import annotations

import signal

import pytest

from vmm.core.ending_signals import ENDING_SIGNALS, on_ending_signal


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_ending_signal_reaches_the_handler_and_the_former_one_comes_back(
    number: signal.Signals,
) -> None:
    seen: list[int] = []
    former = signal.getsignal(number)

    with on_ending_signal(lambda number, frame: seen.append(number)):
        signal.raise_signal(number)

    assert seen == [number]
    assert signal.getsignal(number) is former


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    seen: list[int] = []
    former = signal.signal(number, signal.SIG_IGN)
    try:
        with on_ending_signal(lambda number, frame: seen.append(number)):
            signal.raise_signal(number)
    finally:
        signal.signal(number, former)

    assert seen == []
