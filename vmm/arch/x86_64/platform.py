"""x86's share of one VM: the interrupt controllers, CPUID and MSRs, the PC around it, its exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from kvm_bindings.x86_64 import System, Vcpu, Vm, ioctls
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.cpuid import guest_cpuid
from vmm.arch.x86_64.doorbells import HYPERCALL_NAME, KVM_HC_MAP_GPA_RANGE, PORT_NAME
from vmm.core.errors import HostError
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.host.kvm import SEE_CHECK, in_lab

if TYPE_CHECKING:
    from vmm.arch.options import GuestOptions
    from vmm.arch.protocol import Guest
    from vmm.arch.x86_64.board import PcBoard
    from vmm.arch.x86_64.cpuid import CpuidEntry
    from vmm.arch.x86_64.exits import X86ExitHandlers
    from vmm.arch.x86_64.guests import LoadedGuest, X86Guest
    from vmm.arch.x86_64.vcpu_state import ChipState
    from vmm.conversion.transaction import Converter
    from vmm.core.lean_typing import Any
    from vmm.core.ranges import Range
    from vmm.core.saved import Saved, State
    from vmm.devices.bus import PortBus
    from vmm.devices.doorbell import DoorbellBank
    from vmm.exits.outcome import Outcome
    from vmm.memory.guest_memory import GuestMemory, LaunchMemory
    from vmm.wiring.board import Board, BoardParts


class X86Platform:
    """See vmm.arch.protocol.Platform."""

    def __init__(self, system: System, vm: Vm, guest: Guest, options: GuestOptions) -> None:
        """Creates what KVM wants before memory and vCPUs. Raises KvmError, HostError."""
        self._guest: X86Guest = guest  # type: ignore[assignment]  # x86's own, see X86.linux_guest
        self._vm = vm
        self._options = options
        self._supported_cpuid = system.supported_cpuid()
        self._hypercalls = guest.doorbell == HYPERCALL_NAME
        self.vcpus: list[Vcpu] = []
        self._msr_indices = system.msr_indices
        self._cpuids: list[list[CpuidEntry]] = []
        vm.set_identity_map_addr(layout.IDENTITY_MAP_GPA)
        vm.set_tss_addr(layout.TSS_ADDRESS_GPA)
        vm.create_irqchip()
        vm.create_pit2()
        if options.is_private:
            self._pass_requests_on()

    def _pass_requests_on(self) -> None:
        """Have KVM hand the guest's hypercalls and, for Linux, unknown MSRs to us."""
        if self._hypercalls:
            _require_exits(self._vm)
            self._vm.enable_cap(
                ioctls.KVM_CAP_X86_USER_SPACE_MSR,
                ioctls.KVM_MSR_EXIT_REASON_INVAL
                | ioctls.KVM_MSR_EXIT_REASON_UNKNOWN
                | ioctls.KVM_MSR_EXIT_REASON_FILTER,
            )
        wanted = 1 << KVM_HC_MAP_GPA_RANGE
        if self._vm.check_extension(ioctls.KVM_CAP_EXIT_HYPERCALL) & wanted:
            self._vm.enable_cap(ioctls.KVM_CAP_EXIT_HYPERCALL, wanted)

    def create_vcpus(self, count: int, alias: int, opened: ExitStack) -> None:
        announced = alias.bit_length() - 1 if self._hypercalls else -1
        c_bit = announced if announced >= 0 else None
        for index in range(count):
            vcpu = self._vm.create_vcpu(index)
            opened.callback(vcpu.close)
            # Before registers: KVM refuses EFER.LME to a vCPU whose CPUID doesn't have long mode.
            cpuid = guest_cpuid(self._supported_cpuid, index, count, c_bit=c_bit)
            vcpu.set_cpuid2(cpuid)
            self._cpuids.append(cpuid)
            if self._guest.msrs:
                vcpu.set_msrs(self._guest.msrs)
            self.vcpus.append(vcpu)

    def make_board(self, parts: BoardParts) -> PcBoard:
        from vmm.arch.x86_64.board import PcBoard

        return PcBoard(parts)

    def exit_handlers(
        self,
        board: Board,
        memory: GuestMemory,
        converter: Converter,
        stop: Callable[[Outcome], None],
    ) -> X86ExitHandlers:
        from vmm.arch.x86_64.exits import X86ExitHandlers
        from vmm.arch.x86_64.msrs import MsrTable
        from vmm.devices.doorbell import doorbell
        from vmm.exits.doorbell import doorbell_actions

        is_private = self._options.is_private
        actions = doorbell_actions(memory, converter if is_private else None, stop)
        ports = board.ports
        self._doorbell = doorbell(self._options.cpus, PORT_NAME, actions)
        self._msrs = MsrTable(is_private)
        ports.add(layout.DOORBELL_PORT, layout.DOORBELL_PORTS, self._doorbell)
        if self._guest.loads_itself:
            self._open_window(ports, memory, stop)
        return X86ExitHandlers(ports, board.registers, self._msrs, converter, stop)

    def _open_window(
        self, ports: PortBus, memory: GuestMemory, stop: Callable[[Outcome], None]
    ) -> None:
        from vmm.devices.load_window import LoadWindow
        from vmm.exits.outcome import FAILED, Outcome

        def failed(reason: str) -> None:
            stop(Outcome(FAILED, f"the guest's loader {reason}; nothing of the guest has run"))

        self._guest.window = LoadWindow(memory, self._guest.close, failed)
        ports.add(layout.LOADER_PORT, layout.LOADER_PORTS, self._guest.window)

    def load(
        self, launch: LaunchMemory, ram: list[Range], alias: int, functions: Sequence[str]
    ) -> None:
        guest: LoadedGuest = self._guest  # type: ignore[assignment]  # Machine restores the others
        state = guest.load(launch, ram, alias, functions)
        # The others stay as KVM made them, until the first one starts them (INIT, SIPI).
        first, *others = self.vcpus
        if self._guest.loads_itself:
            from vmm.arch.x86_64.strict.launch import OTHERS_APIC_BASE

            for other in others:
                other.update_sregs({"apic_base": OTHERS_APIC_BASE})
        first.update_sregs(state.sregs)  # type: ignore[arg-type]  # a TypedDict
        first.set_regs(state.regs)

    # -- snapshots ----------------------------------------------------------------------------

    def state(self) -> State:
        if self._guest.window is not None and self._guest.window.is_open:
            from vmm.core.saved import NotSaved

            raise NotSaved("the guest's loader is at work still; try again when the kernel runs")
        banks: Sequence[DoorbellBank] = self._doorbell.banks  # type: ignore[assignment]
        return {
            "cpuid": [[list(entry) for entry in cpuid] for cpuid in self._cpuids],
            "doorbell": [bank.state() for bank in banks],
            "msrs": self._msrs.state(),
            "chips": self._chips().state(),
        }

    def restore(self, saved: Saved) -> int:
        self._require_cpuid(saved)
        banks: Sequence[DoorbellBank] = self._doorbell.banks  # type: ignore[assignment]
        for bank, inner in zip(banks, saved.each("doorbell", len(banks)), strict=True):
            bank.restore(inner)
            inner.finish()
        inner = saved.inner("msrs")
        self._msrs.restore(inner)
        inner.finish()
        return self._chips().restore(saved.inner("chips"))

    def _chips(self) -> ChipState:
        from vmm.arch.x86_64.vcpu_state import ChipState

        return ChipState(self._vm, self.vcpus, self._msr_indices)

    def _require_cpuid(self, saved: Saved) -> None:
        """A guest that has seen a feature uses it: the processor has to be as it was."""
        rows = saved.rows("cpuid", len(self._cpuids))
        mine = [[list(entry) for entry in cpuid] for cpuid in self._cpuids]
        if rows == mine:
            return
        for there, here in zip(rows, mine, strict=False):
            for row in here:
                if not isinstance(there, list) or row not in there:
                    raise saved.bad(
                        f"its guest was told of another processor: CPUID leaf {row[0]:#x} is not "
                        "the same here; restore it where the snapshot was made"
                    )
        raise saved.bad("its guest was told of another processor; restore it where it was made")

    def core_vcpus(self) -> list[dict[str, Any]]:
        from vmm.arch.x86_64.vcpu_state import core_registers

        return [core_registers(vcpu) for vcpu in self.vcpus]


def _require_exits(vm: Vm) -> None:
    """Raises HostError unless KVM hands KVM_HC_MAP_GPA_RANGE to user space (says its word)."""
    lab = in_lab("pyvmm lab")
    offered = vm.check_extension(ioctls.KVM_CAP_EXIT_HYPERCALL)
    if not offered & 1 << KVM_HC_MAP_GPA_RANGE:
        raise HostError(
            f"this host's KVM does not pass share requests on (KVM_CAP_EXIT_HYPERCALL = "
            f"{offered:#x}, Linux 5.15 or later is needed); {lab}; {SEE_CHECK}"
        )
    if not vm.check_extension(ioctls.KVM_CAP_X86_USER_SPACE_MSR):
        raise HostError(
            f"this host's KVM does not pass MSR accesses on (KVM_CAP_X86_USER_SPACE_MSR); {lab}"
        )
