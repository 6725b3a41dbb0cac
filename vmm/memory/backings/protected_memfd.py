"""The memfd of a protected guest (pKVM): one file for private and shared pages alike, which the
host reaches by copying system calls alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence

from kvm_bindings import mapped
from vmm.core.errors import PrivateAccess
from vmm.core.lean_typing import NoReturn
from vmm.memory.backing import Buffer, Traits, byte_count, fill, write_all
from vmm.memory.backings.memfd import MemfdBacking

_BOUNCE = 1 << 20
_FILE_MOVE = 16 << 20
"""Bytes that one call moves between a file and guest memory: handlers of signals run in between."""

_FileMove = Callable[[int, int, int, list[int]], int]
_Part = tuple[int, int, int]


def _parts(moves: list[int], most: int = _FILE_MOVE) -> Iterator[_Part]:
    """Source offset, target offset and size of moves cut into parts of `most` bytes."""
    for source, target, size in zip(moves[::3], moves[1::3], moves[2::3], strict=True):
        for done in range(0, size, most):
            yield source + done, target + done, min(most, size - done)


class ProtectedMemfdBacking(MemfdBacking):
    """A memfd like any other while the guest is loaded. From `seal` on the pages may be donated to
    the guest, and its fd is good for nothing: a read or write of a donated page by the fd
    "succeeds" and destroys the page, the guest's next touch ends it (Linux 7.3).

    What is left is the kernel's copy between a buffer or file of ours and KVM's mapping. A page
    that the guest has not shared is EFAULT there, which is a PrivateAccess here; what lies before
    it has been moved, since nobody knows where the private pages are before trying.
    """

    name = "memfd-protected"
    access = "copying system calls"
    # Claims about the time when there is something private: after `seal`.
    traits = Traits(
        pread=False,
        pwrite=False,
        splice=False,
        mmap=True,
        private_access="SIGSEGV",
        in_place=True,
        conversion="a hypercall that the host is not told of",
    )
    sealed = False

    def seal(self) -> None:
        """The guest may run from now on: the fd gives nobody access any more (EBADF).

        Raises OSError. Any number of times.
        """
        if not self.sealed:
            mapped.name_only(self.fd)
            self.sealed = True

    # -- small pieces -------------------------------------------------------------------------

    def pread(self, size: int, offset: int) -> bytes:
        if not self.sealed:
            return super().pread(size, offset)
        return bytes(self.read_many([offset, size]))

    def pwrite(self, data: Buffer, offset: int) -> None:
        if not self.sealed:
            super().pwrite(data, offset)
            return
        self._write([offset, byte_count(data)], data)

    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
        if not self.sealed:
            super().preadv(buffers, offset)
            return
        data, done = self.read_many([offset, sum(map(byte_count, buffers))]), 0
        for buffer in buffers:
            done += fill(buffer, bytes(data[done : done + byte_count(buffer)]))

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        if not self.sealed:
            super().pwritev(buffers, offset)
            return
        data = b"".join(buffers)
        self._write([offset, len(data)], data)

    def read_many(self, pieces: list[int]) -> bytes | bytearray:
        if not self.sealed:
            return super().read_many(pieces)
        size = sum(pieces[1::2])
        data, moved = mapped.read_mapped(self._addresses(pieces), size)
        if moved != size:
            self._refuse("read", pieces, moved)
        return data

    def write_many(self, pieces: list[int], data: bytes) -> None:
        if not self.sealed:
            super().write_many(pieces, data)
            return
        self._write(pieces, data)

    def _write(self, pieces: list[int], data: Buffer) -> None:
        moved = mapped.write_mapped(self._addresses(pieces), data)
        if moved != byte_count(data):
            self._refuse("write", pieces, moved)

    # -- files --------------------------------------------------------------------------------

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        if not self.sealed:
            return super().transfer_in(src_fd, src_offset, offset, size)
        return self.move_in(src_fd, [src_offset, offset, size])

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        if not self.sealed:
            return super().transfer_out(offset, size, dst_fd, dst_offset)
        return self.move_out([offset, dst_offset, size], dst_fd)

    def move_in(self, src_fd: int, moves: list[int], *, bounce: bool = False) -> int:
        """File offset, offset, size, file offset... for a sealed backing: bytes moved, short at
        the file's end. `bounce`: through a buffer of ours, which is how files go whose reads and
        writes are no copies. Raises PrivateAccess, OSError, with some of it moved."""
        if bounce or not mapped.is_copied(src_fd):
            return self._bounce_in(src_fd, moves)
        return self._move(mapped.move_in, src_fd, list(_parts(moves)), 1)

    def move_out(self, moves: list[int], dst_fd: int, *, bounce: bool = False) -> int:
        """Offset, file offset, size, offset... as `move_in`."""
        if bounce or not mapped.is_copied(dst_fd):
            return self._bounce_out(moves, dst_fd)
        return self._move(mapped.move_out, dst_fd, list(_parts(moves)), 0)

    def _move(self, call: _FileMove, fd: int, parts: list[_Part], at: int) -> int:
        """`at`: which of a part's two offsets is guest memory's."""
        for part in parts:
            self._require_inside(part[at], part[2])
        done = 0
        while parts:
            # So many at once that the call is short: no signal's handler runs while C copies.
            taken, size = 0, 0
            while taken < len(parts) and (not taken or size + parts[taken][2] <= _FILE_MOVE):
                size += parts[taken][2]
                taken += 1
            now, parts = parts[:taken], parts[taken:]
            try:
                numbers = [number for part in now for number in part]
                moved = call(fd, self.hva, self.size, numbers)
            except OSError as error:
                if not mapped.out_of_reach(error):
                    raise
                pieces = [number for part in now for number in (part[at], part[2])]
                self._refuse("file access", pieces, None)
            done += moved
            if moved < size:
                break
        return done

    def _bounce_in(self, src_fd: int, moves: list[int]) -> int:
        done = 0
        for position, offset, size in _parts(moves, _BOUNCE):
            data = os.pread(src_fd, size, position)
            while len(data) < size:
                more = os.pread(src_fd, size - len(data), position + len(data))
                if not more:
                    break
                data += more
            self._write([offset, len(data)], data)
            done += len(data)
            if len(data) < size:
                break
        return done

    def _bounce_out(self, moves: list[int], dst_fd: int) -> int:
        done = 0
        for offset, position, size in _parts(moves, _BOUNCE):
            write_all(dst_fd, self.read_many([offset, size]), position)
            done += size
        return done

    # -- the rest -----------------------------------------------------------------------------

    def probe(self, offsets: Sequence[int]) -> list[bool]:
        """Whether the host reaches the byte at each offset, found out by reading it. A page that
        nobody has touched is made by that."""
        for offset in offsets:
            self._require_inside(offset, 1)
        return mapped.probe_mapped([self.hva + offset for offset in offsets])

    def punch(self, offset: int, size: int) -> None:
        """Refused: a donated page stays the guest's, and a hole would only make the host's file
        show another one."""
        raise OSError(
            errno.EOPNOTSUPP,
            f"{size:#x} bytes at {offset:#x} of a protected guest's memory can't be given back",
        )

    def resident_bytes(self, offset: int = 0, size: int = 0) -> int:
        """Bytes of memory that the kernel holds for all of the file (st_blocks)."""
        if size:
            raise OSError(errno.EOPNOTSUPP, "a protected guest's memory is counted as a whole")
        return super().resident_bytes()

    def _require_inside(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise OSError(errno.EINVAL, f"range {offset:#x}+{size:#x} is outside the backing")

    def _addresses(self, pieces: list[int]) -> list[int]:
        addresses = list(pieces)
        for at in range(0, len(pieces), 2):
            self._require_inside(pieces[at], pieces[at + 1])
            addresses[at] += self.hva
        return addresses

    def _refuse(self, what: str, pieces: list[int], moved: int | None) -> NoReturn:
        """`moved`: how many bytes went well before the kernel found the page out of reach."""
        where = ""
        if moved is not None:
            for offset, size in zip(pieces[::2], pieces[1::2], strict=True):
                if moved < size:
                    where = f": {offset + moved:#x} is private (EFAULT)"
                    break
                moved -= size
        size = sum(pieces[1::2])
        raise PrivateAccess(
            f"host {what} of {size} bytes at {pieces[0]:#x}{where or ': private (EFAULT)'}"
        )
