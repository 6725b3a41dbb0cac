"""Guest memory whose shared pages have an address bit (the `realm` scheme).

A device finds the bit in every address that its driver gives it. Page states, conversions and
loading know addresses without it, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmm.core.errors import PrivateAccess, UnmappedAccess
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.ranges import Range
from vmm.memory.backing import Backing, Buffer, byte_count
from vmm.memory.guest_memory import GuestMemory, MemoryThrough

if TYPE_CHECKING:
    from vmm.memory.engines import Engine


Announce = Callable[[Range, bool, str | None], None]
"""Told the range that a device is about to touch, whether it writes, and what names it."""


def without_bit(announce: Announce, shared_bit: int) -> Announce:
    """`announce`, told of a device's addresses without the bit: as a policy knows them."""

    def tell(area: Range, is_write: bool, named: str | None) -> None:
        announce(Range(area.start & ~shared_bit, area.size), is_write, named)

    return tell


class AliasedMemory(GuestMemory):
    """GuestMemory in which a device's address with `shared_bit` is the shared page, and one
    without it the private page, which the host does not touch."""

    def __init__(
        self,
        ram: Sequence[Range],
        shared: Backing,
        private_backing: Backing | None = None,
        private: Sequence[Range] = (),
        *,
        shared_bit: int,
    ) -> None:
        """`shared_bit` is a mask of one bit, above all RAM."""
        super().__init__(ram, shared, private_backing, private)
        if shared_bit < self.ram[-1].end or shared_bit & (shared_bit - 1):
            raise ValueError(f"{shared_bit:#x} is no single bit above RAM")
        self.shared_bit = shared_bit

    def plain(self, gpa: int, size: int) -> int:
        """A device's address without the bit. Raises GuestMemoryError for one that has no bit."""
        if gpa >= 0 and gpa & self.shared_bit:
            return gpa ^ self.shared_bit  # whether RAM is there, the access itself finds out
        if gpa >= 0 and size >= 0 and self.is_ram(Range(gpa, max(size, 1))):
            raise PrivateAccess(
                f"host access to {size} bytes at {gpa:#x}: without bit {self.shared_bit:#x} it "
                "names a private page"
            )
        raise UnmappedAccess(f"host access to {size} bytes at {gpa:#x} is outside guest RAM")

    def _plain_at(self, numbers: list[int], gpas: int, sizes: int, step: int) -> list[int]:
        """`numbers` with the addresses at positions `gpas`, `gpas + step`... made plain."""
        made = list(numbers)
        for at in range(0, len(numbers), step):
            made[at + gpas] = self.plain(numbers[at + gpas], numbers[at + sizes])
        return made

    def pread(self, size: int, gpa: int) -> bytes:
        return super().pread(size, self.plain(gpa, size))

    def pwrite(self, data: Buffer, gpa: int) -> None:
        super().pwrite(data, self.plain(gpa, byte_count(data)))

    def preadv(self, buffers: Sequence[bytearray | memoryview], gpa: int) -> None:
        super().preadv(buffers, self.plain(gpa, sum(map(byte_count, buffers))))

    def pwritev(self, buffers: Sequence[Buffer], gpa: int) -> None:
        super().pwritev(buffers, self.plain(gpa, sum(map(byte_count, buffers))))

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        return super().transfer_in(src_fd, src_offset, self.plain(gpa, size), size)

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int:
        return super().transfer_out(self.plain(gpa, size), size, dst_fd, dst_offset)

    def read_many(self, pieces: list[int]) -> bytes | bytearray:
        return super().read_many(self._plain_at(pieces, 0, 1, 2))

    def write_many(self, pieces: list[int], data: bytes) -> None:
        super().write_many(self._plain_at(pieces, 0, 1, 2), data)

    def discard(self, gpa: int, size: int) -> None:
        """As GuestMemory's, with either address: a balloon's pages have a number, and no bit."""
        super().discard(gpa & ~self.shared_bit if gpa >= 0 else gpa, size)

    def through(self, engine: Engine) -> MemoryThrough:
        return _AliasedThrough(self, engine)


class _AliasedThrough(MemoryThrough):
    """What `through` gives: moves by a device's addresses."""

    def __init__(self, memory: AliasedMemory, engine: Engine) -> None:
        super().__init__(memory, engine)
        self._aliased = memory

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        return super().move_in(src_fd, self._aliased._plain_at(moves, 1, 2, 3))

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        return super().move_out(self._aliased._plain_at(moves, 0, 2, 3), dst_fd)

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        return super().transfer_in(src_fd, src_offset, self._aliased.plain(gpa, size), size)

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int:
        return super().transfer_out(self._aliased.plain(gpa, size), size, dst_fd, dst_offset)
