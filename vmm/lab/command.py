"""`pyvmm lab ...`: prepare, boot, run the command inside, and be it: console, files, status."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from vmm.core.ending_signals import on_ending_signal
from vmm.core.job_control import on_stop_and_continue
from vmm.core.output import write_all
from vmm.core.raw_terminal import RawTerminal
from vmm.lab import hosts, terminal
from vmm.lab.machine import Lab, with_kernel
from vmm.lab.options import HELP, LabCommand, parse
from vmm.lab.progress import Progress, Reporter, Silent, finished
from vmm.lab.run import LabRun, ended_by


class _Interrupted(BaseException):
    """A signal asks the lab to end; raised wherever the main thread is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _unwind(number: int, frame: FrameType | None) -> None:
    """Unwinds the stack, so that QEMU and the terminal are seen to."""
    raise _Interrupted(number)


def run(argv: list[str], check: Callable[[list[str], str], object] | None = None) -> int:
    """The whole command; returns its exit status, raises PyvmmError for the caller to print.

    `check` raises for arguments that the pyvmm inside would refuse on a machine of that
    architecture (as uname -m says it), before minutes are spent on one.
    """
    command = parse(argv)
    if command.help:
        print(HELP, end="")
        return 0
    pyvmms = not command.is_program and command.options.kernel_selftests is None
    if check is not None and pyvmms:
        host = hosts.named(command.options.host)
        check(with_kernel(command.arguments, host), host.architecture.name)
    progress: Progress = Silent() if command.options.quiet else Reporter()
    try:
        with on_ending_signal(_unwind), finished(progress):
            return _run(command, progress)
    except _Interrupted as interrupted:
        return ended_by(interrupted.number)
    except BrokenPipeError:
        return ended_by(signal.SIGPIPE)  # nobody reads the console any more


def _run(command: LabCommand, progress: Progress) -> int:
    lab = Lab(command.options, progress)
    has_terminal = terminal.interactive()
    tests = command.options.kernel_selftests
    started = lab.start(
        command.arguments if tests is None else lab.selftest_words(tests, command.arguments),
        program=command.is_program or tests is not None,
        terminal=terminal.size() if has_terminal else None,
    )
    with started as machine:
        try:
            status = _drive(machine, has_terminal, progress)
        finally:
            if command.options.log is not None:
                command.options.log.write_bytes(bytes(machine.log))
        return status


def _drive(machine: LabRun, has_terminal: bool, progress: Progress) -> int:
    machine.output.sink = _writer(1)
    if not has_terminal:
        machine.errors.sink = _writer(2)
    if not has_terminal:
        _feed_input(machine)
    with RawTerminal(0) as raw, on_stop_and_continue(raw.suspend, raw.resume):
        while machine.pump():
            if machine.running:
                progress.done()
                if has_terminal:
                    raw.enter()
                    machine.feed_input_from(0)
                break
        return machine.wait()


def _feed_input(machine: LabRun) -> None:
    """Standard input is passed on from the start; a closed one is an empty one."""
    try:
        os.fstat(0)
    except OSError:
        machine.close_input()
        return
    machine.feed_input_from(0)


def _writer(fd: int) -> Callable[[bytes], None]:
    return lambda data: write_all(fd, data)
