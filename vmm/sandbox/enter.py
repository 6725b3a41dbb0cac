"""Into the sandbox: once everything is open, and before the guest's first instruction."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence

from kvm_bindings import KvmError, sandbox
from vmm.core.errors import HostError, UsageError
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.sandbox import seccomp
from vmm.sandbox.calls import NOT_FOR_VCPUS, Needs, allowed, conditional
from vmm.sandbox.paths import READ, readable

if TYPE_CHECKING:
    from vmm.sandbox.user import User

WRITE = (
    READ
    | sandbox.WRITE_FILE
    | sandbox.TRUNCATE
    | sandbox.MAKE_REG
    | sandbox.MAKE_DIR
    | sandbox.REMOVE_FILE
    | sandbox.REMOVE_DIR
)


class Sandbox:
    """What a run has given up, as its report has it."""

    def __init__(self, seccomp: bool, landlock: int, paths: Sequence[str]) -> None:
        """`landlock`: its version; 0: none, and then nothing is opened for writing at all.
        `paths`: what the user has given back (--allow-path)."""
        self.seccomp = seccomp
        self.landlock = landlock
        self.paths = paths


def enter(
    mode: str,
    *,
    kept: Sequence[int],
    output: int | None = None,
    folders: Sequence[str] = (),
    reads: Sequence[str] = (),
    paths: Sequence[str] = (),
    maps: bool = False,
    connects: bool = False,
    receives: bool = False,
    core_dumps: bool = True,
    user: User | None = None,
) -> Sandbox:
    """Give up all system calls and files but those of vmm.sandbox.calls and vmm.sandbox.paths.

    `kept`: descriptors that nobody may map from now on; `output`: the console's, which may get
    another file put in its place; `folders`: where the run writes files of its own; `reads`: what
    it reads by path; `paths`: what the user gives back, to read and write; `maps`: files are used
    through mappings; `connects`: a device connects to Unix sockets; `receives`: open files
    come by socket; `core_dumps`: whether a crash may leave one; `user`: the
    user to become. Threads that run already get the system calls' part only (see `enter_files`).
    Raises HostError where `mode` is "on" and the kernel can't do it.
    """
    writes = bool(folders or paths)
    if user is not None:
        from vmm.sandbox.user import become  # most runs stay who they are
    # Before another user may not look: what isn't looked at could be the folder that we run in.
    rules = _rules(folders, reads, paths)
    try:
        sandbox.no_new_privileges()
        if not core_dumps:
            sandbox.no_core_files()
        _shut_memory(kept)
        if user is not None:
            become(user, folders)
        version = sandbox.landlock(rules)
        if version == 0 and mode == "on":
            raise HostError(
                "--sandbox=on: this kernel has no Landlock, or it is switched off; use "
                "--sandbox=auto, which does without"
            )
        outputs = (1, 2) if output is None else (1, 2, output)
        needs = Needs(
            os.getpid(),
            (0, *outputs, *kept),
            outputs,
            maps=maps,
            connects=connects,
            writes=writes,
            landlock=version > 0,
            receives=receives,
        )
        sandbox.seccomp(seccomp.allow_only(allowed(needs), conditional(needs)), all_threads=True)
    except KvmError as error:
        if mode == "on" or error.errno not in sandbox.NOT_HERE:
            raise HostError(f"--sandbox={mode}: {error}; --sandbox=off goes without") from error
        return Sandbox(seccomp=False, landlock=sandbox.landlock_version(), paths=paths)
    return Sandbox(seccomp=True, landlock=version, paths=paths)


def enter_files(
    *, folders: Sequence[str] = (), reads: Sequence[str] = (), paths: Sequence[str] = ()
) -> None:
    """The files' part of `enter`, for a thread that starts before it: Landlock is each thread's
    own, and a filter of system calls comes to all of them. Raises KvmError."""
    sandbox.no_new_privileges()
    sandbox.landlock(_rules(folders, reads, paths))


def _rules(
    folders: Sequence[str], reads: Sequence[str], paths: Sequence[str]
) -> list[tuple[str, int]]:
    return [
        *((path, READ) for path in (*readable(), *reads)),
        ("/dev/null", READ | sandbox.WRITE_FILE),
        *((path, WRITE) for path in (*folders, *paths)),
    ]


def _shut_memory(descriptors: Sequence[int]) -> None:
    """Have nobody open a memfd once more by /proc/self/fd, where Landlock has no say: it looks at
    paths, and a memfd has none. Its mode keeps everybody out but root with CAP_DAC_OVERRIDE."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
                os.fchmod(fd, 0)


def kept_descriptors() -> list[int]:
    """Those of files and block devices that are open: disks, and the guest's memory."""
    kept = []
    for name in os.listdir("/proc/self/fd"):
        try:
            mode = os.fstat(int(name)).st_mode
        except OSError:
            continue  # the listing's own
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            kept.append(int(name))
    return kept


def enter_vcpu() -> None:
    """What a vCPU's thread gives up besides: callers, connections, children. Raises KvmError."""
    sandbox.seccomp(seccomp.forbid(NOT_FOR_VCPUS))


def require_paths(paths: Sequence[str]) -> None:
    """Raises UsageError for a path to give back that isn't there: it would be left out."""
    for path in paths:
        if not os.path.exists(path):
            raise UsageError(f"--allow-path {path}: there is no such file or folder; make it first")
