"""What a guest's share request does here: the one probe that a private kernel's start needs."""

from __future__ import annotations

from kvm_bindings.exits import HypercallExit, InterruptedExit
from kvm_bindings.x86_64 import System, ioctls
from vmm.arch.x86_64.cpuid import is_amd
from vmm.arch.x86_64.doorbells import KVM_HC_MAP_GPA_RANGE
from vmm.arch.x86_64.micro_guest import OUT_DONE, MicroGuest
from vmm.core.errors import HostError
from vmm.host.kvm import SEE_CHECK

_VMCALL, _VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"

# mov eax, 12; mov ebx, 0; mov ecx, 1; mov edx, 0: KVM_HC_MAP_GPA_RANGE(0, 1 page, shared)
_ARGUMENTS = b"\x66\xb8\x0c\0\0\0\x66\xbb\0\0\0\0\x66\xb9\x01\0\0\0\x66\xba\0\0\0\0"


def hypercall_behaviour(system: System, *, amd: bool, seconds: float | None = None) -> str:
    """What KVM_HC_MAP_GPA_RANGE from kernel mode does here: "exits", "returns" or "hangs".

    `amd` picks vmmcall over vmcall. Only the main thread may call it (it needs the kick signal).
    Raises KvmError, without KVM_CAP_EXIT_HYPERCALL for one.
    """
    code = _ARGUMENTS + (_VMMCALL if amd else _VMCALL) + OUT_DONE
    with MicroGuest(system, code, seconds=seconds) as guest:
        guest.vm.enable_cap(ioctls.KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
        exit = guest.run()
    if isinstance(exit, HypercallExit):
        return "exits"
    return "hangs" if isinstance(exit, InterruptedExit) else "returns"


def require_working_hypercalls(system: System) -> None:
    """Raises HostError where a kernel could not ask for conversions, KvmError as above."""
    behaviour = hypercall_behaviour(system, amd=is_amd(system.supported_cpuid()))
    if behaviour == "exits":
        return
    what = {
        "hangs": "never returns from a guest's hypercall (it interprets kernel-mode code)",
        "returns": "answers a guest's share request itself instead of passing it on",
    }[behaviour]
    raise HostError(
        f"this host's KVM {what}, so that a kernel cannot ask for conversions; use "
        "pyvmm lab with the same options, or run without --kernel (the embedded payload "
        f"asks through a port); {SEE_CHECK}"
    )
