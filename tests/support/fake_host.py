"""A KVM for probes: capabilities by number, and a vCPU whose exits a test scripts."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any, Self, cast

from kvm_bindings import GuestMemfd, KvmError
from kvm_bindings.exits import Exit, InterruptedExit, IoExit
from kvm_bindings.x86_64 import System

DONE = IoExit(0x10, 1, 1, True, b"\0")
"""What a micro-guest's last instruction causes."""

AMD = (0, 0, 0, 0xD, 0x6874_7541, 0x444D_4163, 0x6974_6E65)
FORTY_BITS = (0x8000_0008, 0, 0, 40, 0, 0, 0)
KVM_LEAF = (0x4000_0001, 0, 0, 0, 0, 0, 0)


class FakeVcpu:
    """Answers KVM_RUN with the scripted exits, and then hangs until it is kicked."""

    def __init__(self, exits: list[Exit], ring: list[IoExit]) -> None:
        self.immediate_exit = False
        self._exits = exits
        self._ring = ring
        self.answers: list[tuple[int | None, bool]] = []

    def run(self) -> Exit:
        if self._exits:
            return self._exits.pop(0)
        while not self.immediate_exit:
            signal.pause()
        return InterruptedExit(errno.EINTR)

    def coalesced_writes(self) -> Iterator[IoExit]:
        return iter(self._ring)

    def answer_msr(self, value: int | None, *, known: bool) -> None:
        self.answers.append((value, known))

    def ignore(self, *arguments: object, **named: object) -> None:
        """Registers and the like, which no test looks at."""

    set_cpuid2 = update_sregs = set_regs = pre_fault_memory = close = ignore


class FakeVm:
    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def check_extension(self, capability: int) -> int:
        return self._host.check_extension(capability)

    def create_vcpu(self, vcpu_id: int) -> FakeVcpu:
        return FakeVcpu(self._host.exits, self._host.ring)

    def create_guest_memfd(self, size: int, flags: int = 0) -> Any:
        if self._host.guest_memfds:
            return GuestMemfd(os.memfd_create("stands in for a guest_memfd"), size, flags)
        raise KvmError("KVM_CREATE_GUEST_MEMFD", errno.EINVAL, f"{size=:#x}, {flags=:#x}")

    def coalesce_port_writes(self, port: int, size: int) -> bool:
        return self._host.coalesces

    def ignore(self, *arguments: object, **named: object) -> None:
        """Accepted."""

    create_irqchip = set_user_memory_region = set_user_memory_region2 = ignore
    enable_cap = ioeventfd = irqfd = ignore
    set_memory_attributes = close = ignore

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._host.closed_vms += 1


class FakeHost:
    """/dev/kvm: every capability is 1 unless `capabilities` says otherwise."""

    def __init__(self, *exits: Exit, capabilities: Mapping[int, int] | None = None) -> None:
        self.exits = list(exits)
        self.ring: list[IoExit] = []
        self.coalesces = True
        self.capabilities = dict(capabilities or {})
        self.cpuid: list[tuple[int, ...]] = [AMD, FORTY_BITS, KVM_LEAF]
        self.vm_types = {0}
        self.guest_memfds = False
        self.closed_vms = 0
        self.closed = 0

    def api_version(self) -> int:
        return 12

    def check_extension(self, capability: int) -> int:
        return self.capabilities.get(capability, 1)

    def supported_cpuid(self) -> list[tuple[int, ...]]:
        return self.cpuid

    def create_vm(self, vm_type: int = 0) -> FakeVm:
        if vm_type not in self.vm_types:
            raise KvmError("KVM_CREATE_VM", errno.EINVAL, f"type={vm_type}")
        return FakeVm(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1

    def as_system(self) -> System:
        return cast(System, self)
