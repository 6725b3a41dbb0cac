"""A child that only computes, and reads and writes what is open."""

from __future__ import annotations

import contextlib
import os

from kvm_bindings import KvmError, sandbox
from vmm.sandbox import seccomp
from vmm.sandbox.calls import WORKER, Needs, conditional
from vmm.sandbox.paths import READ, readable

_CONDITIONAL = ("mmap", "mprotect", "openat", "open", "fcntl", "prctl", "kill", "tgkill")


def enter_worker() -> None:
    """Give up everything but that. Where this kernel can't take it away, it stays as it is."""
    with contextlib.suppress(KvmError):
        sandbox.no_new_privileges()
        version = sandbox.landlock([(path, READ) for path in readable()])
        rules = conditional(Needs(os.getpid(), landlock=version > 0))
        calls = {name: rules[name] for name in _CONDITIONAL}
        sandbox.seccomp(seccomp.allow_only(WORKER, calls))
