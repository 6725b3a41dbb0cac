"""Machines as objects of a program: threads, policies as instances, what may be asked of them."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator

import pytest

import vmm
from firmware import bench_path
from vmm import Kind, Machine, MachineConfig, Outcome, PageState, Policy, Range
from vmm.machine.report_keys import Tally
from vmm.policy import Allow, Decision, Deny, Event, View

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

SECONDS = 60
PRIVATE = MachineConfig(private_memory="auto")
# Port writes that exit, for much longer than any test takes.
ENDLESS = MachineConfig(kernel=str(bench_path()), append="-- e1000000000", memory=256 << 20)


def shares(machine: Machine) -> Tally:
    conversions = machine.report["conversions"]
    assert conversions is not None  # told: not under pKVM
    return conversions["share"]


@pytest.fixture
def endless() -> Iterator[Machine]:
    with Machine(ENDLESS) as machine:
        machine.start()
        yield machine


class Counting(Policy):
    """Counts what is asked, and gives one answer."""

    def __init__(self, answer: Decision | None = None) -> None:
        self.shares = 0
        self.answer = answer or Allow()

    def on_share(self, event: Event, view: View) -> Decision:
        self.shares += 1
        return self.answer


class Raising(Policy):
    def on_share(self, event: Event, view: View) -> Decision:
        raise LookupError("no such page in my book")


def test_machine_runs_and_has_its_output_and_report() -> None:
    output = bytearray()

    with Machine(PRIVATE, console=output.extend) as machine:
        outcome = machine.run(SECONDS)

    assert outcome == Outcome("poweroff")
    assert b"checks passed" in output
    assert machine.report["guest"]["exit"] == "poweroff"
    assert shares(machine)["calls"] > 0


def test_machines_run_side_by_side_on_any_thread_and_leave_nothing() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    policies = [Counting(), Counting()]
    ended: list[Outcome] = []

    def one(policy: Policy) -> None:
        with Machine(PRIVATE, policies=[policy]) as machine:
            ended.append(machine.run(SECONDS))

    threads = [threading.Thread(target=one, args=(policy,)) for policy in policies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert ended == [Outcome("poweroff")] * 2
    assert policies[0].shares == policies[1].shares > 0
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_policy_that_is_an_object_decides() -> None:
    with Machine(PRIVATE, policies=[Counting(Deny(errno.EPERM))]) as machine:
        machine.run(SECONDS)

    share = shares(machine)
    assert share["denied"] == share["calls"] > 0


def test_what_a_policy_raises_is_the_programs(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        Machine(PRIVATE, policies=[Raising()]) as machine,
        pytest.raises(vmm.PolicyError, match="no such page in my book"),
    ):
        machine.run(SECONDS)

    assert machine.report["guest"]["exit"] == "policy-error"
    assert capfd.readouterr() == ("", "")


def test_what_a_policy_raises_is_not_lost_on_a_program_that_does_not_wait() -> None:
    with (
        pytest.raises(vmm.PolicyError, match="no such page in my book"),
        Machine(PRIVATE, policies=[Raising()]) as machine,
    ):
        machine.start()
        while machine.is_running:
            pass


def test_error_that_the_block_raises_itself_comes_first() -> None:
    with (
        pytest.raises(KeyError, match="mine"),
        Machine(PRIVATE, policies=[Raising()]) as machine,
    ):
        machine.start()
        raise KeyError("mine")


def test_running_machine_answers_and_obeys(endless: Machine) -> None:
    first = endless.status()
    endless.pause()
    paused = endless.status()
    endless.resume()
    while endless.status().exits <= paused.exits:
        pass

    assert endless.is_running
    assert (first.state, paused.state) == ("running", "paused")
    assert endless.states() == [(Range(0, 256 << 20), PageState.SHARED)]
    endless.memory.pwrite(b"from the program", 0x800_0000)
    assert endless.memory.pread(16, 0x800_0000) == b"from the program"
    with pytest.raises(vmm.UnmappedAccess):
        endless.memory.pread(1, 256 << 20)


def test_stop_ends_the_guest_and_wait_says_so(endless: Machine) -> None:
    with pytest.raises(TimeoutError):
        endless.wait(0.01)

    endless.stop("enough of it")

    assert endless.wait(SECONDS) == Outcome("stopped", "enough of it")
    assert not endless.is_running
    for ask in (endless.pause, endless.resume, endless.status, endless.states):
        with pytest.raises(vmm.NotRunning):
            ask()
    endless.stop()


def test_stop_before_the_start_is_not_forgotten() -> None:
    with Machine(ENDLESS) as machine:
        machine.stop("never mind")
        assert machine.run(SECONDS) == Outcome("stopped", "never mind")


def test_run_that_takes_too_long_is_stopped() -> None:
    with Machine(ENDLESS) as machine:
        with pytest.raises(TimeoutError):
            machine.run(0.05)
        assert machine.wait(SECONDS).exit == "stopped"


def test_end_of_the_block_ends_the_guest() -> None:
    with Machine(ENDLESS) as machine:
        machine.start()

    assert machine.wait(SECONDS).reason == "the program left its block"


def test_pages_are_converted_for_the_program() -> None:
    with Machine(PRIVATE) as machine:
        machine.start()
        machine.pause()
        page = machine.states()[-1][0].end - 4096
        with pytest.raises(vmm.PrivateAccess):
            machine.memory.pread(1, page)
        with pytest.raises(ValueError, match="whole pages"):
            machine.convert(Kind.SHARE, page, 4097)

        machine.convert(Kind.SHARE, page, 4096)

        assert machine.memory.pread(16, page) == bytes(16)
        assert machine.states()[-1] == (Range(page, 4096), PageState.SHARED)


def test_policy_is_asked_about_the_programs_conversions_too() -> None:
    with Machine(PRIVATE, policies=[Counting(Deny(errno.EACCES))]) as machine:
        machine.start()
        machine.pause()
        page = machine.states()[-1][0].end - 4096

        with pytest.raises(PermissionError, match=r"share of .*: Permission denied"):
            machine.convert(Kind.SHARE, page, 4096)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (MachineConfig(kernel="/nonexistent"), vmm.UsageError, "/nonexistent"),
        (MachineConfig(private_memory="memfd-hugetlb"), vmm.HostError, "huge pages"),
    ],
)
def test_what_keeps_a_machine_from_starting_is_raised(
    config: MachineConfig, error: type[Exception], words: str
) -> None:
    with Machine(config) as machine:
        with pytest.raises(error, match=words):
            machine.start()
        with pytest.raises(error, match=words):
            machine.wait(SECONDS)
        with pytest.raises(vmm.NotRunning):
            machine.memory.pread(1, 0)


def test_console_may_be_a_file_or_a_pseudo_terminal() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as output, os.fdopen(writing, "wb") as file:
        with Machine(MachineConfig(), console=file) as machine:
            machine.run(SECONDS)
        file.close()
        assert b"checks passed" in output.read()

    with Machine(MachineConfig(), console="pty") as machine:
        assert machine.console_path is not None
        terminal = os.open(machine.console_path, os.O_RDWR | os.O_NOCTTY)
        machine.run(SECONDS)
        said = os.read(terminal, 4096)
        os.close(terminal)
    assert b"pyvmm payload" in said
