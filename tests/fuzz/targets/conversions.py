"""Requests to convert, however a guest puts them: hypercalls, faults, doorbells, realm calls."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from kvm_bindings.aarch64.registers import CORE_REGISTERS
from kvm_bindings.exits import (
    Exit,
    HypercallExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    RdmsrExit,
    WrmsrExit,
)
from tests.fuzz.conversion_ops import random_program
from tests.fuzz.conversion_programs import LENGTH, Cell, fake_cells, run
from tests.fuzz.drawing import Choices, recorded
from tests.fuzz.targets.registry import target
from tests.support.fake_kvm import FakeKernel, FakeVm
from tests.support.fake_platform import FakePlatform
from tests.support.fake_vcpu import FakeVcpu
from tests.support.x86 import exit_handlers
from vmm.arch.aarch64 import rsi
from vmm.arch.aarch64.exits import ArmExitHandlers
from vmm.arch.aarch64.layout import IPA_BITS
from vmm.arch.aarch64.monitor import RealmMonitor
from vmm.arch.x86_64 import layout
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.bus import MemoryBus, PortBus, PortDevice
from vmm.exits.handlers import bank_of
from vmm.exits.outcome import Outcome
from vmm.memory.guest_memory import PageState
from vmm.selftest.entries import Combination
from vmm.selftest.rig import RAM_GPA, Rig

PAGES = 16
MOST_RECORDS = 16
_U64 = (1 << 64) - 1
_PLATFORM = FakePlatform(FakeKernel.sw_protected())


def records(data: bytes, form: str) -> Iterator[tuple[int, ...]]:
    """`data` cut into records, the last one filled up with zeros."""
    size = struct.calcsize(form)
    for start in range(0, min(len(data), size * MOST_RECORDS), size):
        yield struct.unpack(form, data[start : start + size].ljust(size, b"\0"))


class Guest:
    """Exit handlers over a VM (with attributes), half of its pages shared; `check` each exit."""

    def __init__(self, scheme: str = "attributes", backing: str = "guest_memfd-plain") -> None:
        self._has_attributes = scheme == "attributes"
        self.rig = Rig(_PLATFORM, Combination(scheme, backing), pages=PAGES,
                       private=[Range(RAM_GPA, PAGES // 2 * PAGE_SIZE)])  # fmt: skip
        self.outcomes: list[Outcome] = []
        self.ports = PortBus()
        self.handlers = exit_handlers(
            self.rig.memory, self.rig.converter, self.outcomes.append, ports=self.ports
        )
        self.vcpus = [FakeVcpu(index=0), FakeVcpu(index=1)]
        self.start = self.rig.memory.bytes_in(PageState.SHARED)

    def handle(self, exit: Any, vcpu: int = 0) -> None:
        self.handlers.table[type(exit)][1](self.vcpus[vcpu], exit)

    def check(self) -> None:
        """KVM, page states and accounting agree, and nothing is in between."""
        memory, counts = self.rig.memory, self.rig.converter.accounting
        states = memory.states()
        assert sum(area.size for area, _ in states) == memory.ram_bytes
        vm = self.rig.vm
        assert isinstance(vm, FakeVm)
        for area, state in states:
            assert state in (PageState.SHARED, PageState.PRIVATE), state
            if not self._has_attributes:
                continue
            attributes = [value for _, value in vm.attributes.runs(area)]
            assert attributes == [0 if state is PageState.SHARED else 8], (area, attributes)
        shared = memory.bytes_in(PageState.SHARED)
        assert shared == self.start + counts.share.bytes - counts.unshare.bytes

    def close(self) -> None:
        self.rig.close()


@contextmanager
def guest(*combination: str) -> Iterator[Guest]:
    made = Guest(*combination)
    try:
        yield made
    finally:
        made.close()


def is_answer(value: int) -> bool:
    """0 or a negative errno."""
    return -4095 <= value <= 0


@target("hypercall")
def hypercall(data: bytes) -> None:
    """Records of four u64: GPA, pages, attributes, hypercall number (0 stands for the one that
    is meant). KVM's own checks come first, as a guest can't get round them."""
    with guest() as under_test:
        for gpa, pages, attributes, number in records(data, "<4Q"):
            frame = gpa >> 12
            if gpa % PAGE_SIZE or not pages or (frame + pages) & _U64 <= frame:
                continue
            before = under_test.rig.memory.states()
            args = (gpa, pages, attributes, 0, 0, 0)
            under_test.handle(HypercallExit(number or 12, args, 0))
            answer = under_test.vcpus[0].hypercalls.pop()
            assert is_answer(answer), answer
            if answer:
                assert under_test.rig.memory.states() == before
            under_test.check()


@target("fault")
def fault(data: bytes) -> None:
    """Records of four u64: flags, GPA, size, errno (0: EFAULT) of KVM_EXIT_MEMORY_FAULT."""
    with guest() as under_test:
        for flags, gpa, size, number in records(data, "<4Q"):
            stopped = len(under_test.outcomes)
            before = under_test.rig.memory.states()
            under_test.handle(MemoryFaultExit(flags, gpa, size, number & 0xFFFF or 14))
            if len(under_test.outcomes) > stopped:
                assert under_test.outcomes[-1].exit_status == 1
                assert under_test.rig.memory.states() == before
            under_test.check()


@target("doorbell")
def doorbell(data: bytes) -> None:
    """Records of 12 bytes: direction and vCPU, register offset, size, times, and a u64."""
    with guest() as under_test:
        for how, offset, size, times, value in records(data, "<4BQ"):
            vcpu, is_write = how >> 1 & 1, bool(how & 1)
            width = (1, 2, 4)[size % 3]
            count = 1 + times % 3
            words = struct.pack("<Q", value) * 3
            port = layout.DOORBELL_PORT + offset % (layout.DOORBELL_PORTS + 4)
            payload = words[: width * count] if is_write else b""
            under_test.handle(IoExit(port, width, count, is_write, payload), vcpu)
            if not is_write:
                assert len(under_test.vcpus[vcpu].io.pop()) == width * count
            under_test.check()
        for vcpu in range(2):
            result = doorbell_bank(under_test.ports, vcpu).read(0x0C, 4)
            assert result < 1 << 32 and is_answer(result - (1 << 32) if result >> 31 else -result)


def doorbell_bank(ports: PortBus, vcpu: int) -> PortDevice:
    """The registers as that vCPU sees them."""
    found = ports.find(layout.DOORBELL_PORT)
    assert found is not None
    return bank_of(found[0], vcpu)


# --- arm64: a realm's calls ---


class _ArmVcpu:
    """Registers by KVM's number."""

    index = 0

    def __init__(self) -> None:
        self.registers: dict[int, int] = {}

    def get_one_reg(self, register: int) -> int:
        return self.registers.get(register, 0)

    def set_one_reg(self, register: int, value: int) -> None:
        assert 0 <= value <= _U64, value
        self.registers[register] = value

    def x(self, number: int) -> int:
        return self.registers.get(CORE_REGISTERS[f"x{number}"], 0)


_CALLS = (
    rsi.IPA_STATE_SET, rsi.IPA_STATE_GET, rsi.REALM_CONFIG, rsi.ABI_VERSION,
    *range(rsi.FIRST_FUNCTION, rsi.FIRST_FUNCTION + rsi.FUNCTIONS),
)  # fmt: skip


def _call(function: int, base: int, top: int, ripas: int = 0) -> bytes:
    return struct.pack("<B3Q", _CALLS.index(function), base, top, ripas)


def _calls() -> list[bytes]:
    start, half = RAM_GPA, RAM_GPA + PAGES // 2 * PAGE_SIZE
    return [
        _call(rsi.ABI_VERSION, 1 << 16, 0),
        _call(rsi.REALM_CONFIG, start, 0) + _call(rsi.REALM_CONFIG, half, 0),
        _call(rsi.IPA_STATE_SET, start, half) + _call(rsi.IPA_STATE_GET, start, half),
        _call(rsi.IPA_STATE_SET, half, half + 2 * PAGE_SIZE, 1)
        + _call(rsi.IPA_STATE_GET, 0, half + (4 << 20)),
        _call(rsi.IPA_STATE_SET, 0, 1 << 48) + _call(rsi.IPA_STATE_SET, half, start, 1),
    ]


@target("smc", _calls)
def smc(data: bytes) -> None:
    """Records of 25 bytes: which call, then x1 to x3."""
    with guest("cbit", "memfd") as under_test:
        memory, private = under_test.rig.memory, under_test.rig.memory.private
        assert private is not None
        monitor = RealmMonitor(memory, under_test.rig.converter)
        handlers = ArmExitHandlers(
            MemoryBus(), under_test.rig.converter, under_test.outcomes.append, lambda: None, monitor
        )
        vcpu: Any = _ArmVcpu()
        span = Range(0, RAM_GPA + PAGES * PAGE_SIZE)
        for which, x1, x2, x3 in records(data, "<B3Q"):
            for number, value in enumerate((0, x1, x2, x3)):
                vcpu.set_one_reg(CORE_REGISTERS[f"x{number}"], value)
            function = _CALLS[which % len(_CALLS)]
            before = memory.states()
            held = private.pread(span.size, 0)
            handlers.hypercall(vcpu, HypercallExit(function, (0,) * 6, 0))
            answer, base, accepted = (vcpu.x(number) for number in range(3))
            assert answer in (rsi.SUCCESS, rsi.ERROR_INPUT, rsi.NOT_SUPPORTED), answer
            if function == rsi.IPA_STATE_SET and (answer, accepted) == (rsi.SUCCESS, rsi.ACCEPT):
                wanted = PageState.SHARED if x3 == rsi.EMPTY else PageState.PRIVATE
                assert base == x2
                assert memory.states(Range(x1, x2 - x1)) == [(Range(x1, x2 - x1), wanted)]
            else:
                assert memory.states() == before
            if function == rsi.REALM_CONFIG and answer == rsi.SUCCESS:
                page = rsi.realm_config(IPA_BITS)
                held = held[:x1] + page + held[x1 + PAGE_SIZE :]
                assert memory.states(Range(x1, PAGE_SIZE))[0][1] is PageState.PRIVATE
            if function != rsi.IPA_STATE_SET:
                assert private.pread(span.size, 0) == held, "the monitor wrote elsewhere"
            if function == rsi.IPA_STATE_GET and answer == rsi.SUCCESS:
                assert x1 < base <= max(x2, x1 + PAGE_SIZE) or base == x2
            under_test.check()


# --- any exit at all ---


def _some_exit(choices: Choices) -> Exit:
    """One that KVM could hand over; its numbers are the guest's."""
    number = choices.getrandbits(64)
    match choices.randrange(5):
        case 0:
            size, count = choices.choice((1, 2, 4)), 1 + choices.randrange(9)
            is_write = choices.random() < 0.5
            payload = choices.randbytes(size * count) if is_write else b""
            port = number & 0xFFFF
            if number >> 63:
                port = layout.DOORBELL_PORT + port % (layout.DOORBELL_PORTS + 8)
            return IoExit(port, size, count, is_write, payload)
        case 1:
            size = choices.choice((1, 2, 4, 8))
            is_write = choices.random() < 0.5
            return MmioExit(number, size, is_write, choices.randbytes(size) if is_write else b"")
        case 2:
            return RdmsrExit(number & 0xFFFF_FFFF, 1)
        case 3:
            return WrmsrExit(number & 0xFFFF_FFFF, choices.getrandbits(64), 1)
    flags = choices.choice((0, 8, 8, 1, number & 0xFF))
    return MemoryFaultExit(flags, choices.getrandbits(64), choices.getrandbits(64), 14)


def _take_exits(choices: Choices) -> None:
    with guest() as under_test:
        for _ in range(2 * MOST_RECORDS):
            if choices.spent:
                break
            vcpu = under_test.vcpus[choices.randrange(2)]
            one = _some_exit(choices)
            under_test.handle(one, vcpu.index)
            if isinstance(one, IoExit) and not one.is_write:
                assert len(vcpu.io.pop()) == one.size * one.times
            if isinstance(one, MmioExit) and not one.is_write:
                assert len(vcpu.mmio.pop()) == one.size
            if isinstance(one, RdmsrExit | WrmsrExit):
                value, known = vcpu.msrs.pop()
                assert value is None or not known or 0 <= value <= _U64
            under_test.check()


@target("exits", lambda: [recorded(_take_exits, seed) for seed in range(8)])
def exits(data: bytes) -> None:
    """Ports, registers in memory, MSRs and faults in any order, by two vCPUs."""
    _take_exits(Choices(data))


# --- whole programs beside the reference ---


@cache
def _cells() -> list[Cell]:
    return fake_cells()


def _convert(choices: Choices) -> None:
    cells = _cells()
    cell = cells[choices.randrange(len(cells))]
    seen, wrong = run(cell, random_program(choices, LENGTH))
    assert wrong is None, f"{cell.name}: {wrong}, after {seen}"


@target("conversions", lambda: [recorded(_convert, seed) for seed in range(24)], runs=60)
def conversions(data: bytes) -> None:
    """Conversions, accesses, failures and refusals in every scheme and backing that the model of
    KVM has: each answer, state and byte is the reference's."""
    _convert(Choices(data))
