"""Which thread takes a signal: the main one, on which Python runs handlers."""

from __future__ import annotations

from vmm.core.lean_signal import signal

_SYNCHRONOUS = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGABRT,
    signal.SIGSYS,
}


def leave_signals_to_the_main_thread(*but: int) -> None:
    """Block all signals in the calling thread, except `but` and those of its own faults.

    The kernel gives a process' signal to any thread that doesn't block it, the main one first
    unless that has another pending, as when it is just being continued (complete_signal() in
    kernel/signal.c). Python notes it there, and runs the handler on the main thread, which a wait
    in the kernel keeps from looking: the signal would have no effect until something else comes.
    """
    blocked = signal.valid_signals() - _SYNCHRONOUS - set(but)
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
