"""Data-path engines: how a device's bytes get from its file to guest memory, and back.

One protocol, chosen for each disk. They differ in what copies:

- `pread`: the kernel, twice, through a buffer of ours;
- `fd2fd`: the kernel, once; user space sees nothing;
- `vmfd`: the same on the VM's fd, whose offsets are guest-physical addresses, where KVM has that;
- `hva`: the kernel, once, straight to or from KVM's mapping, whose address is all that it is told;
- `mmap`: the processor in user space, between two mappings.

`auto` is hva from 64 KiB up and pread below, whichever is quicker (fd2fd where no mapping may be a
buffer).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator

from kvm_bindings import datapath, fdops, mapped
from vmm.core.errors import HostError
from vmm.core.lean_typing import Any, Protocol
from vmm.memory import transfer
from vmm.memory.backing import Backing


class Engine(Protocol):
    """Moves bytes between a file and guest memory; both calls return how many, short only at the
    file's end, and raise OSError as the system calls do."""

    name: str

    @property
    def bytes_by(self) -> dict[str, int]:
        """How many bytes went which way, for the report."""
        ...

    @property
    def fallbacks(self) -> int:
        """Transfers that could not go the engine's own way."""
        ...

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int: ...

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int: ...

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        """Many at once: file offset, guest offset, size, file offset...; total bytes moved."""
        ...

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        """Many at once: guest offset, file offset, size, guest offset..."""
        ...

    def as_dict(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


_FileMove = Callable[[int, int, int, list[int], int], int]


def make_engine(name: str, side: Backing, vm_fd: int = -1, *, may_be_buffer: bool = True) -> Engine:
    """The engine of that name (one of transfer.ENGINES) for this shared side, in the VM `vm_fd`.

    `may_be_buffer`: whether KVM's mapping of it may be a system call's buffer, which no private
    page is to be. Raises HostError for all but `auto` where the side's fd has no pread and pwrite,
    UsageError for what a protected guest's memory must not meet.
    """
    if side.name == "memfd-protected":
        from vmm.memory.observed_engine import ObservedEngine  # other runs do without

        return ObservedEngine(name, side)
    if name == "vmfd":
        require_vm_io(vm_fd)
        return CopyingEngine(name, vm_fd)
    if name in ("hva", "mmap") and side.traits.in_place:
        raise HostError(
            f"io={name}: private pages are in the mapping of {side.name}, too: a SIGBUS for "
            "an access that comes late; leave io= away"
        )
    if side.access != "pread/pwrite":
        if name == "auto":
            return BackingsOwnEngine(side)
        raise HostError(
            f"io={name} needs pread and pwrite on the fd of shared memory, {side.name} has "
            f"{side.access}; leave io= away"
        )
    if name == "mmap":
        return MappedEngine(side)
    by_mapping = may_be_buffer and side.hva and not side.is_guest_memfd
    if name in ("auto", "hva") and by_mapping:
        return HvaEngine(name, side, transfer.SPLICE_FROM if name == "auto" else 0)
    return CopyingEngine(name, side.fd)


def require_vm_io(vm_fd: int) -> None:
    """Raises HostError where a VM's fd has no pread: tried, as no released kernel has it."""
    try:
        os.pread(vm_fd, 1, 0)
    except OSError as error:
        # Refused for the page at address 0: private, or no memory there yet.
        if error.errno not in (errno.EACCES, errno.EFAULT):
            raise HostError(
                f"io=vmfd needs a KVM whose VM fds can be read and written, here pread says "
                f"{errno.errorcode.get(error.errno or 0, error.errno)}; use pyvmm lab --host "
                "experimental, or leave io= away"
            ) from None


def _triples(moves: list[int]) -> Iterator[tuple[int, int, int]]:
    return zip(moves[::3], moves[1::3], moves[2::3], strict=True)


def _as_dict(engine: Engine) -> dict[str, Any]:
    """For the report."""
    return {"name": engine.name, "bytes": dict(engine.bytes_by), "fallbacks": engine.fallbacks}


class CopyingEngine:
    """`auto`, `pread`, `fd2fd` and `vmfd`: system calls on the two fds."""

    def __init__(self, name: str, memory_fd: int) -> None:
        """`memory_fd`: where the offsets are guest-physical addresses. It stays its owner's."""
        self.name = name
        self._fd = memory_fd
        sizes = {"auto": transfer.SPLICE_FROM, "pread": None, "fd2fd": 0}
        self._copier = transfer.FdCopier(splice_from=sizes.get(name, transfer.SPLICE_FROM))
        self.bytes_by = self._copier.bytes_by

    @property
    def fallbacks(self) -> int:
        return self._copier.fallbacks

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        return self._copier.copy(src_fd, src_offset, self._fd, offset, size)

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        return self._copier.copy(self._fd, offset, dst_fd, dst_offset, size)

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        return self._copier.copy_many(src_fd, self._fd, moves)

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        return self._copier.copy_many(self._fd, dst_fd, moves)

    def as_dict(self) -> dict[str, Any]:
        return _as_dict(self)

    def close(self) -> None:
        """It holds nothing but the thread's pipe and buffer."""


class HvaEngine:
    """`hva`, and `auto` where KVM has the side mapped: pread(2) and pwrite(2) of the file with that
    mapping as the kernel's buffer. The kernel copies, once; nobody dereferences the mapping.

    `smallest`: transfers below so many bytes go by the two fds. So does, all of it once more, what
    the kernel can't reach in the mapping (EFAULT), and any error is the fds' own then.
    """

    def __init__(self, name: str, side: Backing, smallest: int) -> None:
        self.name = name
        self._fd, self._hva, self._size = side.fd, side.hva, side.size
        self._smallest = smallest
        self._copier = transfer.FdCopier()
        self._counting = threading.Lock()
        self._moved = 0
        self.fallbacks = 0

    @property
    def bytes_by(self) -> dict[str, int]:
        return {"hva": self._moved, **self._copier.bytes_by}

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        if size >= self._smallest:
            moved = self._whole(mapped.move_in, src_fd, src_offset, offset, size)
            if moved is not None:
                return moved
        return self._copier.copy(src_fd, src_offset, self._fd, offset, size)

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        if size >= self._smallest:
            moved = self._whole(mapped.move_out, dst_fd, offset, dst_offset, size)
            if moved is not None:
                return moved
        return self._copier.copy(self._fd, offset, dst_fd, dst_offset, size)

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        if max(moves[2::3]) >= self._smallest:
            moved = self._many(mapped.move_in, src_fd, moves)
            if moved is not None:
                return moved
        return self._copier.copy_many(src_fd, self._fd, moves)

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        if max(moves[2::3]) >= self._smallest:
            moved = self._many(mapped.move_out, dst_fd, moves)
            if moved is not None:
                return moved
        return self._copier.copy_many(self._fd, dst_fd, moves)

    # Both answer how many bytes were moved, or None where some could not be reached.

    def _many(self, call: _FileMove, fd: int, moves: list[int]) -> int | None:
        try:
            moved = call(fd, self._hva, self._size, moves, transfer.SLOW_NS)
        except OSError as error:
            self._fall_back(error, len(moves) // 3)
            return None
        self._count(moved)
        return moved

    def _whole(self, call: _FileMove, fd: int, source: int, target: int, size: int) -> int | None:
        """One transfer, in parts, because no signal's handler runs while C copies."""
        done, moved, part = 0, 0, 0
        try:
            while moved == part and done < size:
                part = min(size - done, transfer.UNINTERRUPTED)
                moves = [source + done, target + done, part]
                moved = call(fd, self._hva, self._size, moves, datapath.NEVER)
                done += moved
        except OSError as error:
            self._fall_back(error, 1)
            return None
        self._count(done)
        return done

    def _count(self, moved: int) -> None:
        with self._counting:
            self._moved += moved

    def _fall_back(self, error: OSError, count: int) -> None:
        if not mapped.out_of_reach(error):
            raise error
        with self._counting:
            self.fallbacks += count

    def as_dict(self) -> dict[str, Any]:
        return _as_dict(self)

    def close(self) -> None:
        """Mapping and fd are the backing's."""


class BackingsOwnEngine:
    """`auto` where shared memory's fd has no pread: whatever the backing offers in its place."""

    name = "auto"
    fallbacks = 0

    def __init__(self, side: Backing) -> None:
        self._side = side
        self.bytes_by = {side.access: 0}

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        return self._count(self._side.transfer_in(src_fd, src_offset, offset, size))

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        return self._count(self._side.transfer_out(offset, size, dst_fd, dst_offset))

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        return sum([self.transfer_in(src_fd, *move) for move in _triples(moves)])

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        return sum(
            [self.transfer_out(gpa, size, dst_fd, offset) for gpa, offset, size in _triples(moves)]
        )

    def _count(self, moved: int) -> int:
        self.bytes_by[self._side.access] += moved
        return moved

    def as_dict(self) -> dict[str, Any]:
        return _as_dict(self)

    def close(self) -> None:
        """The backing is its owner's."""


class MappedEngine:
    """`mmap`: both files mapped, memcpy between them. The comparator that all others are measured
    against, and the one place that reads and writes guest memory through a mapping.

    Mappings of its own: KVM's stay untouched. A disk that another process cuts short while bytes
    are copied is a SIGBUS; before every copy its size is looked at, which is what can be done.
    """

    name = "mmap"

    def __init__(self, side: Backing) -> None:
        self._side = side
        self._memory = fdops.map_shared(side.fd, side.size)
        self._disks: dict[tuple[int, bool], tuple[int, int]] = {}
        self._mapping = threading.Lock()  # queues have threads of their own
        self.bytes_by: dict[str, int] = {"memcpy": 0}
        self.fallbacks = 0

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        address, size = self._disk(src_fd, src_offset, size, writable=False)
        return self._copy(self._memory + offset, address, size)

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        address, room = self._disk(dst_fd, dst_offset, size, writable=True)
        if room < size:
            raise OSError(errno.ENOSPC, f"the file ends before {dst_offset + size:#x}")
        return self._copy(address, self._memory + offset, size)

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        return sum([self.transfer_in(src_fd, *move) for move in _triples(moves)])

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        return sum(
            [self.transfer_out(gpa, size, dst_fd, offset) for gpa, offset, size in _triples(moves)]
        )

    def _copy(self, target: int, source: int, size: int) -> int:
        datapath.copy_memory(target, source, size)
        self.bytes_by["memcpy"] += size
        return size

    def _disk(self, fd: int, offset: int, size: int, *, writable: bool) -> tuple[int, int]:
        """Where the disk's `offset` is mapped, and how many of `size` bytes there are."""
        end = os.lseek(fd, 0, os.SEEK_END)
        with self._mapping:
            mapped = self._disks.get((fd, writable))
            if mapped is None:
                protection = fdops.PROT_READ | (fdops.PROT_WRITE if writable else 0)
                mapped = fdops.map_shared(fd, end, protection=protection), end
                self._disks[fd, writable] = mapped
        return mapped[0] + offset, max(0, min(size, min(end, mapped[1]) - offset))

    def as_dict(self) -> dict[str, Any]:
        return _as_dict(self)

    def close(self) -> None:
        for address, size in [(self._memory, self._side.size), *self._disks.values()]:
            fdops.unmap(address, size)
        self._disks.clear()
