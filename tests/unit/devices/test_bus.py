"""The buses: placement is checked once, lookups never fail."""

from __future__ import annotations

import pytest

from vmm.devices.bus import BusConflict, MemoryBus, PortBus


class Recorder:
    """A port device that remembers what was done to it."""

    def __init__(self, answer: int = 0x5A) -> None:
        self.answer = answer
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def test_bus_access_inside_device_passes_offset() -> None:
    bus, device = PortBus(), Recorder()
    bus.add(0x3F8, 8, device)

    value = bus.read(0x3FD, 1)
    bus.write(0x3F8, 1, 0x41)

    assert value == 0x5A
    assert device.reads == [(5, 1)]
    assert device.writes == [(0, 1, 0x41)]


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)])
def test_bus_unclaimed_port_reads_all_ones_and_drops_writes(size: int, ones: int) -> None:
    bus = PortBus()
    bus.add(0x10, 1, Recorder())

    bus.write(0x11, size, 1)

    assert bus.find(0x11) is None
    assert bus.read(0x11, size) == ones


@pytest.mark.parametrize(
    ("base", "length"), [(0x3F8, 8), (0x3FF, 1), (0x3F0, 9), (0x3F0, 0x100), (0x3FA, 2)]
)
def test_bus_add_overlapping_is_refused_and_changes_nothing(base: int, length: int) -> None:
    bus, first = PortBus(), Recorder()
    bus.add(0x3F8, 8, first)

    with pytest.raises(BusConflict, match="Recorder has port 0x3f"):
        bus.add(base, length, Recorder())

    assert [port for port in range(0x10000) if bus.find(port)] == list(range(0x3F8, 0x400))


@pytest.mark.parametrize(("base", "length"), [(0xFFFF, 2), (-1, 1), (0x10000, 1), (5, 0), (5, -1)])
def test_bus_add_outside_port_space_is_refused(base: int, length: int) -> None:
    with pytest.raises(BusConflict, match="port space"):
        PortBus().add(base, length, Recorder())


def test_bus_remove_frees_exactly_the_device() -> None:
    bus, kept = PortBus(), Recorder()
    bus.add(0x100, 4, Recorder())
    bus.add(0x104, 4, kept)

    bus.remove(0x100)

    assert bus.find(0x103) is None
    assert bus.find(0x104) == (kept, 0)
    bus.add(0x100, 4, kept)


def test_memory_bus_finds_a_device_by_any_address_of_its_pages() -> None:
    bus, device = MemoryBus(), Recorder()
    bus.add(0xE000_1000, 0x2000, device)

    assert bus.find(0xE000_0FFF) is None
    assert bus.find(0xE000_1000) == (device, 0)
    assert bus.find(0xE000_2FFF) == (device, 0x1FFF)
    assert bus.find(0xE000_3000) is None
    assert bus.find(1 << 38 | 0xE000_1000) is None

    bus.remove(0xE000_1000)
    assert bus.find(0xE000_1000) is None


@pytest.mark.parametrize(
    ("base", "size"),
    [(0x800, 0x1000), (0x1000, 0x800), (0, 0), (-0x1000, 0x1000), (0xFFFF_F000, 0x2000)],
)
def test_memory_bus_takes_whole_pages_below_4_gib(base: int, size: int) -> None:
    with pytest.raises(BusConflict, match="4 GiB"):
        MemoryBus().add(base, size, Recorder())


@pytest.mark.parametrize("base", [0x2000, 0x3000, 0x1000])
def test_memory_bus_add_overlapping_is_refused_and_changes_nothing(base: int) -> None:
    bus, first = MemoryBus(), Recorder()
    bus.add(0x2000, 0x2000, first)

    with pytest.raises(BusConflict, match="taken"):
        bus.add(base, 0x2000, Recorder())

    assert [page for page in range(8) if bus.find(page << 12)] == [2, 3]
