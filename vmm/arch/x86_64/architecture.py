"""x86-64, see vmm.arch.protocol. Light to import: what a run may do without is imported late."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from vmm.arch.x86_64 import layout
from vmm.core.lean_typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from kvm_bindings import System, Vm, x86_64
    from vmm.arch.debug import GuestDebug
    from vmm.arch.guest_cpu import Gate, GuestCpu
    from vmm.arch.options import GuestOptions
    from vmm.arch.protocol import Architecture, Guest, OpenedKernel
    from vmm.arch.x86_64.platform import X86Platform
    from vmm.boot.source import Source
    from vmm.core.ranges import Range
    from vmm.devices.bus import PortDevice
    from vmm.exits.handlers import ExitHandlers
    from vmm.host.capability import Capability
    from vmm.host.probes.micro_guest import MicroGuest, Verb

_KVM_X86_DEFAULT_VM, _KVM_X86_SW_PROTECTED_VM = 0, 1


class X86:
    """Guests of a PC's shape: ports, 8259 and IOAPIC, ACPI."""

    name = "x86_64"
    lab = "pyvmm lab"
    without_kvm = "its module is not loaded (modprobe kvm-intel or kvm-amd)"
    schemes = ("attributes", "in-place", "cbit", "remap")
    largest_memory = layout.LARGEST_MEMORY
    # KVM_X86_..._VM in arch/x86/include/uapi/asm/kvm.h.
    vm_types = {0: "default", 1: "sw-protected", 2: "sev", 3: "sev-es", 4: "snp", 5: "tdx"}

    # -- the host's KVM -----------------------------------------------------------------------

    @property
    def needed(self) -> Sequence[tuple[str, int]]:
        from kvm_bindings.ioctls import KVM_CAP_IRQCHIP
        from kvm_bindings.x86_64 import ioctls

        return (
            ("KVM_CAP_IRQCHIP", KVM_CAP_IRQCHIP),
            ("KVM_CAP_PIT2", ioctls.KVM_CAP_PIT2),
            ("KVM_CAP_EXT_CPUID", ioctls.KVM_CAP_EXT_CPUID),
        )

    def open_system(self, path: str) -> System:
        from kvm_bindings.x86_64 import System

        return System(path)

    def vm_type(self, scheme: str) -> int:
        by_kvm = scheme in ("attributes", "in-place")
        return _KVM_X86_SW_PROTECTED_VM if by_kvm else _KVM_X86_DEFAULT_VM

    def prepare_vm(self, vm: Vm, scheme: str) -> None:
        """Nothing: what the schemes need is asked of X86Platform, or tried by choose."""

    def private_bit(self, system: System, ram_end: int) -> int:
        from vmm.arch.x86_64.cpuid import choose_c_bit

        return choose_c_bit(_x86(system).supported_cpuid(), ram_end)

    def check_doorbell(self, system: System, guest: Guest) -> None:
        from vmm.arch.x86_64.doorbells import HYPERCALL_NAME

        if guest.doorbell == HYPERCALL_NAME:
            from vmm.arch.x86_64.probes.hypercall import require_working_hypercalls

            require_working_hypercalls(_x86(system))

    def choose_loading(
        self, system: System, guest: Guest, private_memory: str, scheme: str
    ) -> None:
        from vmm.arch.x86_64.guests import LinuxGuest

        fits = private_memory in ("auto", "guest_memfd") and scheme in ("auto", "cbit")
        if isinstance(guest, LinuxGuest) and fits:
            from vmm.arch.x86_64.probes.strict import choose_loading

            choose_loading(_x86(system), guest, by_name=private_memory != "auto")

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
        from vmm.arch.x86_64.micro_guest import AREA_GPA, VERBS, MicroGuest

        registers = {"rdi": address or AREA_GPA, "rsi": word}
        # In user mode, which no host interprets.
        return MicroGuest(
            _x86(system), VERBS[verb], "user", registers=registers, vm_type=vm_type, seconds=seconds
        )

    def capabilities(self) -> Sequence[Capability]:
        from vmm.arch.x86_64.capabilities import capabilities

        return capabilities(self)

    # -- guests -------------------------------------------------------------------------------

    def ram_ranges(self, size: int) -> list[Range]:
        return layout.ram_ranges(size)

    def open_kernel(self, path: str) -> OpenedKernel:
        from vmm.arch.x86_64.kernel import OpenedKernel

        return OpenedKernel(path)

    def linux_guest(
        self, options: GuestOptions, kernel: OpenedKernel, initrd: Source | None
    ) -> Guest:
        from vmm.arch.x86_64.guests import LinuxGuest

        return LinuxGuest(options, kernel, initrd)

    def restored_guest(
        self, options: GuestOptions, doorbell: str, private: Sequence[Range]
    ) -> Guest:
        from vmm.arch.x86_64.guests import RestoredGuest

        return RestoredGuest(options, doorbell, private)

    def payload_guest(self, options: GuestOptions) -> Guest:
        from vmm.arch.x86_64.guests import PayloadGuest

        return PayloadGuest(options)

    def debug(self, system: System, scheme: str = "none") -> GuestDebug:
        from vmm.arch.x86_64.debug import x86_debug

        return x86_debug(_x86(system))

    def with_bench_guest(self) -> Architecture:
        from vmm.arch.x86_64.bench_guest import WithBenchGuest

        return WithBenchGuest()

    def measure(
        self, guest: Guest, ram: Sequence[Range], functions: Sequence[str], bit: int
    ) -> dict[str, Any]:
        from vmm.arch.x86_64.guests import LinuxGuest
        from vmm.core.errors import UsageError

        if not isinstance(guest, LinuxGuest):
            raise UsageError("measure needs --kernel: the embedded payload is loaded by the host")
        if guest.unfit_to_load_itself is not None:
            raise UsageError(f"measure: {guest.unfit_to_load_itself}; leave that out")
        guest.load_itself()
        guest.finish_opening()
        return guest.measured(list(ram), 1 << bit, functions).as_dict()

    def platform(
        self, system: System, vm: Vm, guest: Guest, options: GuestOptions, scheme: str
    ) -> X86Platform:
        from vmm.arch.x86_64.platform import X86Platform

        return X86Platform(_x86(system), cast("x86_64.Vm", vm), guest, options)

    def handlers_of_done(self, device: PortDevice) -> ExitHandlers:
        from vmm.arch.x86_64.exits import only_ports
        from vmm.arch.x86_64.micro_guest import DONE_PORT
        from vmm.devices.bus import PortBus

        ports = PortBus()
        ports.add(DONE_PORT, 1, device)
        return only_ports(ports)

    def guest_cpus(
        self, system: System, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
    ) -> AbstractContextManager[Sequence[GuestCpu]]:
        from vmm.arch.x86_64.guest_cpu import guest_cpus

        return guest_cpus(_x86(system), cast("x86_64.Vm", vm), count, ram, alias, gate)


def _x86(system: System) -> x86_64.System:
    """What `open_system` has opened, as what it is."""
    return cast("x86_64.System", system)


ARCHITECTURE: Architecture = X86()
