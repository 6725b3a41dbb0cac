"""What signals do to a machine: the button first, the end at last, the terminal in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from vmm.control import signals
from vmm.control.signals import SignalReactions
from vmm.core.event_loop import EventLoop


@dataclass
class Machine:
    """Notes what it is asked; ends its loop when told to, or as soon as `expected` was asked."""

    loop: EventLoop
    listens: bool = False
    stuck: bool = False
    impatient: bool = False
    """Whether another SIGTERM comes once the button is pressed."""
    expected: str = "end"
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reactions = SignalReactions(
            self.loop,
            end=lambda reason: self.note(f"end: {reason}"),
            press_power_button=self.press,
            suspend=lambda: self.note("suspend"),
            continued=lambda: self.note("continued"),
            is_stuck=lambda: self.stuck,
        )

    def note(self, what: str) -> None:
        self.asked.append(what)
        if what.startswith(self.expected):
            self.loop.stop()

    def press(self) -> bool:
        self.note("press")
        if self.impatient:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.listens

    def run(self, *numbers: signal.Signals) -> list[str]:
        """Send signals to this process from another thread while the loop runs."""

        def send() -> None:
            for number in numbers:
                os.kill(os.getpid(), number)

        with self.reactions.installed():
            sender = threading.Thread(target=send)
            sender.start()
            self.loop.run()
            sender.join()
        return self.asked


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


def test_sigterm_ends_a_run_whose_guest_does_not_listen(loop: EventLoop) -> None:
    assert Machine(loop).run(signal.SIGTERM) == ["press", "end: received SIGTERM"]


def test_sigterm_leaves_a_guest_that_listens_its_time(
    loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "POWER_BUTTON_SECONDS", 0.01)

    asked = Machine(loop, listens=True).run(signal.SIGTERM)

    assert asked == [
        "press",
        "end: received SIGTERM, and the guest did not power off in 0.01 s",
    ]


def test_second_sigterm_ends_the_run_at_once(loop: EventLoop) -> None:
    asked = Machine(loop, listens=True, impatient=True).run(signal.SIGTERM)

    assert asked == ["press", "end: received SIGTERM"]


def test_sigterm_while_the_loop_is_stuck_ends_the_run(loop: EventLoop) -> None:
    assert Machine(loop, listens=True, stuck=True).run(signal.SIGTERM) == ["end: received SIGTERM"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_other_ending_signals_press_no_button(loop: EventLoop, number: signal.Signals) -> None:
    assert Machine(loop, listens=True).run(number) == [f"end: received {number.name}"]


def test_sigcont_is_told_on_the_loop(loop: EventLoop) -> None:
    assert Machine(loop, expected="continued").run(signal.SIGCONT) == ["continued"]


def test_handlers_are_those_of_before_afterwards_and_no_fd_is_left(loop: EventLoop) -> None:
    numbers = (signal.SIGTERM, signal.SIGTSTP, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    fds = sorted(os.listdir("/proc/self/fd"))

    Machine(loop).run(signal.SIGTERM)

    assert [signal.getsignal(number) for number in numbers] == before
    assert sorted(os.listdir("/proc/self/fd")) == fds


STOPPING = """
import sys
from tests.unit.control.test_signals import Machine
from vmm.core.event_loop import EventLoop
machine = Machine(EventLoop(), expected="continued")
with machine.reactions.installed():
    print("ready", flush=True)
    machine.loop.run()
print(machine.asked, flush=True)
"""


def test_sigtstp_gives_the_terminal_back_and_stops_the_process() -> None:
    with subprocess.Popen([sys.executable, "-c", STOPPING], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

        process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)

        assert process.stdout.read() == b"['suspend', 'continued']\n"
