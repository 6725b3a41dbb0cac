"""Looks for a secret by every way that a host's user space has into a running pyvmm.

    python -m tests.support.hunt PID SEED [kernel-memory] [FILE...]
    python -m tests.support.hunt files SEED FILE...

The secret is the SHA-256 of SEED in hexadecimal digits, so that neither the hunter's words nor the
guest's console have it; and the hunter itself has it only in two halves, so that it doesn't find
itself in its kernel's memory. JSON on stdout: for each way how often it was found, what was looked
through (bytes), and what refused. With `files` it looks through these alone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import json
import mmap
import os
import re
import signal
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

_PIECE = 1 << 20
_SYS_PIDFD_GETFD = 438
_MOST_OF_A_MAPPING = 2 << 30
_PT_LOAD, _NOT_PHYSICAL = 1, (1 << 64) - 1
KERNEL_MEMORY = "kernel-memory"
_KERNEL_IMAGE = 0xFFFF_FFFF_8000_0000  # Documentation/arch/x86/x86_64/mm.rst


@dataclass
class Found:
    """What one way came to."""

    times: int = 0
    looked_at: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, object]:
        return {"times": self.times, "bytes": self.looked_at, "refused": dict(self.refused)}


class Searched(Protocol):
    """Bytes, or a mapping."""

    def find(self, sub: bytes, start: int = ..., /) -> int: ...
    def __getitem__(self, key: slice, /) -> bytes: ...


class Secret(NamedTuple):
    """What is looked for, in halves of equal size."""

    first: bytes
    second: bytes

    @property
    def size(self) -> int:
        return len(self.first) + len(self.second)

    def count(self, data: Searched) -> int:
        """How often it is in there."""
        times, half, at = 0, len(self.first), data.find(self.first)
        while at >= 0:
            times += data[at + half : at + self.size] == self.second
            at = data.find(self.first, at + 1)
        return times


class Hunter:
    """Hunts in one process."""

    def __init__(self, pid: int, secret: Secret) -> None:
        self._pid = pid
        self._secret = secret

    def hunt(self, files: list[Path]) -> dict[str, Found]:
        """All ways, the gentle ones first."""
        return {
            "file descriptors": self.file_descriptors(),
            "mappings": self.mappings(),
            "/proc/PID/mem": self.proc_mem(),
            "process_vm_readv": self.process_vm_readv(),
            "files": self.files(files),
            "swap": self.swap(),
            "core dump": self.core_dump(),
        }

    # -- ways ---------------------------------------------------------------------------------

    def file_descriptors(self) -> Found:
        """Its open files, taken over and read."""
        found = Found()
        for fd in self._fds(found):
            offset, tail = 0, b""
            try:
                while data := os.pread(fd, _PIECE, offset):
                    tail = self._look(found, tail, data)
                    offset += len(data)
            except OSError as error:
                what = re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{fd}"))
                found.refused[f"{what}: {os.strerror(error.errno or 0)}"] += 1
        return found

    def mappings(self) -> Found:
        """The same, each mapped in a child, which may die of it."""
        found = Found()
        for fd in self._fds(found):
            size = os.fstat(fd).st_size
            if size == 0 or size > _MOST_OF_A_MAPPING:
                continue
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                self._scan_mapping(fd, size, writing)
            os.close(writing)
            with os.fdopen(reading) as answers:
                said = answers.read().split()
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                found.refused[signal.Signals(os.WTERMSIG(status)).name] += 1
            elif said and said[0].isdigit():
                found.times += int(said[0])
                found.looked_at += size
            else:
                found.refused[" ".join(said)] += 1
        return found

    def _scan_mapping(self, fd: int, size: int, writing: int) -> None:
        faulthandler.disable()  # the signal that may come is an answer, no fault
        try:
            with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as area:
                times = self._secret.count(area)
            os.write(writing, str(times).encode())
        except (OSError, ValueError) as error:
            os.write(writing, str(getattr(error, "strerror", error)).encode())
        finally:
            os._exit(0)

    def proc_mem(self) -> Found:
        """All of its address space, by the file that a debugger uses."""
        found = Found()
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as file:
            for start, end in self._areas():
                self._scan_area(found, start, end, lambda at, n: os.pread(file.fileno(), n, at))
        return found

    def process_vm_readv(self) -> Found:
        """The same, by the system call."""
        found = Found()
        for start, end in self._areas():
            self._scan_area(found, start, end, self._vm_read)
        return found

    def files(self, names: list[Path]) -> Found:
        """Report, trace, disks, console: what it has written, by way of the page cache."""
        found = Found()
        for name in names:
            inside = [each for each in name.rglob("*") if each.is_file()] if name.is_dir() else []
            for file in [*inside, *([name] if name.is_file() else [])]:
                with file.open("rb") as opened:
                    tail = b""
                    while data := opened.read(_PIECE):
                        tail = self._look(found, tail, data)
        return found

    def swap(self) -> Found:
        """Where its pages could have been put: guest_memfd's never are, and there may be none."""
        found = Found()
        for line in Path("/proc/swaps").read_text().splitlines()[1:]:
            try:
                with open(line.split()[0], "rb", buffering=0) as area:
                    tail = b""
                    while data := area.read(_PIECE):
                        tail = self._look(found, tail, data)
            except OSError as error:
                found.refused[os.strerror(error.errno or 0)] += 1
        return found

    def kernel_memory(self) -> Found:
        """All memory of the machine as its kernel maps it: what root may read of the kernel."""
        found = Found()
        try:
            fd = os.open("/proc/kcore", os.O_RDONLY)
        except OSError as error:
            found.refused[os.strerror(error.errno or 0)] += 1
            return found
        try:
            header = os.pread(fd, 64, 0)
            (table,) = struct.unpack_from("<Q", header, 32)
            (count,) = struct.unpack_from("<H", header, 56)
            for number in range(count):
                segment = os.pread(fd, 56, table + 56 * number)
                kind, _, offset, virtual, physical, size = struct.unpack_from("<IIQQQQ", segment)
                # The direct map has each page once; the kernel's own image is a second view.
                if kind == _PT_LOAD and physical != _NOT_PHYSICAL and virtual < _KERNEL_IMAGE:
                    self._scan_area(found, offset, offset + size, lambda at, n: os.pread(fd, n, at))
        finally:
            os.close(fd)
        return found

    def core_dump(self) -> Found:
        """What gcore would write: every mapping that /proc says is readable, page by page, where a
        whole piece of it can't be read."""
        found = Found()
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as file:
            for start, end in self._areas(all_of_them=False):
                self._scan_area(
                    found, start, end, lambda at, n: os.pread(file.fileno(), n, at), step=4096
                )
        return found

    # -- their means --------------------------------------------------------------------------

    def _fds(self, found: Found) -> Iterator[int]:
        libc = ctypes.CDLL(None, use_errno=True)
        pidfd = os.pidfd_open(self._pid)
        try:
            for name in sorted(os.listdir(f"/proc/{self._pid}/fd"), key=int):
                fd = libc.syscall(_SYS_PIDFD_GETFD, pidfd, int(name), 0)
                if fd < 0:
                    found.refused[f"pidfd_getfd: {os.strerror(ctypes.get_errno())}"] += 1
                    continue
                try:
                    yield fd
                finally:
                    os.close(fd)
        finally:
            os.close(pidfd)

    def _areas(self, *, all_of_them: bool = True) -> list[tuple[int, int]]:
        areas = []
        for line in Path(f"/proc/{self._pid}/maps").read_text().splitlines():
            place, rights = line.split()[:2]
            start, end = (int(part, 16) for part in place.split("-"))
            if (all_of_them or rights.startswith("r")) and start < 1 << 47:
                areas.append((start, end))
        return areas

    def _scan_area(
        self, found: Found, start: int, end: int, read: object, step: int = _PIECE
    ) -> None:
        tail, at = b"", start
        while at < end:
            wanted = min(step, end - at)
            try:
                data = read(at, wanted)  # type: ignore[operator]
            except OSError as error:
                found.refused[os.strerror(error.errno or 0)] += 1
                data = b""
            tail = self._look(found, tail, data) if data else b""
            at += wanted if len(data) < wanted else len(data)

    def _vm_read(self, address: int, size: int) -> bytes:
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(size)

        class Iovec(ctypes.Structure):
            _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))

        here = Iovec(ctypes.addressof(buffer), size)
        there = Iovec(address, size)
        libc.process_vm_readv.restype = ctypes.c_ssize_t
        done = libc.process_vm_readv(
            self._pid, ctypes.byref(here), 1, ctypes.byref(there), 1, ctypes.c_ulong(0)
        )
        if done < 0:
            raise OSError(ctypes.get_errno(), "process_vm_readv")
        return buffer.raw[:done]

    def _look(self, found: Found, tail: bytes, data: bytes) -> bytes:
        """Count the secret in what follows `tail`; what the next piece has to begin with."""
        found.looked_at += len(data)
        found.times += self._secret.count(tail + data)
        return data[1 - self._secret.size :]


def secret_of(seed: str) -> Secret:
    """What the guest makes of the seed: sha256sum's digits."""
    digest = hashlib.sha256(seed.encode()).digest()
    return Secret(digest[:16].hex().encode(), digest[16:].hex().encode())


def main() -> None:
    pid, seed, *names = sys.argv[1:]
    files = [Path(name) for name in names if name != KERNEL_MEMORY]
    if pid == "files":
        found = {"files": Hunter(0, secret_of(seed)).files(files)}
    else:
        hunter = Hunter(int(pid), secret_of(seed))
        # First what the machine's kernel maps: the rest leaves copies of what it finds.
        kernel = {"/proc/kcore": hunter.kernel_memory()} if KERNEL_MEMORY in names else {}
        found = {**kernel, **hunter.hunt(files)}
    print(json.dumps({way: each.as_dict() for way, each in found.items()}))


if __name__ == "__main__":
    main()
