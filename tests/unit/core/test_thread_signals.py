"""Signals that are not for a thread of ours reach the main one, whatever the kernel prefers."""

from __future__ import annotations

import signal
import threading

from vmm.core.thread_signals import leave_signals_to_the_main_thread


def masked(*but: int) -> set[int]:
    """What a thread blocks that leaves signals to the main one."""
    found: list[set[int]] = []

    def run() -> None:
        leave_signals_to_the_main_thread(*but)
        found.append({int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])})

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_thread_blocks_what_the_main_thread_handles_and_not_its_own_faults() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    blocked = masked(signal.SIGRTMIN)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTSTP, signal.SIGCONT, signal.SIGUSR1):
        assert number in blocked
    for number in (signal.SIGRTMIN, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        assert number not in blocked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before  # the caller's own is as it was
