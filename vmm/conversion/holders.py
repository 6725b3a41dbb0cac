"""Which processes have references to a page of a file, as far as /proc tells it: for a page that
KVM won't make private (EAGAIN).

The kernel has no list of a page's references. What can hold one from user space leaves traces:

- buffers registered with an io_uring;
- system calls under way whose buffer is a mapping of the page;
- pipes that are not empty (splice and vmsplice put the page itself there);
- memory that is pinned for a device (VmPin: VFIO, RDMA).

Each is named with its process. Those of processes that this one may not look into (ptrace access)
are missing.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
from collections.abc import Iterator

from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import PAGE_SIZE

_MOST = 16  # holders told of
# Linux' numbers on x86-64 and arm64 of calls that take (fd, buffer, size...).
_WITH_BUFFER = {
    "x86_64": {0: "read", 1: "write", 17: "pread64", 18: "pwrite64", 45: "recvfrom", 44: "sendto"},
    "aarch64": {
        63: "read",
        64: "write",
        67: "pread64",
        68: "pwrite64",
        207: "recvfrom",
        206: "sendto",
    },
}
_WITH_VECTOR = {
    "x86_64": {
        19: "readv",
        20: "writev",
        278: "vmsplice",
        295: "preadv",
        296: "pwritev",
        327: "preadv2",  # what C libraries call for preadv
        328: "pwritev2",
    },
    "aarch64": {
        65: "readv",
        66: "writev",
        69: "preadv",
        70: "pwritev",
        75: "vmsplice",
        286: "preadv2",
        287: "pwritev2",
    },
}
_MOST_VECTORS = 1024


class _Mapping(NamedTuple):
    """A part of the file in a process's address space, in bytes."""

    start: int
    end: int
    offset: int


def holders(fd: int, offset: int, size: int = PAGE_SIZE) -> list[str]:
    """What may hold pages of the range, in words; empty when nothing can be seen."""
    inode = os.fstat(fd).st_ino
    found: list[str] = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            found += _of_process(f"/proc/{process}", inode, offset, size)
        except (OSError, ValueError):
            continue  # gone meanwhile, or not ours to look into
        if len(found) >= _MOST:
            break
    return found[:_MOST]


def _of_process(process: str, inode: int, offset: int, size: int) -> Iterator[str]:
    areas = [
        (mapping.start + max(offset, mapping.offset) - mapping.offset,
         mapping.start + min(offset + size, mapping.offset + mapping.end - mapping.start)
         - mapping.offset)
        for mapping in _mappings(process, inode)
    ]  # fmt: skip
    areas = [(start, end) for start, end in areas if start < end]
    opened = _opened(process)
    if not areas and inode not in {found for _, found in opened.values()}:
        return
    with open(f"{process}/comm") as file:
        who = f"process {process[6:]} ({file.read().strip()})"
    if areas:
        yield from _calls(process, areas, who)
        yield from _pinned(process, who)
    for number, (target, _) in opened.items():
        if areas and "io_uring" in target:
            yield from _registered(process, number, areas, who)
    yield from _pipes(process, opened, who)


def _mappings(process: str, inode: int) -> Iterator[_Mapping]:
    with open(f"{process}/maps") as file:
        for line in file:
            words = line.split()
            if int(words[4]) == inode:
                start, end = (int(word, 16) for word in words[0].split("-"))
                yield _Mapping(start, end, int(words[2], 16))


def _opened(process: str) -> dict[str, tuple[str, int]]:
    """Its descriptors: what each is, and the inode."""
    found = {}
    for number in os.listdir(f"{process}/fd"):
        try:
            path = f"{process}/fd/{number}"
            found[number] = os.readlink(path), os.stat(path).st_ino
        except OSError:
            continue
    return found


def _overlaps(areas: list[tuple[int, int]], start: int, size: int) -> bool:
    return any(start < end and first < start + size for first, end in areas)


def _calls(process: str, areas: list[tuple[int, int]], who: str) -> Iterator[str]:
    machine = os.uname().machine
    with_buffer = _WITH_BUFFER.get(machine, {})
    with_vector = _WITH_VECTOR.get(machine, {})
    for thread in os.listdir(f"{process}/task"):
        try:
            with open(f"{process}/task/{thread}/syscall") as file:
                words = file.read().split()
        except OSError:
            continue
        if len(words) < 7:
            continue  # it runs
        number, fd, buffer, count = (int(word, 0) for word in words[:4])
        name = with_buffer.get(number)
        if name is not None and _overlaps(areas, buffer, count):
            on = _file_in_words(process, fd)
            yield f"{who}: thread {thread} is in {name} on {on} with the page as its buffer"
        name = with_vector.get(number)
        if name is not None and any(
            _overlaps(areas, *piece) for piece in _vector(process, buffer, count)
        ):
            on = _file_in_words(process, fd)
            yield f"{who}: thread {thread} is in {name} on {on} with the page among its buffers"


def _file_in_words(process: str, fd: int) -> str:
    """Whether it was opened O_DIRECT: then the device has the page itself for as long."""
    try:
        with open(f"{process}/fdinfo/{fd}") as file:
            flags = re.search(r"^flags:\s+([0-7]+)", file.read(), re.MULTILINE)
    except OSError:
        flags = None
    direct = flags is not None and int(flags[1], 8) & os.O_DIRECT
    return f"fd {fd} (O_DIRECT)" if direct else f"fd {fd}"


def _vector(process: str, address: int, count: int) -> list[tuple[int, int]]:
    """The buffers of a struct iovec array, as its owner sees it."""
    fd = os.open(f"{process}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, 16 * min(count, _MOST_VECTORS), address)
    except OSError:
        return []
    finally:
        os.close(fd)
    return list(struct.iter_unpack("=QQ", data[: len(data) // 16 * 16]))


def _registered(process: str, number: str, areas: list[tuple[int, int]], who: str) -> Iterator[str]:
    """An io_uring's registered buffers (io_uring/fdinfo.c: "UserBufs", then address/length)."""
    with open(f"{process}/fdinfo/{number}") as file:
        text = file.read()
    buffers = text.partition("UserBufs:")[2]
    for address, length in re.findall(r"^ *\d+: 0x([0-9a-f]+)/(\d+)", buffers, re.MULTILINE):
        if _overlaps(areas, int(address, 16), int(length)):
            yield f"{who}: the page is registered as a buffer of the io_uring of fd {number}"


def _pinned(process: str, who: str) -> Iterator[str]:
    with open(f"{process}/status") as file:
        pinned = re.search(r"^VmPin:\s+(\d+) kB", file.read(), re.MULTILINE)
    if pinned is not None and int(pinned[1]):
        yield f"{who}: {pinned[1]} KiB of its memory are pinned for a device"


def _pipes(process: str, opened: dict[str, tuple[str, int]], who: str) -> Iterator[str]:
    seen = set()
    for number, (target, inode) in opened.items():
        if not target.startswith("pipe:") or inode in seen:
            continue
        seen.add(inode)
        try:
            fd = os.open(f"{process}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            waiting = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"    "))[0]
        finally:
            os.close(fd)
        if waiting:
            yield f"{who}: {waiting} bytes wait in the pipe of fd {number}"
