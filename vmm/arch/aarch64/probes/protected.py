"""Protected VMs: whether pKVM makes and runs them, and what the host meets in their memory.

The host's access is a system call with the mapping as its buffer, which fails with EFAULT on a
page that is the guest's. Anything through the file's own pages (pread of the memfd, /proc/PID/mem,
process_vm_readv of the mapping) would destroy the page (Linux 7.3); nothing here does that.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack

from kvm_bindings import KvmError, fdops
from kvm_bindings.aarch64 import System, ioctls
from vmm.arch.aarch64.guest_cpu import MEM_SHARE, MEM_UNSHARE
from vmm.arch.aarch64.machine_code import SHARE_AND_BACK, assembled
from vmm.arch.aarch64.micro_guest import AREA_GPA, MicroGuest
from vmm.arch.aarch64.probes.cpu import KVM_CAP_EXIT_HYPERCALL, MEM_SHARE_MASK
from vmm.core.ranges import PAGE_SIZE
from vmm.host.probes.finding import Finding, broken, no, yes
from vmm.host.probes.micro_guest import AREA_SIZE, mapped, memory_file, seen

_PROTECTED = ioctls.KVM_VM_TYPE_ARM_PROTECTED
_WORD = 0x5445_5243_4553
_SECONDS = 10.0


def protected_vms(system: System) -> Finding:
    """A protected VM runs; a page of its own is out of the host's reach, a shared one in it, and
    out of it again."""
    registers = {
        "x0": 0, "x1": AREA_GPA, "x2": 0, "x3": 0, "x20": AREA_GPA, "x21": _WORD,
        "x22": MEM_SHARE, "x23": MEM_UNSHARE,
    }  # fmt: skip
    with ExitStack() as opened:
        try:
            guest = opened.enter_context(
                MicroGuest(
                    system, assembled(SHARE_AND_BACK), registers=registers, vm_type=_PROTECTED,
                    seconds=_SECONDS,
                )
            )  # fmt: skip
        except KvmError as error:
            return no("none", str(error))
        area = memory_file(opened, AREA_SIZE)
        hva = mapped(opened, area, AREA_SIZE)
        guest.vm.set_user_memory_region(1, AREA_GPA, AREA_SIZE, hva)
        scratch = memory_file(opened, PAGE_SIZE)
        locked = locked_pages()
        found = []
        donated = 0
        for step in ("its own", "shared", "unshared"):
            exit = guest.run()
            answer = guest.word(exit)
            if answer != 0:
                evidence = f"a protected guest, page {step}: {seen(exit)}, answer {answer}"
                return broken("don't work", evidence)
            found.append(host_finds(hva, scratch))
            donated = donated or locked_pages() - locked
    what = (
        f"a protected guest wrote a word; the host found {', '.join(map(str, found))} in the page"
    )
    evidence = f"{what} while it was private, shared, private again; {donated} pages locked"
    data = {"private": found[0], "shared": found[1], "unshared": found[2], "locked_pages": donated}
    if found != ["EFAULT", hex(_WORD), "EFAULT"]:
        return broken("memory isn't kept apart", evidence, **data)
    if donated <= 0:
        return broken("donations aren't counted", evidence, **data)
    return yes("host kept out", evidence, **data)


def told_shares(system: System) -> Finding:
    """Whether a protected guest's share is announced to user space."""
    try:
        vm = system.create_vm(_PROTECTED)
    except KvmError as error:
        return no("no protected VMs", str(error))
    with vm:
        offered = vm.check_extension(KVM_CAP_EXIT_HYPERCALL)
        word = f"KVM_CAP_EXIT_HYPERCALL = {offered:#x}"
        try:
            vm.enable_cap(KVM_CAP_EXIT_HYPERCALL, MEM_SHARE_MASK)
        except KvmError as error:
            return no("not told", f"{word}; {error}", capability=offered)
    return yes("offered", f"{word}; KVM_ENABLE_CAP took it", capability=offered)


def host_finds(hva: int, scratch: int) -> str:
    """The first word at `hva` in hex, or the name of the errno that reading it came to."""
    try:
        fdops.pwrite_from_address(scratch, hva, 8, 0)
    except KvmError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return hex(int.from_bytes(os.pread(scratch, 8, 0), "little"))


def locked_pages() -> int:
    """VmLck of this process in pages: what it has locked, and what it has donated to guests."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmLck:"):
                return int(line.split()[1]) * 1024 // PAGE_SIZE
    return 0
