"""Access by system calls into a mapping, for fds that can't be read and written themselves."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from kvm_bindings import fdops
from vmm.memory.backing import Buffer, FdBacking, byte_count, fill, write_all


class MappedBacking(FdBacking):
    """pread and pwrite on /proc/self/mem at the mapping's address, and pread(2) and pwrite(2) of
    another file with the mapping as its buffer.

    The nearest honest thing where the fd has no read, write or splice: a page that the host can't
    reach is EIO or EFAULT there, never a SIGBUS.
    """

    access = "/proc/self/mem"

    def __init__(self, fd: int, size: int) -> None:
        """Takes over `fd`, also when it raises OSError."""
        super().__init__(fd, size)
        self._mem = -1
        try:
            self._mem = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        if self._mem >= 0:
            os.close(self._mem)
            self._mem = -1

    def _address(self, offset: int, size: int) -> int:
        if offset < 0 or offset + size > self.size:
            raise OSError(errno.EINVAL, f"range {offset:#x}+{size:#x} is outside the backing")
        return self.hva + offset

    def pread(self, size: int, offset: int) -> bytes:
        address = self._address(offset, size)
        data = os.pread(self._mem, size, address)
        while len(data) != size:
            more = os.pread(self._mem, size - len(data), address + len(data))
            if not more:
                reach = f"only {len(data)} of {size} bytes at {offset:#x} readable"
                raise OSError(errno.EIO, reach)
            data += more
        return data

    def pwrite(self, data: Buffer, offset: int) -> None:
        write_all(self._mem, data, self._address(offset, byte_count(data)))

    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
        for buffer in buffers:
            offset += fill(buffer, self.pread(byte_count(buffer), offset))

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        for buffer in buffers:
            self.pwrite(buffer, offset)
            offset += byte_count(buffer)

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        address = self._address(offset, size)
        done = 0
        while done < size:
            moved = fdops.pread_to_address(src_fd, address + done, size - done, src_offset + done)
            if moved == 0:
                break
            done += moved
        return done

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        address = self._address(offset, size)
        done = 0
        while done < size:
            moved = fdops.pwrite_from_address(
                dst_fd, address + done, size - done, dst_offset + done
            )
            if moved == 0:
                raise OSError(errno.EIO, f"nothing more is written at {dst_offset + done:#x}")
            done += moved
        return done
