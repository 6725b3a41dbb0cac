"""The one runner of micro-guests: a few instructions, a vCPU, a watchdog."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Literal

from kvm_bindings import fdops
from kvm_bindings.exits import Exit, InterruptedExit
from kvm_bindings.x86_64 import System, Vcpu, Vm
from vmm.exits.run_loop import KICK_SIGNAL, install_kick_handler

WATCHDOG_SECONDS = 1.0

Mode = Literal["real", "kernel", "user"]

REAL_CODE_GPA = 0x1000
"""Where real-mode code lies, in segment 0."""
RAM_SIZE = 2 << 20
"""RAM from 0: the micro-guest's code and tables."""
AREA_GPA, AREA_SIZE = RAM_SIZE, 2 << 20
"""Mapped for the guest in long mode and without a memslot: a probe puts there what it tests."""

DONE_PORT = 0x10
OUT_DONE = b"\xe6\x10"
"""out 0x10, al: how a micro-guest says that it got there."""


class MicroGuest:
    """A VM with one vCPU and RAM in a memfd. A context manager; main thread only.

    `mode` is real mode, or long mode at CPL 0 ("kernel") or CPL 3 ("user"); in long mode VA = GPA
    for RAM and area, and with `c_mask` also VA = GPA | c_mask. Raises KvmError where KVM refuses.
    """

    vm: Vm
    vcpu: Vcpu

    def __init__(
        self,
        system: System,
        code: bytes,
        mode: Mode = "real",
        *,
        c_mask: int = 0,
        irqchip: bool = False,
        registers: Mapping[str, int] | None = None,
        vm_type: int = 0,
        seconds: float = WATCHDOG_SECONDS,
    ) -> None:
        self._seconds = seconds
        self._barked = False
        with ExitStack() as opened:
            self.memfd = memory_file(opened, RAM_SIZE)
            hva = mapped(opened, self.memfd, RAM_SIZE)
            self.vm = opened.enter_context(system.create_vm(vm_type))
            if irqchip:
                self.vm.create_irqchip()
            self.vm.set_user_memory_region(0, 0, RAM_SIZE, hva)
            self.vcpu = self.vm.create_vcpu(0)
            opened.callback(self.vcpu.close)
            if mode == "real":
                os.pwrite(self.memfd, code, REAL_CODE_GPA)
                self.vcpu.update_sregs({"cs": {"base": 0, "selector": 0}})
                state = {"rip": REAL_CODE_GPA, "rsp": 0x8000, "rflags": 2}
            else:
                state = self._enter_long_mode(system, code, mode, c_mask)
            self.vcpu.set_regs({**state, **(registers or {})})
            self._opened = opened.pop_all()

    def _enter_long_mode(
        self, system: System, code: bytes, mode: Mode, c_mask: int
    ) -> dict[str, int]:
        # Not on the way to a guest, which needs the real-mode probe only.
        from vmm.arch.x86_64 import layout
        from vmm.arch.x86_64.page_tables import payload_tables
        from vmm.arch.x86_64.registers import linux64_entry, payload_entry
        from vmm.core.ranges import Range

        tables = payload_tables([Range(0, AREA_GPA + AREA_SIZE)], c_mask)
        entry = payload_entry if mode == "user" else linux64_entry
        state = entry(layout.PAYLOAD_GPA, tables.cr3)
        for gpa, data in [*tables.writes, *state.writes, (layout.PAYLOAD_GPA, code)]:
            os.pwrite(self.memfd, data, gpa)
        # CPUID first: KVM refuses EFER.LME to a vCPU that doesn't have long mode.
        self.vcpu.set_cpuid2(system.supported_cpuid())
        self.vcpu.update_sregs(state.sregs)  # type: ignore[arg-type]  # a TypedDict
        return state.regs

    def run(self) -> Exit:
        """To the next exit; InterruptedExit when the guest makes none until the watchdog barks."""
        with self.watched():
            return self.next_exit()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The watchdog watches over every `next_exit` in the block together."""
        install_kick_handler()
        runner = threading.get_ident()

        def bark() -> None:
            self._barked = True
            # The flag catches a vCPU on its way into KVM_RUN, the signal one that is inside.
            self.vcpu.immediate_exit = True
            signal.pthread_kill(runner, KICK_SIGNAL)

        watchdog = threading.Timer(self._seconds, bark)
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            watchdog.join()

    def next_exit(self) -> Exit:
        """KVM_RUN, repeated for signals other than the watchdog's."""
        exit = self.vcpu.run()
        while isinstance(exit, InterruptedExit) and not self._barked:
            exit = self.vcpu.run()
        return exit

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> MicroGuest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def memory_file(opened: ExitStack, size: int) -> int:
    """A memfd of `size` bytes, closed with `opened`."""
    memfd = os.memfd_create("pyvmm-probe", os.MFD_CLOEXEC)
    opened.callback(os.close, memfd)
    os.ftruncate(memfd, size)
    return memfd


def mapped(opened: ExitStack, fd: int, size: int) -> int:
    """The address of a mapping of `fd`, undone with `opened`. Raises KvmError."""
    address = fdops.map_shared(fd, size)
    opened.callback(fdops.unmap, address, size)
    return address
