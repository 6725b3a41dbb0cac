"""Consoles in a process of their own, with programs of the host at their ends."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.consoles import CONTROL_RX, CONTROL_TX, RX0, RX1, TX0, TX1, Consoles, connect
from tests.support.fake_memory import BatchingFakeMemory, FakeMemory
from tests.support.virtio_driver import NEEDS_RESET
from tests.support.virtio_machine import MEMORY
from vmm.core.errors import UsageError
from vmm.devices.process.front_end import ProcessDevice
from vmm.devices.process.spawner import Job, Spawner
from vmm.devices.virtio import console
from vmm.devices.virtio.console_backend import open_console
from vmm.sandbox.device import enter_device

Message = tuple[int, int, int, bytes]


class ConsoleRig(Consoles):
    """Consoles whose process is a real one, in its sandbox."""

    def __init__(self, *specs: str, memory: FakeMemory | None = None) -> None:
        made = open_console([f"{spec},process" for spec in specs])
        assert made.descriptors is not None
        self.spawner = Spawner(enter_device)
        number = self.spawner.add(Job(made, [], made.descriptors, accepts=True))
        self.spawner.begin()
        self.device = ProcessDevice(
            made, "console", number, self.spawner,
            events_without=made.ports_shut, drops_without=made.said_to_nobody,
        )  # fmt: skip
        super().__init__(device=self.device, memory=memory)

    def close(self) -> None:
        self.machine.close()
        self.spawner.close()

    def until(self, done: Callable[[], bool]) -> None:
        """Serve what comes until it is so."""
        self.machine.settle()
        while not done():
            assert self.machine.loop.wait(10), "the process says nothing"
            self.machine.settle()

    def answered(self, queue: int) -> None:
        """Wait until all that was given to a queue has been answered."""
        given = self.machine.queues[queue]
        self.until(lambda: given.used_index() == given.available)

    def hears(self, count: int) -> list[Message]:
        """The next messages."""
        said, queue = self.heard(), self.machine.queues[CONTROL_RX]
        while len(said) < count:
            self.until(lambda: queue.used_index() != queue.seen)
            said += self.heard()
        return said

    def introduced(self, *ports: int) -> None:
        """The driver comes up, and takes all ports; somebody in the guest opens them."""
        self.up()
        self.hears(len(ports))
        for port in ports:
            self.open(port)
            self.hears(2)
        self.answered(CONTROL_TX)

    def prints(self, queue: int, data: bytes) -> None:
        self.machine.give(queue, self.machine.place(data))
        self.machine.kick(queue)
        self.answered(queue)

    def received(self, client: socket.socket) -> bytes:
        """What a program of the host gets next; the process is served meanwhile."""
        while True:
            fds: list[socket.socket | int] = [client, *self.machine.loop.wanted]
            ready, _, _ = select.select(fds, [], [], 10)
            assert ready, "nothing comes"
            self.machine.settle()
            if client in ready:
                return client.recv(100)

    def kill(self) -> None:
        deaths = self.device.statistics.deaths
        os.kill(self.device.statistics.pid, signal.SIGKILL)
        self.until(lambda: self.device.statistics.deaths > deaths)


MakeRig = Callable[..., ConsoleRig]


@pytest.fixture(params=[BatchingFakeMemory, FakeMemory])
def make(request: pytest.FixtureRequest) -> Iterator[MakeRig]:
    """On memory with verbs for many pieces, and on one that is read piece by piece."""
    made: list[ConsoleRig] = []

    def build(*specs: str) -> ConsoleRig:
        made.append(ConsoleRig(*specs, memory=request.param(MEMORY)))
        return made[-1]

    yield build
    for each in made:
        each.close()


def test_console_s_output_and_a_port_s_both_ways_go_through_the_process(
    make: MakeRig, tmp_path: Path
) -> None:
    rig = make(f"file={tmp_path / 'out'}", f"socket={tmp_path / 's'},name=n")
    rig.introduced(0, 1)

    rig.prints(TX0, b"line\n")
    with connect(tmp_path / "s") as client:
        assert rig.hears(1) == [(1, console.PORT_OPEN, 1, b"")]
        rig.prints(TX1, b"to the host")
        assert rig.received(client) == b"to the host"
        buffer = rig.machine.blank(64)
        rig.machine.give(RX1, buffer)
        rig.machine.kick(RX1)
        client.sendall(b"to the guest")
        rig.answered(RX1)

    assert (tmp_path / "out").read_bytes() == b"line\n"
    assert rig.machine.text(buffer, 12) == b"to the guest"


def test_pseudo_terminal_is_another_process_s_too(
    make: MakeRig, capfd: pytest.CaptureFixture[str]
) -> None:
    rig = make("pty")
    terminal = os.open(capfd.readouterr().err.split()[-1], os.O_RDWR | os.O_NOCTTY)
    rig.introduced(0)
    for _ in range(2):
        rig.prints(TX0, b"x\n")
        assert os.read(terminal, 100) == b"x\n"
        rig.device.restart()
    os.close(terminal)


def test_killed_process_holds_no_driver_up_and_shuts_plain_ports(
    make: MakeRig, tmp_path: Path
) -> None:
    """Linux' driver keeps its processor waiting for an answer to what it prints and says."""
    rig = make(f"file={tmp_path / 'out'}", f"socket={tmp_path / 's'},name=n")
    rig.introduced(0, 1)
    with connect(tmp_path / "s") as client:
        assert rig.hears(1) == [(1, console.PORT_OPEN, 1, b"")]

        rig.kill()

        assert rig.heard() == [(1, console.PORT_OPEN, 0, b"")]
        assert client.recv(1) == b""
    for queue in (TX0, TX1):
        rig.prints(queue, b"lost")
    rig.say(1, console.PORT_OPEN, 0)
    assert rig.machine.queues[CONTROL_TX].used_index() == rig.machine.queues[CONTROL_TX].available
    assert (tmp_path / "out").read_bytes() == b""
    assert not rig.machine.driver.status & NEEDS_RESET


def test_new_process_knows_which_ports_are_open(make: MakeRig, tmp_path: Path) -> None:
    rig = make("pty", f"socket={tmp_path / 's'},name=n", f"socket={tmp_path / 't'},name=m")
    rig.up()
    rig.hears(3)
    rig.open(1)
    rig.say(2, console.PORT_READY, 1)  # which nobody opens
    rig.hears(4)
    rig.answered(CONTROL_TX)
    buffers = [rig.machine.blank(64) for _ in range(2)]
    for queue, buffer in zip((RX1, RX1 + 2), buffers, strict=True):
        rig.machine.give(queue, buffer)
    rig.kill()
    rig.heard()

    rig.device.restart()

    again = rig.hears(5)
    assert (0, console.PORT_ADD, 1, b"") in again  # which the driver hadn't taken
    assert (1, console.PORT_NAME, 1, b"n") in again
    with connect(tmp_path / "t") as early, connect(tmp_path / "s") as client:
        early.sendall(b"early")
        client.sendall(b"typed")
        rig.answered(RX1)
        assert rig.hears(2)  # both have come
    assert rig.machine.text(buffers[0], 5) == b"typed"
    assert rig.machine.queues[RX1 + 2].used_index() == 0


def test_driver_that_came_up_without_a_process_gets_its_ports_from_the_next(
    make: MakeRig, tmp_path: Path
) -> None:
    rig = make("pty", f"socket={tmp_path / 's'},name=n")
    rig.kill()
    rig.up()
    assert rig.heard() == []

    rig.device.restart()

    assert rig.hears(2) == [(0, console.PORT_ADD, 1, b""), (1, console.PORT_ADD, 1, b"")]


def test_new_driver_is_not_taken_for_the_last_one(make: MakeRig) -> None:
    rig = make("pty")
    rig.introduced(0)
    rig.machine.driver.status = 0
    rig.machine.up(size=32)
    rig._messages = []
    rig._refill()

    rig.kill()
    rig.device.restart()
    rig.prints(TX0, b"x")

    assert rig.machine.queues[CONTROL_RX].used_index() == 0


def test_file_gets_no_more_in_all_than_it_may_get(
    make: MakeRig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rig = make(f"file={tmp_path / 'out'},size=10")
    rig.introduced(0)
    rig.prints(TX0, b"12345678")

    rig.kill()
    rig.device.restart()
    rig.prints(TX0, b"abcdefgh")

    assert (tmp_path / "out").read_bytes() == b"12345678ab"
    assert capfd.readouterr().err.endswith("dropped: write size=SIZE for more\n")


def test_input_that_came_without_a_process_is_the_next_one_s(make: MakeRig, tmp_path: Path) -> None:
    rig = make(f"socket={tmp_path / 's'}")
    rig.introduced(0)
    buffer = rig.machine.blank(64)
    rig.machine.give(RX0, buffer)
    rig.machine.kick(RX0)
    rig.kill()

    with connect(tmp_path / "s") as client:
        client.sendall(b"patient")
        rig.device.restart()
        rig.answered(RX0)

    assert rig.machine.text(buffer, 7) == b"patient"


def test_ports_of_which_some_are_in_a_process_are_refused(tmp_path: Path) -> None:
    specs = [f"file={tmp_path / 'a'},process", f"file={tmp_path / 'b'},name=n"]

    with pytest.raises(UsageError, match="write process at each --console, or at none"):
        open_console(specs)
