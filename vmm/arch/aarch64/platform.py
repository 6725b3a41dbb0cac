"""arm64's share of one VM: the interrupt controller, vCPUs, the board around them, its exits."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from kvm_bindings import KvmError
from kvm_bindings.aarch64 import Vcpu, Vm, ioctls
from kvm_bindings.aarch64.registers import CORE_REGISTERS
from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.gic import create_gic
from vmm.arch.aarch64.guests import MMIO_DOORBELL_NAME
from vmm.core.errors import HostError
from vmm.core.lean_typing import TYPE_CHECKING, Any, NoReturn, cast
from vmm.host.kvm import SEE_CHECK

if TYPE_CHECKING:
    from vmm.arch.aarch64.board import ArmBoard
    from vmm.arch.aarch64.exits import ArmExitHandlers
    from vmm.arch.aarch64.guests import ArmGuest
    from vmm.arch.options import GuestOptions
    from vmm.arch.protocol import Guest
    from vmm.conversion.transaction import Converter
    from vmm.core.ranges import Range
    from vmm.core.saved import Saved, State
    from vmm.exits.outcome import Outcome
    from vmm.memory.guest_memory import GuestMemory, LaunchMemory
    from vmm.wiring.board import Board, BoardParts


class ArmPlatform:
    """See vmm.arch.protocol.Platform."""

    def __init__(self, vm: Vm, guest: Guest, options: GuestOptions, scheme: str) -> None:
        """Creates what KVM wants before memory and vCPUs. Raises KvmError, HostError."""
        self._guest: ArmGuest = guest  # type: ignore[assignment]  # arm64's own, see Arm64
        self._vm = vm
        self._options = options
        self._scheme = scheme
        self._guest.learn(scheme)
        self.vcpus: list[Vcpu] = []
        if vm.check_extension(ioctls.KVM_CAP_ARM_NISV_TO_USER):
            vm.enable_cap(ioctls.KVM_CAP_ARM_NISV_TO_USER)

    def create_vcpus(self, count: int, alias: int, opened: ExitStack) -> None:
        try:
            gic = create_gic(self._vm)
        except KvmError as error:
            raise HostError(
                f"this host's KVM has no GICv3 for guests ({error}); {SEE_CHECK}"
            ) from None
        opened.callback(gic.close)
        target = self._vm.preferred_target()
        for index in range(count):
            vcpu = self._vm.create_vcpu(index)
            opened.callback(vcpu.close)
            features = [ioctls.KVM_ARM_VCPU_PSCI_0_2]
            if index:  # the first one starts the others (PSCI CPU_ON)
                features.append(ioctls.KVM_ARM_VCPU_POWER_OFF)
            vcpu.init(target, *features)
            self.vcpus.append(vcpu)
        # After the vCPUs, whose number it takes.
        gic.set_attr(ioctls.KVM_DEV_ARM_VGIC_GRP_CTRL, ioctls.KVM_DEV_ARM_VGIC_CTRL_INIT, None)

    def make_board(self, parts: BoardParts) -> ArmBoard:
        from vmm.arch.aarch64.board import ArmBoard

        return ArmBoard(parts)

    def exit_handlers(
        self,
        board: Board,
        memory: GuestMemory,
        converter: Converter,
        stop: Callable[[Outcome], None],
    ) -> ArmExitHandlers:
        from vmm.arch.aarch64.exits import ArmExitHandlers
        from vmm.devices.doorbell import doorbell
        from vmm.exits.doorbell import doorbell_actions

        monitor = None
        if self._scheme == "realm":
            from vmm.arch.aarch64.monitor import RealmMonitor

            monitor = RealmMonitor(memory, converter)
        asks = self._guest.doorbell == MMIO_DOORBELL_NAME and self._options.is_private
        checked = memory
        if self._scheme == "realm":
            # The guest names the page, as for a conversion; the host's way to it has the bit.
            checked = cast("GuestMemory", _AtSharedAddresses(memory))
        actions = doorbell_actions(checked, converter if asks else None, stop)
        if self._scheme == "pkvm":
            # Only the hypervisor can convert; the rest of the registers is there.
            actions.convert = lambda request: -errno.EOPNOTSUPP
        board.registers.add(
            layout.DOORBELL_GPA,
            layout.DOORBELL_SIZE,
            doorbell(self._options.cpus, MMIO_DOORBELL_NAME, actions),
        )
        reset = cast("ArmBoard", board).reset
        return ArmExitHandlers(board.registers, converter, stop, reset, monitor)

    def load(
        self, launch: LaunchMemory, ram: list[Range], alias: int, functions: Sequence[str]
    ) -> None:
        entry = self._guest.load(launch, ram, functions)
        first = self.vcpus[0]
        first.set_one_reg(CORE_REGISTERS["pc"], entry.pc)
        first.set_one_reg(CORE_REGISTERS["x0"], entry.x0)

    def state(self) -> State:
        refuse_to_save()

    def restore(self, saved: Saved) -> int:
        refuse_to_save()

    def core_vcpus(self) -> list[dict[str, Any]]:
        refuse_to_save()


def refuse_to_save() -> NoReturn:
    """What board and platform have to say of snapshots and dumps. Raises NotSaved."""
    from vmm.core.saved import NotSaved

    raise NotSaved("only x86-64 guests can be saved and dumped so far")


class _AtSharedAddresses:
    """A realm's memory by plain addresses, for the host's checks of shared pages."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def pread(self, size: int, gpa: int) -> bytes:
        return self._memory.pread(size, gpa | 1 << layout.REALM_SHARED_BIT)

    def pwrite(self, data: bytes, gpa: int) -> None:
        self._memory.pwrite(data, gpa | 1 << layout.REALM_SHARED_BIT)
