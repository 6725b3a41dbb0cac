"""Into the sandbox: once everything is open, and before the guest's first instruction."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from kvm_bindings import KvmError, sandbox
from vmm.core.errors import HostError, UsageError
from vmm.sandbox import seccomp
from vmm.sandbox.calls import NOT_FOR_VCPUS, Needs, allowed, conditional
from vmm.sandbox.paths import READ, readable

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
) -> Sandbox:
    """Give up all system calls and files but those of vmm.sandbox.calls and vmm.sandbox.paths.

    `kept`: descriptors that nobody may map from now on; `output`: the console's, which may get
    another file put in its place; `folders`: where the run writes files of its own; `reads`: what
    it reads by path; `paths`: what the user gives back, to read and write; `maps`: files are used
    through mappings; `connects`: a device connects to Unix sockets; `receives`: devices'
    processes may be started anew. Threads that run already get the system calls' part only. Raises
    HostError where `mode` is "on" and the kernel can't do it.
    """
    writes = bool(folders or paths)
    try:
        sandbox.no_new_privileges()
        version = sandbox.landlock(
            [
                *((path, READ) for path in (*readable(), *reads)),
                ("/dev/null", READ | sandbox.WRITE_FILE),
                *((path, WRITE) for path in (*folders, *paths)),
            ]
        )
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
