"""Calls that a run makes and the table has no row for, each with the reason.

What is in neither is a new kind of call: test_calls fails until it has a row, or a reason here.
"""

from __future__ import annotations

from tests.injection.recording import END, NOWHERE, PYTHONS, RUNNING, START, Call
from vmm.core.lean_typing import NamedTuple


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_EVER = (START, RUNNING, END)


class Reason(NamedTuple):
    """Why it doesn't matter that these calls can fail."""

    why: str
    names: frozenset[str]
    on: frozenset[str]
    """Empty: whatever has a descriptor or a path."""
    phases: tuple[str, ...] = _EVER

    def covers(self, call: Call) -> bool:
        return (
            call.phase in self.phases
            and call.name in self.names
            and (call.on in self.on if self.on else call.on != NOWHERE)
        )


def _reason(why: str, names: str, on: str | None = None, *phases: str) -> Reason:
    objects = frozenset() if on is None else frozenset(on.split("|"))
    return Reason(why, words(names), objects, phases or _EVER)


REASONS = [
    _reason(
        "modules and libraries, which are read: the interpreter's own error names the file",
        "openat read pread64 mmap newfstatat lseek getdents64 readlink access fcntl TCGETS execve "
        "statfs",
        PYTHONS,
    ),
    _reason(
        "lets go: nothing is asked of it any more",
        "close shutdown munmap FIOCLEX FIONCLEX",
    ),
    _reason("lets go of many at once", "close_range munmap exit exit_group", NOWHERE),
    _reason(
        "the C library's memory and threads: where there is none, MemoryError, which main says",
        "brk mmap mprotect mremap madvise futex rseq set_robust_list set_tid_address arch_prctl "
        "sched_yield",
        NOWHERE,
    ),
    _reason(
        "signals of this process: fail with wrong numbers alone",
        "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack tgkill kill "
        "signalfd4 restart_syscall",
        NOWHERE,
    ),
    _reason(
        "says who and where we are: can't fail",
        "getpid getppid gettid getuid geteuid getgid getegid getpgrp getcwd uname sysinfo umask "
        "prlimit64 sched_getaffinity getrusage clock_gettime getrandom",
        NOWHERE,
    ),
    _reason(
        "waits: interrupted, Python does it again by itself (PEP 475); else wrong arguments alone",
        "poll ppoll pselect6 clock_nanosleep",
        NOWHERE,
    ),
    _reason("for a child of its own: as what waits", "wait4", NOWHERE, START),
    _reason(
        "looks at what is open, or sets a flag of its descriptor: wrong descriptors alone",
        "fcntl lseek newfstatat FIONBIO TCGETS TIOCGWINSZ",
        "console|pipe|socket|eventfd|loop|/dev/kvm|/dev/fuse|VM|vCPU|guest_memfd|shared memory|"
        "tap|terminal|/proc/self/mem|image|console's file|memfd|trace|report",
    ),
    _reason("a flag of what is open", "FIONBIO", "disk"),
    _reason("what strace has no name for: fstat of a closed stream", "newfstatat", NOWHERE),
    _reason(
        "asks a socket who it is: wrong descriptors alone",
        "getsockname getsockopt setsockopt getpeername",
        "socket",
    ),
    _reason("0 is no; it can't fail", "KVM_CHECK_EXTENSION", "/dev/kvm|VM"),
    _reason("never blocks: full with 2**64 - 2 signals (test_parts)", "write", "eventfd"),
    _reason(
        "what is looked up about the host: an OSError with its path, which main says in a line",
        "openat read getdents64 readlink newfstatat lseek TCGETS access",
        "host's facts|folder",
    ),
    _reason("whether it is there and ours: an error is a no, which is said", "access", "/dev/fuse"),
    _reason("where a path leads to: an OSError with the path", "readlink", "report|trace|snapshot"),
    _reason("with the process outside: an end is one (end wait4)", "read write", "pipe"),
    _reason("the other end is a file's, by which the table has it", "splice", "pipe"),
    _reason("what an earlier trace left in the folder: as its openat", "read", "trace", START),
    _reason(
        "whether a socket is there before ours: whatever is said, bind says it again",
        "newfstatat openat",
        "socket's path",
        START,
    ),
    _reason(
        "whose a socket is that is taken away at the end: as its unlinkat",
        "newfstatat openat",
        "socket's path|folder",
        RUNNING,
        END,
    ),
    _reason(
        "what was made and isn't wanted is taken away as far as can be: its writer has the error",
        "unlink rmdir",
        "saved",
        RUNNING,
        END,
    ),
    _reason(
        "whether the folder is empty, and what of it is said at the end: as its mkdir and rmdir",
        "getdents64 newfstatat openat",
        "memory file",
    ),
    _reason(
        "looks at a folder's names: as openat of what is in it",
        "getdents64 newfstatat openat",
        "snapshot",
    ),
    _reason(
        "part of openpty(3), which fails as a whole: as TIOCGPTN",
        "TIOCSPTLCK TIOCGPTPEER",
        "terminal",
        START,
    ),
    _reason(
        "the debugger's micro-guest: as its memfd_create",
        "ftruncate mmap pwrite64",
        "memfd",
        START,
    ),
]

IOCTLS = [
    (
        words(
            "KVM_CREATE_DEVICE KVM_SET_DEVICE_ATTR KVM_GET_DEVICE_ATTR KVM_HAS_DEVICE_ATTR "
            "KVM_GET_ONE_REG KVM_SET_ONE_REG KVM_ARM_VCPU_INIT KVM_ARM_PREFERRED_TARGET"
        ),
        "arm64's: this host's KVM has none of them (tests/unit/arch/aarch64, tests/lab)",
    ),
    (words("KVM_SET_TSC_KHZ"), "only where a snapshot comes from a host of another frequency"),
    (words("KVM_CHECK_EXTENSION"), "0 is no; it can't fail"),
]
"""Requests of the bindings that no run here makes, or that can't fail."""
