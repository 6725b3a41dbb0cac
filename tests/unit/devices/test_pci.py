"""Configuration space: the type-0 header under every access, and BARs that follow the guest."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.devices.bus import PortBus
from vmm.devices.pci import BAR0, COMMAND, PciBus, PciFunction, host_bridge

IO_ENABLE = 1


class Ports:
    """A device with no behaviour."""

    def read(self, offset: int, size: int) -> int:
        return offset

    def write(self, offset: int, size: int, value: int) -> None:
        return


@dataclass
class PciMachine:
    """A host bridge and two functions with one I/O BAR each, at 0xc000 and 0xc100."""

    ports: PortBus = field(default_factory=PortBus)
    devices: list[Ports] = field(default_factory=lambda: [Ports(), Ports()])
    moves: list[int | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bus = PciBus(self.ports)
        self.bus.add(0, host_bridge())
        for slot, device in enumerate(self.devices, start=1):
            function = PciFunction(0x1AF4, 0x1042, 0x018000, revision=1)
            base = 0xC000 + 0x100 * (slot - 1)
            function.add_io_bar(0, base, 0x100, device, self.moves.append)
            function.set_interrupt(4 + slot)
            self.bus.add(slot, function)

    def get(self, slot: int, register: int, size: int) -> int:
        return self.bus.read_config(0, slot, 0, register, size)

    def put(self, slot: int, register: int, size: int, value: int) -> None:
        self.bus.write_config(0, slot, 0, register, size, value)

    def owner(self, port: int) -> Ports | None:
        found = self.ports.find(port)
        return None if found is None else found[0]  # type: ignore[return-value]


@pytest.fixture
def pci() -> PciMachine:
    return PciMachine()


def test_pci_host_bridge_is_what_linux_looks_for(pci: PciMachine) -> None:
    assert pci.get(0, 0x00, 4) == 0x1237_8086
    assert pci.get(0, 0x0A, 2) == 0x0600
    assert pci.get(0, 0x0E, 1) == 0


def test_pci_what_is_not_there_reads_ones_and_swallows_writes(pci: PciMachine) -> None:
    for address in ((0, 3, 0), (0, 0, 1), (1, 0, 0), (255, 31, 7)):
        pci.bus.write_config(*address, 0, 4, 0)
        assert pci.bus.read_config(*address, 0, 4) == 0xFFFF_FFFF
        assert pci.bus.read_config(*address, 0, 1) == 0xFF


def test_pci_same_slot_twice_is_refused(pci: PciMachine) -> None:
    with pytest.raises(ValueError, match="slot 1"):
        pci.bus.add(1, host_bridge())


def test_pci_identity_is_read_only(pci: PciMachine) -> None:
    before = [pci.get(1, register, 4) for register in range(0, 0x10, 4)]

    for register in (0x00, 0x08, 0x0C):
        pci.put(1, register, 4, 0xFFFF_FFFF)

    assert [pci.get(1, register, 4) for register in range(0, 0x10, 4)] == before


def test_pci_interrupt_line_is_writable_and_pin_is_not(pci: PciMachine) -> None:
    pci.put(1, 0x3C, 2, 0x0B0B)

    assert pci.get(1, 0x3C, 2) == 0x010B


def test_pci_bar_sizing_gives_the_size_and_restores(pci: PciMachine) -> None:
    pci.put(1, COMMAND, 2, IO_ENABLE)
    original = pci.get(1, BAR0, 4)

    pci.put(1, BAR0, 4, 0xFFFF_FFFF)
    sized = pci.get(1, BAR0, 4)
    pci.put(1, BAR0, 4, original)

    assert original == 0xC001
    assert (~(sized & ~3) + 1) & 0xFFFF_FFFF == 0x100
    assert pci.owner(0xC000) is pci.devices[0]
    assert pci.moves == [0xC000, None, 0xC000]


def test_pci_unimplemented_bars_size_to_zero(pci: PciMachine) -> None:
    for register in (0x14, 0x18, 0x1C, 0x20, 0x24, 0x30):
        pci.put(1, register, 4, 0xFFFF_FFFF)
        assert pci.get(1, register, 4) == 0


def test_pci_bar_is_mapped_exactly_while_io_is_enabled(pci: PciMachine) -> None:
    assert pci.owner(0xC000) is None
    pci.put(1, COMMAND, 2, IO_ENABLE)
    assert pci.owner(0xC000) is pci.devices[0]
    assert pci.owner(0xC0FF) is pci.devices[0]
    assert pci.owner(0xC100) is None
    pci.put(1, COMMAND, 1, 0)
    assert pci.owner(0xC000) is None


def test_pci_bar_moves_with_its_register(pci: PciMachine) -> None:
    pci.put(1, COMMAND, 2, IO_ENABLE)

    pci.put(1, BAR0, 4, 0xD201)
    assert pci.owner(0xC000) is None
    assert pci.owner(0xD200) is pci.devices[0]
    pci.put(1, BAR0 + 1, 1, 0xE4)

    assert pci.owner(0xE400) is pci.devices[0]
    assert pci.moves == [0xC000, None, 0xD200, None, 0xE400]


@pytest.mark.parametrize("value", [0x0, 0x1_0000, 0xFFFF_FF00, 0x8000_C000])
def test_pci_bar_at_no_port_is_unmapped(pci: PciMachine, value: int) -> None:
    pci.put(1, COMMAND, 2, IO_ENABLE)

    pci.put(1, BAR0, 4, value)

    assert all(pci.ports.find(port) is None for port in range(0, 0x10000, 0x80))


def test_pci_bar_on_anothers_ports_waits_until_they_are_free(pci: PciMachine) -> None:
    pci.put(1, COMMAND, 2, IO_ENABLE)
    pci.put(2, COMMAND, 2, IO_ENABLE)

    pci.put(1, BAR0, 4, 0xC101)
    assert pci.owner(0xC100) is pci.devices[1]
    assert pci.owner(0xC000) is None
    pci.put(2, BAR0, 4, 0xC001)

    assert pci.owner(0xC100) is pci.devices[0]
    assert pci.owner(0xC000) is pci.devices[1]


def test_pci_capabilities_form_a_list() -> None:
    function = PciFunction(1, 2, 3)
    assert function.read_config(0x06, 2) & 0x10 == 0

    first = function.add_capability(0x09, b"\x05abc")
    second = function.add_capability(0x05, bytes(4))

    assert function.read_config(0x06, 2) & 0x10
    assert function.read_config(0x34, 1) == first == 0x40
    assert function.read_config(first, 2) == second << 8 | 0x09
    assert second == 0x48
    assert function.read_config(second, 2) == 0x05
    with pytest.raises(ValueError, match="does not fit"):
        function.add_capability(0x09, bytes(200))


@pytest.mark.parametrize(("base", "size"), [(0xC000, 0x60), (0xC010, 0x100), (0, 2), (0, 512)])
def test_pci_bar_that_cannot_be_is_refused(base: int, size: int) -> None:
    with pytest.raises(ValueError, match="no I/O BAR"):
        PciFunction(1, 2, 3).add_io_bar(0, base, size, Ports())


ACCESSES = st.tuples(
    st.booleans(),
    st.integers(0, 3),
    st.one_of(st.integers(0, 300), st.sampled_from([0x04, 0x10, 0x3C, 0xFF, 0xFD])),
    st.sampled_from([1, 2, 4]),
    st.one_of(st.integers(0, 0xFFFF_FFFF), st.sampled_from([0xC001, 0xC101, 0xC081, 1, 0])),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACCESSES, max_size=30))
def test_pci_any_accesses_keep_the_bus_consistent(
    accesses: list[tuple[bool, int, int, int, int]],
) -> None:
    pci = PciMachine()
    for writes, slot, register, size, value in accesses:
        if writes:
            pci.put(slot, register, size, value)
        wide = pci.get(slot, register, size)
        narrow = [pci.get(slot, register + i, 1) for i in range(size)]
        assert wide.to_bytes(size, "little") == bytes(narrow)

    wanted: dict[int, list[Ports]] = {}
    for slot, device in enumerate(pci.devices, start=1):
        base = pci.get(slot, BAR0, 4) & ~3
        if pci.get(slot, COMMAND, 1) & IO_ENABLE and 0 < base <= 0xFF00:
            wanted.setdefault(base, []).append(device)
    for base, devices in wanted.items():
        assert pci.owner(base) in devices
    mapped = {port & ~0xFF for port in range(0, 0x10000, 0x100) if pci.ports.find(port)}
    assert mapped == set(wanted)
