"""Exits of arm64: realm calls through registers, accesses without a description, where it was."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvm_bindings import KvmError
from kvm_bindings.aarch64.registers import CORE_REGISTERS
from kvm_bindings.exits import ArmDebugExit, ArmNisvExit, HypercallExit, MmioExit, SystemEventExit
from vmm.arch.aarch64.exits import ArmExitHandlers, without_ports
from vmm.arch.aarch64.layout import UART_GPA, UART_SIZE
from vmm.devices.bus import MemoryBus
from vmm.exits.outcome import INTERNAL_ERROR, POWEROFF, RESET, Outcome

NOBODY: Any = None


class FakeVcpu:
    """Registers by name; those of a protected guest can't be read."""

    index = 1

    def __init__(self, *, is_protected: bool = False, **values: int) -> None:
        self.registers = {CORE_REGISTERS[name]: value for name, value in values.items()}
        self.is_protected = is_protected
        self.answer = b""
        self.ring: list[MmioExit] = []

    def coalesced_writes(self) -> list[MmioExit]:
        return self.ring

    def get_one_reg(self, register: int) -> int:
        if self.is_protected:
            raise KvmError("KVM_GET_ONE_REG", errno.EPERM)
        return self.registers.get(register, 0)

    def set_one_reg(self, register: int, value: int) -> None:
        self.registers[register] = value

    def answer_mmio(self, data: bytes) -> None:
        self.answer = data

    def x(self, number: int) -> int:
        return self.registers.get(CORE_REGISTERS[f"x{number}"], 0)


class FakeMonitor:
    """Answers every call with the same registers."""

    def __init__(self, *answer: int) -> None:
        self.calls: list[tuple[int, ...]] = []
        self._answer = answer

    def answer(self, *call: int) -> tuple[int, ...]:
        self.calls.append(call)
        return self._answer


class Register:
    """A device that remembers what was written."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0x1122_3344_5566_7788 & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def handlers(
    monitor: FakeMonitor | None = None, bus: MemoryBus | None = None
) -> tuple[ArmExitHandlers, list[Outcome]]:
    outcomes: list[Outcome] = []
    made = ArmExitHandlers(
        bus or MemoryBus(),
        NOBODY,
        outcomes.append,
        lambda: outcomes.append(Outcome(RESET, "the board's")),
        monitor,
    )
    return made, outcomes


def handle(made: ArmExitHandlers, vcpu: FakeVcpu, exit: Any) -> str:
    name, handler = made.table[type(exit)]
    handler(vcpu, exit)
    return name


def call(number: int) -> HypercallExit:
    return HypercallExit(number, (0, 0, 0, 0, 0, 0), 1)


def test_call_of_a_realm_gives_the_monitor_arguments_and_the_guest_its_answer() -> None:
    monitor = FakeMonitor(0, 7, 8)
    vcpu = FakeVcpu(x0=0xC400_0197, x1=1, x2=2, x3=3)

    name = handle(handlers(monitor)[0], vcpu, call(0xC400_0197))

    assert name == "hypercall"
    assert monitor.calls == [(0xC400_0197, 1, 2, 3, 1)]
    assert [vcpu.x(number) for number in range(4)] == [0, 7, 8, 3]


def test_debug_exit_without_a_debugger_ends_the_run_and_says_where() -> None:
    made, outcomes = handlers()

    assert handle(made, FakeVcpu(pc=0x4000), ArmDebugExit(0xF200_0000, 0)) == "debug"

    (outcome,) = outcomes
    assert outcome.exit == INTERNAL_ERROR
    assert outcome.reason == "a debug exit at PC 0x4000, and no debugger is attached"


def test_writes_that_kvm_kept_back_reach_the_registers_in_memory() -> None:
    bus, register = MemoryBus(), Register()
    bus.add(UART_GPA, UART_SIZE, register)
    vcpu = FakeVcpu()
    vcpu.ring = [MmioExit(UART_GPA, 1, True, bytes([letter])) for letter in b"ok"]

    handlers(bus=bus)[0].coalesced(vcpu)

    assert register.writes == [(0, 1, ord("o")), (0, 1, ord("k"))]


def test_call_without_a_monitor_is_not_supported() -> None:
    vcpu = FakeVcpu(x0=0xC400_0190, x1=5)

    handle(handlers()[0], vcpu, call(0xC400_0190))

    assert (vcpu.x(0), vcpu.x(1)) == (2**64 - 1, 5)


def test_access_without_a_description_ends_the_run_with_its_address() -> None:
    made, outcomes = handlers()

    handle(made, FakeVcpu(pc=0x4008_0000), ArmNisvExit(0x47, 0x900_0000))

    (outcome,) = outcomes
    assert outcome.exit == INTERNAL_ERROR
    assert "PC 0x40080000" in outcome.reason and "GPA 0x9000000" in outcome.reason


def test_place_in_a_protected_guest_is_unknown() -> None:
    assert handlers()[0].where(FakeVcpu(is_protected=True)) == "an unknown PC"


@pytest.mark.parametrize(("event", "word"), [(1, POWEROFF), (2, RESET)])
def test_psci_off_and_reset_end_the_run(event: int, word: str) -> None:
    made, outcomes = handlers()

    handle(made, FakeVcpu(), SystemEventExit(event, ()))

    assert [outcome.exit for outcome in outcomes] == [word]


def test_reset_is_the_boards_which_tells_a_panic_from_a_wish() -> None:
    made, outcomes = handlers()

    handle(made, FakeVcpu(), SystemEventExit(2, ()))

    assert outcomes == [Outcome(RESET, "the board's")]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_register_in_memory_is_reached_at_every_size(size: int) -> None:
    bus, device = MemoryBus(), Register()
    bus.add(0x900_0000, 0x1000, device)
    made, _ = handlers(bus=bus)
    vcpu = FakeVcpu()

    handle(made, vcpu, MmioExit(0x900_0008, size, True, b"\1".ljust(size, b"\0")))
    handle(made, vcpu, MmioExit(0x900_0008, size, False, b""))

    assert device.writes == [(8, size, 1)]
    assert vcpu.answer == bytes.fromhex("8877665544332211")[:size]


def test_guest_with_registers_only_reaches_them() -> None:
    bus, device = MemoryBus(), Register()
    bus.add(0x1000, 0x1000, device)

    handle(without_ports(bus), FakeVcpu(), MmioExit(0x1004, 4, True, b"\5\0\0\0"))

    assert device.writes == [(4, 4, 5)]
