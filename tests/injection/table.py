"""Calls of the host's that a run makes, the errors that they can give, and what comes of each.

One place: the tests are made of it, and `python -m tests.injection` prints it.
"""

from __future__ import annotations

import errno

from kvm_bindings import ioctls
from kvm_bindings.x86_64 import ioctls as x86
from tests.injection.injecting import SHORT
from vmm.core.lean_typing import NamedTuple

SAME = "nobody notices"
"""The call is repeated, or another way is taken: answers, bytes and counts are as without it."""
GUEST = "guest told"
"""Its request ends with an I/O error, its conversion with the errno; the machine goes on."""
RESET = "device stops"
"""DEVICE_NEEDS_RESET; its driver may reset it, and the machine goes on."""
SAID = "one line, goes on"
"""The user is told; the guest's run is what it would have been."""
DROPPED = "bytes dropped"
"""Output or frames that nobody can take any more; the machine goes on."""
CALLER = "caller told"
"""Whoever asked (a client, a reader of the memory file) has the error, or is hung up on."""
ENDS_1, ENDS_2, ENDS_3 = (f"one line, status {status}" for status in (1, 2, 3))
NOT_GIVEN = ""
"""The call can't give it."""

OUTCOMES = (SAME, GUEST, RESET, SAID, DROPPED, CALLER, ENDS_1, ENDS_2, ENDS_3)
EINTR, EIO, ENOSPC, ENOMEM = errno.EINTR, errno.EIO, errno.ENOSPC, errno.ENOMEM
EAGAIN, EFBIG, EDQUOT = errno.EAGAIN, errno.EFBIG, errno.EDQUOT
EMFILE, EPIPE, EFAULT = errno.EMFILE, errno.EPIPE, errno.EFAULT
ENOENT, EINVAL, ENODEV, EBADFD = errno.ENOENT, errno.EINVAL, errno.ENODEV, errno.EBADFD
COLUMNS = (EINTR, SHORT, EIO, ENOSPC, ENOMEM, EAGAIN, EFBIG, EDQUOT, EMFILE, EPIPE)

FS_IOC_FIEMAP = 0xC020660B
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8

BY_SHIM, BY_STRACE, BY_PROGRAM, BY_MODEL = "shim", "strace", "program", "model"
Cells = dict[int, str]


class Row(NamedTuple):
    """A call on a kind of object, in one of a run's paths."""

    path: str
    call: str
    """As strace names it, or an ioctl's name; `splice-in` reads a file, `splice-out` writes one."""
    on: str
    cells: Cells
    """By errno (SHORT: fewer bytes than asked for)."""
    by: str = BY_SHIM
    scenario: str = ""
    """Which run it is injected into (tests.injection.runs), or which program; for BY_MODEL, what
    the model of KVM is driven by."""
    match: str = "*"
    """The object, as /proc/self/fd names it (see shim.c)."""
    request: int = 0
    first: int = 1
    """From which such call on: errors stay, as those of a broken disk do."""
    lasts: bool = True
    """Whether they stay. EINTR never does."""

    @property
    def name(self) -> str:
        return f"{self.path}-{self.call}-{self.on}".replace(" ", "_").replace("/", "_")


def _all(outcome: str, *errors: int, **more: str) -> Cells:
    return dict.fromkeys(errors, outcome)


_DISK = (EIO, ENOSPC, ENOMEM, EAGAIN, EFBIG, EDQUOT)
_TOLD = {EINTR: SAME, SHORT: SAME, **_all(GUEST, *_DISK)}
_STOPS = {EINTR: SAME, SHORT: SAME, **_all(RESET, EIO, ENOMEM, ENOSPC)}
_CONVERSION = {EINTR: SAME, **_all(GUEST, EIO, ENOSPC, ENOMEM, EAGAIN)}
_START = {EINTR: SAME, **_all(ENDS_3, ENOMEM, ENOSPC, EIO)}
_START_FDS = {**_START, EMFILE: ENDS_3}

DISK = [
    Row("disk", "pread64", "disk", _TOLD, scenario="pread", match=".img$", first=3),
    Row("disk", "pwrite64", "disk", _TOLD, scenario="pread", match=".img$"),
    Row("disk", "splice-in", "disk", _TOLD, scenario="fd2fd", match=".img$"),
    Row("disk", "splice-out", "shared memory", _TOLD, scenario="fd2fd", match="pyvmm-shared"),
    Row("disk", "splice-in", "shared memory", _TOLD, scenario="fd2fd", match="pyvmm-shared"),
    Row("disk", "splice-out", "disk", _TOLD, scenario="fd2fd", match=".img$"),
    Row("disk", "pread64", "disk, to the mapping", _TOLD, scenario="hva", match=".img$", first=3),
    Row("disk", "pwrite64", "disk, from the mapping", _TOLD, scenario="hva", match=".img$"),
    Row("disk", "lseek", "disk, io=mmap", _all(GUEST, EIO), scenario="mmap", match=".img$",
        first=3),
    Row("disk", "FS_IOC_FIEMAP", "disk", {EINTR: SAME, **_all(SAME, EIO, ENOMEM,
        errno.EOPNOTSUPP)}, BY_PROGRAM, "read-ahead", "/disk$", FS_IOC_FIEMAP),
    Row("disk", "fdatasync", "disk", {EINTR: SAME, **_all(GUEST, EIO, ENOSPC, EDQUOT)},
        scenario="cbit", match=".img$"),
    Row("disk", "fallocate", "disk, discard", {EINTR: SAME, **_all(GUEST, EIO, ENOSPC, EDQUOT),
        errno.EOPNOTSUPP: SAME}, BY_PROGRAM, "discard", "/disk$", lasts=False),
    Row("disk", "pwrite64", "disk, zeroes", {EINTR: SAME, SHORT: SAME,
        **_all(GUEST, EIO, ENOSPC, EFBIG, EDQUOT)}, BY_PROGRAM, "zeroes", "/disk$"),
    Row("disk", "pread64", "rings", _STOPS, scenario="none", match="pyvmm-shared", lasts=False),
    Row("disk", "pwrite64", "rings", _STOPS, scenario="none", match="pyvmm-shared", first=13),
]  # fmt: skip
CONVERSION = [
    Row("conversion", "fallocate", "guest_memfd", _CONVERSION, scenario="cbit",
        match="[kvm-gmem]"),
    Row("conversion", "fallocate", "shared memory", _CONVERSION, scenario="cbit",
        match="pyvmm-shared"),
    Row("conversion", "KVM_SET_USER_MEMORY_REGION", "VM, remap", _CONVERSION, scenario="remap",
        match="kvm-vm", request=ioctls.KVM_SET_USER_MEMORY_REGION, first=2, lasts=False),
    Row("conversion", "KVM_SET_USER_MEMORY_REGION2", "VM, remap", _CONVERSION, scenario="remap",
        match="kvm-vm", request=ioctls.KVM_SET_USER_MEMORY_REGION2, first=2, lasts=False),
    Row("conversion", "KVM_SET_MEMORY_ATTRIBUTES", "VM, attributes", _CONVERSION, BY_MODEL,
        "attributes"),
    Row("conversion", "KVM_SET_MEMORY_ATTRIBUTES2", "guest_memfd, in place", _CONVERSION,
        BY_MODEL, "in-place"),
    Row("conversion", "KVM_PRE_FAULT_MEMORY", "vCPU", {EINTR: SAME, **_all(SAME, EAGAIN, ENOMEM,
        EIO)}, BY_MODEL, "pre-fault"),
    Row("conversion", "process_vm_readv", "protected memory", {EINTR: SAME, SHORT: SAME,
        ENOMEM: CALLER, EFAULT: CALLER}, BY_PROGRAM, "process-vm"),
    Row("conversion", "process_vm_writev", "protected memory", {EINTR: SAME, SHORT: SAME,
        ENOMEM: CALLER, EFAULT: CALLER}, BY_PROGRAM, "process-vm"),
]  # fmt: skip
_RUN = ioctls.KVM_RUN
RUN = [
    Row("run", "KVM_RUN", "vCPU", {EINTR: SAME, **_all(ENDS_1, EIO, ENOSPC, ENOMEM, EFAULT)},
        scenario="cbit", match="kvm-vcpu", request=_RUN, first=40),
    Row("run", "KVM_RUN", "vCPU, once", {EAGAIN: SAME}, scenario="cbit", match="kvm-vcpu",
        request=_RUN, first=40, lasts=False),
    Row("run", "KVM_IOEVENTFD", "VM", {EINTR: SAME, **_all(SAME, ENOSPC, ENOMEM)},
        scenario="cbit", match="kvm-vm", request=ioctls.KVM_IOEVENTFD),
    Row("run", "read", "eventfd", {EINTR: SAME, EAGAIN: SAME}, BY_STRACE, "pread",
        "anon_inode:[eventfd]", first=2, lasts=False),
    Row("run", "epoll_wait", "loop", {EINTR: SAME}, BY_STRACE, "pread", first=2, lasts=False),
    Row("run", "write", "console", {EINTR: SAME, SHORT: SAME, EAGAIN: SAME,
        **_all(DROPPED, EPIPE, EIO, ENOSPC)}, scenario="pread", match="pipe:", first=2,
        lasts=False),
]  # fmt: skip
START = [
    Row("start", name, where, cells, scenario="cbit", match=match, request=request)
    for name, where, cells, match, request in [
        ("KVM_GET_API_VERSION", "/dev/kvm", _START, "/dev/kvm", ioctls.KVM_GET_API_VERSION),
        ("KVM_CREATE_VM", "/dev/kvm", _START_FDS, "/dev/kvm", ioctls.KVM_CREATE_VM),
        ("KVM_GET_VCPU_MMAP_SIZE", "/dev/kvm", _START, "/dev/kvm",
         ioctls.KVM_GET_VCPU_MMAP_SIZE),
        ("KVM_GET_SUPPORTED_CPUID", "/dev/kvm", _START, "/dev/kvm", x86.KVM_GET_SUPPORTED_CPUID),
        ("KVM_CREATE_IRQCHIP", "VM", _START, "kvm-vm", x86.KVM_CREATE_IRQCHIP),
        ("KVM_CREATE_PIT2", "VM", _START, "kvm-vm", x86.KVM_CREATE_PIT2),
        ("KVM_SET_TSS_ADDR", "VM", _START, "kvm-vm", x86.KVM_SET_TSS_ADDR),
        ("KVM_SET_IDENTITY_MAP_ADDR", "VM", _START, "kvm-vm", x86.KVM_SET_IDENTITY_MAP_ADDR),
        ("KVM_CREATE_GUEST_MEMFD", "VM", _START_FDS, "kvm-vm", ioctls.KVM_CREATE_GUEST_MEMFD),
        ("KVM_SET_USER_MEMORY_REGION", "VM", _START, "kvm-vm",
         ioctls.KVM_SET_USER_MEMORY_REGION),
        ("KVM_SET_USER_MEMORY_REGION2", "VM", _START, "kvm-vm",
         ioctls.KVM_SET_USER_MEMORY_REGION2),
        ("KVM_CREATE_VCPU", "VM", _START_FDS, "kvm-vm", ioctls.KVM_CREATE_VCPU),
        ("KVM_ENABLE_CAP", "VM", _START, "kvm-vm", ioctls.KVM_ENABLE_CAP),
        ("KVM_IRQFD", "VM", _START, "kvm-vm", ioctls.KVM_IRQFD),
        ("KVM_REGISTER_COALESCED_MMIO", "VM", _START, "kvm-vm",
         ioctls.KVM_REGISTER_COALESCED_MMIO),
        ("KVM_SET_CPUID2", "vCPU", _START, "kvm-vcpu", x86.KVM_SET_CPUID2),
        ("KVM_GET_SREGS", "vCPU", _START, "kvm-vcpu", x86.KVM_GET_SREGS),
        ("KVM_SET_SREGS", "vCPU", _START, "kvm-vcpu", x86.KVM_SET_SREGS),
        ("KVM_SET_REGS", "vCPU", _START, "kvm-vcpu", x86.KVM_SET_REGS),
    ]
] + [
    Row("start", "KVM_SET_MSRS", "vCPU", _START, scenario="pread", match="kvm-vcpu",
        request=x86.KVM_SET_MSRS),
    Row("start", "pread64", "guest_memfd", {EINTR: SAME, **_all(SAME, EIO, ENOMEM)},
        scenario="readable", match="[kvm-gmem]"),
    Row("start", "pread64", "disk's first bytes", {EINTR: SAME, **_all(ENDS_2, EIO, ENOMEM)},
        scenario="pread", match=".img$"),
    Row("start", "pwrite64", "guest memory", {EINTR: SAME, SHORT: SAME, **_all(ENDS_3, EIO,
        ENOSPC, ENOMEM)}, scenario="none", match="pyvmm-shared", first=3),
    *(
        Row("start", call, on, cells, by, "cbit")
        for call, on, cells, by in [
            ("memfd_create", "", _all(ENDS_3, ENOMEM, EMFILE, ENOSPC), BY_SHIM),
            ("ftruncate", "shared memory", _all(ENDS_3, EFBIG, ENOSPC, ENOMEM), BY_SHIM),
            ("epoll_create1", "", _all(ENDS_3, EMFILE, ENOMEM), BY_SHIM),
            ("epoll_ctl", "loop", _all(ENDS_3, ENOSPC, ENOMEM), BY_SHIM),
            ("eventfd2", "", _all(ENDS_3, EMFILE, ENOMEM), BY_SHIM),
            ("pipe2", "to the process outside", _all(ENDS_3, EMFILE), BY_SHIM),
            ("clone", "the process outside", _all(ENDS_3, EAGAIN, ENOMEM), BY_STRACE),
            ("clone3", "a thread", _all(ENDS_3, EAGAIN, ENOMEM), BY_STRACE),
            ("landlock_create_ruleset", "", {errno.EOPNOTSUPP: SAME}, BY_SHIM),
            ("landlock_add_rule", "", _all(ENDS_3, ENOMEM), BY_SHIM),
            ("landlock_restrict_self", "", _all(ENDS_3, errno.E2BIG), BY_SHIM),
            ("seccomp", "", _all(ENDS_3, ENOMEM), BY_SHIM),
            ("fchmod", "shared memory", _all(SAME, errno.EPERM), BY_SHIM),
            ("prctl", "", _all(ENDS_3, errno.EPERM), BY_SHIM),
        ]
    ),
]  # fmt: skip
_LOSES = {EINTR: SAME, **_all(SAID, EIO, ENOSPC, EDQUOT)}
END = [
    Row("end", "write", "report", {**_LOSES, SHORT: SAME, EFBIG: SAID}, scenario="pread",
        match=".tmp"),
    Row("end", "rename", "report", _all(SAID, EIO, ENOSPC, EDQUOT), scenario="pread"),
    Row("end", "write", "trace", {**_LOSES, SHORT: SAME, EFBIG: SAID}, scenario="trace",
        match="data.ninja"),
    Row("end", "pwrite64", "trace", {**_LOSES, SHORT: SAID}, scenario="trace",
        match="shape.ninja", first=14),
    Row("end", "write", "trace's first file", {EINTR: SAME, SHORT: SAME, **_all(ENDS_2, EIO,
        ENOSPC, EDQUOT)}, scenario="trace", match="json"),
    Row("end", "wait4", "the process outside", {EINTR: SAME, errno.ECHILD: SAME}, BY_STRACE,
        "pread", lasts=False),
]  # fmt: skip
_TAP = {EINTR: SAME, EAGAIN: SAME, **_all(DROPPED, EIO, EBADFD)}
_SEEN = {EINTR: SAME, SHORT: SAME, **_all(CALLER, EIO, ENOMEM)}
OTHERS = [
    Row("memory", "pread64", "/proc/self/mem", _SEEN, BY_PROGRAM, "readable", "/mem$"),
    Row("memory", "pwrite64", "/proc/self/mem", {**_SEEN, ENOSPC: CALLER}, BY_PROGRAM, "readable",
        "/mem$"),
    Row("memory", "pread64", "disk, to that mapping", _SEEN, BY_PROGRAM, "readable-disk",
        "/file$"),
    Row("memory", "pwrite64", "disk, from that mapping", {**_SEEN, ENOSPC: CALLER}, BY_PROGRAM,
        "readable-disk", "/file$"),
    Row("memory file", "preadv", "shared memory", _SEEN, BY_PROGRAM, "memory-file", "pyvmm"),
    Row("memory file", "pwritev", "shared memory", {**_SEEN, ENOSPC: CALLER}, BY_PROGRAM,
        "memory-file", "pyvmm"),
    Row("control", "accept4", "socket", {EINTR: SAME, EMFILE: CALLER, ENOMEM: SAME}, BY_PROGRAM,
        "control", lasts=False),
    Row("control", "epoll_ctl", "a caller", _all(CALLER, ENOSPC, ENOMEM), BY_PROGRAM, "control",
        lasts=False),
    Row("control", "recvmsg", "socket", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME, **_all(CALLER,
        EIO, ENOMEM)}, BY_PROGRAM, "control", lasts=False),
    Row("control", "sendto", "socket", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME}, BY_PROGRAM,
        "control", lasts=False),
    Row("control", "sendto", "socket, hung up", {EPIPE: CALLER}, BY_PROGRAM, "control"),
    Row("net", "recvfrom", "passt", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME, ENOMEM: SAME,
        EIO: DROPPED}, BY_PROGRAM, "net", lasts=False),
    Row("net", "sendto", "passt", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME, EPIPE: DROPPED},
        BY_PROGRAM, "net", lasts=False),
    Row("net", "read", "tap", {**_TAP, ENOMEM: SAME}, BY_PROGRAM, "real-tap", "net/tun$",
        lasts=False),
    Row("net", "write", "tap", {**_TAP, **_all(DROPPED, ENOMEM, EINVAL)}, BY_PROGRAM, "real-tap",
        "net/tun$", lasts=False),
    Row("net", "read", "tap, a socket in its place", {**_TAP, ENOMEM: SAME}, BY_PROGRAM, "tap",
        "socket:", lasts=False),
    Row("net", "write", "tap, a socket in its place", {**_TAP, ENOMEM: DROPPED}, BY_PROGRAM,
        "tap", "socket:", lasts=False),
    Row("net", "TUNSETOFFLOAD", "tap", _all(RESET, EINVAL, EBADFD), BY_PROGRAM, "tap-offloads",
        "net/tun$", TUNSETOFFLOAD),
    Row("start", "TUNSETIFF", "tap", _all(ENDS_3, errno.EPERM, errno.EBUSY, EINVAL, ENOMEM),
        BY_PROGRAM, "tap-start", "net/tun$", TUNSETIFF),
    Row("start", "TUNSETVNETHDRSZ", "tap", _all(ENDS_3, EINVAL, EBADFD), BY_PROGRAM, "tap-start",
        "net/tun$", TUNSETVNETHDRSZ),
    Row("vsock", "socket", "a guest's call", _all(GUEST, EMFILE, ENOMEM), BY_PROGRAM,
        "vsock-call"),
    Row("vsock", "connect", "a guest's call", _all(GUEST, EAGAIN,
        errno.ECONNREFUSED), BY_PROGRAM, "vsock-call"),
    Row("vsock", "recvfrom", "a host's program", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME,
        EIO: GUEST}, BY_PROGRAM, "vsock", lasts=False),
    Row("vsock", "sendto", "a host's program", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME,
        EPIPE: GUEST}, BY_PROGRAM, "vsock", lasts=False),
    Row("console", "write", "file, FIFO", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME,
        **_all(DROPPED, EIO, ENOSPC, EDQUOT, EPIPE)}, BY_PROGRAM, "console-file", "fifo",
        lasts=False),
    Row("console", "read", "terminal", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME, EIO: SAME},
        BY_PROGRAM, "console-pty", "ptmx", lasts=False),
]  # fmt: skip

_KEPT = {EINTR: SAME, SHORT: SAME, **_all(CALLER, EIO, ENOSPC, EFBIG, EDQUOT)}
_READ = {EINTR: SAME, SHORT: SAME, **_all(CALLER, EIO, ENOMEM)}
APART = [
    Row("device process", "pread64", "disk", {EINTR: SAME, SHORT: SAME, **_all(GUEST, EIO,
        ENOMEM)}, scenario="process", match=".img$", first=3),
    Row("device process", "pwrite64", "disk", {EINTR: SAME, SHORT: SAME, **_all(GUEST, EIO,
        ENOSPC, EFBIG, EDQUOT)}, scenario="process", match=".img$"),
    Row("device process", "recvfrom", "its socket", {EINTR: SAME, **_all(GUEST, EIO, ENOMEM)},
        scenario="process", match="socket:", first=5, lasts=False),
    Row("device process", "sendto", "its socket", {EINTR: SAME, **_all(GUEST, EPIPE, EAGAIN,
        ENOMEM)}, scenario="process", match="socket:", first=5, lasts=False),
    Row("device process", "recvmsg", "the spawner", {EINTR: SAME, EIO: ENDS_3},
        scenario="process", match="socket:", lasts=False),
    Row("device process", "sendmsg", "the spawner", {EINTR: SAME, EIO: ENDS_3},
        scenario="process", match="socket:", lasts=False),
    Row("vsock process", "accept4", "its socket", {EINTR: SAME, EMFILE: CALLER, ENOMEM: SAME},
        BY_PROGRAM, "called", lasts=False),
    Row("vsock process", "socket", "a guest's call", _all(GUEST, EMFILE, ENOMEM), BY_PROGRAM,
        "dialed"),
    Row("vsock process", "connect", "a guest's call", _all(GUEST, EAGAIN, errno.ECONNREFUSED),
        BY_PROGRAM, "dialed"),
    Row("vsock process", "sendmsg", "the spawner", {EINTR: SAME, **_all(GUEST, EAGAIN, ENOMEM,
        EPIPE)}, BY_PROGRAM, "dialed", lasts=False),
    Row("vsock process", "recvmsg", "the spawner", {EINTR: SAME, **_all(GUEST, ENOMEM, EIO)},
        BY_PROGRAM, "dialed", lasts=False),
    Row("console process", "write", "file, FIFO", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME,
        **_all(DROPPED, EIO, ENOSPC, EDQUOT, EPIPE)}, BY_PROGRAM, "console-process",
        lasts=False),
    Row("vhost-user", "sendmsg", "back end", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME,
        EPIPE: CALLER}, BY_PROGRAM, "vhost-user", "socket:", lasts=False),
    Row("vhost-user", "recvfrom", "back end", {EINTR: SAME, EAGAIN: SAME, SHORT: SAME,
        EIO: CALLER}, BY_PROGRAM, "vhost-user", "socket:", lasts=False),
    Row("snapshot", "pwrite64", "snapshot's files", _KEPT, BY_PROGRAM, "snapshot", "/memory$"),
    Row("snapshot", "splice-out", "snapshot's files", _KEPT, BY_PROGRAM, "snapshot", "/memory$"),
    Row("snapshot", "pwrite64", "its state", _KEPT, BY_PROGRAM, "snapshot", "/state$"),
    Row("snapshot", "splice-in", "guest memory, saved", _READ, BY_PROGRAM, "snapshot",
        "pyvmm-guest"),
    Row("snapshot", "fsync", "snapshot's files", _all(CALLER, EIO, ENOSPC, EDQUOT), BY_PROGRAM,
        "snapshot"),
    Row("snapshot", "fsync", "the folder around it", _all(CALLER, EIO, ENOSPC, EDQUOT),
        BY_PROGRAM, "snapshot", first=4),
    Row("snapshot", "mkdir", "", _all(CALLER, ENOSPC, EDQUOT, EIO), BY_PROGRAM, "snapshot"),
    Row("snapshot", "rename", "", _all(CALLER, ENOSPC, EDQUOT, EIO), BY_PROGRAM, "snapshot"),
    Row("snapshot", "pread64", "what was written of it", _READ, BY_PROGRAM, "snapshot",
        "/memory$"),
    Row("snapshot", "pread64", "core file", _READ, BY_PROGRAM, "dump", "/.core."),
    Row("snapshot", "pwrite64", "core file's headers", _KEPT, BY_PROGRAM, "dump", "/.core."),
    Row("snapshot", "fsync", "core file", _all(CALLER, EIO, ENOSPC, EDQUOT), BY_PROGRAM, "dump"),
    Row("snapshot", "rename", "core file", _all(CALLER, EIO, ENOSPC, EDQUOT), BY_PROGRAM, "dump"),
    Row("snapshot", "pread64", "a snapshot that is restored", _READ, BY_PROGRAM, "restore"),
]  # fmt: skip

_GONE = _all(CALLER, EIO, ENOMEM, EINVAL)
ASKED = [
    Row("memory file", "read", "/dev/fuse", {EINTR: SAME, **_all(SAME, EAGAIN, ENOENT, ENOMEM,
        EIO), ENODEV: CALLER}, scenario="memory file", match="/dev/fuse", first=3, lasts=False),
    Row("memory file", "read", "/dev/fuse, for good", _all(CALLER, EAGAIN, ENOMEM, EIO),
        scenario="memory file", match="/dev/fuse", first=3),
    Row("memory file", "writev", "/dev/fuse", {**_GONE, EINTR: CALLER}, scenario="memory file",
        match="/dev/fuse", first=3, lasts=False),
    *(
        Row("gdb", call, "vCPU", {EINTR: SAME, **_all(CALLER, EIO, ENOMEM, EINVAL)},
            scenario="gdb", match="kvm-vcpu", request=request)
        for call, request in [
            ("KVM_GET_REGS", x86.KVM_GET_REGS), ("KVM_SET_REGS", x86.KVM_SET_REGS),
            ("KVM_GET_SREGS", x86.KVM_GET_SREGS), ("KVM_SET_SREGS", x86.KVM_SET_SREGS),
            ("KVM_GET_FPU", x86.KVM_GET_FPU), ("KVM_SET_FPU", x86.KVM_SET_FPU),
        ]
    ),
    Row("gdb", "KVM_SET_GUEST_DEBUG", "vCPU", {EINTR: SAME, **_all(CALLER, EIO, ENOMEM, EINVAL)},
        scenario="gdb", match="kvm-vcpu", request=x86.KVM_SET_GUEST_DEBUG, lasts=False),
    Row("gdb", "KVM_SET_GUEST_DEBUG", "vCPU, the debugger leaves", {EINTR: SAME,
        **_all(SAID, EIO, ENOMEM, EINVAL)}, scenario="gdb", match="kvm-vcpu",
        request=x86.KVM_SET_GUEST_DEBUG, first=3, lasts=False),
    *(
        Row("snapshot", call, on, {EINTR: SAME, **_all(CALLER, EIO, ENOMEM, EINVAL)},
            scenario="saving", match=f"kvm-{on.lower()}", request=request)
        for call, on, request in [
            ("KVM_GET_REGS", "vCPU", x86.KVM_GET_REGS),
            ("KVM_GET_SREGS2", "vCPU", x86.KVM_GET_SREGS2),
            ("KVM_GET_XSAVE", "vCPU", x86.KVM_GET_XSAVE),
            ("KVM_GET_XSAVE2", "vCPU", x86.KVM_GET_XSAVE2),
            ("KVM_GET_XCRS", "vCPU", x86.KVM_GET_XCRS),
            ("KVM_GET_MSRS", "vCPU", x86.KVM_GET_MSRS),
            ("KVM_GET_LAPIC", "vCPU", x86.KVM_GET_LAPIC),
            ("KVM_GET_DEBUGREGS", "vCPU", x86.KVM_GET_DEBUGREGS),
            ("KVM_GET_VCPU_EVENTS", "vCPU", x86.KVM_GET_VCPU_EVENTS),
            ("KVM_GET_MP_STATE", "vCPU", x86.KVM_GET_MP_STATE),
            ("KVM_GET_IRQCHIP", "VM", x86.KVM_GET_IRQCHIP),
            ("KVM_GET_PIT2", "VM", x86.KVM_GET_PIT2),
            ("KVM_GET_CLOCK", "VM", x86.KVM_GET_CLOCK),
        ]
    ),
    Row("snapshot", "KVM_GET_TSC_KHZ", "vCPU", {EINTR: SAME, **_all(SAME, EIO, EINVAL)},
        scenario="saving", match="kvm-vcpu", request=x86.KVM_GET_TSC_KHZ),
    Row("snapshot", "KVM_KVMCLOCK_CTRL", "vCPU", {EINTR: SAME, EINVAL: SAME, EIO: CALLER},
        scenario="saving", match="kvm-vcpu", request=x86.KVM_KVMCLOCK_CTRL),
    Row("snapshot", "ftruncate", "core file", _all(CALLER, EIO, ENOSPC, EFBIG), scenario="saving",
        match="/.core."),
    Row("snapshot", "pread64", "shared memory, to the files", _READ, scenario="saving",
        match="pyvmm-shared"),
    Row("snapshot", "pwrite64", "its memory's file, by the run", _KEPT, scenario="saving",
        match="/memory$"),
    Row("snapshot", "pwrite64", "core file, by the run", _KEPT, scenario="saving",
        match="/.core."),
    *(
        Row("restore", call, on, {EINTR: SAME, **_all(ENDS_2, EINVAL, EIO, ENOMEM)},
            scenario="restore", match=f"kvm-{on.lower()}", request=request)
        for call, on, request in [
            ("KVM_SET_REGS", "vCPU", x86.KVM_SET_REGS),
            ("KVM_SET_SREGS2", "vCPU", x86.KVM_SET_SREGS2),
            ("KVM_SET_XSAVE", "vCPU", x86.KVM_SET_XSAVE),
            ("KVM_SET_XCRS", "vCPU", x86.KVM_SET_XCRS),
            ("KVM_SET_MSRS", "vCPU", x86.KVM_SET_MSRS),
            ("KVM_SET_LAPIC", "vCPU", x86.KVM_SET_LAPIC),
            ("KVM_SET_DEBUGREGS", "vCPU", x86.KVM_SET_DEBUGREGS),
            ("KVM_SET_VCPU_EVENTS", "vCPU", x86.KVM_SET_VCPU_EVENTS),
            ("KVM_SET_MP_STATE", "vCPU", x86.KVM_SET_MP_STATE),
            ("KVM_SET_IRQCHIP", "VM", x86.KVM_SET_IRQCHIP),
            ("KVM_SET_PIT2", "VM", x86.KVM_SET_PIT2),
            ("KVM_SET_CLOCK", "VM", x86.KVM_SET_CLOCK),
        ]
    ),
    Row("restore", "KVM_GET_MSR_INDEX_LIST", "/dev/kvm", {EINTR: SAME, **_all(ENDS_2, EIO,
        ENOMEM)}, scenario="restore", match="/dev/kvm", request=x86.KVM_GET_MSR_INDEX_LIST),
    Row("restore", "pread64", "a snapshot's state", {EINTR: SAME, SHORT: SAME, **_all(ENDS_2, EIO,
        ENOMEM)}, scenario="restore", match="/state$"),
    Row("restore", "pread64", "a snapshot's memory", {EINTR: SAME, SHORT: SAME, **_all(ENDS_2,
        EIO, ENOMEM)}, scenario="restore", match="/memory$"),
    Row("restore", "pwrite64", "guest memory, restored", {EINTR: SAME, SHORT: SAME, **_all(ENDS_3,
        EIO, ENOMEM, ENOSPC)}, scenario="restore", match="pyvmm-shared"),
]  # fmt: skip

TABLE: list[Row] = [*DISK, *CONVERSION, *RUN, *START, *END, *OTHERS, *APART, *ASKED]


def word(error: int) -> str:
    """The errno's name."""
    if error == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # Python has the other name
    return "short count" if error == SHORT else errno.errorcode[error]


def as_markdown() -> str:
    """The table: a row for each call and object, a column for each error."""
    others = sorted({error for row in TABLE for error in row.cells} - set(COLUMNS))
    errors = [error for error in (*COLUMNS, *others) if any(error in row.cells for row in TABLE)]
    # Rare ones share a column.
    rare = [error for error in errors if sum(error in row.cells for row in TABLE) < 3]
    errors = [error for error in errors if error not in rare]
    head = ["path", "call", "on", *map(word, errors), "others"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in TABLE:
        more = "; ".join(
            f"{word(error)}: {row.cells[error]}" for error in rare if error in row.cells
        )
        cells = [row.cells.get(error, NOT_GIVEN) for error in errors]
        lines.append(f"| {' | '.join([row.path, f'`{row.call}`', row.on, *cells, more])} |")
    return "\n".join(lines) + "\n"
