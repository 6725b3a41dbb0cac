"""Parts of pyvmm that no guest on this machine's KVM drives, as programs to inject errors into.

`python -m tests.injection.programs NAME ERRNO` does one thing while its calls fail, and prints
which of the table's outcomes came of it, or what is wrong. More names and errnos go on with the
next of the environment's rules each.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.injection import programs_apart, programs_files, taps
from tests.injection.arming import failing, line_of, next_rule
from tests.injection.row import (
    CALLER,
    DROPPED,
    ENDS_3,
    GUEST,
    RESET,
    SAME,
)
from tests.support.back_end import BackEndDouble
from tests.support.consoles import Consoles
from tests.support.control import Server, line
from tests.support.virtio_driver import NEEDS_RESET
from tests.support.virtio_machine import VirtioMachine
from tests.support.vsock_guest import HOST_PORT, Guest, dial
from tests.unit.devices.test_virtio_net import HEADER, Network
from vmm.core import unix_listener
from vmm.core.errors import HostError
from vmm.devices.vhost_user.channel import BackEndError, Channel
from vmm.devices.vhost_user.device import VERSION_1, greet
from vmm.devices.vhost_user.messages import PROTOCOL_F_CONFIG, PROTOCOL_F_MQ
from vmm.devices.virtio.balloon_control import open_balloon
from vmm.devices.virtio.console_backend import open_console
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.net import RX, TX, VirtioNet
from vmm.devices.virtio.net_backend import Tap
from vmm.devices.virtio.vsock import open_vsock
from vmm.devices.virtio.vsock_packet import Op

# -- who connects ---------------------------------------------------------------------------------


def control(folder: Path, error: int) -> str:
    unix_listener.AGAIN_SECONDS = 0.01
    server = Server(folder / "control")
    try:
        with failing(), socket.socket(socket.AF_UNIX) as caller:
            caller.setblocking(True)
            caller.connect(str(server.path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                caller.sendmsg([line("status")])
            answered = line_of(caller)
        assert server.ask(line("status"))[0]["ok"], "the next caller isn't served"
    finally:
        server.stop()
    return SAME if answered else CALLER


def _taken(path: Path, device: VirtioDevice) -> str:
    """A program of the host calls a device."""
    machine = VirtioMachine(device)
    machine.up()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
        caller.setblocking(False)
        opened = len(os.listdir("/proc/self/fd"))
        with failing():
            machine.loop.run_ready()
        machine.loop.pass_time()
        machine.loop.run_ready()
        is_taken = len(os.listdir("/proc/self/fd")) > opened
        try:
            hung_up = not caller.recvmsg(1)[0]
        except BlockingIOError:
            hung_up = False
    machine.close()
    assert is_taken is not hung_up
    return SAME if is_taken else CALLER


def console_caller(folder: Path, error: int) -> str:
    return _taken(folder / "s", open_console([f"socket={folder / 's'}"]))


def vsock_caller(folder: Path, error: int) -> str:
    return _taken(folder / "s", open_vsock(f"path={folder / 's'}"))


def balloon_caller(folder: Path, error: int) -> str:
    return _taken(folder / "s", open_balloon(f"control={folder / 's'}", 64 << 20))


# -- devices --------------------------------------------------------------------------------------


def _frames(
    machine: VirtioMachine, device: VirtioNet, arrive: Callable[[], None], front: bytes = b""
) -> str | None:
    """A frame from the guest, and one for it; what came of the second, None where it came."""
    machine.up()
    buffer = machine.blank(200)
    machine.give(RX, buffer)
    machine.kick(RX)
    machine.give(TX, machine.place(HEADER + front + b"from the guest"))
    with failing():
        machine.kick(TX)
        arrive()
    machine.loop.pass_time()  # a host without memory is tried again in a moment
    machine.settle()
    if machine.driver.status & NEEDS_RESET:
        return RESET
    assert len(machine.queues[TX].collect()) == 1, "its buffer was not given back"
    came = machine.queues[RX].collect()
    return None if came and b"for the guest" in machine.text(buffer, 200) else DROPPED


def net(folder: Path, error: int) -> str:
    network = Network()
    said = _frames(network.machine, network.device, lambda: network.arrive(b"for the guest"))
    sent = network.sent()
    network.close()
    if said is None:
        assert network.device.statistics.bytes_read == len(b"for the guest")
    if sent != [b"from the guest"]:
        said = said or DROPPED
        assert network.device.statistics.errors
    return said or SAME


def tap(folder: Path, error: int) -> str:
    """The tap's end is a socket that keeps frames apart, as a tap does."""
    ours, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    outside.setblocking(False)
    backend = Tap.__new__(Tap)
    backend.fd = ours.detach()
    backend.features = 0  # TUNSETOFFLOAD is for taps alone
    backend.set_offloads = lambda features: None  # type: ignore[method-assign]
    device = VirtioNet(backend, bytes(6))
    machine = VirtioMachine(device)

    def arrive() -> None:
        outside.sendmsg([HEADER + b"for the guest"])
        machine.settle()

    said = _frames(machine, device, arrive)
    try:
        sent = outside.recvmsg(200)[0][len(HEADER) :]
    except BlockingIOError:
        sent = b""
    machine.close()
    outside.close()
    if sent != b"from the guest":
        assert device.statistics.errors
        said = said or DROPPED
    return said or SAME


def tap_start(folder: Path, error: int) -> str:
    """An interface that can't be had."""
    taps.enter()
    try:
        with failing():
            taps.Tap(taps.NAME).close()
    except HostError as refused:
        assert taps.NAME in str(refused) and os.strerror(error) in str(refused)
        return ENDS_3
    return SAME


def tap_offloads(folder: Path, error: int) -> str:
    """Offloads that were agreed on, and that the interface then doesn't take."""
    taps.enter()
    machine = VirtioMachine(VirtioNet(taps.Tap(taps.NAME), bytes(6)))
    with failing():
        machine.up()
    stopped = machine.driver.status & NEEDS_RESET
    machine.close()
    return RESET if stopped else SAME


def real_tap(folder: Path, error: int) -> str:
    taps.enter()
    device = VirtioNet(taps.Tap(taps.NAME), bytes(6))
    machine = VirtioMachine(device)
    network = taps.Network()

    def arrive() -> None:
        network.send(b"for the guest")
        machine.settle()

    said = _frames(machine, device, arrive, taps.FRAME)
    came = network.came()
    network.close()
    machine.close()
    if came != [b"from the guest"]:
        assert device.statistics.errors
        said = said or DROPPED
    return said or SAME


def tap_deleted(folder: Path, error: int) -> str:
    """The interface goes away under way: nothing is injected, the kernel says EBADFD."""
    taps.enter()
    device = VirtioNet(taps.Tap(taps.NAME), bytes(6))
    machine = VirtioMachine(device)
    said = _frames(machine, device, taps.delete, taps.FRAME)
    assert not device.config()[6], "the link is up"
    assert not machine.loop.run_ready(), "it is waited for still"
    machine.close()
    return said or SAME


def vsock_call(folder: Path, error: int) -> str:
    """The guest connects to a program of the host."""
    guest = Guest(folder / "v")
    guest.up()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder / 'v'}_{HOST_PORT}")
        listener.listen()
        with failing():
            guest.say(Op.REQUEST)
        answer = guest.ops()
        stopped = guest.machine.driver.status & NEEDS_RESET
        guest.machine.close()
    if stopped:
        return RESET
    return {Op.RST: GUEST, Op.RESPONSE: SAME}[Op(answer[0])]


def vsock(folder: Path, error: int) -> str:
    """Data both ways on a connection that a program of the host has made."""
    guest = Guest(folder / "v")
    guest.up()
    with dial(folder / "v") as client:
        client.setblocking(True)
        port = guest.called_by(client)
        client.setblocking(False)
        client.sendmsg([b"to the guest"])
        with failing():
            guest.machine.settle()
            guest.say(Op.RW, b"from the guest", host_port=port)
            guest.machine.settle()
        guest.machine.settle()
        heard = guest.heard()
        stopped = guest.machine.driver.status & NEEDS_RESET
        try:
            taken = client.recvmsg(100)[0]
        except OSError:
            taken = b""
        guest.machine.close()
    if stopped:
        return RESET
    if any(header.op == Op.RST for header, _ in heard):
        return GUEST
    assert b"".join(data for _, data in heard) == b"to the guest"
    assert taken == b"from the guest"
    return SAME


def console_file(folder: Path, error: int) -> str:
    """Output to a FIFO, which can be full."""
    path = folder / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    consoles = Consoles(f"file={path}")
    consoles.up()
    consoles.open(0)
    machine = consoles.machine
    machine.give(1, machine.place(b"some output"))
    with failing():
        machine.kick(1)
    machine.settle()
    stopped = machine.driver.status & NEEDS_RESET
    assert len(machine.queues[1].collect()) == 1, "its buffer was not given back"
    statistics = machine.device.statistics
    machine.close()
    came = os.readv(reader, [data := bytearray(100)])
    if stopped:
        return RESET
    if data[:came] == b"some output":
        return SAME
    assert statistics.errors or statistics.bytes_written in (0, came)
    return DROPPED


def console_pty(folder: Path, error: int) -> str:
    """Input from a terminal."""
    consoles = Consoles("pty")
    consoles.up()
    consoles.open(0)
    machine = consoles.machine
    buffer = machine.blank(100)
    machine.give(0, buffer)
    machine.kick(0)
    slave = machine.device._ports[0].backend._slave  # type: ignore[attr-defined]
    os.writev(slave, [b"typed"])
    with failing():
        machine.settle()
    machine.settle()
    more = machine.blank(100)
    machine.give(0, more)
    machine.kick(0)
    sizes = [size for _, size in machine.queues[0].collect()]
    came = machine.text(buffer, sizes[0]) + (machine.text(more, sizes[1]) if sizes[1:] else b"")
    stopped = machine.driver.status & NEEDS_RESET
    machine.close()
    if stopped:
        return RESET
    return SAME if came == b"typed" else DROPPED


# -- back ends of vhost-user, snapshots -----------------------------------------------------------


def vhost_user(folder: Path, error: int) -> str:
    """The greeting; the back end, which is in this process, hears and answers by other calls."""
    double = _BackEnd()
    link = Channel(double.connect())
    link.begin(10)
    try:
        with failing():
            found = greet(link, PROTOCOL_F_MQ, PROTOCOL_F_CONFIG)
    except BackEndError:
        return CALLER
    finally:
        link.close()
        double.end()
    assert found.features & VERSION_1
    return SAME


class _BackEnd(BackEndDouble):
    """Whose calls are none of those that fail."""

    def connect(self) -> socket.socket:
        self.socket = _Other(fileno=self.socket.detach())
        return super().connect()


class _Other(socket.socket):
    def recv(self, size: int, flags: int = 0) -> bytes:
        return os.read(self.fileno(), size)

    def recvmsg(self, size: int, room: int = 0, flags: int = 0) -> Any:
        return super().recvmsg(size, room, flags | socket.MSG_WAITALL)

    def sendall(self, data: Any, flags: int = 0) -> None:
        os.write(self.fileno(), data)


PROGRAMS: dict[str, Callable[[Path, int], str]] = {
    "discard": programs_files.discard,
    "zeroes": programs_files.zeroes,
    "read-ahead": programs_files.read_ahead,
    "advice": programs_files.advice,
    "readable": programs_files.readable,
    "readable-disk": programs_files.readable_disk,
    "process-vm": programs_files.process_vm,
    "memory-file": programs_files.memory_file,
    "control": control,
    "console-caller": console_caller,
    "vsock-caller": vsock_caller,
    "balloon-caller": balloon_caller,
    "net": net,
    "tap": tap,
    "real-tap": real_tap,
    "tap-start": tap_start,
    "tap-offloads": tap_offloads,
    "tap-deleted": tap_deleted,
    "vsock-call": vsock_call,
    "vsock": vsock,
    "console-file": console_file,
    "console-pty": console_pty,
    "vhost-user": vhost_user,
    "snapshot": programs_files.snapshot,
    "dialed": programs_apart.dialed,
    "called": programs_apart.called,
    "console-process": programs_apart.console_process,
    "dump": programs_files.dump,
    "restore": programs_files.restore,
    "confined": programs_apart.confined,
    "spawned": programs_apart.spawned,
    "watched": programs_apart.watched,
    "raw-terminal-set": programs_apart.raw_terminal_set,
    "raw-terminal-restored": programs_apart.raw_terminal_restored,
    "message": programs_apart.message,
}


def main(*words: str) -> None:
    """NAME ERRNO, and so on: for each a line."""
    for name, error in zip(words[::2], words[1::2], strict=True):
        with tempfile.TemporaryDirectory(prefix="pyvmm-") as folder:
            try:
                said = PROGRAMS[name](Path(folder), int(error))
            except Exception as wrong:
                traceback.print_exc()
                said = f"wrong: {wrong!r}".replace("\n", " ")
        print(said, flush=True)
        next_rule()


if __name__ == "__main__":
    main(*sys.argv[1:])
