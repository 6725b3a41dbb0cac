"""virtio-console from the guest's side, with sockets, files and pseudo-terminals behind it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.consoles import CONTROL_TX, RX0, RX1, TX0, TX1, Consoles, connect
from tests.support.virtio_driver import ACCESS_PLATFORM, NEEDS_RESET, VERSION_1, Piece
from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.devices.virtio import console
from vmm.devices.virtio.budget import TURN_CALLS
from vmm.devices.virtio.console_backend import OutputFile, open_console

MakeConsoles = Callable[..., Consoles]


@pytest.fixture
def make() -> Iterator[MakeConsoles]:
    made: list[Consoles] = []

    def build(*specs: str) -> Consoles:
        made.append(Consoles(*specs))
        return made[-1]

    yield build
    for each in made:
        each.machine.close()


def test_console_without_multiport_is_one_open_port(make: MakeConsoles, tmp_path: Path) -> None:
    consoles = make(f"socket={tmp_path / 's'}")
    machine = consoles.machine
    machine.up(features=VERSION_1 | ACCESS_PLATFORM)
    with connect(tmp_path / "s") as client:
        client.sendall(b"typed")
        buffer = machine.blank(64)
        head = machine.give(RX0, buffer)
        machine.kick(RX0)
        assert machine.queues[RX0].collect() == [(head, 5)]
        assert machine.text(buffer, 5) == b"typed"

        machine.give(TX0, machine.place(b"printed "), machine.place(b"here"))
        machine.kick(TX0)
        assert client.recv(100) == b"printed here"


def test_console_ports_are_introduced_with_their_names(make: MakeConsoles, tmp_path: Path) -> None:
    consoles = make(f"file={tmp_path / 'out'}", f"socket={tmp_path / 's'},name=org.example.0")
    consoles.up()
    assert consoles.heard() == [(0, console.PORT_ADD, 1, b""), (1, console.PORT_ADD, 1, b"")]

    consoles.say(0, console.PORT_READY, 1)
    assert consoles.heard() == [
        (0, console.CONSOLE_PORT, 1, b""),
        (0, console.PORT_OPEN, 1, b""),
    ]
    consoles.say(1, console.PORT_READY, 1)
    assert consoles.heard() == [
        (1, console.PORT_NAME, 1, b"org.example.0"),
        (1, console.PORT_OPEN, 0, b""),
    ]


def test_console_plain_port_tells_who_comes_and_goes(make: MakeConsoles, tmp_path: Path) -> None:
    consoles = make("pty", f"socket={tmp_path / 's'},name=n")
    consoles.up()
    consoles.open(1)
    consoles.machine.give(RX1, consoles.machine.blank(64))
    consoles.machine.kick(RX1)
    consoles.heard()

    with connect(tmp_path / "s"):
        consoles.machine.settle()
        assert consoles.heard() == [(1, console.PORT_OPEN, 1, b"")]
    consoles.machine.settle()
    assert consoles.heard() == [(1, console.PORT_OPEN, 0, b"")]


def test_console_input_waits_until_the_guest_opens_the_port(
    make: MakeConsoles, tmp_path: Path
) -> None:
    consoles = make("pty", f"socket={tmp_path / 's'},name=n")
    machine = consoles.machine
    consoles.up()
    buffer = machine.blank(64)
    machine.give(RX1, buffer)
    consoles.say(1, console.PORT_READY, 1)
    with connect(tmp_path / "s") as client:
        client.sendall(b"early")
        machine.kick(RX1)
        assert machine.queues[RX1].collect() == []

        consoles.say(1, console.PORT_OPEN, 1)

        assert machine.text(buffer, 5) == b"early"


def test_console_file_gets_the_output(make: MakeConsoles, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"from an earlier run")
    consoles = make(f"file={tmp_path / 'out'}")
    consoles.up()
    consoles.machine.give(TX0, consoles.machine.place(b"line\n"))

    consoles.machine.kick(TX0)

    assert (tmp_path / "out").read_bytes() == b"line\n"


def test_console_pty_carries_both_ways_unchanged(
    make: MakeConsoles, capfd: pytest.CaptureFixture[str]
) -> None:
    consoles = make("pty")
    machine = consoles.machine
    path = capfd.readouterr().err.split()[-1]
    consoles.up()
    consoles.open(0)
    terminal = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        buffer = machine.blank(64)
        machine.give(RX0, buffer)
        machine.kick(RX0)
        os.write(terminal, b"a\r\n\x03\x7f")
        machine.settle()
        assert machine.text(buffer, 5) == b"a\r\n\x03\x7f"

        machine.give(TX0, machine.place(b"\xffx\n"))
        machine.kick(TX0)
        assert os.read(terminal, 100) == b"\xffx\n"
    finally:
        os.close(terminal)


@pytest.mark.parametrize("name", ["", ",name=n"])
def test_console_output_that_nobody_reads(make: MakeConsoles, name: str, tmp_path: Path) -> None:
    """A console's is dropped, since Linux spins until it is taken; a plain port's waits."""
    consoles = make("pty", f"socket={tmp_path / 's'}{name}")
    machine = consoles.machine
    consoles.up()
    consoles.open(1)
    with connect(tmp_path / "s") as client:
        machine.settle()
        block = bytes(range(256)) * 256
        piece = machine.place(block)
        for _ in range(30):
            machine.give(TX1, piece)
        machine.kick(TX1)
        done = len(machine.queues[TX1].collect())

        received = b""
        while True:
            try:
                received += client.recv(1 << 20)
            except BlockingIOError:
                break
            machine.settle()

        if name:
            assert done < 30
            assert received == block * 30
        else:
            assert done == 30
            assert received == block * (len(received) // len(block))
            assert 0 < len(received) < 30 * len(block)


def test_console_client_that_leaves_takes_half_an_output_with_it(
    make: MakeConsoles, tmp_path: Path
) -> None:
    consoles = make(f"socket={tmp_path / 's'}")
    machine = consoles.machine
    consoles.up()
    consoles.open(0)
    machine.give(RX0, machine.blank(16))
    machine.kick(RX0)
    with connect(tmp_path / "s"):
        machine.settle()
        for _ in range(20):
            machine.give(TX0, machine.place(bytes(30000)))
        machine.kick(TX0)
    machine.settle()

    with connect(tmp_path / "s") as second:
        machine.settle()
        machine.give(TX0, machine.place(b"fresh"))
        machine.kick(TX0)
        assert second.recv(100) == b"fresh"


def test_console_messages_that_the_guest_does_not_fetch_do_not_pile_up(
    make: MakeConsoles,
) -> None:
    consoles = make("pty", "pty", "pty")
    machine = consoles.machine
    machine.up(size=32)
    for _ in range(200):
        consoles.say(0, console.DEVICE_READY, 1)
        for port in range(3):
            consoles.say(port, console.PORT_READY, 1)
        machine.queues[CONTROL_TX].collect()
        machine._next = 0x60000
    device = machine.device
    assert isinstance(device, console.VirtioConsole)
    assert len(device._messages) <= 3 * 3


@pytest.mark.parametrize(
    ("queue", "data"),
    [(CONTROL_TX, b"short"), (CONTROL_TX, b"")],
)
def test_console_broken_control_message_stops_the_device(
    make: MakeConsoles, queue: int, data: bytes
) -> None:
    consoles = make("pty")
    consoles.up()
    consoles.machine.give(queue, consoles.machine.place(data))

    consoles.machine.kick(queue)

    assert consoles.machine.driver.status & NEEDS_RESET


def test_console_output_of_gigabytes_stops_the_device(make: MakeConsoles) -> None:
    consoles = make("pty")
    consoles.up()
    consoles.machine.give(TX0, Piece(0, console.MOST_OUTPUT), Piece(0, 1))

    consoles.machine.kick(TX0)

    assert consoles.machine.driver.status & NEEDS_RESET


def test_console_private_buffers_are_refused(make: MakeConsoles, tmp_path: Path) -> None:
    consoles = make(f"socket={tmp_path / 's'}")
    machine = consoles.machine
    consoles.up()
    consoles.open(0)
    machine.memory.private.append(Range(0x80000, 4096))
    with connect(tmp_path / "s") as client:
        machine.give(TX0, Piece(0x80000, 10))
        machine.kick(TX0)
        with pytest.raises(BlockingIOError):
            client.recv(10)
    assert machine.driver.status & NEEDS_RESET
    assert machine.device.statistics.refused == 1
    assert machine.loop.wanted == {}


def test_console_of_an_unknown_port_is_ignored(make: MakeConsoles) -> None:
    consoles = make("pty")
    consoles.up()
    consoles.heard()

    consoles.say(1, console.PORT_READY, 1)
    consoles.say(0xFFFF_FFFE, console.PORT_OPEN, 1)

    assert consoles.heard() == []
    assert not consoles.machine.driver.status & NEEDS_RESET


def test_console_reset_forgets_and_starts_again(make: MakeConsoles, tmp_path: Path) -> None:
    consoles = make(f"socket={tmp_path / 's'}")
    machine = consoles.machine
    consoles.up()
    consoles.open(0)
    with connect(tmp_path / "s") as client:
        machine.settle()
        machine.driver.status = 0
        client.sendall(b"meanwhile")
        machine.settle()
        assert machine.loop.wanted == {}

        consoles.up()
        consoles.open(0)
        buffer = machine.blank(16)
        machine.give(RX0, buffer)
        machine.kick(RX0)
        assert machine.text(buffer, 9) == b"meanwhile"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["tty"], "exactly one of file, pty, socket is needed; write --console pty"),
        (["pty,file=x"], "exactly one of"),
        (["pty=3"], "'pty' takes no value"),
        (["socket="], "'socket' has no value"),
        (["file"], "'file' has no value"),
        (["pty,name="], "'name' has no value"),
        (["pty,name=" + "n" * 65], "at most 64 bytes"),
        (["pty,names=x"], "unknown option 'names'"),
        (["pty,name=x"], "put one without name= first"),
        (["pty"] * 17, "given 17 times; there are 16 ports"),
        (["file={dir}"], "cannot be written: Is a directory; give another path"),
        (["file={dir}/no/x"], "cannot be written: No such file"),
        (["socket={dir}/no/x"], "cannot listen there: No such file"),
        (["socket={dir}/" + "x" * 200], "cannot listen there: .*too long; give a path of at most"),
        (["socket={dir}"], "cannot listen there: Address already in use"),
        (["pty", "socket={dir}/s", "socket={dir}/s"], "Address already in use"),
    ],
)
def test_console_bad_input_is_refused_and_leaves_nothing_open(
    tmp_path: Path, specs: list[str], message: str
) -> None:
    open_fds = len(os.listdir("/proc/self/fd"))

    with pytest.raises(UsageError, match=message):
        open_console([spec.replace("{dir}", str(tmp_path)) for spec in specs])

    assert len(os.listdir("/proc/self/fd")) == open_fds
    assert os.listdir(tmp_path) == []


def test_console_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(tmp_path / "s"))
        old.listen()

    open_console([f"socket={tmp_path / 's'}"]).close()

    assert os.listdir(tmp_path) == []


def test_file_with_all_its_bytes_gets_no_more_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fd = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    output = OutputFile(fd, "out", 10)

    accepted = [output.write(b"01234567") for _ in range(3)]
    output.close()

    assert accepted == [True] * 3
    assert (tmp_path / "out").read_bytes() == b"0123456701"
    assert capsys.readouterr().err == (
        "pyvmm: --console file=out has its 10 bytes; further output is dropped: "
        "write size=SIZE for more\n"
    )


def test_device_that_takes_output_has_no_bound(capsys: pytest.CaptureFixture[str]) -> None:
    output = OutputFile(os.open(os.devnull, os.O_WRONLY), os.devnull, 10)

    output.write(bytes(100))
    output.close()

    assert capsys.readouterr().err == ""


def test_console_fifo_that_was_full_goes_on_when_it_is_read(tmp_path: Path) -> None:
    """A port's output stayed for ever where nobody had been told to wait for room."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    consoles = Consoles(f"file={tmp_path / 'out'}", f"file={path},name=log")
    machine = consoles.machine
    consoles.up()
    consoles.open(1)
    sent = machine.place(bytes(range(256)) * 256)
    for _ in range(5):
        machine.give(TX1, sent)

    machine.kick(TX1)
    assert len(machine.queues[TX1].collect()) < 5
    received = b""
    while data := _read_some(reader):
        received += data
        machine.settle()

    assert received == bytes(range(256)) * 256 * 5
    machine.queues[TX1].collect()
    assert machine.queues[TX1].seen == 5
    machine.close()
    os.close(reader)


def _read_some(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""


def test_console_turn_of_output_in_crumbs_is_bounded(tmp_path: Path) -> None:
    consoles = Consoles(f"file={tmp_path / 'out'}")
    machine = consoles.machine
    machine.up(size=64)
    queue = machine.queues[TX0]
    table = machine.place(
        b"".join(
            struct.pack("<QIHH", 0x80000 + 2 * i, 1, 1 if i < 1023 else 0, i + 1)
            for i in range(1024)
        )
    )
    for i in range(64):
        queue.descriptor(i, table.gpa, table.size, 4, 0)
    queue.offer(*range(64))
    machine.memory.calls.clear()

    machine.transport.notify(TX0)

    assert machine.memory.calls["pread"] < 2 * TURN_CALLS
    assert machine.rung == [TX0]
    machine.settle()
    assert len(queue.collect()) == 64
    machine.close()
