"""Programs to inject errors into: processes of devices, and parts of a run by themselves."""

from __future__ import annotations

import contextlib
import io
import os
import select
import socket
import termios
from pathlib import Path

from kvm_bindings import fdops
from kvm_bindings.x86_64 import System
from tests.injection.arming import SIZE, failing, failing_everywhere, line_of
from tests.injection.injecting import SHORT
from tests.injection.row import (
    CALLER,
    DROPPED,
    EAGAIN,
    EINTR,
    ENDS_3,
    GUEST,
    SAID,
    SAME,
)
from tests.support.virtio_machine import VirtioMachine
from tests.support.vsock_guest import HOST_PORT, dial
from tests.unit.devices.process.test_console_process import ConsoleRig
from tests.unit.devices.process.test_vsock_process import VsockRig
from vmm.arch.x86_64 import layout
from vmm.core import event_loop, unix_listener
from vmm.core.errors import HostError
from vmm.core.raw_terminal import RawTerminal
from vmm.devices.process.spawner import Job, Spawner
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import open_disk
from vmm.devices.virtio.vsock_packet import Op
from vmm.sandbox.device import enter_device
from vmm.wiring.interrupts import MessageRoutes, MsixMessages

# -- vsock and consoles in processes of their own -------------------------------------------------


def dialed(folder: Path, error: int) -> str:
    """The guest connects to a program of the host: the spawner does, and hands it over."""
    rig = VsockRig(folder / "v")
    rig.up()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder / 'v'}_{HOST_PORT}")
        listener.listen()
        with failing_everywhere():
            rig.say(Op.REQUEST)
            answer = rig.hears_op()
    rig.close()
    return {Op.RST: GUEST, Op.RESPONSE: SAME}[Op(answer)]


def called(folder: Path, error: int) -> str:
    """A program of the host connects to a guest whose vsock has a process."""
    unix_listener.AGAIN_SECONDS = 0.01
    rig = VsockRig(folder / "v")
    rig.up()
    with contextlib.ExitStack() as opened:
        with failing_everywhere():  # from before it comes: its process takes it at once
            client = opened.enter_context(dial(folder / "v"))
            with contextlib.suppress(BrokenPipeError):
                client.send(b"CONNECT 1234\n")
            while not (came := rig.heard()) and not _ready(client.fileno(), rig.machine):
                rig.machine.settle()
        rig.called(opened.enter_context(dial(folder / "v")))  # who comes next is served
        said = SAME if came else CALLER
        assert came or not line_of(client)
    rig.close()
    return said


def _ready(fd: int, machine: VirtioMachine) -> bool:
    """Wait until that fd, or one of the machine's, can be read; whether it is that one."""
    ready, _, _ = select.select([fd, *machine.loop.wanted], [], [], 10)
    assert ready, "nothing comes"
    return fd in ready


def console_process(folder: Path, error: int) -> str:
    path = folder / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    rig = ConsoleRig(f"file={path}")
    rig.up()
    rig.open(0)
    rig.machine.give(1, rig.machine.place(b"some output"))
    with failing_everywhere():
        rig.machine.kick(1)
        rig.answered(1)
        while error in (EINTR, EAGAIN, SHORT) and not _ready(reader, rig.machine):
            rig.machine.settle()  # its process isn't done yet
    rig.close()
    came = os.readv(reader, [data := bytearray(100)])
    return SAME if data[:came] == b"some output" else DROPPED


def confined(folder: Path, error: int) -> str:
    """A device's process that can't be put into its sandbox serves nobody."""
    path = folder / "disk"
    path.write_bytes(bytes(SIZE))
    disk = open_disk(f"{path},process")
    spawner = Spawner(enter_device)
    number = spawner.add(Job(VirtioBlock(disk, fdops.punch_hole), [disk.fd], [disk.fd]))
    spawner.begin()
    try:
        with failing_everywhere():
            link, _ = spawner.start(number)
            with link:
                serves = bool(link.recv(100))
        said = spawner.end(number)
    finally:
        spawner.close()
        os.close(disk.fd)
    if serves:
        return SAME
    assert said == f"could not enter its sandbox: {os.strerror(error)}", said
    return GUEST  # who is told that the device is gone


def spawned(folder: Path, error: int) -> str:
    """One device's process can't be started: the others', and who starts them, go on."""
    path = folder / "disk"
    path.write_bytes(bytes(SIZE))
    disk = open_disk(f"{path},process")
    spawner = Spawner(None)
    job = Job(VirtioBlock(disk, fdops.punch_hole), [disk.fd], [disk.fd])
    numbers = [spawner.add(job), spawner.add(job)]
    spawner.begin()
    try:
        others, _ = spawner.start(numbers[0])
        others.recv(100)
        try:
            with failing_everywhere():
                link, _ = spawner.start(numbers[1])
        except HostError as refused:
            assert os.strerror(error) in str(refused)
            others.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                assert others.recv(100), "another device's process has ended"
            spawner.start(numbers[1])[0].close()
            said = ENDS_3
        else:
            link.close()
            said = SAME
        others.close()
    finally:
        spawner.close()
        os.close(disk.fd)
    return said


def watched(folder: Path, error: int) -> str:
    """epoll has no room for what a device waits for; a moment later it has."""
    event_loop.AGAIN_SECONDS = 0.01
    loop, (near, far) = event_loop.EventLoop(), socket.socketpair()
    seen: list[bytes] = []

    def ready() -> None:
        seen.append(near.recv(10))
        loop.stop()

    with failing():
        loop.watch_in_time(near.fileno(), ready, readable=True)
    far.sendall(b"x")
    loop.run()
    loop.close()
    near.close()
    far.close()
    return SAME if seen == [b"x"] else DROPPED


def raw_terminal_set(folder: Path, error: int) -> str:
    """The user's terminal: where it is gone, it is left as it is."""
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    terminal = RawTerminal(slave)
    with failing():
        terminal.enter()
    was_raw = terminal.is_raw
    assert (termios.tcgetattr(slave) != before) is was_raw
    terminal.restore()
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)
    return SAME if was_raw else SAID


def raw_terminal_restored(folder: Path, error: int) -> str:
    """It is given back."""
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    terminal = RawTerminal(slave)
    terminal.enter()
    with failing():
        terminal.restore()
    is_as_before = termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)
    return SAME if is_as_before else DROPPED


def message(folder: Path, error: int) -> str:
    """An interrupt message that the guest sets up (MSI-X)."""
    said = io.StringIO()
    with System() as system, system.create_vm() as vm, contextlib.redirect_stderr(said):
        vm.create_irqchip()
        routes = MessageRoutes(vm, layout.interrupt_pins(), layout.FIRST_MESSAGE_GSI)
        messages = MsixMessages(vm, routes)
        with failing():
            messages.route({0: (layout.LAPIC_GPA, 0x41)})
            messages.signal(0)
        lines = said.getvalue().splitlines()
        messages.route({0: (layout.LAPIC_GPA, 0x42)})  # the next time all is well
        messages.signal(0)
        messages.close()
    if not lines:
        return SAME
    assert len(lines) == 1 and "interrupt message 0" in lines[0], lines
    return SAID
