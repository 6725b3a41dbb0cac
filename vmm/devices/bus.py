"""The buses: which device answers which I/O port or address, decided when it is put there.

Devices know offsets only. Overlap and the end of the space are checked in `add`;
after that a lookup is one dict access and cannot fail on anything the guest does.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

from vmm.core.errors import PyvmmError
from vmm.core.lean_typing import Protocol, TypeGuard

PORT_SPACE = 0x1_0000
MEMORY_SPACE = 1 << 32  # registers lie below 4 GiB
MEMORY_PAGE = 0x1000  # what a device in memory has at least


class PortDevice(Protocol):
    """What sits on the bus. `offset` counts from the port where it was put, `size` is 1, 2 or 4.

    Neither method ever raises for anything that a guest can write, and `value` fits `size`.
    """

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class StreamDevice(PortDevice, Protocol):
    """One that also takes a whole string for its first port: string I/O as one call."""

    def write_bytes(self, data: bytes) -> None: ...


def takes_strings(device: PortDevice) -> TypeGuard[StreamDevice]:
    """Whether a device is a StreamDevice."""
    return hasattr(device, "write_bytes")


class Banked:
    """A device with a bank of registers for each vCPU at the same place, as a GIC has them.

    The bus knows nothing of it: the code that carries an access out picks the bank (`bank_of`).
    """

    __slots__ = ("banks",)

    def __init__(self, banks: Sequence[PortDevice]) -> None:
        """`banks` by vCPU index."""
        self.banks = banks

    def read(self, offset: int, size: int) -> int:
        """An access by no vCPU, as by another device: there is no register for it."""
        return all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Dropped, see `read`."""


class BusConflict(PyvmmError):
    """The ports or addresses do not exist, or another device has some of them."""


def all_ones(size: int) -> int:
    """What a read of `size` bytes answers where nothing drives the bus."""
    return (1 << (8 * size)) - 1


class PortBus:
    """64 KiB of I/O ports.

    Any thread may look up while another one moves a device: a lookup sees a port either with
    its old owner or with its new one.
    """

    __slots__ = ("_lengths", "_lock", "_ports")

    def __init__(self) -> None:
        self._ports: dict[int, tuple[PortDevice, int]] = {}
        self._lengths: dict[int, int] = {}  # first port -> number of ports
        self._lock = Lock()

    def add(self, base: int, length: int, device: PortDevice) -> None:
        """Put `device` on ports [base, base + length).

        Raises BusConflict, with nothing changed, when they leave the port space or are taken.
        """
        if length <= 0 or base < 0 or base + length > PORT_SPACE:
            raise BusConflict(
                f"ports {base:#x} to {base + length - 1:#x} do not lie in the port space "
                f"0x0 to {PORT_SPACE - 1:#x}"
            )
        with self._lock:
            for port in range(base, base + length):
                owner = self._ports.get(port)
                if owner is not None:
                    raise BusConflict(
                        f"ports {base:#x} to {base + length - 1:#x} cannot go to "
                        f"{type(device).__name__}: {type(owner[0]).__name__} has port {port:#x}"
                    )
            self._lengths[base] = length
            self._ports.update((base + offset, (device, offset)) for offset in range(length))

    def remove(self, base: int) -> None:
        """Take away the device that was put at exactly `base`; KeyError when there is none."""
        with self._lock:
            for port in range(base, base + self._lengths.pop(base)):
                del self._ports[port]

    def find(self, port: int) -> tuple[PortDevice, int] | None:
        """The device at `port` and the port's offset in it."""
        return self._ports.get(port)

    def read(self, port: int, size: int) -> int:
        """What IN of `size` bytes at `port` gives; all ones where nobody answers."""
        found = self._ports.get(port)
        if found is None:
            return all_ones(size)
        return found[0].read(found[1], size)

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of `size` bytes at `port`; dropped where nobody answers."""
        found = self._ports.get(port)
        if found is not None:
            found[0].write(found[1], size, value)


class MemoryBus:
    """Memory-mapped registers below 4 GiB: whole pages, the devices of PortBus' protocol.

    `size` is 1 to 8 here. KVM asks for what has no memslot and never across a page's end.
    Safe for the same uses as PortBus.
    """

    __slots__ = ("_lock", "_pages", "_sizes")

    def __init__(self) -> None:
        self._pages: dict[int, tuple[PortDevice, int]] = {}
        self._sizes: dict[int, int] = {}
        self._lock = Lock()

    def add(self, base: int, size: int, device: PortDevice) -> None:
        """Put `device` on [base, base + size), whole pages; raises as PortBus.add."""
        unaligned = (base | size) % MEMORY_PAGE
        if size <= 0 or base < 0 or base + size > MEMORY_SPACE or unaligned:
            raise BusConflict(f"{base:#x} to {base + size - 1:#x} are no pages below 4 GiB")
        pages = range(base // MEMORY_PAGE, (base + size) // MEMORY_PAGE)
        with self._lock:
            if any(page in self._pages for page in pages):
                raise BusConflict(f"{base:#x} to {base + size - 1:#x} are taken in part")
            self._sizes[base] = size
            self._pages.update((page, (device, page * MEMORY_PAGE - base)) for page in pages)

    def remove(self, base: int) -> None:
        """Take away the device that was put at exactly `base`; KeyError when there is none."""
        with self._lock:
            size = self._sizes.pop(base)
            for page in range(base // MEMORY_PAGE, (base + size) // MEMORY_PAGE):
                del self._pages[page]

    def find(self, gpa: int) -> tuple[PortDevice, int] | None:
        """The device at `gpa` and the address' offset in it."""
        found = self._pages.get(gpa // MEMORY_PAGE)
        return None if found is None else (found[0], found[1] + gpa % MEMORY_PAGE)
