"""Registers: ports, PCI configuration space by ports and by ECAM, BARs, MSI-X tables."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.fuzz.drawing import Choices, recorded
from tests.fuzz.ports import Board
from tests.fuzz.storm import Guest
from tests.fuzz.targets.conversions import records
from tests.fuzz.targets.registry import scratch_folder, target
from vmm.arch.aarch64.devices.gic_v2m import GicV2m
from vmm.arch.aarch64.devices.pci_ecam import PciEcam
from vmm.arch.aarch64.devices.pl031 import Pl031
from vmm.devices.bus import MEMORY_PAGE, MemoryBus, PortBus, PortDevice
from vmm.devices.msix import BAR_SIZE, CONTROL_ENABLE, CONTROL_MASK_ALL, TABLE, MsixTable
from vmm.devices.pci import PciBus, PciFunction, host_bridge

_STEPS = 120


def _access_ports(choices: Choices) -> None:
    board = Board(choices)
    try:
        for _ in range(_STEPS):
            if choices.spent:
                break
            board.step()
        board.check()
    finally:
        board.close()


@target("ports", lambda: [recorded(_access_ports, seed) for seed in range(8)])
def ports(data: bytes) -> None:
    """IN and OUT at any port: serial line, clock, keyboard controller, power, PCI with two virtio
    functions whose BARs move over all of these."""
    _access_ports(Choices(data))


def _storm(choices: Choices) -> None:
    with scratch_folder() as folder, ExitStack() as stack:
        guest = Guest(choices, Path(folder), stack)
        guest.kvm.refuses = choices.random() < 0.5
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(_STEPS):
            if choices.spent:
                break
            guest.access()
            guest.check()
        assert len(os.listdir("/proc/self/fd")) <= before + guest.vectors


@target("bars", lambda: [recorded(_storm, seed) for seed in range(8)], runs=40)
def bars(data: bytes) -> None:
    """BARs and MSI-X tables of three virtio functions on a whole board; KVM is asked for no more
    than the registers say."""
    _storm(Choices(data))


class _Lines:
    """KVM's side of messages: what is routed, and that nothing else is ever signalled."""

    def __init__(self, vectors: int) -> None:
        self.routes: dict[int, tuple[int, int]] = {}
        self.calls = 0
        self.sent: list[tuple[int, int]] = []
        self._vectors = vectors

    def route(self, messages: Mapping[int, tuple[int, int]]) -> None:
        self.calls += 1
        assert messages and all(0 <= vector < self._vectors for vector in messages)
        self.routes.update(messages)

    def signal(self, vector: int) -> None:
        self.sent.append(self.routes[vector])


def _msix_seeds() -> list[bytes]:
    def op(kind: int, offset: int, size: int, value: int) -> bytes:
        return struct.pack("<BHBQ", kind, offset, size, value)

    program = b"".join(
        op(0, 16 * vector + at, 2, value)
        for vector in range(2)
        for at, value in ((0, 0xFEE0_0000), (4, 0), (8, 0x41 + vector), (12, 0))
    )
    program += op(2, 0, 0, CONTROL_ENABLE) + op(3, 0, 0, 0) + op(3, 1, 0, 0)
    program += op(2, 0, 0, CONTROL_ENABLE | CONTROL_MASK_ALL) + op(3, 1, 0, 0) + op(1, 0x800, 3, 0)
    return [program, program + op(2, 0, 0, CONTROL_ENABLE) + op(0, 8, 2, 7), op(4, 0, 0, 0)]


@target("msix", _msix_seeds)
def msix(data: bytes) -> None:
    """Records of 12 bytes: write, read, control, interrupt or reset; offset, size, value. Beside
    a model of the table: a message is sent once, by the route that its entry says."""
    vectors = 3
    lines = _Lines(vectors)
    table = MsixTable(vectors, lines)
    model = bytearray(16 * vectors)
    for vector in range(vectors):
        model[16 * vector + 12] = 1
    pending: set[int] = set()
    control = 0
    for kind, offset, size, value in records(data, "<BHBQ"):
        calls, sent = lines.calls, len(lines.sent)
        if kind % 5 == 0:
            width = (1, 2, 4, 8)[size % 4]
            number = value & (1 << 8 * width) - 1
            at = offset % BAR_SIZE
            at -= at % width
            table.write(at, width, number)
            if width >= 4 and at + width <= len(model):
                model[at : at + width] = number.to_bytes(width, "little")
        elif kind % 5 == 1:
            width = 1 + size % 8
            found = table.read(offset % (BAR_SIZE - 8), width)
            assert 0 <= found < 1 << 8 * width
        elif kind % 5 == 2:
            control = value & 0xFFFF
            table.control(control)
        elif kind % 5 == 3:
            vector = offset % (vectors + 2)
            table.interrupt(vector)
            pending |= {vector} if vector < vectors else set()
        else:
            table.forget_pending()
            pending.clear()
        live = control & CONTROL_ENABLE and not control & CONTROL_MASK_ALL
        due = {v for v in pending if live and not model[16 * v + 12] & 1}
        pending -= due
        assert len(lines.sent) == sent + len(due)
        entries = [struct.unpack_from("<QI", model, 16 * vector) for vector in sorted(due)]
        assert sorted(lines.sent[sent:]) == sorted(entries)
        assert lines.calls <= calls + 1
        assert table.read(TABLE, 8) == int.from_bytes(model[:8], "little")
        assert table.read(0x800, 8) == sum(1 << vector for vector in pending)


class _Registers:
    """A function's own registers, which note nothing but that they were in bounds."""

    def __init__(self, size: int) -> None:
        self._size = size

    def read(self, offset: int, size: int) -> int:
        assert 0 <= offset < self._size
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        assert 0 <= offset < self._size


def _ecam_seeds() -> list[bytes]:
    def op(write: int, slot: int, register: int, size: int, value: int) -> bytes:
        return struct.pack("<BIBI", write, slot << 15 | register, size, value)

    return [
        op(0, 0, 0, 2, 0) + op(0, 1, 0, 2, 0) + op(1, 1, 4, 1, 7) + op(1, 1, 0x10, 2, 0xE000_0000),
        op(1, 1, 0x14, 2, 0xFFFF_FFFF) + op(0, 1, 0x14, 2, 0) + op(1, 1, 0x14, 2, 0xC001),
        op(1, 2, 0x10, 2, 0xE000_0000) + op(1, 1, 0x10, 2, 0xE000_0000) + op(1, 2, 4, 1, 2)
        + op(1, 1, 4, 1, 2) + op(1, 2, 4, 1, 0),
        op(0, 31, 0xFFE, 2, 0) + op(1, 40, 0xFC, 2, 0) + op(2, 3, 0, 2, 0) + op(3, 9, 4, 2, 1),
    ]  # fmt: skip


@target("ecam", _ecam_seeds)
def ecam(data: bytes) -> None:
    """Records of 10 bytes: an access to arm64's PCI configuration space, its clock or its message
    frame; offset, size, value. No two BARs ever answer at one place."""
    io, memory = PortBus(), MemoryBus()
    pci = PciBus(io, memory)
    pci.add(0, host_bridge())
    functions = []
    for slot in (1, 2):
        function = PciFunction(0x1AF4, 0x10F0, 0xFF0000)
        function.add_memory_bar(0, 0, MEMORY_PAGE * slot, _Registers(MEMORY_PAGE * slot))
        function.add_io_bar(1, 0, 64, _Registers(64))
        pci.add(slot, function)
        functions.append(function)
    now = 1 << 60
    configuration = PciEcam(pci)
    devices: tuple[PortDevice, ...] = (
        configuration, configuration, Pl031(lambda: now), GicV2m(64, 32),
    )  # fmt: skip
    identity = [pci.read_config(0, slot, 0, 0, 4) for slot in range(3)]
    for what, offset, size, value in records(data, "<BIBI"):
        width = (1, 2, 4, 8)[size % 4]
        device = devices[what // 2 % 4]
        space = (1 << 20, 1 << 20, 0x1000, 0x1000)[what // 2 % 4]
        at = offset % space
        at -= at % width
        if what & 1:
            device.write(at, width, value & (1 << 8 * width) - 1)
        else:
            assert 0 <= device.read(at, width) < 1 << 8 * width
        for function in functions:
            for bar in function._bars:
                if bar.mapped is not None:
                    found = (io if bar.is_io else memory).find(bar.mapped)
                    assert found == (bar.device, 0)
    assert identity == [pci.read_config(0, slot, 0, 0, 4) for slot in range(3)]
