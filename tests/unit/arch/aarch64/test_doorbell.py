"""The doorbell's registers in memory: who may ask for what under which scheme."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, cast

import pytest

from kvm_bindings.aarch64 import Vm
from tests.support.memory import guest_memory
from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.board import ArmBoard
from vmm.arch.aarch64.guests import LinuxGuest, PayloadGuest
from vmm.arch.aarch64.platform import ArmPlatform
from vmm.arch.options import GuestOptions
from vmm.core.errors import PrivateAccess
from vmm.core.events import ConversionRequest
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.bus import MemoryBus, PortDevice
from vmm.exits.handlers import bank_of
from vmm.memory.guest_memory import GuestMemory

RAM = Range(layout.RAM_START, 64 * PAGE_SIZE)
FRAME, PAGES, COMMAND, RESULT = 0x00, 0x04, 0x08, 0x0C
SHARE, HOST_CHECK = 1, 3
NOWHERE: Any = None


class FakeVm:
    """Takes everything, has nothing."""

    def create_device(self, kind: int) -> Any:
        return self

    def set_attr(self, *attribute: Any) -> None: ...

    def check_extension(self, capability: int) -> int:
        return 0


class FakeBoard:
    """A bus, and nothing on it."""

    def __init__(self) -> None:
        self.registers = MemoryBus()

    def reset(self) -> None: ...


class FakeConverter:
    """Says yes, and remembers to what."""

    def __init__(self) -> None:
        self.requests: list[ConversionRequest] = []

    def convert(self, request: ConversionRequest) -> int:
        self.requests.append(request)
        return 0


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with guest_memory(RAM, ram=(RAM,)) as made:
        yield made


def rung(memory: GuestMemory, guest: Any, scheme: str) -> tuple[int, list[ConversionRequest]]:
    """vCPU 1 asks for a share; (the answer, what reached the converter)."""
    bank, converter = the_bank(memory, guest, scheme)
    for register, value in ((FRAME, RAM.start >> 12), (PAGES, 2), (COMMAND, SHARE)):
        bank.write(register, 4, value)
    return bank.read(RESULT, 4), converter.requests


def the_bank(memory: Any, guest: Any, scheme: str) -> tuple[PortDevice, FakeConverter]:
    """vCPU 1's registers, and the converter behind them."""
    is_private = scheme != "none"
    platform = ArmPlatform(
        cast(Vm, FakeVm()), guest, GuestOptions(64 << 20, 2, "", is_private=is_private), scheme
    )
    board, converter = FakeBoard(), FakeConverter()
    platform.exit_handlers(
        cast(ArmBoard, board), memory, cast(Any, converter), lambda outcome: None
    )
    found = board.registers.find(layout.DOORBELL_GPA)
    assert found is not None
    return bank_of(found[0], 1), converter


def payload() -> PayloadGuest:
    return PayloadGuest(GuestOptions(64 << 20, 2, "", is_private=True))


def test_payload_asks_through_registers(memory: GuestMemory) -> None:
    answer, (request,) = rung(memory, payload(), "remap")

    assert answer == 0
    assert (request.gpa, request.pages, request.vcpu) == (RAM.start, 2, 1)
    assert request.doorbell == "mmio"


def test_payload_of_a_protected_guest_is_sent_to_the_hypervisor(memory: GuestMemory) -> None:
    answer, requests = rung(memory, payload(), "pkvm")

    assert answer == -errno.EOPNOTSUPP & 0xFFFF_FFFF
    assert requests == []


class Forbidden:
    """Guest memory that refuses everything, and remembers where."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def pread(self, size: int, gpa: int) -> bytes:
        self.asked.append(gpa)
        raise PrivateAccess("not yours")


@pytest.mark.parametrize(
    ("scheme", "bit"), [("remap", 0), ("pkvm", 0), ("realm", 1 << layout.REALM_SHARED_BIT)]
)
def test_host_checks_the_page_at_the_address_that_its_devices_use(scheme: str, bit: int) -> None:
    memory = Forbidden()
    bank, _ = the_bank(memory, payload(), scheme)

    for register, value in ((FRAME, RAM.start >> 12), (PAGES, 1), (COMMAND, HOST_CHECK)):
        bank.write(register, 4, value)

    assert memory.asked[:1] == [RAM.start | bit]
    assert bank.read(RESULT, 4) == -errno.EACCES & 0xFFFF_FFFF


@pytest.mark.parametrize(("scheme", "linux"), [("none", False), ("realm", True)])
def test_guests_without_a_doorbell_reach_no_converter(
    memory: GuestMemory, scheme: str, linux: bool
) -> None:
    options = GuestOptions(64 << 20, 2, "", is_private=True)
    guest = LinuxGuest(options, NOWHERE, None) if linux else payload()

    answer, requests = rung(memory, guest, scheme)

    assert answer == 0xFFFF_FFFF
    assert requests == []
