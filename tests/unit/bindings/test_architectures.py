"""Classes of each architecture, devices, registers and routes: what reaches the kernel.

The kernel is a function of the test's that sees each ioctl's number and its structure.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kvm_bindings._kvm import ffi

import kvm_bindings
from kvm_bindings import (
    KvmError,
    MessageRoute,
    Vcpu,
    Vm,
    aarch64,
    ioctls,
    owned_fd,
    x86_64,
)
from kvm_bindings.aarch64 import ioctls as arm64
from kvm_bindings.aarch64.registers import CORE_REGISTERS
from kvm_bindings.device import Device

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
U32, U64, U128 = (size << 52 for size in (2, 3, 4))  # KVM_REG_SIZE_


class Kernel:
    """Answers ioctls with numbers by `answers` (else 0), those with structures by `pointer`."""

    def __init__(self) -> None:
        self.values: list[tuple[int, int]] = []
        self.answers: dict[int, Callable[[], int]] = {}
        self.pointer: Callable[[int, Any], int] = lambda request, argument: 0

    def pyvmm_ioctl_value(self, fd: int, request: int, value: int) -> int:
        self.values.append((request, value))
        return self.answers.get(request, lambda: 0)()

    def pyvmm_ioctl_pointer(self, fd: int, request: int, argument: Any) -> int:
        return self.pointer(request, argument)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(owned_fd, "lib", made)
    return made


@pytest.fixture
def page_fd() -> Iterator[int]:
    fd = os.memfd_create("kvm_run")
    os.truncate(fd, 3 * PAGE_SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def vcpu(page_fd: int) -> Iterator[Vcpu]:
    made = Vcpu(os.dup(page_fd), 3, 3 * PAGE_SIZE)
    yield made
    made.close()


@pytest.fixture
def arm64_vcpu(page_fd: int) -> Iterator[aarch64.Vcpu]:
    made = aarch64.Vcpu(os.dup(page_fd), 3, 3 * PAGE_SIZE)
    yield made
    made.close()


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Vm(os.memfd_create("vm"), 3 * PAGE_SIZE) as made:
        yield made


@pytest.fixture
def device() -> Iterator[Device]:
    with Device(os.memfd_create("device"), arm64.KVM_DEV_TYPE_ARM_VGIC_V3) as made:
        yield made


# -- classes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [kvm_bindings, x86_64, aarch64])
def test_system_makes_vms_and_vcpus_of_its_own_architecture(
    architecture: Any, kernel: Kernel, page_fd: int
) -> None:
    kernel.answers = {
        ioctls.KVM_GET_VCPU_MMAP_SIZE: lambda: 3 * PAGE_SIZE,
        ioctls.KVM_CREATE_VM: lambda: os.dup(page_fd),
        ioctls.KVM_CREATE_VCPU: lambda: os.dup(page_fd),
    }

    with architecture.System(os.devnull) as system, system.create_vm(5) as vm:
        vcpu = vm.create_vcpu(2)
        vcpu.close()

    assert isinstance(system, kvm_bindings.System)
    assert (type(vm), type(vcpu)) == (architecture.Vm, architecture.Vcpu)
    assert (ioctls.KVM_CREATE_VM, 5) in kernel.values
    assert (ioctls.KVM_CREATE_VCPU, 2) in kernel.values
    assert vcpu.index == 2


# -- arm64 --------------------------------------------------------------------------------------


def test_init_sets_the_bits_of_the_features(arm64_vcpu: aarch64.Vcpu, kernel: Kernel) -> None:
    seen: list[tuple[int, int, list[int]]] = []

    def look(request: int, argument: Any) -> int:
        seen.append((request, argument.target, list(argument.features)))
        return 0

    kernel.pointer = look

    arm64_vcpu.init(5, arm64.KVM_ARM_VCPU_POWER_OFF, arm64.KVM_ARM_VCPU_PSCI_0_2, 37)

    assert seen == [(arm64.KVM_ARM_VCPU_INIT, 5, [0b101, 1 << 5, 0, 0, 0, 0, 0])]


def test_init_that_is_refused_says_what_was_asked(arm64_vcpu: aarch64.Vcpu, kernel: Kernel) -> None:
    kernel.pointer = lambda request, argument: -errno.EINVAL

    with pytest.raises(
        KvmError, match=r"KVM_ARM_VCPU_INIT\(vcpu=3, target=5, features=\(2, 3\)\) failed: EINVAL"
    ):
        arm64_vcpu.init(5, 2, 3)


def test_guest_debug_takes_pairs_of_registers(arm64_vcpu: aarch64.Vcpu, kernel: Kernel) -> None:
    seen: list[tuple[object, ...]] = []

    def look(request: int, argument: Any) -> int:
        registers = argument.arch
        lists = [registers.dbg_bcr, registers.dbg_bvr, registers.dbg_wcr, registers.dbg_wvr]
        seen.append((request, argument.control, *(list(each)[:3] for each in lists)))
        return 0

    kernel.pointer = look

    arm64_vcpu.set_guest_debug(
        ioctls.KVM_GUESTDBG_ENABLE, [(1, 0x1000), (2, 0x2000)], [(3, 0x3000)]
    )

    assert seen == [
        (arm64.KVM_SET_GUEST_DEBUG, 1, [1, 2, 0], [0x1000, 0x2000, 0], [3, 0, 0], [0x3000, 0, 0])
    ]


def test_guest_debug_that_is_refused_says_what_was_asked(
    arm64_vcpu: aarch64.Vcpu, kernel: Kernel
) -> None:
    kernel.pointer = lambda request, argument: -errno.EINVAL

    with pytest.raises(
        KvmError, match=r"KVM_SET_GUEST_DEBUG\(vcpu=3, control=0x5\) failed: EINVAL"
    ):
        arm64_vcpu.set_guest_debug(5)


def test_preferred_target_is_the_kernels(kernel: Kernel) -> None:
    def answer(request: int, argument: Any) -> int:
        assert request == arm64.KVM_ARM_PREFERRED_TARGET
        argument.target = 5
        return 0

    kernel.pointer = answer

    with aarch64.Vm(os.memfd_create("vm"), 3 * PAGE_SIZE) as vm:
        assert vm.preferred_target() == 5


# -- registers ----------------------------------------------------------------------------------


def test_filter_of_calls_names_functions_and_what_becomes_of_them(kernel: Kernel) -> None:
    seen: list[tuple[int, int, int, bytes]] = []

    def look(request: int, argument: Any) -> int:
        data = bytes(ffi.buffer(ffi.cast("char *", argument.addr), 24))
        seen.append((request, argument.group, argument.attr, data))
        return 0

    kernel.pointer = look
    with aarch64.Vm(os.memfd_create("vm"), PAGE_SIZE) as vm:
        vm.filter_smccc(0xC400_0190, 16, arm64.KVM_SMCCC_FILTER_FWD_TO_USER)

    filter_bytes = bytes.fromhex("900100c4 10000000 02").ljust(24, b"\0")
    assert seen == [(ioctls.KVM_SET_DEVICE_ATTR, 0, 0, filter_bytes)]


def test_filter_that_is_refused_says_what_was_asked(kernel: Kernel) -> None:
    kernel.pointer = lambda request, argument: -errno.EINVAL

    with (
        aarch64.Vm(os.memfd_create("vm"), PAGE_SIZE) as vm,
        pytest.raises(KvmError, match=r"base=0xc4000190, functions=16, action=2\) failed: EINVAL"),
    ):
        vm.filter_smccc(0xC400_0190, 16, 2)


@pytest.mark.parametrize(("size_bits", "size"), [(U32, 4), (U64, 8), (U128, 16)])
def test_register_is_as_large_as_its_id_says(
    vcpu: Vcpu, kernel: Kernel, size_bits: int, size: int
) -> None:
    value = int.from_bytes(bytes(range(1, size + 1)), "little")
    register = CORE_REGISTERS["pc"] & ~U64 | size_bits
    stored: list[bytes] = []

    def keep(request: int, argument: Any) -> int:
        assert argument.id == register
        if request == ioctls.KVM_SET_ONE_REG:
            stored.append(bytes(ffi.buffer(argument.addr, size)))
        else:
            ffi.memmove(argument.addr, stored[0], size)
        return 0

    kernel.pointer = keep

    vcpu.set_one_reg(register, value)

    assert stored == [bytes(range(1, size + 1))]
    assert vcpu.get_one_reg(register) == value


def test_register_that_holds_no_such_value_is_not_written(vcpu: Vcpu, kernel: Kernel) -> None:
    def refuse(request: int, argument: Any) -> int:
        raise AssertionError("the kernel was asked")

    kernel.pointer = refuse

    with pytest.raises(OverflowError):
        vcpu.set_one_reg(CORE_REGISTERS["x0"], 1 << 64)


def test_register_that_is_not_there_is_named(vcpu: Vcpu, kernel: Kernel) -> None:
    kernel.pointer = lambda request, argument: -errno.ENOENT

    with pytest.raises(
        KvmError, match=r"KVM_GET_ONE_REG\(vcpu=3, id=0x6030000000100040\) failed: ENOENT"
    ):
        vcpu.get_one_reg(CORE_REGISTERS["pc"])
    with pytest.raises(
        KvmError, match=r"KVM_SET_ONE_REG\(vcpu=3, id=0x6030000000100040, value=0x10\) failed"
    ):
        vcpu.set_one_reg(CORE_REGISTERS["pc"], 16)


# -- devices ------------------------------------------------------------------------------------


def test_device_is_made_of_the_fd_that_the_kernel_fills_in(vm: Vm, kernel: Kernel) -> None:
    fd = os.memfd_create("device")

    def create(request: int, argument: Any) -> int:
        assert request == ioctls.KVM_CREATE_DEVICE
        assert (argument.type, argument.flags) == (7, 0)
        argument.fd = fd
        return 0

    kernel.pointer = create

    device = vm.create_device(7)

    assert (device.fd, device.device_type) == (fd, 7)
    device.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(("result", "offered"), [(0, True), (-errno.ENODEV, False)])
def test_asking_for_a_device_creates_none(
    vm: Vm, kernel: Kernel, result: int, offered: bool
) -> None:
    def test(request: int, argument: Any) -> int:
        assert argument.flags == ioctls.KVM_CREATE_DEVICE_TEST
        return result

    kernel.pointer = test

    assert vm.can_create_device(8) is offered


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (0x0800_0000, bytes([0, 0, 0, 8, 0, 0, 0, 0])),
        (64, bytes([64, 0, 0, 0, 0, 0, 0, 0])),
        (b"\1\2\3", b"\1\2\3"),
        (None, None),
    ],
)
def test_attribute_is_set_to_a_number_to_bytes_or_to_nothing(
    device: Device, kernel: Kernel, value: int | bytes | None, data: bytes | None
) -> None:
    seen = []

    def look(request: int, argument: Any) -> int:
        there = None
        if argument.addr != ffi.NULL:
            there = bytes(ffi.buffer(argument.addr, len(data or b"")))
        seen.append((request, argument.group, argument.attr, there))
        return 0

    kernel.pointer = look

    device.set_attr(4, 1 << 40, value)

    assert seen == [(ioctls.KVM_SET_DEVICE_ATTR, 4, 1 << 40, data)]


def test_attribute_that_is_read_sees_the_index_and_gives_the_answer(
    device: Device, kernel: Kernel
) -> None:
    def answer(request: int, argument: Any) -> int:
        assert (request, argument.group, argument.attr) == (ioctls.KVM_GET_DEVICE_ATTR, 0, 5)
        word = ffi.cast("uint64_t *", argument.addr)
        word[0] = word[0] << 16
        return 0

    kernel.pointer = answer

    assert device.get_attr(0, 5, 3) == 3 << 16


@pytest.mark.parametrize(("result", "known"), [(0, True), (-errno.ENXIO, False)])
def test_attribute_is_known_or_not(
    device: Device, kernel: Kernel, result: int, known: bool
) -> None:
    kernel.pointer = lambda request, argument: result

    assert device.has_attr(0, 99) is known


@pytest.mark.parametrize(
    "call",
    [
        lambda device: device.set_attr(3, 0, 64),
        lambda device: device.get_attr(3, 0),
        lambda device: device.has_attr(3, 0),
    ],
)
def test_attribute_that_is_refused_says_which(
    device: Device, kernel: Kernel, call: Callable[[Device], object]
) -> None:
    kernel.pointer = lambda request, argument: -errno.EBUSY

    with pytest.raises(KvmError, match=r"DEVICE_ATTR\(device=7, group=3, attr=0x0\) failed: EBUSY"):
        call(device)


# -- routes and writes that don't exit ----------------------------------------------------------


def test_message_routes_carry_the_device_id_where_there_is_one(vm: Vm, kernel: Kernel) -> None:
    seen = []

    def look(request: int, table: Any) -> int:
        for entry in table.entries[0 : table.nr]:
            msi = entry.u.msi
            address = msi.address_hi << 32 | msi.address_lo
            seen.append((entry.gsi, entry.type, entry.flags, address, msi.data, msi.devid))
        return 0

    kernel.pointer = look

    vm.set_gsi_routing(
        [],
        [
            MessageRoute(24, 0xFEE0_1000, 0x41),
            MessageRoute(25, 0x1_0808_0040, 3, 0x10),
            MessageRoute(26, 0x0808_0040, 0, 0),
        ],
    )

    msi, valid = ioctls.KVM_IRQ_ROUTING_MSI, ioctls.KVM_MSI_VALID_DEVID
    assert seen == [
        (24, msi, 0, 0xFEE0_1000, 0x41, 0),
        (25, msi, valid, 0x1_0808_0040, 3, 0x10),
        (26, msi, valid, 0x0808_0040, 0, 0),
    ]


@pytest.mark.parametrize(("port", "flags"), [(True, 0b10), (False, 0)])
def test_ioeventfd_is_for_a_port_or_a_gpa(vm: Vm, kernel: Kernel, port: bool, flags: int) -> None:
    seen = []

    def look(request: int, event: Any) -> int:
        seen.append((event.addr, event.len, event.fd, event.flags, event.datamatch))
        return 0

    kernel.pointer = look

    vm.ioeventfd(9, 0xC080, 2, port=port)
    vm.ioeventfd(9, 0xC080, 2, 1, port=port, deassign=True)

    assert seen == [(0xC080, 2, 9, flags, 0), (0xC080, 2, 9, flags | 0b101, 1)]


@pytest.mark.parametrize(("port", "word"), [(True, "port"), (False, "gpa")])
def test_ioeventfd_that_is_refused_says_what_the_address_is(
    vm: Vm, kernel: Kernel, port: bool, word: str
) -> None:
    kernel.pointer = lambda request, event: -errno.EEXIST

    with pytest.raises(KvmError, match=rf"\(eventfd=9, {word}=0xc080, size=2, datamatch=None\)"):
        vm.ioeventfd(9, 0xC080, 2, port=port)


def test_coalesced_writes_are_asked_for_by_their_own_capability(kernel: Kernel) -> None:
    zones = []

    def look(request: int, zone: Any) -> int:
        zones.append((zone.addr, zone.size, zone.pio))
        return 0

    kernel.pointer = look
    kernel.answers = {ioctls.KVM_CHECK_EXTENSION: lambda: 1}

    with x86_64.Vm(os.memfd_create("vm"), 3 * PAGE_SIZE) as vm:
        made = [vm.coalesce_port_writes(0x70, 1), vm.coalesce_mmio_writes(0xD000_0000, 8)]

    assert made == [True, True]
    assert zones == [(0x70, 1, 1), (0xD000_0000, 8, 0)]
    assert [value for _, value in kernel.values] == [
        ioctls.KVM_CAP_COALESCED_PIO,
        ioctls.KVM_CAP_COALESCED_MMIO,
    ]


def test_coalesced_writes_without_the_capability_are_not_asked_for(vm: Vm, kernel: Kernel) -> None:
    kernel.pointer = lambda request, zone: -errno.ENOTTY

    assert vm.coalesce_mmio_writes(0xD000_0000, 8) is False
