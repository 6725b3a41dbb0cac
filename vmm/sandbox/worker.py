"""A child that only computes, and reads and writes what is open."""

from __future__ import annotations

import os

from kvm_bindings import KvmError, sandbox
from vmm.sandbox import seccomp
from vmm.sandbox.calls import WORKER, Needs, conditional
from vmm.sandbox.paths import READ, readable

_CONDITIONAL = ("mmap", "mprotect", "openat", "open", "fcntl", "prctl", "kill", "tgkill")


def enter_worker() -> None:
    """Give up everything but that; a kernel that can't take it away leaves it as it is. Raises
    KvmError where one that can refuses."""
    try:
        sandbox.no_new_privileges()
        version = sandbox.landlock([(path, READ) for path in readable()])
        rules = conditional(Needs(os.getpid(), landlock=version > 0))
        calls = {name: rules[name] for name in _CONDITIONAL}
        sandbox.seccomp(seccomp.allow_only(WORKER, calls))
    except KvmError as error:
        if error.errno not in sandbox.NOT_HERE:
            raise
