"""The VM of a run: KVM's VM of the right kind, its memory under a scheme, and its processors."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvm_bindings import KvmError, ioctls
from kvm_bindings.x86_64 import System, Vcpu, Vm
from kvm_bindings.x86_64 import ioctls as x86
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.cpuid import choose_c_bit, guest_cpuid, is_amd
from vmm.arch.x86_64.doorbells import HYPERCALL_NAME, KVM_HC_MAP_GPA_RANGE, PORT_NAME
from vmm.conversion.scheme import Scheme
from vmm.conversion.schemes.plain import PlainScheme
from vmm.core.errors import HostError
from vmm.core.ranges import Range, page_align_down, page_align_up
from vmm.machine.config import MachineConfig
from vmm.machine.guest import Guest
from vmm.machine.host import SEE_CHECK, open_kvm, require_hypercall_exits
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState

if TYPE_CHECKING:
    from vmm.conversion.schemes.remap import Parking
    from vmm.machine.schemes import Chosen


class GuestVm:
    """What a guest runs in, without its contents and its devices."""

    def __init__(
        self, config: MachineConfig, guest: Guest, parked: Parking, cleanup: ExitStack
    ) -> None:
        """Opens and creates all of it, except that memslots are under way still
        (`finish_memslots`); `cleanup` closes it again, also after a failure.

        `parked` holds the vCPUs, for schemes that need it. Raises HostError, OSError.
        """
        self._config = config
        self._guest = guest
        self._parked = parked
        self._cleanup = cleanup
        self.is_private = config.private_memory is not None
        self._create_vm()
        self._lay_out_memory()
        self._create_processors()

    @property
    def doorbell(self) -> str | None:
        """How the guest asks for conversions; None where it has none to ask for."""
        if not self.is_private:
            return None
        return HYPERCALL_NAME if self._guest.needs_hypercalls else PORT_NAME

    def _create_vm(self) -> None:
        system = self._cleanup.enter_context(open_kvm())
        self._system: System = system
        self._supported_cpuid = system.supported_cpuid()
        if self.is_private and self._guest.needs_hypercalls:
            self._require_working_hypercalls()
        self.ram: list[Range] = layout.ram_ranges(self._config.memory)
        self.chosen = self._choose_scheme()
        vm = system.create_vm() if self.chosen is None else self.chosen.vm
        self.kvm: Vm = self._cleanup.enter_context(vm)
        if self.chosen is not None:
            self._cleanup.callback(self.chosen.backing.close)
        self.kvm.set_identity_map_addr(layout.IDENTITY_MAP_GPA)
        self.kvm.set_tss_addr(layout.TSS_ADDRESS_GPA)
        self.kvm.create_irqchip()
        self.kvm.create_pit2()
        if self.is_private:
            self._pass_requests_on()

    def _choose_scheme(self) -> Chosen | None:
        """Scheme and private backing, in a VM of the kind that they need; None: nothing private."""
        config, guest = self._config, self._guest
        if config.private_memory is None:
            return None
        from vmm.machine.schemes import Wanted, choose  # an ordinary VM has none

        return choose(
            self._system,
            Wanted(
                config.scheme,
                config.private_memory,
                self.ram[-1].end,
                two_addresses=guest.two_addresses,
                host_loads=guest.host_loads_private,
            ),
        )

    def _pass_requests_on(self) -> None:
        """Have KVM hand the guest's hypercalls and, for Linux, unknown MSRs to us."""
        if self._guest.needs_hypercalls:
            require_hypercall_exits(self.kvm)
            self.kvm.enable_cap(
                x86.KVM_CAP_X86_USER_SPACE_MSR,
                x86.KVM_MSR_EXIT_REASON_INVAL
                | x86.KVM_MSR_EXIT_REASON_UNKNOWN
                | x86.KVM_MSR_EXIT_REASON_FILTER,
            )
        wanted = 1 << KVM_HC_MAP_GPA_RANGE
        if self.kvm.check_extension(x86.KVM_CAP_EXIT_HYPERCALL) & wanted:
            self.kvm.enable_cap(x86.KVM_CAP_EXIT_HYPERCALL, wanted)

    def _require_working_hypercalls(self) -> None:
        from vmm.machine.probes.hypercall import hypercall_behaviour

        behaviour = hypercall_behaviour(self._system, amd=is_amd(self._supported_cpuid))
        if behaviour == "exits":
            return
        what = {
            "hangs": "never returns from a guest's hypercall (it interprets kernel-mode code)",
            "returns": "answers a guest's share request itself instead of passing it on",
        }[behaviour]
        raise HostError(
            f"this host's KVM {what}, so that a kernel cannot ask for conversions; use "
            "pyvmm lab with the same options, or run without --kernel (the embedded payload "
            f"asks through a port); {SEE_CHECK}"
        )

    def _lay_out_memory(self) -> None:
        """Backings, GuestMemory and the scheme's memslots."""
        chosen, size = self.chosen, self.ram[-1].end
        self.scheme: Scheme = PlainScheme()
        backing = None
        private: list[Range] = []
        if chosen is not None:
            from vmm.machine.schemes import make_scheme

            self.scheme = make_scheme(
                chosen.scheme, lambda: choose_c_bit(self._supported_cpuid, size), self._parked
            )
            backing = chosen.backing
            private = self._guest.private_ranges(self.ram)
        in_place = backing is not None and backing.traits.in_place
        shared = backing if in_place and backing else MemfdBacking(size, "pyvmm-shared")
        common_end = self._guest.unpaged_end if self.scheme.alias else 0
        self.memory = GuestMemory(self.ram, shared, backing, private, common_end)
        self._cleanup.callback(self.memory.close)
        # KVM waits for a grace period of its own with every memslot.
        self._memslots = threading.Thread(target=self._make_memslots, name="memslots")
        self._memslots_failure: BaseException | None = None
        self._memslots.start()
        self._cleanup.callback(self._memslots.join)

    def _make_memslots(self) -> None:
        try:
            self.scheme.install(self.kvm, self.memory)
        except BaseException as failure:
            self._memslots_failure = failure

    def finish_memslots(self) -> None:
        """Wait until guest memory is KVM's, too; nothing may be done with it before.

        Raises what Scheme.install does: HostError, OSError.
        """
        self._memslots.join()
        if self._memslots_failure is not None:
            raise self._memslots_failure

    def _create_processors(self) -> None:
        self.processors: list[Vcpu] = []
        count = self._config.cpus
        limit = self.kvm.check_extension(ioctls.KVM_CAP_MAX_VCPUS)
        if count > limit > 0:
            raise HostError(f"--cpus {count}: this host's KVM takes {limit} at most; use fewer")
        announced = self.scheme.alias.bit_length() - 1 if self._guest.needs_hypercalls else -1
        c_bit = announced if announced >= 0 else None
        for index in range(count):
            vcpu = self.kvm.create_vcpu(index)
            self._cleanup.callback(vcpu.close)
            # Before registers: KVM refuses EFER.LME to a vCPU whose CPUID doesn't have long mode.
            vcpu.set_cpuid2(guest_cpuid(self._supported_cpuid, index, count, c_bit=c_bit))
            if self._guest.msrs:
                vcpu.set_msrs(self._guest.msrs)
            self.processors.append(vcpu)

    def map_ahead(self, areas: list[Range]) -> None:
        """Map what the loader filled, or the guest is sure to write, in one go: each page would
        cost the guest a fault. Nothing else, so that residency stays what the guest uses.
        """
        if not self.kvm.check_extension(ioctls.KVM_CAP_PRE_FAULT_MEMORY):
            return
        for area in areas:
            for run, state in self.memory.states(area):
                alias = self.scheme.alias if state is PageState.PRIVATE else 0
                start, end = page_align_down(run.start), page_align_up(run.end)
                try:
                    self.processors[0].pre_fault_memory(start | alias, end - start)
                except KvmError:
                    return  # shadow paging can't; the guest's faults do it one by one
