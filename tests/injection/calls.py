"""Which system calls a run makes, on what: recorded by strace, held against the table."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvm_bindings import ioctls
from kvm_bindings.x86_64 import ioctls as x86
from tests.injection import injecting
from tests.injection.table import FS_IOC_FIEMAP, TABLE

Call = tuple[str, str]
"""A call's or ioctl's name, and the kind of object that it is made on ("": none, or a path)."""

_KINDS = [
    (r"\.img$", "disk"),
    (r"^/memfd:pyvmm-shared", "shared memory"),
    (r"kvm-gmem", "guest_memfd"),
    (r"^/dev/kvm$", "/dev/kvm"),
    (r"kvm-vm", "VM"),
    (r"kvm-vcpu", "vCPU"),
    (r"\[eventfd\]", "eventfd"),
    (r"\[eventpoll\]", "loop"),
    (r"/console\.out$", "console"),
    (r"^pipe:", "pipe"),
    (r"^socket:", "socket"),
    (r"/proc/\d+/mem$", "/proc/self/mem"),
    (r"/dev/fuse$", "fuse"),
    (r"/dev/net/tun$", "tap"),
    (r"/trace/", "trace"),
    (r"/\.(snapshot|core)\.\w+(/\w+)?$", "saved"),
    (r"/snapshot/(memory|state)$", "saved"),
    (r"\.pyvmm-.*\.tmp$", "report"),
    (r"landlock", ""),
]
"""What strace says of a descriptor, and what it is called here."""

_OF_THE_TABLE = {
    "disk": "disk", "disk, to the mapping": "disk", "disk, from the mapping": "disk",
    "disk, io=mmap": "disk", "disk, discard": "disk", "disk, zeroes": "disk",
    "disk's first bytes": "disk", "disk, to that mapping": "disk",
    "disk, from that mapping": "disk", "shared memory": "shared memory", "rings": "shared memory",
    "guest memory": "shared memory", "guest_memfd": "guest_memfd",
    "guest_memfd, in place": "guest_memfd", "/proc/self/mem": "/proc/self/mem",
    "/dev/kvm": "/dev/kvm", "VM": "VM", "VM, remap": "VM", "VM, attributes": "VM",
    "vCPU": "vCPU", "vCPU, once": "vCPU", "vCPU, the debugger leaves": "vCPU",
    "/dev/fuse": "fuse", "/dev/fuse, for good": "fuse", "eventfd": "eventfd", "loop": "loop",
    "a caller": "loop", "console": "console", "report": "report", "trace": "trace",
    "trace's first file": "trace", "socket": "socket", "socket, hung up": "socket",
    "passt": "socket", "tap": "tap", "tap, a socket in its place": "socket",
    "a host's program": "socket", "a guest's call": "socket", "its socket": "socket",
    "the spawner": "socket", "back end": "socket",
    "its memory's file, by the run": "saved", "core file, by the run": "saved",
    "core file": "saved", "core file's headers": "saved", "snapshot's files": "saved",
    "its state": "saved", "the folder around it": "saved", "what was written of it": "saved",
    "a snapshot's state": "saved", "a snapshot's memory": "saved",
    "a snapshot that is restored": "saved",
    "guest memory, saved": "shared memory", "guest memory, restored": "shared memory",
    "shared memory, to the files": "shared memory",
    "file, FIFO": "console", "terminal": "console", "protected memory": "",
    "to the process outside": "", "the process outside": "", "a thread": "", "": "",
}  # fmt: skip
"""The table's objects, by the kinds above."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ON_ALL = _names(
    "close fcntl fstat newfstatat lseek FIONBIO FIONCLEX FIOCLEX TCGETS TIOCGWINSZ fadvise64 "
    "getsockname getsockopt setsockopt shutdown"
)
"""What only asks or lets go: nothing depends on it, or the error comes back with the next bytes."""

_OF_KINDS = frozenset(
    {
        ("write", "eventfd"),  # non-blocking: EAGAIN with 2**64 - 2 unread signals, nothing else
        ("KVM_CHECK_EXTENSION", "/dev/kvm"),  # can't fail: 0 is no
        ("KVM_CHECK_EXTENSION", "VM"),
        ("KVM_GET_SREGS2", "vCPU"),
        ("read", "pipe"),  # the process outside: an end is an end
        ("write", "pipe"),
        ("splice", "pipe"),  # the other end is a file's, by which the table has it
        ("read", "trace"),
        ("openat", "trace"),
        ("getdents64", "trace"),
        ("flock", "trace"),  # a file system may have none: goes on
        ("poll", "console"),
        ("bind", "socket"),  # at the start, where the error names the path
        ("listen", "socket"),
        ("dup2", "pipe"),
    }
)

_PYTHONS = _names(
    "access arch_prctl bind brk cachestat chdir clock_gettime clock_nanosleep close close_range "
    "dup dup2 execve exit exit_group faccessat2 fcntl fstat futex getcwd getdents64 getegid "
    "geteuid getgid getpgrp getpid getppid getrandom getrusage getsockname getsockopt gettid "
    "getuid kill lgetxattr link listen lseek lstat madvise mincore mkdir mkdirat mmap mount "
    "mprotect mremap munmap newfstatat openat pipe poll ppoll prlimit64 readlink readlinkat "
    "renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigprocmask rt_sigreturn "
    "rt_sigtimedwait sched_getaffinity sched_yield set_robust_list set_tid_address setsockopt "
    "pselect6 shutdown sigaltstack signalfd4 socketpair stat statfs statx syscall_0x1c3 sysinfo "
    "tgkill timer_create "
    "umask umount2 uname unlink unlinkat vfork"
)
"""Of the interpreter, the C library and paths: imports, allocations, locks. Their errors are
Python's, or name the path; none of them moves a byte of the guest's. strace 6.1 has no name for
cachestat(2), 0x1c3."""


def known() -> frozenset[Call]:
    """What the table has."""
    found = set()
    for row in TABLE:
        name = "splice" if row.call.startswith("splice-") else row.call
        found.add((name, _OF_THE_TABLE[row.on]))
    return frozenset(found) | _OF_KINDS


def unknown(calls: set[Call]) -> set[Call]:
    """Those that the table should have, and doesn't."""
    names = {name for name, _ in known()}
    return {
        (name, kind)
        for name, kind in calls - known()
        if not (name in _ON_ALL if kind else name in _PYTHONS or name in names)
    }


def recorded(
    words: Sequence[str],
    folder: Path,
    meanwhile: Callable[[injecting.Process], None] = lambda process: None,
    typed: bytes = b"",
) -> set[Call]:
    """All calls of a run. Raises AssertionError where it doesn't end well."""
    log = folder / "strace.log"
    tracer = ["strace", "-f", "-qq", "-y", "-X", "raw", "-s", "0", "-o", str(log)]
    with (
        open(folder / "console.out", "wb") as console,
        subprocess.Popen(
            [*tracer, *words], cwd=injecting.ROOT, bufsize=0, stdin=subprocess.PIPE, stdout=console,
            stderr=subprocess.PIPE,
        ) as process,
    ):  # fmt: skip
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            meanwhile(process)
            _, said = process.communicate(typed)
        finally:
            watchdog.cancel()
            watchdog.join()
            process.terminate()
    assert process.returncode == 0, said
    return set(_calls(log.read_text(errors="replace")))


_LINE = re.compile(r"^\d+ +([a-z0-9_]+)\((?:\d+<((?:[^>\\]|\\.)*)>)?(?:\(deleted\))?(.*)")
_REQUEST = re.compile(r", (0x[0-9a-f]+)")


def _calls(log: str) -> Iterator[Call]:
    names = _requests()
    for line in log.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        name, object_, rest = found[1], found[2] or "", found[3]
        kind = next((kind for pattern, kind in _KINDS if re.search(pattern, object_)), "")
        if name == "ioctl" and (request := _REQUEST.match(rest)):
            number = int(request[1], 16)
            name = names.get(number, f"ioctl {number:#x}")
        if kind or not object_:
            # Python has one function for both.
            yield {"preadv2": "preadv", "pwritev2": "pwritev"}.get(name, name), kind


def _requests() -> dict[int, str]:
    """Names of ioctls by their numbers."""
    files = {"FIONBIO": 0x5421, "FIONCLEX": 0x5450, "FIOCLEX": 0x5451, "TCGETS": 0x5401}
    files |= {"TIOCGWINSZ": 0x5413, "FS_IOC_FIEMAP": FS_IOC_FIEMAP}
    found = {number: name for name, number in files.items()}
    for module in (ioctls, x86):
        for name, value in vars(module).items():
            if name.startswith("KVM_") and isinstance(value, int) and value & 0xFF00 == 0xAE00:
                found.setdefault(value & 0xFFFF_FFFF, name)
    return found
