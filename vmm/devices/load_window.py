"""The window through which a strict guest's loader gets what it asks for, and its port.

The loader copies from the window into its private memory and checks what it has there, so that
nothing here has to be believed. What it may ask for is a number of a chunk; there is nothing else
that it could reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmm.core.errors import GuestMemoryError
from vmm.core.lean_typing import Protocol
from vmm.devices.bus import all_ones

PORT_FILL, PORT_DONE, PORT_FAILED = 0x00, 0x04, 0x08
PORTS = 0x0C
REGISTER_SIZE = 4
FAILED_HEADER, FAILED_CONVERSION = 0xFFFF_0001, 0xFFFF_0002


class Contents(Protocol):
    """A part of what is loaded."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def content(self) -> bytes | tuple[int, int, str]: ...


class Memory(Protocol):
    """What filling the window needs of guest memory (vmm.memory.GuestMemory)."""

    def pwrite(self, data: bytes, gpa: int, /) -> None: ...
    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int, /) -> int: ...


class LoadWindow:
    """The loader's port: 32-bit registers, which read all ones.

    +0x00 write: fill the window with the chunk of this number; carried out when the write returns
    +0x04 write: all is loaded        +0x08 write: something is wrong, 1 + the number of a part

    Chunks are as large as the window, but for the last of each part, in the parts' order.
    """

    def __init__(
        self,
        memory: Memory,
        loaded: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        """`loaded` is called once; `failed` ends the run with a sentence."""
        self._memory = memory
        self._loaded = loaded
        self._failed = failed
        self._gpa = 0
        self._parts: Sequence[Contents] = ()
        self._chunks: list[tuple[int, int, int]] = []
        self.is_open = False
        """Whether the loader is at work: from `open` until it is done or has failed."""

    def open(self, gpa: int, size: int, parts: Sequence[Contents]) -> None:
        """The loader is about to start, with a window of `size` bytes at `gpa`."""
        self._gpa = gpa
        self._parts = parts
        self._chunks = [
            (number, offset, min(size, part.size - offset))
            for number, part in enumerate(parts)
            for offset in range(0, part.size, size)
        ]
        self.is_open = True

    def read(self, offset: int, size: int) -> int:
        return all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != REGISTER_SIZE or not self.is_open:
            return
        if offset == PORT_FILL:
            self._fill(value)
        elif offset == PORT_DONE:
            self.is_open = False
            self._loaded()
        elif offset == PORT_FAILED:
            self._fail(self._reason(value))

    def _fail(self, reason: str) -> None:
        self.is_open = False
        self._failed(reason)

    def _fill(self, number: int) -> None:
        if number >= len(self._chunks):
            self._fail(f"asked for chunk {number}, there are {len(self._chunks)}")
            return
        index, offset, size = self._chunks[number]
        part = self._parts[index]
        content = part.content
        try:
            if isinstance(content, bytes):
                self._memory.pwrite(content[offset : offset + size], self._gpa)
                return
            fd, start, name = content
            done = 0
            while done < size:
                place = start + offset + done
                moved = self._memory.transfer_in(fd, place, self._gpa + done, size - done)
                if moved <= 0:
                    self._fail(f"the file of {name} ended while it was loaded")
                    return
                done += moved
        except OSError as error:
            self._fail(f"{part.name} could not be read: {error.strerror}")
        except GuestMemoryError as error:  # it has given its window back already
            self._fail(f"{part.name} has no place: {error}")

    def _reason(self, code: int) -> str:
        if code == FAILED_HEADER:
            return "found no header of its own"
        if code == FAILED_CONVERSION:
            return "could not convert its window back to private memory"
        if 1 <= code <= len(self._parts):
            return f"{self._parts[code - 1].name} is not what its manifest says (SHA-256 differs)"
        return f"failed with code {code:#x}"
