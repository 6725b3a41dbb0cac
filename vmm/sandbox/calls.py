"""Which system calls each kind of pyvmm's threads may make once the guest runs.

What isn't here is EPERM. A call may depend on its arguments' numbers: a filter can't look at what a
pointer points to, so that paths are Landlock's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_O_ACCMODE, _O_CREAT, _O_TRUNC = 0o3, 0o100, 0o1000
_MAP_PRIVATE, _MAP_ANONYMOUS, _PROT_EXEC = 0x02, 0x20, 0x4
_CLONE_THREAD = 0x10000
_AF_UNIX = 1
_F_DUPFD, _F_DUPFD_CLOEXEC = 0, 1030
_PR_SET_NAME, _PR_GET_DUMPABLE = 15, 3
_PR_SET_VMA = 0x53564D41
_KVM = 0xAE00
_TERMINAL = (0x5401, 0x5402, 0x5403, 0x5404, 0x5413, 0x540B, 0x540F, 0x5411)
"""TCGETS, TCSETS*, TIOCGWINSZ, TCFLSH, TIOCGPGRP, TIOCOUTQ: never TIOCSTI, which types."""
_TERMINAL2 = (0x802C542A, 0x402C542B, 0x402C542C, 0x402C542D)
"""TCGETS2, TCSETS2 and so on, which newer C libraries use."""
_FILES = (0x5421, 0x541B, 0x5450, 0x5451, 0xC020660B, 0x125E)
"""FIONBIO, FIONREAD, FIONCLEX, FIOCLEX, FS_IOC_FIEMAP, BLKROGET."""
_BLOCK = (0x1277, 0x127F, 0x1268, 0x127C, 0x80081272)
"""BLKDISCARD, BLKZEROOUT, BLKSSZGET, BLKDISCARDZEROES, BLKGETSIZE64."""
_TAP = (0x400454D0, 0x400454D8)
"""TUNSETOFFLOAD, TUNSETVNETHDRSZ."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALWAYS = _names(
    # Bytes, on what is open.
    "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek splice tee "
    "sendfile copy_file_range fallocate ftruncate fsync fdatasync sync_file_range fadvise64 close "
    # What is there.
    "fstat newfstatat stat lstat statx fstatfs access faccessat faccessat2 readlink readlinkat "
    "getcwd getdents64 getdents mincore cachestat "
    # Waiting, time, threads.
    "poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 pipe2 pipe "
    "futex sched_yield nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time "
    "timerfd_create timerfd_settime set_robust_list rseq membarrier sched_getaffinity wait4 waitid "
    "exit exit_group restart_syscall "
    # Memory and signals of its own.
    "munmap mremap madvise brk rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait "
    "sigaltstack alarm arch_prctl "
    # Who it is.
    "getpid gettid getppid getuid geteuid getgid getegid getpgid getpgrp getrandom getrusage "
    "uname sysinfo "
    # Callers and back ends that are connected.
    "recvfrom sendto sendmsg shutdown getsockopt setsockopt getsockname getpeername accept4 flock "
    # Of no use without a right of Landlock's to the folder.
    "umask"
)
ON_FOLDERS = _names("rename renameat renameat2 link linkat unlink unlinkat mkdir mkdirat")
"""Allowed where some folder may be written to, which Landlock then says."""
WORKER = _names(
    "read write readv writev pread64 pwrite64 lseek splice fallocate ftruncate close fstat "
    "newfstatat stat statx readlink readlinkat getcwd getdents64 getdents munmap mremap madvise "
    "brk futex sched_yield clock_gettime getpid gettid getrandom rt_sigaction rt_sigprocmask "
    "rt_sigreturn sigaltstack set_robust_list rseq exit exit_group restart_syscall sysinfo "
    "sched_getaffinity"
)
"""For a child that only computes: no threads, no signals to others, no callers."""
DEVICE = _names(
    "read write readv writev pread64 pwrite64 fdatasync fallocate fadvise64 lseek close "
    "recvfrom sendto shutdown poll ppoll munmap mremap madvise brk futex sched_yield clock_gettime "
    "getpid gettid getrandom rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack rseq exit "
    "exit_group restart_syscall"
)
"""For a device in a process of its own: bytes, on its disk or its network, and its socket. None
opens, maps, connects or starts anything."""
DEVICE_ACCEPTS = _names("accept4 eventfd2")
"""Besides, for one that programs of the host call."""
DEVICE_RECEIVES = _names("recvmsg")
"""Besides, for one that is given sockets."""
NOT_FOR_VCPUS = _names("accept4 socket connect recvmsg wait4 waitid kill dup2 dup3 flock")
"""What the device loop may call and a vCPU's thread may not."""


class Condition:  # a NamedTuple would be a part of a start that can be felt
    """An argument's low 32 bits, `mask` applied, are one of `values` (or none of them)."""

    __slots__ = ("argument", "mask", "negated", "values")

    def __init__(
        self, argument: int, mask: int, values: Sequence[int], negated: bool = False
    ) -> None:
        self.argument = argument
        self.mask = mask
        self.values = values
        self.negated = negated


Alternatives = Sequence[Sequence[Condition]]
"""Any of them will do; all of an alternative's conditions have to hold."""

_WORD = 0xFFFFFFFF


class Needs:
    """What a run's filters depend on."""

    def __init__(
        self,
        pid: int,
        kept: Sequence[int] = (),
        outputs: Sequence[int] = (1, 2),
        *,
        maps: bool = False,
        connects: bool = False,
        writes: bool = False,
        landlock: bool = True,
        receives: bool = False,
    ) -> None:
        """`kept`: file descriptors that nobody may map: disks, guest memory, the standard ones.
        `outputs`: those that may get another file put in their place: a console that nobody reads.
        `maps`: files are mapped after all: a disk with io=mmap, a trace that is read. `connects`:
        a device connects to Unix sockets (vsock). `writes`: there are folders to write to.
        `landlock`: it says which files may be opened; else none for writing. `receives`: open
        files come by socket: from the control socket's callers, to write to, and from the process
        that starts devices' processes.
        """
        self.pid = pid
        self.kept = kept
        self.outputs = outputs
        self.maps = maps
        self.connects = connects
        self.writes = writes
        self.landlock = landlock
        self.receives = receives


def conditional(needs: Needs) -> dict[str, Alternatives]:
    """The calls that depend on their arguments."""
    own = [[Condition(0, _WORD, (needs.pid,))]]
    opened: list[Condition] = []
    if not needs.writes:
        only = _O_CREAT | _O_TRUNC | (0 if needs.landlock else _O_ACCMODE)
        opened = [Condition(2, only, (0,))]
    # A file's mapping: a module of Python's that is loaded late; never a disk, or guest memory.
    file = [
        Condition(3, _MAP_PRIVATE | _MAP_ANONYMOUS, (_MAP_PRIVATE,)),
        Condition(4, _WORD, needs.kept, True),
    ]
    mappings: list[list[Condition]] = [
        [Condition(3, _MAP_ANONYMOUS, (_MAP_ANONYMOUS,)), Condition(2, _PROT_EXEC, (0,))],
        file,
    ]
    if needs.maps:
        mappings.append([Condition(2, _PROT_EXEC, (0,))])
    calls: dict[str, Alternatives] = {
        "ioctl": [
            [Condition(1, 0xFF00, (_KVM,))],
            [Condition(1, _WORD, (*_TERMINAL, *_TERMINAL2, *_FILES, *_BLOCK, *_TAP))],
        ],
        "mmap": mappings,
        "mprotect": [[Condition(2, _PROT_EXEC, (0,))]],
        "clone": [[Condition(0, _CLONE_THREAD, (_CLONE_THREAD,))]],
        # Python's own mmap copies the descriptor; elsewhere a copy could be mapped.
        "fcntl": [[]]
        if needs.maps
        else [[Condition(1, _WORD, (_F_DUPFD, _F_DUPFD_CLOEXEC), True)]],
        "prctl": [[Condition(0, _WORD, (_PR_SET_NAME, _PR_GET_DUMPABLE, _PR_SET_VMA))]],
        "prlimit64": [[Condition(2, _WORD, (0,))]],  # to read them
        # A filter more, on one thread: it can only take away.
        "seccomp": [[Condition(0, _WORD, (1,)), Condition(1, _WORD, (0,))]],
        "tgkill": own,
        "kill": own,
        "process_vm_readv": own,
        "process_vm_writev": own,
        "dup2": [[Condition(1, _WORD, needs.outputs)]],
        "dup3": [[Condition(1, _WORD, needs.outputs)]],
        "openat": [opened],
        "open": [[Condition(1, each.mask, each.values) for each in opened]],
    }
    if needs.connects:
        calls["socket"] = [[Condition(0, _WORD, (_AF_UNIX,))]]
        calls["connect"] = [[]]
    if needs.receives:
        calls["recvmsg"] = [[]]
    return calls


def allowed(needs: Needs) -> Iterable[str]:
    """The calls that the device loop may make whatever their arguments."""
    return ALWAYS | ON_FOLDERS if needs.writes else ALWAYS
