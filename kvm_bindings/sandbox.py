"""What a process gives up for good: privileges, system calls, files.

Sources: seccomp(2), landlock(7), include/uapi/linux/{filter,seccomp,landlock}.h. What is given up
is inherited by every thread and process that is started later, and can't be had back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from struct import pack

from kvm_bindings._kvm import lib
from kvm_bindings.errors import check

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
TRUNCATE = 1 << 14
"""Rights of Landlock (LANDLOCK_ACCESS_FS_*); TRUNCATE since its version 3."""
_FIRST_VERSION = (1 << 13) - 1
_SINCE = {2: 1 << 13, 3: TRUNCATE, 5: 1 << 15}
"""Rights by the version of Landlock that brought them: REFER, TRUNCATE, IOCTL_DEV."""
_ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | 1 << 15
"""What a rule about something that is no folder may allow."""
_TCP = 0b11  # LANDLOCK_ACCESS_NET_BIND_TCP and _CONNECT_TCP, version 4
_SCOPES = 0b11  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and _SIGNAL, version 6


def syscall_number(name: str) -> int | None:
    """The number of a system call on this machine; None for one that it hasn't, or that sandbox.c
    doesn't list."""
    number = lib.pyvmm_syscall_number(name.encode())
    return None if number < 0 else int(number)


def audit_arch() -> int:
    """The AUDIT_ARCH_* that seccomp's filters find of this process's calls; 0: not known here."""
    return int(lib.pyvmm_audit_arch())


def no_new_privileges() -> None:
    """No execve(2) gives this process more than it has (PR_SET_NO_NEW_PRIVS); what the rest here
    needs. Raises KvmError."""
    check("PR_SET_NO_NEW_PRIVS", lib.pyvmm_no_new_privileges())


def seccomp(program: Sequence[tuple[int, int, int, int]], *, all_threads: bool = False) -> None:
    """Have every system call looked at by a classic BPF program, of (code, jt, jf, k).

    Of this thread and those that it starts later, or of all threads of the process. Raises
    KvmError: EACCES without `no_new_privileges`, EINVAL for a program that isn't one.
    """
    data = b"".join(pack("=HBBI", *instruction) for instruction in program)
    result = lib.pyvmm_seccomp(data, len(program), all_threads)
    check("seccomp", result, "{} instructions", len(program))


def no_core_files() -> None:
    """This process leaves none, and can't have it otherwise (RLIMIT_CORE). Raises KvmError."""
    check("RLIMIT_CORE", lib.pyvmm_no_core_files())


def landlock_version() -> int:
    """Which Landlock this kernel has; 0: none, or switched off."""
    return max(int(lib.pyvmm_landlock_abi()), 0)


def landlock(allowed: Sequence[tuple[str, int]]) -> int:
    """From now on this thread, and those that it starts, opens nothing by a path but what
    `allowed` has: (path, rights), with all that is beneath a folder. What is open stays so.

    Neither does it bind or connect to TCP ports (version 4), nor signal processes and reach
    abstract Unix sockets outside of it (version 6). A path that isn't there is left out. The
    version that does it, 0 where there is none. Raises KvmError.
    """
    version = landlock_version()
    if version == 0:
        return 0
    handled = _FIRST_VERSION
    for since, right in _SINCE.items():
        handled |= right if version >= since else 0
    network, scopes = (_TCP if version >= 4 else 0), (_SCOPES if version >= 6 else 0)
    ruleset = check("landlock_create_ruleset", lib.pyvmm_landlock_ruleset(handled, network, scopes))
    try:
        for path, rights in allowed:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                mask = handled if os.path.isdir(path) else handled & _ON_FILES
                result = lib.pyvmm_landlock_allow(ruleset, rights & mask, fd)
                check("landlock_add_rule", result, "{}", path)
            finally:
                os.close(fd)
        check("landlock_restrict_self", lib.pyvmm_landlock_restrict(ruleset))
    finally:
        os.close(ruleset)
    return version


NOT_HERE = frozenset((errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL))
"""What a kernel without seccomp's filters answers."""
