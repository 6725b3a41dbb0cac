"""Access by system calls on the fd itself: memfds, and guest_memfds where the kernel has them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from kvm_bindings import datapath
from vmm.memory.backing import Buffer, FdBacking, byte_count, fill, write_all
from vmm.memory.transfer import FdCopier

_IOV_MAX = 1024  # buffers that one preadv(2) or pwritev(2) takes


class FdIoBacking(FdBacking):
    """pread, pwrite and splice on the fd."""

    name: str
    access = "pread/pwrite"

    def __init__(self, fd: int, size: int) -> None:
        """Takes over `fd`, also when it raises OSError."""
        super().__init__(fd, size)
        self._copier = FdCopier()

    def pread(self, size: int, offset: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        while len(data) != size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, f"{self.name} ends before {offset + size:#x}")
            data += more
        return data

    def pwrite(self, data: Buffer, offset: int) -> None:
        write_all(self.fd, data, offset)

    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
        expected = sum(map(byte_count, buffers))
        whole = len(buffers) <= _IOV_MAX
        if whole and os.preadv(self.fd, list(buffers), offset) == expected:
            return
        for buffer in buffers:  # too many, or a short read: piece by piece
            offset += fill(buffer, self.pread(byte_count(buffer), offset))

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        expected = sum(map(byte_count, buffers))
        whole = len(buffers) <= _IOV_MAX
        if whole and os.pwritev(self.fd, list(buffers), offset) == expected:
            return
        for buffer in buffers:
            write_all(self.fd, buffer, offset)
            offset += byte_count(buffer)

    def read_many(self, pieces: list[int]) -> bytes | bytearray:
        if len(pieces) == 2:
            return self.pread(pieces[1], pieces[0])
        return datapath.pread_many(self.fd, pieces, sum(pieces[1::2]))

    def write_many(self, pieces: list[int], data: bytes) -> None:
        datapath.pwrite_many(self.fd, pieces, data)

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        return self._copier.copy(src_fd, src_offset, self.fd, offset, size)

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        return self._copier.copy(self.fd, offset, dst_fd, dst_offset, size)
