"""What a vCPU does: how kernel and user mode are run, hypercalls, MSRs, and what an exit costs."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

from kvm_bindings import KvmError, ioctls
from kvm_bindings.exits import (
    Exit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    RdmsrExit,
)
from kvm_bindings.x86_64 import System
from kvm_bindings.x86_64 import ioctls as x86
from vmm.arch.x86_64.cpuid import choose_c_bit, guest_cpuid, is_amd
from vmm.arch.x86_64.doorbells import KVM_HC_MAP_GPA_RANGE
from vmm.arch.x86_64.micro_guest import AREA_GPA, DONE_PORT, OUT_DONE, MicroGuest, Mode
from vmm.arch.x86_64.probes.hypercall import hypercall_behaviour
from vmm.core.errors import HostError
from vmm.host.probes import latency
from vmm.host.probes.finding import Finding, broken, no, yes
from vmm.host.probes.micro_guest import AREA_SIZE, mapped, memory_file, seen

# SSE2, which every x86-64 processor has, and KVM's instruction emulator (arch/x86/kvm/emulate.c)
# has not: Linux uses it and many others that it lacks.
_ADD_NAME, _ADD = "paddq", b"\x66\x0f\xd4\xc0"

_SEV_STATUS = 0xC001_0131
_ANSWER = 0x5A
# mov ecx, SEV_STATUS; rdmsr; out
_READ_MSR = b"\xb9" + _SEV_STATUS.to_bytes(4, "little") + b"\x0f\x32" + OUT_DONE
_WRITE_WORD = b"\x48\x89\x37" + OUT_DONE  # mov [rdi], rsi; out
_OUT_FOR_EVER = OUT_DONE + b"\xeb\xfc"


def is_done(exit: Exit) -> bool:
    """Whether the micro-guest got to its OUT_DONE."""
    return isinstance(exit, IoExit) and exit.port == DONE_PORT


def kernel_mode(system: System) -> Finding:
    """Whether code at CPL 0 runs on the processor, or in KVM's instruction emulator."""
    return _runs_natively(system, "kernel", "CPL 0")


def user_mode(system: System) -> Finding:
    """Whether code at CPL 3 runs on the processor, and may use ports there."""
    return _runs_natively(system, "user", "CPL 3")


def _runs_natively(system: System, mode: Mode, level: str) -> Finding:
    what = f"a guest in long mode at {level} ran {_ADD_NAME} and out"
    with MicroGuest(system, _ADD + OUT_DONE, mode) as guest:
        exit = guest.run()
    if is_done(exit):
        return yes("runs natively", what, behaviour="native")
    if isinstance(exit, InternalErrorExit) and exit.suberror == 1:
        bytes_seen = f" ({_ADD.hex(' ')})"
        return broken(
            "is interpreted",
            f"KVM's instruction emulator met {_ADD_NAME}{bytes_seen} in long mode at {level}, "
            "which it lacks",
            behaviour="interpreted",
            instruction=_ADD_NAME,
        )
    if isinstance(exit, InterruptedExit):
        return broken("hangs", f"{what}: {seen(exit)}", behaviour="hangs")
    return broken("fails", f"{what}: {seen(exit)}", behaviour="fails")


def hypercall_exits(system: System) -> Finding:
    """Whether KVM_HC_MAP_GPA_RANGE reaches user space."""
    with system.create_vm() as vm:
        offered = vm.check_extension(x86.KVM_CAP_EXIT_HYPERCALL)
    word = f"KVM_CAP_EXIT_HYPERCALL = {offered:#x}"
    if not offered & 1 << KVM_HC_MAP_GPA_RANGE:
        return no("not offered", word, capability=offered, behaviour="absent")
    amd = is_amd(system.supported_cpuid())
    started = time.monotonic()
    behaviour = hypercall_behaviour(system, amd=amd)
    milliseconds = round((time.monotonic() - started) * 1000)
    did = f"{word}; a {'vmmcall' if amd else 'vmcall'} at CPL 0"
    data = {"capability": offered, "behaviour": behaviour, "milliseconds": milliseconds}
    if behaviour == "exits":
        return yes("exit to user space", f"{did} exited with KVM_EXIT_HYPERCALL", **data)
    if behaviour == "hangs":
        after = f"had not returned after {milliseconds} ms, then was stopped"
        return broken("never return", f"{did} {after}", **data)
    return broken("answered by KVM itself", f"{did} did not exit", **data)


def user_space_msrs(system: System) -> Finding:
    """Whether an MSR that KVM doesn't know is asked of user space, and the answer arrives."""
    name = f"rdmsr {_SEV_STATUS:#x}"
    with MicroGuest(system, _READ_MSR, "kernel") as guest:
        offered = guest.vm.check_extension(x86.KVM_CAP_X86_USER_SPACE_MSR)
        word = f"KVM_CAP_X86_USER_SPACE_MSR = {offered:#x}"
        if not offered:
            return no("not offered", word, capability=offered)
        reasons = (
            x86.KVM_MSR_EXIT_REASON_INVAL
            | x86.KVM_MSR_EXIT_REASON_UNKNOWN
            | x86.KVM_MSR_EXIT_REASON_FILTER
        )
        guest.vm.enable_cap(x86.KVM_CAP_X86_USER_SPACE_MSR, reasons)
        exit = guest.run()
        if not isinstance(exit, RdmsrExit):
            evidence = f"{word}; {name}: {seen(exit)}"
            return broken("don't exit", evidence, capability=offered)
        guest.vcpu.answer_msr(_ANSWER, known=True)
        exit = guest.run()
    if not is_done(exit) or exit.data != bytes([_ANSWER]):  # type: ignore[union-attr]
        evidence = f"{word}; after the answer to {name}: {seen(exit)}"
        return broken("answers get lost", evidence, capability=offered)
    return yes("exit to user space", f"{word}; {name} exited, the guest got the answer",
               capability=offered)  # fmt: skip


def c_bit(system: System) -> Finding:
    """Which address bit can tell private from shared, and whether both aliases then work."""
    supported = system.supported_cpuid()
    bit = choose_c_bit(supported)
    width = max((leaf[3] & 0xFF for leaf in supported if leaf[0] == 0x8000_0008), default=36)
    mask = 1 << bit
    word = 0x5052_4956
    registers = {"rdi": AREA_GPA | mask, "rsi": word}
    with (
        ExitStack() as opened,
        MicroGuest(system, _WRITE_WORD, "user", c_mask=mask, registers=registers) as guest,
    ):
        sides = [memory_file(opened, AREA_SIZE) for _ in range(2)]
        for slot, (side, alias) in enumerate(zip(sides, (0, mask), strict=True), start=1):
            hva = mapped(opened, side, AREA_SIZE)
            guest.vm.set_user_memory_region(slot, AREA_GPA | alias, AREA_SIZE, hva)
        exit = guest.run()
        shared, private = (int.from_bytes(os.pread(side, 8, 0), "little") for side in sides)
    data = {"maxphyaddr": width, "bit": bit}
    if not is_done(exit):
        return broken(f"bit {bit} faults", f"a write at GPA | 1 << {bit}: {seen(exit)}", **data)
    if (shared, private) != (0, word):
        return broken(
            f"bit {bit} is ignored", f"a write at GPA | 1 << {bit} went elsewhere", **data
        )
    return yes(
        f"bit {bit} of {width}",
        f"MAXPHYADDR {width}; a guest's write at GPA | 1 << {bit} reached the private side alone",
        **data,
    )


def share_announcement(system: System) -> Finding:
    """Whether CPUID can tell Linux that it runs encrypted and may ask for conversions."""
    try:
        guest_cpuid(system.supported_cpuid(), 0, 1, c_bit=0)
    except HostError as error:
        return no("not possible", str(error))
    return yes("possible", "KVM_GET_SUPPORTED_CPUID has leaf 0x40000001")


def pre_fault(system: System) -> Finding:
    """Whether memory can be mapped for the guest ahead of its faults."""
    with MicroGuest(system, OUT_DONE, "user") as guest:
        offered = guest.vm.check_extension(ioctls.KVM_CAP_PRE_FAULT_MEMORY)
        word = f"KVM_CAP_PRE_FAULT_MEMORY = {offered}"
        if not offered:
            return no("not offered", word)
        try:
            guest.vcpu.pre_fault_memory(0, AREA_GPA)
        except KvmError as error:
            return broken("refused", f"{word}; {error}")
    return yes("works", f"{word}; {AREA_GPA >> 20} MiB mapped ahead")


def exit_latency(system: System) -> Finding:
    """What a port write costs from guest to here and back, in this process."""
    with MicroGuest(system, _OUT_FOR_EVER, "user") as guest, guest.watched():
        return latency.exit_latency(lambda: is_done(guest.next_exit()), "port writes at CPL 3")
