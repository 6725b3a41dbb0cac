"""Devices saved and restored: what a guest sees goes on, and a hostile state is refused."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support.moved import Moved, carried
from tests.support.saved import refuses_what_is_wrong
from tests.support.virtio_driver import NEEDS_RESET
from tests.support.virtio_machine import BAR, VirtioMachine
from vmm.arch.x86_64.devices.acpi_pm import AcpiPm
from vmm.arch.x86_64.devices.cmos import Cmos
from vmm.arch.x86_64.devices.i8042 import I8042
from vmm.arch.x86_64.devices.pci_conf1 import PciConf1
from vmm.arch.x86_64.msrs import MsrTable
from vmm.core.saved import BadState, NotSaved, Saved
from vmm.devices.bus import PortBus
from vmm.devices.doorbell import DoorbellActions, DoorbellBank
from vmm.devices.msix import MsixTable
from vmm.devices.pci import PciBus
from vmm.devices.serial16550 import IER, LCR, MCR, RBR_THR, Serial16550
from vmm.devices.virtio import console
from vmm.devices.virtio.balloon import STATS, VirtioBalloon
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import open_disk
from vmm.devices.virtio.console_backend import open_console
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.iommu import VirtioIommu
from vmm.devices.virtio.net import VirtioNet
from vmm.devices.virtio.net_backend import Passt
from vmm.devices.virtio.own import VirtioDevice as OwnDevice
from vmm.devices.virtio.rng import VirtioRng
from vmm.devices.virtio.vsock import open_vsock

T_IN = 0


class Lines:
    """Takes messages, and notes those that are sent."""

    def __init__(self) -> None:
        self.routes: dict[int, tuple[int, int]] = {}
        self.sent: list[int] = []

    def route(self, messages: Any) -> None:
        self.routes |= messages

    def signal(self, vector: int) -> None:
        self.sent.append(vector)


# --- registers ---

SIMPLE: dict[str, Callable[[], Any]] = {
    "serial": lambda: Serial16550(lambda data: None, lambda: None),
    "cmos": lambda: Cmos(lambda: 10**18),
    "pm": lambda: AcpiPm(lambda: 5, lambda: None, lambda: None),
    "i8042": lambda: I8042(lambda: None),
    "conf1": lambda: PciConf1(PciBus(PortBus())),
    "doorbell": lambda: DoorbellBank(
        0, "x", DoorbellActions(lambda request: 0, lambda gpa, size: 0, lambda code: None)
    ),
    "msrs": lambda: MsrTable(True),
    "msix": lambda: MsixTable(3, Lines()),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_register_device_refuses_a_hostile_state_and_stays_in_use(name: str) -> None:
    state = SIMPLE[name]().state()

    def restore(saved: Saved) -> None:
        device = SIMPLE[name]()
        device.restore(saved)
        device.state()
        if name != "msrs":
            for offset in range(16):
                device.read(offset, 1)
                device.write(offset, 1, 0x55)

    assert refuses_what_is_wrong(state, restore) > 10


def test_serial_port_goes_on_with_its_input_and_its_interrupt() -> None:
    old = Serial16550(lambda data: None, lambda: None)
    for register, value in ((IER, 1), (MCR, 0x0B), (LCR, 3)):
        old.write(register, 1, value)
    old.receive(b"x")
    edges: list[int] = []
    new = Serial16550(lambda data: None, lambda: edges.append(1))

    new.restore(Saved(carried(old.state()), "serial"))

    assert edges == [1], "the interrupt may have been on its way"
    assert new.read(RBR_THR, 1) == ord("x")
    assert [new.read(register, 1) for register in (IER, LCR, MCR)] == [1, 3, 0x0B]


def test_pm_timer_goes_on_and_can_be_put_forward() -> None:
    now = [0]
    old = AcpiPm(lambda: now[0], lambda: None, lambda: None)
    now[0] = 10**9
    state = carried(old.state())
    now[0] = 77
    new = AcpiPm(lambda: now[0], lambda: None, lambda: None)

    new.restore(Saved(state, "pm"))

    assert new.timer() == 3_579_545
    new.put_forward(10**9)
    assert new.timer() == 2 * 3_579_545


def test_guest_s_setting_of_the_clock_stays() -> None:
    old = Cmos(lambda: 0)
    old.write(0, 1, 0x09)
    old.write(1, 1, 0x80)  # the year, in BCD
    new = Cmos(lambda: 0)

    new.restore(Saved(carried(old.state()), "cmos"))

    new.write(0, 1, 0x09)
    assert new.read(1, 1) == 0x80


def test_messages_are_routed_as_the_guest_has_them() -> None:
    old = MsixTable(2, Lines())
    for at, value in enumerate((0xFEE0_0000, 0, 0x41, 0)):
        old.write(4 * at, 4, value)
    lines = Lines()
    new = MsixTable(2, lines)

    new.restore(Saved(carried(old.state()), "msix"))
    new.control(1 << 15)

    assert lines.routes == {0: (0xFEE0_0000, 0x41)}


# --- virtio ---


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(1 << 20))
    return path


NUMBERS = count()


def card_on_a_closed_connection() -> VirtioNet:
    ours, theirs = socket.socketpair()
    theirs.close()
    return VirtioNet(Passt(ours), b"\2\0\0\0\0\1")


MACHINES: dict[str, Callable[[Path], VirtioDevice]] = {
    "block": lambda disk: VirtioBlock(open_disk(f"{disk},ro")),
    "rng": lambda disk: VirtioRng(),
    "balloon": lambda disk: VirtioBalloon(4),
    "console": lambda disk: open_console((f"file={disk}.a", f"file={disk}.b,name=one")),
    "net": lambda disk: card_on_a_closed_connection(),
    "vsock": lambda disk: open_vsock(f"path={disk}.{next(NUMBERS)}"),
}


@pytest.fixture(params=MACHINES)
def moved(request: pytest.FixtureRequest, disk: Path) -> Iterator[Moved]:
    made = Moved(lambda: MACHINES[request.param](disk))
    yield made
    made.close()


def test_virtio_device_refuses_a_hostile_state_and_stays_in_use(moved: Moved) -> None:
    moved.old.up()
    moved.old.settle()
    state = moved.state()

    def restore(saved: Saved) -> None:
        new = VirtioMachine(moved.make())
        try:
            new.transport.restore(saved)
            new.pci.remap()
            new.transport.resume()
            new.settle()
            new.transport.state()
        finally:
            new.close()

    assert refuses_what_is_wrong(state, restore) > 100


@pytest.fixture
def block(disk: Path) -> Iterator[Moved]:
    made = Moved(lambda: VirtioBlock(open_disk(f"{disk},ro")))
    yield made
    made.close()


def read(machine: VirtioMachine, sector: int) -> tuple[Any, Any]:
    """A request for a sector, not notified."""
    data, status = machine.blank(512), machine.blank(1)
    machine.give(0, machine.place(struct.pack("<IIQ", T_IN, 0, sector)), data, status)
    return data, status


def test_disk_goes_on_after_its_last_request(block: Moved, disk: Path) -> None:
    block.old.up()
    for sector in range(3):
        read(block.old, sector)
    block.old.kick(0)
    assert len(block.old.queues[0].collect()) == 3

    new = block.restored(block.state())
    data, status = read(new, 5)
    new.kick(0)

    assert len(new.queues[0].collect()) == 1
    assert new.text(status, 1) == b"\0"
    assert new.text(data, 512) == disk.read_bytes()[5 * 512 : 6 * 512]


def test_request_that_nobody_has_seen_is_served_after_the_restore(block: Moved, disk: Path) -> None:
    block.old.up()
    data, _ = read(block.old, 7)  # the notify is lost on the way

    new = block.restored(block.state())
    new.transport.resume()
    new.settle()

    assert new.text(data, 512) == disk.read_bytes()[7 * 512 : 8 * 512]
    assert new.interrupts > 0


def test_request_in_steps_is_done_before_the_state_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 32 << 20)
    made = Moved(lambda: VirtioBlock(open_disk(str(path))))
    try:
        machine = made.old
        machine.up()
        # Written out, a budget's worth of zeroes at a time.
        status = machine.blank(1)
        ranges = machine.place(struct.pack("<QII", 0, 1 << 16, 0))
        machine.give(0, machine.place(struct.pack("<IIQ", 13, 0, 0)), ranges, status)
        machine.driver.notify(0)
        machine.transport.notify(machine.rung.pop(0))
        queue = machine.transport._active[0].queue
        assert queue.unfinished is not None, "else this test tries nothing"

        made.state()

        assert queue.unfinished is None and queue.outstanding == 0
        assert machine.text(status, 1) == b"\0"
    finally:
        made.close()


def test_disk_that_was_written_to_is_refused(disk: Path) -> None:
    made = Moved(lambda: VirtioBlock(open_disk(str(disk))))
    try:
        made.old.up()
        state = made.state()
        made.old.device.close()
        with disk.open("r+b") as file:
            file.write(b"changed")

        with pytest.raises(BadState, match=f"--disk {disk} is not as the guest left .*written to"):
            made.restored(state)
    finally:
        made.close()


@pytest.mark.parametrize("kind", ["time", "content"])
def test_time_and_content_are_looked_at_each_for_itself(disk: Path, kind: str) -> None:
    made = Moved(lambda: VirtioBlock(open_disk(f"{disk},ro")))
    try:
        made.old.up()
        state = made.state()
        found = disk.stat()
        if kind == "content":
            with disk.open("r+b") as file:
                file.seek(700_000)
                file.write(b"changed")
        later = found.st_mtime_ns + (kind == "time")
        os.utime(disk, ns=(found.st_atime_ns, later))

        with pytest.raises(BadState, match="written to since"):
            made.restored(state)
    finally:
        made.close()


def test_copy_of_the_disk_that_keeps_its_time_will_do(disk: Path, tmp_path: Path) -> None:
    made = Moved(lambda: VirtioBlock(open_disk(f"{disk},ro")))
    try:
        made.old.up()
        state = made.state()
        copy = tmp_path / "copy"
        copy.write_bytes(disk.read_bytes())
        found = disk.stat()
        os.utime(copy, ns=(found.st_atime_ns, found.st_mtime_ns))
        made.make = lambda: VirtioBlock(open_disk(f"{copy},ro"))

        made.restored(state)
    finally:
        made.close()


def test_ring_outside_of_memory_stops_the_device_as_a_guest_s_own_would(block: Moved) -> None:
    block.old.up()
    state = block.state()
    state["queues"][0]["desc"] = 1 << 40

    new = block.restored(state)
    new.transport.resume()
    read(new, 0)
    new.kick(0)

    assert new.driver.status & NEEDS_RESET


def test_queue_that_has_taken_more_than_it_has_is_refused(block: Moved) -> None:
    block.old.up(size=16)
    state = block.state()
    state["queues"][0]["position"] = {"next_avail": 5, "next_used": 0xFFFF - 11}

    with pytest.raises(BadState, match="17 chains are taken from 16 entries"):
        block.restored(state)


def test_misaligned_ring_stops_the_device(block: Moved) -> None:
    block.old.up()
    state = block.state()
    state["queues"][0]["desc"] = 3

    new = block.restored(state)

    assert new.driver.status & NEEDS_RESET


def test_features_that_are_not_offered_are_refused(block: Moved) -> None:
    block.old.up()
    state = block.state()
    state["driver_features"] |= 1 << 60

    with pytest.raises(BadState, match="agreed on features"):
        block.restored(state)


def test_another_device_s_state_is_refused(block: Moved) -> None:
    state = block.state()
    state["id"] = 4

    with pytest.raises(BadState, match="it is device 4, and here is 2"):
        block.restored(state)


def test_bars_are_where_the_guest_had_put_them(block: Moved) -> None:
    block.old.driver.enable()
    block.old.pci.write_config(0, 1, 0, 0x10, 4, BAR + 0x400)
    state = block.state()

    new = block.restored(state)

    assert new.ports.find(BAR + 0x400) is not None and new.ports.find(BAR) is None


def test_balloon_keeps_its_size_and_the_statistics_buffer() -> None:
    made = Moved(lambda: VirtioBalloon(9))
    try:
        made.old.up()
        made.old.give(STATS, made.old.place(struct.pack("<HQ", 4, 77)))
        made.old.kick(STATS)

        new = made.restored(made.state())
        heard: list[dict[str, int]] = []
        device = new.device
        assert isinstance(device, VirtioBalloon)
        device.heard = heard.append
        device.ask()
        new.settle()

        assert len(new.queues[STATS].collect()) == 1, "the buffer is back, to be filled anew"
        assert device.config()[:4] == struct.pack("<I", 9)
    finally:
        made.close()


def test_console_port_that_the_guest_has_open_stays_open(tmp_path: Path) -> None:
    made = Moved(lambda: open_console((f"file={tmp_path}/a", f"file={tmp_path}/b,name=one")))
    try:
        made.old.up()
        message = struct.pack("<IHH", 1, console.PORT_OPEN, 1)
        made.old.give(console.CONTROL_TX, made.old.place(message))
        made.old.kick(console.CONTROL_TX)

        new = made.restored(made.state())
        new.give(5, new.place(b"hello"))
        new.kick(5)

        assert (tmp_path / "b").read_bytes() == b"hello"
        assert made.state()["device"]["ports"][1]["guest_open"] is True
    finally:
        made.close()


def test_virtual_iommu_is_not_saved() -> None:
    with pytest.raises(NotSaved, match="--iommu"):
        VirtioIommu().state()


def test_device_of_the_user_s_is_not_saved_by_itself() -> None:
    class Dice(OwnDevice):
        device_id = 4

        def answer(self, queue: int, request: bytes, room: int) -> bytes:
            return b""

    with pytest.raises(NotSaved, match="device Dice is the user's own"):
        Dice().state()
