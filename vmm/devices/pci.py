"""PCI configuration space of bus 0: type-0 functions, BARs that follow the guest, capabilities.

How the guest reaches it (0xcf8/0xcfc, a memory window) is the architecture's business. A BAR is
on its bus exactly while its command bit is set and its place is there and free; a value
that makes no sense maps nothing, and is tried again when another function moves away.
Layout: PCI Local Bus 3.0, section 6.1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from threading import RLock

from vmm.core.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.devices.bus import (
    MEMORY_PAGE,
    MEMORY_SPACE,
    PORT_SPACE,
    BusConflict,
    MemoryBus,
    PortBus,
    PortDevice,
    all_ones,
)

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

CONFIG_SIZE = 256
SLOTS = 32

# Registers of the type-0 header.
VENDOR_ID, COMMAND, STATUS, REVISION, HEADER_TYPE = 0x00, 0x04, 0x06, 0x08, 0x0E
BAR0, SUBSYSTEM_VENDOR, CAPABILITY_POINTER = 0x10, 0x2C, 0x34
INTERRUPT_LINE, INTERRUPT_PIN = 0x3C, 0x3D

COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER, COMMAND_SERR = 0x001, 0x002, 0x004, 0x100
COMMAND_INTX_DISABLE = 0x400
STATUS_INTERRUPT, STATUS_CAPABILITIES = 0x08, 0x10
BAR_IO = 0x1

_FIRST_CAPABILITY = 0x40
_HEADER = struct.Struct("<HHHHBBBB")


class _Bar:
    """One BAR: what the guest sizes, and where it is on its bus now (None: nowhere)."""

    __slots__ = ("device", "is_io", "mapped", "moved", "register", "size")

    def __init__(
        self,
        register: int,
        is_io: bool,
        size: int,
        device: PortDevice,
        moved: Callable[[int | None], None] | None,
    ) -> None:
        self.register = register
        self.is_io = is_io
        self.size = size
        self.device = device
        self.moved = moved
        self.mapped: int | None = None


class _Buses(NamedTuple):
    """Where BARs can be mapped."""

    ports: PortBus
    memory: MemoryBus

    def of(self, bar: _Bar) -> PortBus | MemoryBus:
        return self.ports if bar.is_io else self.memory


class PciFunction:
    """One function with a type-0 header, built by its owner and then driven by the guest.

    `class_code` is the 24-bit class, subclass and interface as one number (0x060000 = host
    bridge). The `*_config` methods take any register and size.
    """

    def __init__(
        self,
        vendor: int,
        device: int,
        class_code: int,
        *,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
    ) -> None:
        self._config = bytearray(CONFIG_SIZE)
        self._writable = bytearray(CONFIG_SIZE)
        self._bars: list[_Bar] = []
        self._next_capability = _FIRST_CAPABILITY
        self._last_link = CAPABILITY_POINTER
        _HEADER.pack_into(
            self._config,
            VENDOR_ID,
            vendor,
            device,
            0,
            0,
            revision,
            class_code & 0xFF,
            (class_code >> 8) & 0xFF,
            class_code >> 16,
        )
        struct.pack_into("<HH", self._config, SUBSYSTEM_VENDOR, *subsystem)

    # --- building ---

    def set_writable(self, register: int, mask: bytes) -> None:
        """Let the guest change the bits of `mask` (as bytes) from `register`."""
        self._writable[register : register + len(mask)] = mask

    def set_interrupt(self, line: int, pin: int = 1) -> None:
        """Interrupt Pin (1 = INTA#) and what firmware would have left in Interrupt Line."""
        self._config[INTERRUPT_LINE] = line
        self._config[INTERRUPT_PIN] = pin
        self.set_writable(INTERRUPT_LINE, b"\xff")
        self._allow_command(COMMAND_INTX_DISABLE | COMMAND_MASTER | COMMAND_SERR)

    def add_capability(self, identity: int, body: bytes) -> int:
        """Append a capability to the list; `body` follows its two header bytes. Its register."""
        register = self._next_capability
        end = register + 2 + len(body)
        if end > CONFIG_SIZE:
            raise ValueError(f"capability {identity:#x} of {len(body)} bytes does not fit")
        self._config[register] = identity
        self._config[register + 2 : end] = body
        self._config[self._last_link] = register
        self._config[STATUS] |= STATUS_CAPABILITIES
        self._last_link = register + 1
        self._next_capability = (end + 3) & ~3
        return register

    def add_io_bar(
        self,
        index: int,
        base: int,
        size: int,
        device: PortDevice,
        moved: Callable[[int | None], None] | None = None,
    ) -> None:
        """Give BAR `index` `size` ports (a power of two, 4 to 256) that `device` answers.

        `base` is the address that firmware would have assigned; nothing is mapped before the
        guest sets the command register's I/O bit. `moved(base or None)` follows each change.
        """
        if size & (size - 1) or not 4 <= size <= 256 or base % size or not 0 <= index < 6:
            raise ValueError(f"no I/O BAR {index} of {size} ports at {base:#x}")
        register = BAR0 + 4 * index
        struct.pack_into("<I", self._config, register, base | BAR_IO)
        self.set_writable(register, struct.pack("<I", ~(size - 1) & 0xFFFF_FFFC))
        self._bars.append(_Bar(register, True, size, device, moved))
        self._allow_command(COMMAND_IO)

    def add_memory_bar(
        self,
        index: int,
        base: int,
        size: int,
        device: PortDevice,
        moved: Callable[[int | None], None] | None = None,
    ) -> None:
        """Give 32-bit BAR `index` `size` bytes of memory (a power of two, a page or more) that
        `device` answers; `base`, `moved` and the mapping as for add_io_bar, by the memory bit."""
        aligned = not size & (size - 1) and size >= MEMORY_PAGE and not base % size
        if not aligned or base + size > MEMORY_SPACE or not 0 <= index < 6:
            raise ValueError(f"no memory BAR {index} of {size} bytes at {base:#x}")
        register = BAR0 + 4 * index
        struct.pack_into("<I", self._config, register, base)
        self.set_writable(register, struct.pack("<I", ~(size - 1) & 0xFFFF_FFF0))
        self._bars.append(_Bar(register, False, size, device, moved))
        self._allow_command(COMMAND_MEMORY)

    def _allow_command(self, bits: int) -> None:
        """Command bits that the function implements; the others read as zero."""
        (writable,) = struct.unpack_from("<H", self._writable, COMMAND)
        struct.pack_into("<H", self._writable, COMMAND, writable | bits)

    # --- what the guest does ---

    def read_config(self, register: int, size: int) -> int:
        """`size` bytes from `register`; bytes past the 256th read as ones."""
        data = self._config[register : register + size]
        value = int.from_bytes(data, "little")
        missing = size - len(data)
        if missing > 0:
            value |= all_ones(missing) << (8 * len(data))
        if self.asserts_interrupt() and register <= STATUS < register + size:
            value |= STATUS_INTERRUPT << (8 * (STATUS - register))
        return value

    def write_config(self, register: int, size: int, value: int) -> None:
        """Change the writable bits among `size` bytes from `register`; the rest is dropped."""
        size = min(size, CONFIG_SIZE - register)
        if size <= 0:
            return
        end = register + size
        mask = int.from_bytes(self._writable[register:end], "little")
        old = int.from_bytes(self._config[register:end], "little")
        self._config[register:end] = ((old & ~mask) | (value & mask)).to_bytes(size, "little")

    def state(self) -> State:
        """See vmm.core.saved.Stateful: what the guest could have written."""
        return {"config": bytes(self._config).hex()}

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful. As if the guest had written all registers at once: what it
        can't write stays. The bus maps BARs (`PciBus.remap`)."""
        self._take_config(saved.bytes("config", CONFIG_SIZE))

    def _take_config(self, config: bytes) -> None:
        PciFunction.write_config(self, 0, CONFIG_SIZE, int.from_bytes(config, "little"))

    def asserts_interrupt(self) -> bool:
        """Status bit 3: has it an interrupt to tell of? Overridden by functions with INTx."""
        return False

    @property
    def command(self) -> int:
        """The command register."""
        return self._config[COMMAND] | self._config[COMMAND + 1] << 8

    @property
    def intx_enabled(self) -> bool:
        """Whether the guest lets the function assert its INTx."""
        return not self.command & COMMAND_INTX_DISABLE

    # --- BARs on their buses ---

    def unmap_changed(self, buses: _Buses) -> bool:
        """Take BARs off their buses that are not where the registers say now; True when any was."""
        changed = False
        for bar in self._bars:
            if bar.mapped is not None and bar.mapped != self._wanted(bar):
                buses.of(bar).remove(bar.mapped)
                bar.mapped = None
                changed = True
                if bar.moved is not None:
                    bar.moved(None)
        return changed

    def map_missing(self, buses: _Buses) -> None:
        """Put BARs on their buses that should be there and find their place free."""
        for bar in self._bars:
            base = self._wanted(bar)
            if bar.mapped is not None or base is None:
                continue
            try:
                buses.of(bar).add(base, bar.size, bar.device)
            except BusConflict:
                continue  # somebody else's place: the BAR decodes nothing until it is free
            bar.mapped = base
            if bar.moved is not None:
                bar.moved(base)

    def _wanted(self, bar: _Bar) -> int | None:
        """Where the command register and the BAR ask for it; None where that is no place."""
        enabled, flags, space = (
            (COMMAND_IO, 0x3, PORT_SPACE) if bar.is_io else (COMMAND_MEMORY, 0xF, MEMORY_SPACE)
        )
        if not self.command & enabled:
            return None
        (value,) = struct.unpack_from("<I", self._config, bar.register)
        base = int(value) & ~flags
        return base if 0 < base <= space - bar.size else None


def host_bridge() -> PciFunction:
    """Function 0:0.0. Linux trusts configuration mechanism #1 only where it finds one."""
    return PciFunction(0x8086, 0x1237, 0x060000, revision=2)


class PciBus:
    """Bus 0 with one function per slot. Everything that is not there reads as ones."""

    def __init__(self, ports: PortBus, memory: MemoryBus | None = None) -> None:
        """BARs go to `ports` and `memory`; without the latter memory BARs answer nobody."""
        self._buses = _Buses(ports, memory or MemoryBus())
        self._functions: dict[int, PciFunction] = {}
        self._lock = RLock()

    def add(self, slot: int, function: PciFunction) -> None:
        """Plug `function` in as 0:`slot`.0; ValueError when the slot is taken or not there."""
        if not 0 <= slot < SLOTS or slot in self._functions:
            raise ValueError(f"PCI slot {slot} is taken or not one of 0 to {SLOTS - 1}")
        self._functions[slot] = function

    def remap(self) -> None:
        """The functions' registers were restored: have BARs where these say."""
        with self._lock:
            for function in self._functions.values():
                function.unmap_changed(self._buses)
            for function in self._functions.values():
                function.map_missing(self._buses)

    def read_config(self, bus: int, device: int, function: int, register: int, size: int) -> int:
        """Read `size` bytes of a function's configuration space from `register`."""
        target = self._functions.get(device) if bus == 0 and function == 0 else None
        if target is None or register < 0:
            return all_ones(size)
        with self._lock:
            return target.read_config(register, size)

    def write_config(
        self, bus: int, device: int, function: int, register: int, size: int, value: int
    ) -> None:
        """Write `size` bytes of a function's configuration space; BARs move accordingly."""
        target = self._functions.get(device) if bus == 0 and function == 0 else None
        if target is None or register < 0:
            return
        with self._lock:
            target.write_config(register, size, value)
            vacated = target.unmap_changed(self._buses)
            target.map_missing(self._buses)
            if vacated:
                for other in self._functions.values():
                    other.map_missing(self._buses)
