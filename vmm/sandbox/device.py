"""A device's process: it serves what is open, and can open nothing."""

from __future__ import annotations

import os

from kvm_bindings import KvmError, sandbox
from vmm.sandbox import seccomp
from vmm.sandbox.calls import DEVICE, DEVICE_ACCEPTS, DEVICE_RECEIVES, Needs, conditional

_CONDITIONAL = ("mmap", "mprotect", "ioctl")


def enter_device(*, accepts: bool = False, receives: bool = False) -> tuple[bool, int]:
    """Give up everything but that, and to take callers (`accepts`), or to be given sockets by the
    process that started it (`receives`): it connects to nothing itself. What there is of it: the
    filter of system calls, Landlock's version (0: none); a kernel that has neither leaves it as it
    is. Raises KvmError where one that has them refuses: nothing is served outside the sandbox then.
    """
    version = 0
    try:
        sandbox.no_new_privileges()
        version = sandbox.landlock([])
        rules = conditional(Needs(os.getpid()))
        calls = {name: rules[name] for name in _CONDITIONAL}
        # No file is mapped, not even a module: the first alternative alone, anonymous memory.
        calls["mmap"] = calls["mmap"][:1]
        calls["ioctl"] = calls["ioctl"][1:]  # without KVM's
        names = DEVICE | (DEVICE_ACCEPTS if accepts else set())
        names |= DEVICE_RECEIVES if receives else set()
        sandbox.seccomp(seccomp.allow_only(names, calls))
    except KvmError as error:
        if error.errno not in sandbox.NOT_HERE:
            raise
        return False, version
    return True, version
