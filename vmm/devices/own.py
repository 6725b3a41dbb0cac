"""Devices of the user's own: registers at I/O ports, or in the BAR of a PCI function.

A virtio device of one's own is `vmm.devices.virtio.own.VirtioDevice`. All of them are given to
`Machine(devices=[...])`, or named by `--device`.

What they raise ends the run, as a policy's error does; a GuestMemoryError that leaves a method is
the guest's fault, who named such memory: the access is dropped, and counted as refused.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock

from vmm.core.errors import GuestMemoryError
from vmm.core.lean_typing import Any, Protocol
from vmm.core.own_code import ExtensionError, called
from vmm.devices.bus import all_ones
from vmm.devices.virtio.device import IoStatistics


class DeviceMemory(Protocol):
    """Guest memory by guest-physical address, as a device may use it.

    Both raise GuestMemoryError before a byte moves: UnmappedAccess, PrivateAccess, or AccessDenied
    where a policy's on_io keeps the device off.
    """

    def pread(self, size: int, gpa: int) -> bytes: ...
    def pwrite(self, data: bytes | memoryview, gpa: int) -> None: ...


LARGEST_BAR = {True: 0x1000, False: 0x100}
"""Bytes of registers: a page of memory, or 256 I/O ports."""


class _Own:
    """What both kinds of devices have. Methods are called one at a time, on vCPUs' threads."""

    name = ""
    """What reports call it; by default its class's name in small letters."""
    memory: DeviceMemory
    """Guest memory; there from `start` on. Only for use inside the methods: a paused guest's
    devices leave it alone."""

    def read(self, offset: int, size: int) -> int:
        """The guest reads `size` bytes (1, 2, 4 or 8) from `offset`: a number that fits them."""
        return all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes `value` of `size` bytes to `offset`."""

    def start(self) -> None:
        """The guest is about to run: `memory` can be used."""

    def statistics(self) -> dict[str, Any]:
        """What the report's `io` says of it besides the counts of accesses: JSON-ready."""
        return {}

    def close(self) -> None:
        """The machine ends: let go of what was opened on the host."""


class PortDevice(_Own):
    """Registers at I/O ports, for x86 guests.

        class Knock(vmm.PortDevice):
            ports = range(0x510, 0x511)

            def write(self, offset: int, size: int, value: int) -> None:
                print(f"the guest knocks: {value:#x}")

    Ports are accessed by 1, 2 or 4 bytes.
    """

    ports: range
    """The I/O ports, without gaps; offsets count from the first."""


class PciDevice(_Own):
    """A PCI function with registers in BAR 0 and an interrupt (INTA).

    BAR 0 is of I/O ports where the machine has such, else (or with `in_memory`) of memory.
    """

    vendor = 0x1AF4
    device = 0x10F0
    """Vendor and device of the function: by default from the range that the vendor of virtio has
    for experiments."""
    class_code = 0xFF0000
    """Class, subclass and interface as one number; 0xff0000 fits no class."""
    bar_size = 0x100
    """Bytes of registers: a power of two, 256 at most of I/O ports, a page of memory."""
    in_memory = False

    is_asserted = False
    """Whether the interrupt line is up, for pyvmm."""
    _raised: Callable[[], None] | None = None

    def interrupt(self, asserted: bool = True) -> None:
        """Take the interrupt line up, until `interrupt(False)`. From any thread."""
        was, self.is_asserted = self.is_asserted, asserted
        if asserted and not was and self._raised is not None:
            self._raised()

    def connect(self, raised: Callable[[], None]) -> None:
        """For pyvmm: what is called when the line goes up."""
        self._raised = raised


class GuardedRegisters:
    """What is on the bus in a device's place: one access at a time, and no error unnoticed."""

    def __init__(self, device: PortDevice | PciDevice) -> None:
        self.device = device
        self._counts = IoStatistics()
        self._lock = RLock()

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            self._counts.moved(1, size, 0)
            try:
                value = called(self.device, "read", self.device.read, offset, size)
            except GuestMemoryError:
                self._counts.refused += 1
                return all_ones(size)
        if not isinstance(value, int) or value < 0 or value >> (8 * size):
            name = type(self.device).__name__
            raise ExtensionError(
                f"{name}: read returned {value!r}; {size} bytes were asked for: return a number "
                f"of 0 to {all_ones(size):#x}",
                self.device,
            )
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            self._counts.moved(1, 0, size)
            try:
                called(self.device, "write", self.device.write, offset, size, value)
            except GuestMemoryError:
                self._counts.refused += 1

    def as_dict(self) -> dict[str, Any]:
        """For the report's `io`: a request is an access of the guest's, bytes are registers'."""
        own = called(self.device, "statistics", self.device.statistics)
        return {**own, **self._counts.as_dict()}
