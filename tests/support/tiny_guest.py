"""A guest of a few bytes of real-mode code, run under a watchdog."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType

from kvm_bindings import fdops
from kvm_bindings.exits import Exit
from kvm_bindings.x86_64 import System
from vmm.exits.run_loop import KICK_SIGNAL

CODE = 0x1000
"""Where the code lies, in segment 0."""
RAM = 0x10000
"""64 KiB of RAM from 0; what lies above is MMIO."""
WATCHDOG_SECONDS = 20.0


class TinyGuest:
    """A VM, by default without interrupt controller, one vCPU, RAM in a memfd. A context
    manager."""

    def __init__(
        self, system: System, code: bytes, *, irqchip: bool = False, **registers: int
    ) -> None:
        self.memfd = os.memfd_create("tiny guest")
        os.ftruncate(self.memfd, RAM)
        os.pwrite(self.memfd, code, CODE)
        self._hva = fdops.map_shared(self.memfd, RAM)
        self.vm = system.create_vm()
        if irqchip:
            self.vm.create_irqchip()
        self.vm.set_user_memory_region(0, 0, RAM, self._hva)
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.update_sregs({"cs": {"base": 0, "selector": 0}})
        self.vcpu.set_regs({"rip": CODE, "rflags": 2, "rsp": 0x8000, **registers})

    def run(self) -> Exit:
        """One KVM_RUN; a guest that does not exit comes back as InterruptedExit."""
        runner = threading.get_ident()

        def bark() -> None:
            self.vcpu.immediate_exit = True
            signal.pthread_kill(runner, KICK_SIGNAL)

        watchdog = threading.Timer(WATCHDOG_SECONDS, bark)
        watchdog.start()
        try:
            return self.vcpu.run()
        finally:
            watchdog.cancel()
            watchdog.join()

    def pread(self, size: int, gpa: int) -> bytes:
        return os.pread(self.memfd, size, gpa)

    def pwrite(self, data: bytes, gpa: int) -> None:
        os.pwrite(self.memfd, data, gpa)

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()
        fdops.unmap(self._hva, RAM)
        os.close(self.memfd)

    def __enter__(self) -> TinyGuest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
