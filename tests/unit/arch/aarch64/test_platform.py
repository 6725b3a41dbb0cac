"""arm64's share of a VM, against a VM that records what it is asked for."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from kvm_bindings import KvmError
from kvm_bindings.aarch64 import Vm, ioctls
from kvm_bindings.aarch64.registers import CORE_REGISTERS
from tests.support.fdt import Read, read_tree
from vmm.arch import architecture
from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.board import ArmBoard
from vmm.arch.aarch64.guests import LinuxGuest
from vmm.arch.aarch64.platform import ArmPlatform
from vmm.arch.options import GuestOptions
from vmm.boot.source import open_source
from vmm.core.errors import HostError, UsageError
from vmm.core.event_loop import EventLoop
from vmm.core.ranges import Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, LaunchMemory
from vmm.wiring.board import BoardParts
from vmm.wiring.interrupts import Lines

ARM64 = architecture("aarch64")
IMAGE = struct.pack("<8xQQQ24x4s4x", 0, 4 << 20, 0b1010, b"ARM\x64") + b"kernel"
TARGET = 5


def options(memory: int = 64 << 20, append: str = "quiet") -> GuestOptions:
    return GuestOptions(memory, 2, append, is_private=False)


OPTIONS = options()


class FakeDevice:
    """A device in the VM; its attributes go to the VM's journal."""

    def __init__(self, vm: FakeVm) -> None:
        self._vm = vm

    def set_attr(self, group: int, attr: int, value: int | None = None) -> None:
        self._vm.refuse("gic")
        self._vm.journal.append(("gic", group, attr, value))

    def close(self) -> None:
        self._vm.journal.append(("gic closed",))


class FakeVcpu:
    """A vCPU that keeps its features and registers."""

    def __init__(self, vm: FakeVm, index: int) -> None:
        self.index = index
        self.registers: dict[int, int] = {}
        self._vm = vm

    def init(self, target: int, *features: int) -> None:
        self._vm.journal.append(("vcpu", self.index, target, features))

    def set_one_reg(self, register: int, value: int) -> None:
        self.registers[register] = value

    def close(self) -> None:
        self._vm.journal.append(("vcpu closed", self.index))


class FakeVm:
    """Notes every call in order; refuses those that `refuses` names."""

    def __init__(self, *refuses: str, nisv: int = 1) -> None:
        self.journal: list[tuple[Any, ...]] = []
        self.irqfds: list[tuple[int, bool]] = []
        self.zones: list[tuple[int, int]] = []
        self._refuses = refuses
        self._nisv = nisv

    def refuse(self, what: str) -> None:
        if what in self._refuses:
            raise KvmError(what, errno.ENODEV)

    def create_device(self, kind: int) -> FakeDevice:
        self.refuse("create_device")
        self.journal.append(("device", kind))
        return FakeDevice(self)

    def filter_smccc(self, first: int, count: int, action: int) -> None:
        self.refuse("filter")
        self.journal.append(("filter", first, count, action))

    def check_extension(self, capability: int) -> int:
        return self._nisv if capability == ioctls.KVM_CAP_ARM_NISV_TO_USER else 0

    def coalesce_mmio_writes(self, gpa: int, size: int) -> bool:
        self.zones.append((gpa, size))
        return "zones" not in self._refuses

    def enable_cap(self, capability: int, *arguments: int) -> None:
        self.journal.append(("capability", capability))

    def preferred_target(self) -> int:
        return TARGET

    def create_vcpu(self, index: int) -> FakeVcpu:
        return FakeVcpu(self, index)

    def irqfd(self, eventfd: int, gsi: int, resamplefd: int | None = None) -> None:
        self.irqfds.append((gsi, resamplefd is not None))

    def names(self) -> list[Any]:
        return [entry[0] for entry in self.journal]


class AnyGuest:
    """A guest that is never loaded."""

    doorbell = "mmio"

    def learn(self, scheme: str) -> None:
        self.scheme = scheme


def platform(vm: FakeVm, guest: Any = None, scheme: str = "none") -> ArmPlatform:
    guest = guest or AnyGuest()
    return ArmPlatform(cast(Vm, vm), guest, OPTIONS, scheme)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[LinuxGuest]:
    (tmp_path / "Image").write_bytes(IMAGE)
    (tmp_path / "initrd").write_bytes(b"files" * 1000)
    made = LinuxGuest(
        OPTIONS,
        ARM64.open_kernel(str(tmp_path / "Image")),
        open_source(tmp_path / "initrd", "initrd"),
    )
    made.finish_opening()
    yield made
    made.close()


# -- what KVM is told -----------------------------------------------------------------------------


def test_interrupt_controller_is_at_its_place_before_vcpus_and_started_after_them() -> None:
    vm = FakeVm()
    made = platform(vm)

    with ExitStack() as opened:
        made.create_vcpus(2, 0, opened)

    of_gic = [entry for entry in vm.journal if entry[0] in ("device", "gic")]
    assert of_gic[:4] == [
        ("device", ioctls.KVM_DEV_TYPE_ARM_VGIC_V3),
        ("gic", 0, ioctls.KVM_VGIC_V3_ADDR_TYPE_DIST, layout.GIC_DISTRIBUTOR_GPA),
        ("gic", 0, ioctls.KVM_VGIC_V3_ADDR_TYPE_REDIST, layout.GIC_REDISTRIBUTORS_GPA),
        ("gic", ioctls.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, layout.INTERRUPTS),
    ]
    start = ("gic", ioctls.KVM_DEV_ARM_VGIC_GRP_CTRL, ioctls.KVM_DEV_ARM_VGIC_CTRL_INIT, None)
    assert vm.journal.index(of_gic[3]) < vm.names().index("vcpu")
    last_vcpu = max(at for at, name in enumerate(vm.names()) if name == "vcpu")
    assert vm.journal.index(start) > last_vcpu


def test_vcpus_but_the_first_wait_to_be_started() -> None:
    vm = FakeVm()
    with ExitStack() as opened:
        platform(vm).create_vcpus(3, 0, opened)

    psci, off = ioctls.KVM_ARM_VCPU_PSCI_0_2, ioctls.KVM_ARM_VCPU_POWER_OFF
    assert [entry for entry in vm.journal if entry[0] == "vcpu"] == [
        ("vcpu", 0, TARGET, (psci,)),
        ("vcpu", 1, TARGET, (psci, off)),
        ("vcpu", 2, TARGET, (psci, off)),
    ]
    assert vm.names()[-4:] == ["vcpu closed"] * 3 + ["gic closed"]


def test_calls_of_a_realm_are_passed_on() -> None:
    vm = FakeVm()

    ARM64.prepare_vm(cast(Vm, vm), "realm")

    assert vm.journal == [("filter", 0xC400_0190, 16, ioctls.KVM_SMCCC_FILTER_FWD_TO_USER)]


@pytest.mark.parametrize("scheme", ["none", "pkvm", "remap"])
def test_calls_of_other_guests_stay_kvms(scheme: str) -> None:
    vm = FakeVm()

    ARM64.prepare_vm(cast(Vm, vm), scheme)
    platform(vm, scheme=scheme)

    assert "filter" not in vm.names()


@pytest.mark.parametrize(("nisv", "asked"), [(1, True), (0, False)])
def test_accesses_without_a_description_are_asked_for_where_kvm_has_them(
    nisv: int, asked: bool
) -> None:
    vm = FakeVm(nisv=nisv)

    platform(vm)

    assert (("capability", ioctls.KVM_CAP_ARM_NISV_TO_USER) in vm.journal) is asked


def test_host_without_an_interrupt_controller_is_told_so() -> None:
    with pytest.raises(HostError, match="GICv3"), ExitStack() as opened:
        platform(FakeVm("create_device")).create_vcpus(1, 0, opened)


def test_interrupt_controller_that_is_refused_its_place_is_closed() -> None:
    vm = FakeVm("gic")

    with pytest.raises(HostError, match="no GICv3"), ExitStack() as opened:
        platform(vm).create_vcpus(1, 0, opened)

    assert vm.names()[-2:] == ["device", "gic closed"]


def test_protected_vms_have_a_type_of_their_own() -> None:
    assert ARM64.vm_type("pkvm") == ioctls.KVM_VM_TYPE_ARM_PROTECTED
    assert {ARM64.vm_type(scheme) for scheme in ("none", "realm", "remap")} == {0}
    assert set(ARM64.vm_types) == {0, ioctls.KVM_VM_TYPE_ARM_PROTECTED}


def test_shared_bit_of_realms_lies_above_ram_or_there_is_none() -> None:
    system: Any = None

    assert ARM64.private_bit(system, 256 << 30) == 39
    with pytest.raises(HostError, match="bit 39"):
        ARM64.private_bit(system, (1 << 39) + 4096)


# -- what is loaded -------------------------------------------------------------------------------


def loaded(guest: LinuxGuest, scheme: str) -> tuple[FakeVcpu, GuestMemory]:
    """The first vCPU and memory after loading; the caller closes the memory."""
    made = platform(FakeVm(), guest, scheme)
    ram = layout.ram_ranges(OPTIONS.memory)
    with ExitStack() as opened:
        made.create_vcpus(1, 0, opened)
    memory = GuestMemory(ram, MemfdBacking(ram[-1].end))
    made.load(LaunchMemory(memory), ram, 0, [])
    return cast(FakeVcpu, made.vcpus[0]), memory


def tree_of(vcpu: FakeVcpu, memory: GuestMemory) -> Read:
    place = vcpu.registers[CORE_REGISTERS["x0"]]
    size = int.from_bytes(memory.pread(8, place)[4:], "big")
    return read_tree(memory.pread(size, place))[0]


def test_linux_is_entered_at_its_image_with_its_tree_and_initrd(guest: LinuxGuest) -> None:
    vcpu, memory = loaded(guest, "none")
    try:
        entry = vcpu.registers[CORE_REGISTERS["pc"]]
        chosen = tree_of(vcpu, memory).at("/chosen")
        (start,) = chosen.addresses("linux,initrd-start")

        assert memory.pread(len(IMAGE), entry) == IMAGE
        assert memory.pread(5000, start) == b"files" * 1000
        assert chosen.addresses("linux,initrd-end") == [start + 5000]
        assert chosen.texts("bootargs") == ["console=ttyS0 panic=-1 quiet"]
        assert set(vcpu.registers) == {CORE_REGISTERS["pc"], CORE_REGISTERS["x0"]}
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("scheme", "method", "confined"),
    [("none", "hvc", False), ("realm", "smc", False), ("pkvm", "hvc", True)],
)
def test_linux_is_told_how_its_scheme_wants_it(
    guest: LinuxGuest, scheme: str, method: str, confined: bool
) -> None:
    vcpu, memory = loaded(guest, scheme)
    try:
        tree = tree_of(vcpu, memory)

        assert tree.at("/psci").texts("method") == [method]
        assert ("reserved-memory" in tree.children) is confined
    finally:
        memory.close()


def test_protected_linux_asks_the_hypervisor_and_other_guests_us(guest: LinuxGuest) -> None:
    platform(FakeVm(), guest, "realm")
    of_realm = guest.doorbell
    platform(FakeVm(), guest, "pkvm")

    assert (of_realm, guest.doorbell) == ("rsi", "pkvm")


def test_nothing_that_is_loaded_overlaps(guest: LinuxGuest) -> None:
    vcpu, memory = loaded(guest, "pkvm")
    try:
        tree = tree_of(vcpu, memory)
        (start,) = tree.at("/chosen").addresses("linux,initrd-start")
        (ram,) = layout.ram_ranges(OPTIONS.memory)
        places = [
            Range(layout.RAM_START, 4 << 20),
            Range(start, 5000),
            layout.tree_place(ram),
            layout.pool_place(ram),
        ]

        assert all(ram.contains(place) for place in places)
        assert not any(a.overlaps(b) for at, a in enumerate(places) for b in places[at + 1 :])
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("scheme", "memory", "slots"),
    [("none", 256, None), ("pkvm", 256, None), ("realm", 64, 2048), ("realm", 256, 7864),
     ("realm", 4096, 32768)],
)  # fmt: skip
def test_realm_gets_a_bounce_buffer_that_holds_disk_requests(
    tmp_path: Path, scheme: str, memory: int, slots: int | None
) -> None:
    (tmp_path / "Image").write_bytes(IMAGE)
    kernel = ARM64.open_kernel(str(tmp_path / "Image"))
    made = LinuxGuest(options(memory=memory << 20, append="swiotlb=9"), kernel, None)
    made.learn(scheme)

    made.finish_opening()

    words = made._command_line.split()
    wanted = [] if slots is None else [f"swiotlb={slots}"]
    assert [word for word in words if "swiotlb" in word] == [*wanted, "swiotlb=9"]
    made.close()


@pytest.mark.parametrize(("append", "message"), [("x" * 2040, "2063 bytes"), ("a\0b", "NUL")])
def test_command_line_that_linux_would_cut_is_refused(
    tmp_path: Path, append: str, message: str
) -> None:
    (tmp_path / "Image").write_bytes(IMAGE)
    kernel = ARM64.open_kernel(str(tmp_path / "Image"))
    made = LinuxGuest(options(append=append), kernel, None)

    with pytest.raises(UsageError, match=message):
        made.finish_opening()
    made.close()


def test_guest_too_small_for_its_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Image").write_bytes(IMAGE)
    kernel = ARM64.open_kernel(str(tmp_path / "Image"))
    made = LinuxGuest(options(memory=4 << 20), kernel, None)

    with pytest.raises(UsageError, match="use --mem"):
        made.finish_opening()
    made.close()


# -- the board ------------------------------------------------------------------------------------


def _nothing() -> None:
    """Nobody listens."""


@pytest.fixture
def board() -> Iterator[tuple[ArmBoard, list[bytes], FakeVm]]:
    vm, output = FakeVm(), list[bytes]()
    loop = EventLoop()
    with ExitStack() as opened:
        opened.callback(loop.close)
        lines = Lines(cast(Vm, vm), loop, opened)
        parts = BoardParts(
            cast(Vm, vm),
            loop,
            lines,
            opened,
            output=output.append,
            room=_nothing,
            power_off=_nothing,
            reset=_nothing,
        )
        yield platform(vm).make_board(parts), output, vm


def write(board: ArmBoard, gpa: int, size: int, value: int) -> None:
    found = board.registers.find(gpa)
    assert found is not None
    found[0].write(found[1], size, value)


def read(board: ArmBoard, gpa: int, size: int) -> int:
    found = board.registers.find(gpa)
    assert found is not None
    return found[0].read(found[1], size)


def test_board_prints_what_is_written_to_the_uart(
    board: tuple[ArmBoard, list[bytes], FakeVm],
) -> None:
    made, output, vm = board

    write(made, layout.UART_GPA, 1, ord("x"))

    assert output == [b"x"]
    assert vm.irqfds == [(layout.UART_SPI, False)]


def test_board_has_kvm_keep_back_what_is_written_to_the_uart_and_nothing_else(
    board: tuple[ArmBoard, list[bytes], FakeVm],
) -> None:
    made, _, vm = board

    assert vm.zones == [(layout.UART_GPA, 1)]
    assert made.coalesces_output is True


def test_board_has_clock_frame_and_host_bridge(
    board: tuple[ArmBoard, list[bytes], FakeVm],
) -> None:
    made, _, _ = board

    assert read(made, layout.RTC_GPA, 4) > 1_700_000_000
    assert read(made, layout.V2M_GPA + 8, 4) >> 16 == 64
    assert read(made, layout.PCI_ECAM_GPA + 8, 4) >> 8 == 0x06_0000
    assert read(made, layout.PCI_ECAM_GPA + (1 << 15), 4) == 0xFFFF_FFFF


def test_slots_registers_are_in_memory_and_lines_take_turns(
    board: tuple[ArmBoard, list[bytes], FakeVm],
) -> None:
    slots = [board[0].slot(number) for number in range(1, 32)]

    assert not any(slot.registers_in_io for slot in slots)
    assert {slot.gsi for slot in slots} == set(layout.PCI_INTX_SPIS)
    assert board[0].press_power_button() is False
