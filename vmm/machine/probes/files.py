"""Which files can stand behind guest memory: the memfds with something special about them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import ExitStack

from kvm_bindings import KvmError, fdops
from kvm_bindings.exits import IoExit
from kvm_bindings.x86_64 import System
from vmm.machine.probes.cpu import is_done, seen
from vmm.machine.probes.finding import Finding, broken, no, yes
from vmm.machine.probes.memory import EXCHANGE, WORD_AT, outcome
from vmm.machine.probes.micro_guest import AREA_GPA, AREA_SIZE, MicroGuest

_WORD = 0x444C_4948
_REGISTERS = {"rdi": AREA_GPA, "rsi": _WORD}


def sealed_memfd(system: System) -> Finding:
    """A memfd whose size is sealed: the guest uses it, holes work, truncation doesn't."""

    def sealed() -> int:
        fd = os.memfd_create("pyvmm-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, AREA_SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return fd

    return _behind_a_memslot(system, sealed, "F_SEAL_SHRINK, F_SEAL_GROW set")


def hugetlb_memfd(system: System) -> Finding:
    """A memfd of 2 MiB pages, which the host must have set aside."""

    def huge() -> int:
        flags = os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB
        fd = os.memfd_create("pyvmm-probe", flags)
        os.ftruncate(fd, AREA_SIZE)
        return fd

    return _behind_a_memslot(system, huge, "MFD_HUGETLB, 2 MiB pages")


def secret_memfd(system: System) -> Finding:
    """memfd_secret(2), whose pages the kernel itself has no mapping of."""

    def secret() -> int:
        fd = fdops.memfd_secret()
        os.ftruncate(fd, AREA_SIZE)
        return fd

    return _behind_a_memslot(system, secret, "memfd_secret(2)")


def _behind_a_memslot(system: System, make: Callable[[], int], what: str) -> Finding:
    """Whether a guest can use the file that `make` opens, and what the host can do with its fd."""
    with ExitStack() as opened:
        try:
            fd = make()
            opened.callback(os.close, fd)
            hva = fdops.map_shared(fd, AREA_SIZE, reserve=True)
            opened.callback(fdops.unmap, hva, AREA_SIZE)
        except OSError as error:  # KvmError is one
            return no("none here", f"{what}: {error}")
        with MicroGuest(system, EXCHANGE, "user", registers=_REGISTERS) as guest:
            try:
                guest.vm.set_user_memory_region(1, AREA_GPA, AREA_SIZE, hva)
                exit = guest.run()
            except KvmError as error:
                return no("of no use to a guest", f"{what}; a guest's access: {error}")
            if not is_done(exit):
                return broken("faults", f"{what}; a guest's access: {seen(exit)}")
            pread = outcome(lambda: os.pread(fd, 8, WORD_AT))
            pwrite = outcome(lambda: os.pwrite(fd, b"x", 0))
            punch = outcome(lambda: fdops.punch_hole(fd, 0, AREA_SIZE))
            truncate = outcome(lambda: os.ftruncate(fd, 0))
            exit = guest.run() if truncate != "works" else exit
        emptied = isinstance(exit, IoExit) and not any(exit.data)
    evidence = (
        f"{what}; a guest used it; pread {pread}, pwrite {pwrite}, punch {punch}, "
        f"truncation {truncate}"
    )
    data = {"pread": pread, "pwrite": pwrite, "punch": punch, "truncate": truncate}
    if punch != "works" or not emptied:
        return broken("can't be emptied", evidence, **data)
    return yes("works", evidence, **data)
