"""Whether a guest can run whose code KVM cannot read: each instruction that could need it, tried.

A processor that says where the next instruction is (AMD: next-RIP saving, Intel: the instruction's
length) and what a control register is written with (AMD: decode assists) leaves nothing to read.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from kvm_bindings import KvmError
from kvm_bindings import ioctls as generic
from kvm_bindings.exits import Exit, HltExit, HypercallExit, InterruptedExit, IoExit
from kvm_bindings.x86_64 import System, ioctls
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.cpuid import choose_c_bit, is_amd
from vmm.arch.x86_64.doorbells import KVM_HC_MAP_GPA_RANGE
from vmm.arch.x86_64.micro_guest import AREA_GPA, DONE_PORT, OUT_DONE, MicroGuest
from vmm.core.errors import HostError, UsageError, tell
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.host.kvm import SEE_CHECK
from vmm.host.probes.finding import Finding, no, yes
from vmm.host.probes.micro_guest import AREA_SIZE, mapped, seen

if TYPE_CHECKING:
    from vmm.arch.x86_64.guests import LinuxGuest

_EFER = b"\xb9\x80\x00\x00\xc0"  # mov ecx, 0xc0000080
_HYPERCALL = (
    # mov eax, 12; mov ebx, 0; mov ecx, 1; mov edx, 0: KVM_HC_MAP_GPA_RANGE(0, 1 page, shared)
    b"\xb8\x0c\0\0\0\xbb\0\0\0\0\xb9\x01\0\0\0\xba\0\0\0\0"
)
INSTRUCTIONS = {
    "out": b"",
    "in": b"\xe4" + bytes([DONE_PORT]),
    "cpuid": b"\x31\xc0\x0f\xa2",
    "rdmsr": _EFER + b"\x0f\x32",
    "wrmsr": _EFER + b"\x0f\x32\x0f\x30",
    # mov rax, cr4; btc eax, 7; mov cr4, rax (global pages)
    "mov cr4": b"\x0f\x20\xe0\x0f\xba\xf8\x07\x0f\x22\xe0",
    # mov rax, cr0; btc eax, 18; mov cr0, rax (alignment checks)
    "mov cr0": b"\x0f\x20\xc0\x0f\xba\xf8\x12\x0f\x22\xc0",
    "mov cr3": b"\x0f\x20\xd8\x0f\x22\xd8",
    "wbinvd": b"\x0f\x09",
    "hypercall": _HYPERCALL,
    "hlt": b"\xf4",
}
"""What Linux executes and KVM carries out for it, each by its name."""

_COPY_AND_GO = b"\xf3\xa4\xff\xe3"  # rep movsb; jmp rbx
_START_SIZE = 16


def _reaches_end(system: System, names: list[str]) -> str | None:
    """None if a guest with its code in an inaccessible guest_memfd executes all of these; else
    the name of the instruction that KVM could not do, and what came instead."""
    amd = is_amd(system.supported_cpuid())
    call = b"\x0f\x01\xd9" if amd else b"\x0f\x01\xc1"
    code = b"".join(
        INSTRUCTIONS[name] + (call if name == "hypercall" else b"") + OUT_DONE for name in names
    )
    alias = 1 << choose_c_bit(system.supported_cpuid())
    start = _COPY_AND_GO.ljust(_START_SIZE, b"\x90") + code
    registers = {
        "rsi": layout.PAYLOAD_GPA + _START_SIZE,
        "rdi": AREA_GPA | alias,
        "rbx": AREA_GPA | alias,
        "rcx": len(code),
    }
    with (
        ExitStack() as opened,
        MicroGuest(system, start, "kernel", c_mask=alias, registers=registers) as guest,
    ):
        private = guest.vm.create_guest_memfd(AREA_SIZE, generic.GUEST_MEMFD_FLAG_MMAP)
        opened.callback(os.close, private.fd)
        hva = mapped(opened, private.fd, AREA_SIZE)
        guest.vm.set_user_memory_region2(1, AREA_GPA | alias, AREA_SIZE, hva, private.fd, 0)
        if "hypercall" in names:
            guest.vm.enable_cap(ioctls.KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
        with guest.watched():
            for name in names:
                exit = guest.next_exit()
                if name == "in" and _is_read(exit):
                    guest.vcpu.answer_io(b"\0")
                    exit = guest.next_exit()
                elif name == "hypercall" and isinstance(exit, HypercallExit):
                    guest.vcpu.answer_hypercall(0)
                    exit = guest.next_exit()
                elif name == "hlt" and isinstance(exit, HltExit):
                    exit = guest.next_exit()
                if not (isinstance(exit, IoExit) and exit.is_write and exit.port == DONE_PORT):
                    return f"{name} ({seen(exit)})"
                if isinstance(exit, InterruptedExit):
                    return f"{name} (hangs)"
    return None


def _is_read(exit: Exit) -> bool:
    return isinstance(exit, IoExit) and not exit.is_write


def strict_obstacle(system: System) -> str | None:
    """Why this host can't run a strict guest; None where it can. One micro-guest, main thread
    only."""
    try:
        failed = _reaches_end(system, list(INSTRUCTIONS))
    except (KvmError, HostError) as error:
        return str(error)
    if failed is None:
        return None
    return f"KVM here has to read the guest's instructions, first at {failed}"


def private_code(system: System) -> Finding:
    """Which instructions work in memory that KVM cannot read."""
    what = "code in a guest_memfd that the host can't reach, at CPL 0"
    if strict_obstacle(system) is None:
        return yes("runs", f"{what}: {', '.join(INSTRUCTIONS)}", needs_reading=[])
    failed = {}
    for name in INSTRUCTIONS:
        try:
            failed[name] = _reaches_end(system, [name])
        except (KvmError, HostError) as error:
            return no("not possible", str(error))
    needed = [name for name, why in failed.items() if why is not None]
    evidence = f"{what}: KVM has to read the instruction for {', '.join(needed) or 'none alone'}"
    return no("KVM reads it", evidence, needs_reading=needed)


# -- what a run does with it ----------------------------------------------------------------------


def choose_loading(system: System, guest: LinuxGuest, *, by_name: bool) -> None:
    """Make the guest a strict one where that can be. Where it can't: UsageError or HostError if
    the user wanted it `by_name`, else one line that says why."""
    unfit = guest.unfit_to_load_itself
    if unfit is not None:
        if by_name:
            raise UsageError(
                f"--private-mem=guest_memfd: {unfit}; leave that out, or use "
                "--private-mem=guest_memfd-mmap, which the host loads"
            )
        _tell_rehearsal(unfit)
        return
    obstacle = strict_obstacle(system)
    if obstacle is None:
        guest.load_itself()
    elif by_name:
        raise HostError(
            f"--private-mem=guest_memfd: {obstacle}; use --private-mem=guest_memfd-mmap or memfd, "
            f"which are rehearsals, or pyvmm lab --host bochs; {SEE_CHECK}"
        )
    else:
        _tell_rehearsal(obstacle)


def _tell_rehearsal(why: str) -> None:
    tell(f"private memory is a rehearsal here, not kept from the host by its kernel: {why}")
