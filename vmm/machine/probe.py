"""Behaviour probes: a micro-guest tries what a capability only promises.

Capabilities lie: there are hosts that advertise hypercall exits and never return from KVM_RUN
after one. The probe runs under a watchdog, so that it always ends.
"""

from __future__ import annotations

import os
import signal
import threading

from kvm_bindings import System, fdops, ioctls
from kvm_bindings.exits import HypercallExit, InterruptedExit
from vmm.arch.x86_64.doorbells import KVM_HC_MAP_GPA_RANGE
from vmm.exits.run_loop import KICK_SIGNAL, install_kick_handler

PROBE_SECONDS = 1.0

_CODE_GPA = 0x1000
_SIZE = 0x10000
_VMCALL, _VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"


def hypercall_behaviour(system: System, *, amd: bool, seconds: float = PROBE_SECONDS) -> str:
    """What KVM_HC_MAP_GPA_RANGE from kernel mode does here: "exits", "returns" or "hangs".

    `amd` picks vmmcall over vmcall. Only the main thread may call it (it needs the kick signal).
    """
    # mov eax, 12; mov ebx, 0; mov ecx, 1; mov edx, 0; <hypercall>; out 0x10, al
    code = b"\x66\xb8\x0c\0\0\0\x66\xbb\0\0\0\0\x66\xb9\x01\0\0\0\x66\xba\0\0\0\0"
    code += (_VMMCALL if amd else _VMCALL) + b"\xe6\x10"
    memfd = os.memfd_create("pyvmm-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, _SIZE)
        os.pwrite(memfd, code, _CODE_GPA)
        hva = fdops.map_shared(memfd, _SIZE)
        try:
            return _run(system, hva, seconds)
        finally:
            fdops.unmap(hva, _SIZE)
    finally:
        os.close(memfd)


def _run(system: System, hva: int, seconds: float) -> str:
    install_kick_handler()
    runner = threading.get_ident()
    with system.create_vm() as vm:
        vm.enable_cap(ioctls.KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
        vm.set_user_memory_region(0, 0, _SIZE, hva)
        vcpu = vm.create_vcpu(0)

        def bark() -> None:
            vcpu.immediate_exit = True
            signal.pthread_kill(runner, KICK_SIGNAL)

        watchdog = threading.Timer(seconds, bark)
        try:
            vcpu.update_sregs({"cs": {"base": 0, "selector": 0}})
            vcpu.set_regs({"rip": _CODE_GPA, "rflags": 2})
            watchdog.start()
            exit = vcpu.run()
        finally:
            watchdog.cancel()
            if watchdog.ident is not None:
                watchdog.join()
            vcpu.close()
    if isinstance(exit, HypercallExit):
        return "exits"
    return "hangs" if isinstance(exit, InterruptedExit) else "returns"
