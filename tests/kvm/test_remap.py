"""Memslots replaced while several vCPUs run: no access is lost, none becomes MMIO."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import NamedTuple

import pytest

from kvm_bindings.exits import MmioExit
from kvm_bindings.x86_64 import System
from tests.support.x86 import exit_handlers
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.msrs import MsrTable
from vmm.arch.x86_64.page_tables import payload_tables
from vmm.arch.x86_64.registers import payload_entry
from vmm.conversion.schemes.remap import RemapScheme
from vmm.conversion.transaction import Converter
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.bus import PortBus
from vmm.exits.outcome import Outcome
from vmm.exits.vcpu_group import VcpuGroup
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory

pytestmark = pytest.mark.kvm

RAM = Range(0, 16 << 20)
PRIVATE = Range(2 << 20, 14 << 20)
COUNTERS = PRIVATE.start + 0x7000
"""Two words, 12 KiB apart, in the run of private pages that is split and joined."""
APART = 0x3000
TOGGLED = PRIVATE.start + 0x100000
CONVERSIONS = 60
MANY_CONVERSIONS = 5000
COUNT_PORT = 0x80

# again: inc qword [rdi]; inc qword [rdi+0x3000]; jmp again
COUNTING = bytes.fromhex("48ff07 48ff8700300000 ebf4")
# again: mov edx, 0x500; mov eax, esi; out dx, eax; add edx, 4; mov eax, edi; out dx, eax;
# add edx, 4; mov eax, ebx; out dx, eax; add edx, 4; in eax, dx; out 0x80, eax; xor ebx, 3;
# jmp again
RINGING = bytes.fromhex(
    "ba00050000 89f0 ef 83c204 89f8 ef 83c204 89d8 ef 83c204 ed e780 83f303 ebdf"
)
RINGING_GPA, COUNTING_GPA = layout.PAYLOAD_GPA, layout.PAYLOAD_GPA + PAGE_SIZE


class Answers:
    """The port to which the ringing vCPU writes each answer; the last one ends the run."""

    def __init__(self, count: int, end: Callable[[], None]) -> None:
        self.seen: list[int] = []
        self._count = count
        self._end = end

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(value)
        if len(self.seen) == self._count:
            self._end()

    def read(self, offset: int, size: int) -> int:
        return 0


class Ran(NamedTuple):
    """Answers to the ringing vCPU, exits of both, counters of the other, why it ended early."""

    answers: list[int]
    exits: dict[str, int]
    counters: tuple[int, int]
    outcomes: list[Outcome]

    @property
    def has_lost_accesses(self) -> bool:
        first, second = self.counters
        # The counting vCPU may be stopped between the two.
        return bool("mmio" in self.exits or self.outcomes or first - second not in (0, 1))


def run_counters(
    kvm: System,
    opened: ExitStack,
    park: Callable[[VcpuGroup], AbstractContextManager[object]],
    conversions: int,
) -> Ran:
    """One vCPU has conversions made beside a counting one, until an access of that is lost."""
    vm = opened.enter_context(kvm.create_vm())
    private = MemfdBacking(RAM.end)
    memory = GuestMemory([RAM], MemfdBacking(RAM.end), private, [PRIVATE])
    opened.callback(memory.close)
    group = VcpuGroup()
    scheme = RemapScheme(lambda: park(group))
    scheme.install(vm, memory)
    converter = Converter(memory, scheme)
    outcomes: list[Outcome] = []

    def stop(outcome: Outcome) -> None:
        outcomes.append(outcome)
        group.stop()

    answers = Answers(conversions, group.stop)
    ports = PortBus()
    ports.add(COUNT_PORT, 4, answers)
    handlers = exit_handlers(memory, converter, stop, ports=ports, msrs=MsrTable(False))
    # A lost access ends the run.
    handlers.table[MmioExit] = ("mmio", lambda vcpu, exit: group.stop())
    tables = payload_tables([RAM])
    programs = (
        (RINGING_GPA, RINGING, {"rsi": TOGGLED // PAGE_SIZE, "rdi": 1, "rbx": 1}),
        (COUNTING_GPA, COUNTING, {"rdi": COUNTERS}),
    )
    for index, (gpa, code, registers) in enumerate(programs):
        state = payload_entry(gpa, tables.cr3)
        for place, data in [*tables.writes, *state.writes, (gpa, code)]:
            memory.pwrite(data, place)
        vcpu = vm.create_vcpu(index)
        opened.callback(vcpu.close)
        vcpu.set_cpuid2(kvm.supported_cpuid())
        vcpu.update_sregs(state.sregs)  # type: ignore[arg-type]  # a TypedDict
        vcpu.set_regs({**state.regs, **registers})
        group.add(vcpu, handlers, stop)
    group.start()
    assert group.join(60), "the guest does not end"
    exits: dict[str, int] = {}
    for runner in group.runners:
        assert runner.error is None
        for name, count in runner.exit_counts.items():
            exits[name] = exits.get(name, 0) + count
    first, second = (
        int.from_bytes(os.pread(private.fd, 8, COUNTERS + offset), "little")
        for offset in (0, APART)
    )
    return Ran(answers.seen, exits, (first, second), outcomes)


def test_conversions_beside_a_running_vcpu_lose_none_of_its_accesses(kvm: System) -> None:
    with ExitStack() as opened:
        ran = run_counters(kvm, opened, VcpuGroup.parked, CONVERSIONS)

    assert ran.answers == [0] * CONVERSIONS
    assert not ran.has_lost_accesses
    assert ran.counters[0] > 0


def test_without_parking_accesses_are_lost(kvm: System) -> None:
    """What the parking is for, and that this guest would notice."""
    with ExitStack() as opened:
        ran = run_counters(kvm, opened, lambda group: nullcontext(), MANY_CONVERSIONS)

    assert ran.has_lost_accesses
