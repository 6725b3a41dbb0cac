"""--exec from the guest's side: its ports, what goes through them, and how the run ends."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.consoles import Consoles
from tests.support.virtio_driver import Piece
from vmm.core.errors import UsageError
from vmm.devices.virtio import console
from vmm.exits.outcome import FAILED, PANIC, POWEROFF, STOPPED, Outcome
from vmm.machine.execution import MOST_COMMAND, Execution


def receive_queue(port: int) -> int:
    """The transmit queue is the next."""
    return 2 * port + 2 if port else 0


class Guest:
    """A guest's init: the driver of the console, and what it says through the ports."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.ended: list[Outcome] = []
        execution.connect(self.ended.append)
        self._consoles = Consoles(device=execution.device)
        self.machine = self._consoles.machine
        self._buffers: dict[int, list[Piece]] = {}
        self.ports: dict[str, int] = {}
        self.connected: dict[int, bool] = {}
        self._consoles.up()
        for port, event, _, _ in self._consoles.heard():
            assert event == console.PORT_ADD
            self._consoles.say(port, console.PORT_READY, 1)
        self._listen()

    def _listen(self) -> None:
        """Take note of what the device says of its ports."""
        for port, event, value, more in self._consoles.heard():
            if event == console.PORT_NAME:
                self.ports[more.decode()] = port
            if event == console.PORT_OPEN:
                self.connected[port] = bool(value)

    def is_connected(self, name: str) -> bool:
        self._listen()
        return self.connected[self.ports[name]]

    def open(self, name: str) -> None:
        port = self.ports[name]
        index = receive_queue(port)
        self._buffers[index] = [self.machine.blank(4096) for _ in range(4)]
        for buffer in self._buffers[index]:
            self.machine.give(index, buffer)
        self._consoles.say(port, console.PORT_OPEN, 1)

    def read(self, name: str) -> bytes:
        """What has come so far."""
        index = receive_queue(self.ports[name])
        self.machine.settle()
        pieces = self.machine.queues[index].collect()
        return b"".join(self.machine.text(self._buffers[index].pop(0), n) for _, n in pieces)

    def write(self, name: str, data: bytes) -> None:
        index = receive_queue(self.ports[name]) + 1
        self.machine.give(index, self.machine.place(data))
        self.machine.kick(index)


class Pipes:
    """The run's standard streams."""

    def __init__(self) -> None:
        self.input, self.typed = os.pipe()
        self.seen, self.output = os.pipe()
        self.complained, self.errors = os.pipe()
        os.set_blocking(self.seen, False)
        os.set_blocking(self.complained, False)

    @property
    def streams(self) -> tuple[int, int, int]:
        return self.input, self.output, self.errors

    def close(self) -> None:
        for fd in (self.input, self.typed, self.seen, self.output, self.complained, self.errors):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    made = Pipes()
    yield made
    made.close()


@pytest.fixture
def guest(pipes: Pipes) -> Iterator[Guest]:
    made = Guest(Execution("uname -r", None, pipes.streams))
    yield made
    made.machine.close()
    made.execution.close()


def test_guest_gets_the_command_and_both_ways_of_its_streams(guest: Guest, pipes: Pipes) -> None:
    for name in guest.ports:
        guest.open(name)
    os.write(pipes.typed, b"typed")

    assert guest.read("pyvmm.command") == b"run 8\nuname -r"
    assert guest.read("pyvmm.input") == b"typed"
    guest.write("pyvmm.output", b"7.3\n")
    guest.write("pyvmm.errors", b"oops\n")
    assert os.read(pipes.seen, 100) == b"7.3\n"
    assert os.read(pipes.complained, 100) == b"oops\n"


def test_end_of_input_is_the_ports_end_after_all_of_it_was_taken(
    guest: Guest, pipes: Pipes
) -> None:
    os.write(pipes.typed, b"all of it")
    os.close(pipes.typed)
    pipes.typed = -1
    assert guest.is_connected("pyvmm.input")

    guest.open("pyvmm.input")

    assert guest.read("pyvmm.input") == b"all of it"
    assert not guest.is_connected("pyvmm.input")
    assert guest.is_connected("pyvmm.output")


def test_status_counts_once_all_output_is_out(guest: Guest, pipes: Pipes) -> None:
    for name in guest.ports:
        guest.open(name)
    guest.read("pyvmm.command")

    guest.write("pyvmm.command", b"ended 7 5 0 0\n")
    assert guest.read("pyvmm.command") == b""  # the guest waits: its output isn't here
    guest.write("pyvmm.output", b"hello")

    assert guest.read("pyvmm.command") == b"taken\n"
    assert guest.execution.outcome(Outcome(POWEROFF)).exit_status == 7
    assert os.read(pipes.seen, 100) == b"hello"


def test_output_that_nobody_takes_holds_the_end_up(guest: Guest, pipes: Pipes) -> None:
    for name in guest.ports:
        guest.open(name)
    guest.read("pyvmm.command")
    os.set_blocking(pipes.output, False)
    filled = 0
    while True:
        try:
            filled += os.write(pipes.output, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(pipes.output, True)

    guest.write("pyvmm.output", b"last")
    guest.write("pyvmm.command", b"ended 0 4 0 0\n")
    assert guest.read("pyvmm.command") == b""
    while filled:
        filled -= len(os.read(pipes.seen, 1 << 16))

    assert guest.read("pyvmm.command") == b"taken\n"
    assert os.read(pipes.seen, 100) == b"last"


@pytest.mark.parametrize("end", [Outcome(POWEROFF), Outcome(PANIC, "a panic")])
def test_guest_that_ends_without_a_status_has_failed(guest: Guest, end: Outcome) -> None:
    outcome = guest.execution.outcome(end)

    assert outcome.command_status is None
    assert outcome.exit_status == 1
    assert outcome.reason


@pytest.mark.parametrize(
    "line",
    [
        b"ended 0\n",
        b"ended x 0 0 0\n",
        b"ended 0 0 0 9999999999999999\n",
        b"\n",
        b"ended - 0 0 0\n",
    ],
)
def test_damaged_status_is_none(guest: Guest, line: bytes) -> None:
    guest.open("pyvmm.command")

    guest.write("pyvmm.command", line)

    assert guest.execution.outcome(Outcome(POWEROFF)).exit == FAILED


def test_what_the_guests_init_can_not_do_ends_the_run_with_its_words(guest: Guest) -> None:
    guest.open("pyvmm.command")

    guest.write("pyvmm.command", b"failed no shell \x1b[2J here\n")

    assert guest.ended[0].exit == FAILED
    assert guest.ended[0].reason == "no shell \\x1b[2J here"


def test_signal_is_passed_on_to_the_command(guest: Guest) -> None:
    guest.open("pyvmm.command")
    guest.read("pyvmm.command")

    assert guest.execution.signal(15)

    assert guest.read("pyvmm.command") == b"signal 15\n"


def test_reader_that_has_gone_ends_the_run_as_a_shell_says_it(guest: Guest, pipes: Pipes) -> None:
    guest.open("pyvmm.output")
    os.close(pipes.seen)
    pipes.seen = -1

    guest.write("pyvmm.output", b"y\n")

    assert guest.ended == [Outcome(STOPPED, "nobody reads the command's output", 141)]


@pytest.mark.parametrize("command", ["", "  ", "x" * (MOST_COMMAND + 1), "a\0b"])
def test_command_that_can_not_be_run_is_refused(command: str, pipes: Pipes) -> None:
    with pytest.raises(UsageError, match="--exec"):
        Execution(command, None, pipes.streams)


def test_folder_goes_in_and_what_the_guest_sends_comes_back(tmp_path: Path, pipes: Pipes) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "in").write_text("from the host")
    execution = Execution("true", str(folder), pipes.streams)
    guest = Guest(execution)
    for name in guest.ports:
        guest.open(name)
    archive = guest.read("pyvmm.share-in")
    returned = io.BytesIO()
    with tarfile.open(fileobj=returned, mode="w:") as tar:
        member = tarfile.TarInfo("./out")
        member.size = 14
        tar.addfile(member, io.BytesIO(b"from the guest"))
    data = returned.getvalue()
    for at in range(0, len(data), 4096):
        guest.write("pyvmm.share-out", data[at : at + 4096])
    guest.write("pyvmm.command", b"ended 0 0 0 %d\n" % len(data))

    execution.take_share()

    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert tar.getnames() == ["in"]
    assert (folder / "out").read_text() == "from the guest"
    guest.machine.close()
    execution.close()


def test_folder_of_a_guest_that_has_not_ended_well_stays_as_it_is(
    tmp_path: Path, pipes: Pipes
) -> None:
    (tmp_path / "in").write_text("from the host")
    execution = Execution("true", str(tmp_path), pipes.streams)

    execution.take_share()

    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    execution.close()


def test_what_comes_back_beyond_the_limit_is_not_kept(
    tmp_path: Path, pipes: Pipes, capsys: pytest.CaptureFixture[str]
) -> None:
    execution = Execution("true", f"{tmp_path},size=4K", pipes.streams)
    guest = Guest(execution)
    for name in guest.ports:
        guest.open(name)
    sent, piece = 0, bytes(200_000)
    while sent < 1_200_000:
        guest.write("pyvmm.share-out", piece)
        sent += len(piece)
        guest.machine._next -= len(piece)
    guest.write("pyvmm.command", b"ended 3 0 0 %d\n" % sent)

    execution.take_share()

    assert execution.outcome(Outcome(POWEROFF)).exit_status == 3
    assert "add size=SIZE" in capsys.readouterr().err
    guest.machine.close()
    execution.close()
