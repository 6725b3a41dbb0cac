"""`pyvmm lab ...`: prepare, boot, run the command inside, and be it: console, files, status."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from vmm.core.ending_signals import on_ending_signal
from vmm.core.errors import tell
from vmm.core.job_control import on_stop_and_continue
from vmm.core.output import write_all
from vmm.core.raw_terminal import RawTerminal
from vmm.lab import hosts, terminal
from vmm.lab.apt import Apt
from vmm.lab.cache import Cache, default_directory
from vmm.lab.distribution import ImageMaker, parse_request
from vmm.lab.machine import Lab, value_of, with_kernel
from vmm.lab.options import HELP, LabCommand, parse
from vmm.lab.progress import Progress, Reporter, Silent, finished
from vmm.lab.run import LabRun, ended_by

_GRACE_SECONDS = 60.0
"""How long a command inside may take to end after a signal, and its results to come back; pyvmm
gives a guest half of it to power off."""


class _Interrupted(BaseException):
    """A signal asks the lab to end; raised wherever the main thread is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """What signals ask of us: the first, while a command runs inside, is passed on to it; any
    other ends the lab at once."""

    def __init__(self) -> None:
        self.running = False  # a command does
        self.asked: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.running and self.asked is None:
            self.asked = number
        else:
            raise _Interrupted(number)  # unwinds the stack: QEMU and the terminal are seen to


def run(argv: list[str], check: Callable[[list[str], str], object] | None = None) -> int:
    """The whole command; returns its exit status, raises PyvmmError for the caller to print.

    `check` raises for arguments that the pyvmm inside would refuse on a machine of that
    architecture (as uname -m says it), before minutes are spent on one.
    """
    command = parse(argv)
    if command.help:
        print(HELP, end="")
        return 0
    progress: Progress = Silent() if command.options.quiet else Reporter()
    if command.arguments[:1] == ["image"] and not command.is_program:
        return _make_image(command, progress)
    pyvmms = not command.is_program and command.options.kernel_selftests is None
    if check is not None and pyvmms:
        host = hosts.named(command.options.host)
        check(with_kernel(command.arguments, host), host.architecture.name)
    signals = _Signals()
    try:
        with on_ending_signal(signals), finished(progress):
            return _run(command, progress, signals)
    except _Interrupted as interrupted:
        return ended_by(interrupted.number)
    except BrokenPipeError:
        return ended_by(signal.SIGPIPE)  # nobody reads the console any more


def _make_image(command: LabCommand, progress: Progress) -> int:
    request = parse_request(command.arguments[1:])
    options = command.options
    cache = Cache(options.cache or default_directory())
    maker = ImageMaker(cache, Apt(cache.path("apt")), progress, options.offline)
    with finished(progress):
        image = maker.make(request)
    print(f"{image}: Debian {request.release}, for --root {image}; root logs in without a password")
    return 0


def _run(command: LabCommand, progress: Progress, signals: _Signals) -> int:
    lab = Lab(command.options, progress)
    # A command's output is bytes, and standard error not the same as standard output.
    executes = not command.is_program and value_of(command.arguments, "--exec") is not None
    has_terminal = terminal.interactive() and not executes
    tests = command.options.kernel_selftests
    started = lab.start(
        command.arguments if tests is None else lab.selftest_words(tests, command.arguments),
        program=command.is_program or tests is not None,
        terminal=terminal.size() if has_terminal else None,
    )
    with started as machine:
        try:
            status = _drive(machine, has_terminal, progress, signals)
        finally:
            if command.options.log is not None:
                command.options.log.write_bytes(bytes(machine.log))
        return status


def _drive(machine: LabRun, has_terminal: bool, progress: Progress, signals: _Signals) -> int:
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
        signals.running = True
        _pass_on(machine, signals)
        return machine.wait()


def _pass_on(machine: LabRun, signals: _Signals) -> None:
    """Move bytes until the machine has ended; a signal goes to the command inside meanwhile."""
    until: float | None = None
    while machine.pump():
        if signals.asked is not None and until is None:
            machine.send_signal(signals.asked)
            until = time.monotonic() + _GRACE_SECONDS
        if until is not None and time.monotonic() > until:
            tell(
                f"the command in the lab didn't end within {_GRACE_SECONDS:g} s of the signal; "
                "what it was to bring back is lost"
            )
            assert signals.asked is not None
            raise _Interrupted(signals.asked)


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
