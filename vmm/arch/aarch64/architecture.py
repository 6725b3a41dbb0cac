"""arm64, see vmm.arch.protocol. Light to import: what a run may do without is imported late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from vmm.arch.aarch64 import layout
from vmm.core.errors import HostError, UsageError
from vmm.core.lean_typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from kvm_bindings import System, Vm, aarch64
    from vmm.arch.aarch64.platform import ArmPlatform
    from vmm.arch.debug import GuestDebug
    from vmm.arch.guest_cpu import Gate, GuestCpu
    from vmm.arch.options import GuestOptions
    from vmm.arch.protocol import Architecture, Guest, OpenedKernel
    from vmm.boot.source import Source
    from vmm.core.ranges import Range
    from vmm.devices.bus import PortDevice
    from vmm.exits.handlers import ExitHandlers
    from vmm.host.capability import Capability
    from vmm.host.probes.micro_guest import MicroGuest, Verb

_DEFAULT, _PROTECTED = 0, 1 << 31  # KVM_VM_TYPE_ARM_PROTECTED; both with layout.IPA_BITS


class Arm64:
    """Guests of the shape of a virtual board: GICv3, device tree, registers in memory."""

    name = "aarch64"
    lab = "pyvmm lab --host arm64 on an x86-64 machine"
    without_kvm = "Linux was started at EL1 or with kvm-arm.mode=none"
    schemes = ("pkvm", "realm", "remap")
    largest_memory = layout.LARGEST_MEMORY
    vm_types: Mapping[int, str] = {_DEFAULT: "default", _PROTECTED: "protected"}

    # -- the host's KVM -----------------------------------------------------------------------

    @property
    def needed(self) -> Sequence[tuple[str, int]]:
        from kvm_bindings import ioctls
        from kvm_bindings.aarch64 import ioctls as arm

        return (
            ("KVM_CAP_IRQCHIP", ioctls.KVM_CAP_IRQCHIP),
            ("KVM_CAP_DEVICE_CTRL", ioctls.KVM_CAP_DEVICE_CTRL),
            ("KVM_CAP_ONE_REG", ioctls.KVM_CAP_ONE_REG),
            ("KVM_CAP_ARM_PSCI_0_2", arm.KVM_CAP_ARM_PSCI_0_2),
        )

    def open_system(self, path: str) -> System:
        from kvm_bindings.aarch64 import System

        return System(path)

    def vm_type(self, scheme: str) -> int:
        return _PROTECTED if scheme == "pkvm" else _DEFAULT

    def prepare_vm(self, vm: Vm, scheme: str) -> None:
        """Have KVM hand a realm's calls to its monitor on to us."""
        if scheme != "realm":
            return
        from kvm_bindings.aarch64 import ioctls
        from vmm.arch.aarch64 import rsi

        cast("aarch64.Vm", vm).filter_smccc(
            rsi.FIRST_FUNCTION, rsi.FUNCTIONS, ioctls.KVM_SMCCC_FILTER_FWD_TO_USER
        )

    def private_bit(self, system: System, ram_end: int) -> int:
        """The bit of a realm's *shared* addresses: here the other side has none."""
        if ram_end > 1 << layout.REALM_SHARED_BIT:
            raise HostError(
                f"guest RAM ends at {ram_end:#x}, above address bit {layout.REALM_SHARED_BIT}; "
                "use less --mem"
            )
        return layout.REALM_SHARED_BIT

    def choose_loading(
        self, system: System, guest: Guest, private_memory: str, scheme: str
    ) -> None:
        """Nothing: the host loads arm64's guests."""

    def check_doorbell(self, system: System, guest: Guest) -> None:
        """Registers in memory always work; whether KVM passes a realm's calls on is found out
        when its VM is made (`prepare_vm`)."""

    def micro_guest(
        self,
        system: System,
        verb: Verb,
        *,
        address: int = 0,
        word: int = 0,
        vm_type: int = 0,
        seconds: float | None = None,
    ) -> MicroGuest:
        from vmm.arch.aarch64.micro_guest import micro_guest

        return micro_guest(
            _arm(system), verb, address=address, word=word, vm_type=vm_type, seconds=seconds
        )

    def capabilities(self) -> Sequence[Capability]:
        from vmm.arch.aarch64.capabilities import capabilities

        return capabilities(self)

    # -- guests -------------------------------------------------------------------------------

    def ram_ranges(self, size: int) -> list[Range]:
        return layout.ram_ranges(size)

    def open_kernel(self, path: str) -> OpenedKernel:
        from vmm.arch.aarch64.kernel import OpenedKernel

        return OpenedKernel(path)

    def linux_guest(
        self, options: GuestOptions, kernel: OpenedKernel, initrd: Source | None
    ) -> Guest:
        from vmm.arch.aarch64.guests import LinuxGuest

        return LinuxGuest(options, kernel, initrd)

    def restored_guest(
        self, options: GuestOptions, doorbell: str, private: Sequence[Range]
    ) -> Guest:
        raise UsageError("--restore: only x86-64 guests can be restored so far")

    def payload_guest(self, options: GuestOptions) -> Guest:
        from vmm.arch.aarch64.guests import PayloadGuest

        return PayloadGuest(options)

    def debug(self, system: System, scheme: str = "none") -> GuestDebug:
        from vmm.arch.aarch64.debug import arm64_debug

        return arm64_debug(_arm(system), self.vm_type(scheme))

    def with_bench_guest(self) -> Architecture:
        raise HostError("there is no bench guest for arm64; measure on an x86-64 machine")

    def measure(
        self, guest: Guest, ram: Sequence[Range], functions: Sequence[str], bit: int
    ) -> dict[str, Any]:
        raise UsageError("measure: arm64 guests are loaded by the host, which measures nothing")

    def platform(
        self, system: System, vm: Vm, guest: Guest, options: GuestOptions, scheme: str
    ) -> ArmPlatform:
        from vmm.arch.aarch64.platform import ArmPlatform

        return ArmPlatform(cast("aarch64.Vm", vm), guest, options, scheme)

    def handlers_of_done(self, device: PortDevice) -> ExitHandlers:
        from vmm.arch.aarch64.exits import without_ports
        from vmm.arch.aarch64.micro_guest import DONE_GPA
        from vmm.devices.bus import MEMORY_PAGE, MemoryBus

        registers = MemoryBus()
        registers.add(DONE_GPA, MEMORY_PAGE, device)
        return without_ports(registers)

    def guest_cpus(
        self, system: System, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
    ) -> AbstractContextManager[Sequence[GuestCpu]]:
        from vmm.arch.aarch64.guest_cpu import guest_cpus

        return guest_cpus(_arm(system), cast("aarch64.Vm", vm), count, ram, alias, gate)


def _arm(system: System) -> aarch64.System:
    """What `open_system` has opened, as what it is."""
    return cast("aarch64.System", system)


ARCHITECTURE: Architecture = Arm64()
