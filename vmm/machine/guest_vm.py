"""The VM of a run: KVM's VM of the right kind, its memory under a scheme, and its processors."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress

from kvm_bindings import KvmError, System, Vm, ioctls
from vmm.conversion.scheme import Scheme, make_memory
from vmm.conversion.schemes.plain import PlainScheme
from vmm.core.errors import HostError
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.ranges import NOWHERE, Range, page_align_down, page_align_up
from vmm.host.kvm import open_kvm
from vmm.machine.config import MachineConfig
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import PageState

if TYPE_CHECKING:
    from vmm.arch.protocol import Architecture, Guest
    from vmm.conversion.schemes.remap import Parking
    from vmm.host.choice import Chosen
    from vmm.machine.extensions import Extensions
    from vmm.memory.backing import Backing


class GuestVm:
    """What a guest runs in, without its contents and its devices."""

    def __init__(
        self,
        architecture: Architecture,
        config: MachineConfig,
        guest: Guest,
        parked: Parking,
        cleanup: ExitStack,
        own: Extensions | None = None,
    ) -> None:
        """Opens and creates all of it, except that memslots are under way still
        (`finish_memslots`); `cleanup` closes it again, also after a failure.

        `parked` holds the vCPUs, for schemes that need it. `own`: with a scheme or a backing of the
        user's, in the place of those that the configuration names. Raises HostError, OSError.
        """
        self._architecture = architecture
        self._config = config
        self._guest = guest
        self._parked = parked
        self._cleanup = cleanup
        self._own = own
        self.is_private = config.private_memory is not None
        self._create_vm()
        self._lay_out_memory()
        self._create_vcpus()

    @property
    def doorbell(self) -> str | None:
        """How the guest asks for conversions; None where it has none to ask for."""
        if not self.is_private:
            return None
        return self._guest.doorbell

    @property
    def guest_doorbell(self) -> str:
        """How the guest would ask for conversions, whether there are any or not."""
        return self._guest.doorbell

    def _create_vm(self) -> None:
        system = self._cleanup.enter_context(open_kvm(self._architecture))
        self.system: System = system
        if self.is_private:
            self._architecture.check_doorbell(system, self._guest)
            wanted = self._config.private_memory
            assert wanted is not None
            self._architecture.choose_loading(system, self._guest, wanted, self._config.scheme)
        self.ram: list[Range] = self._architecture.ram_ranges(self._config.memory)
        self.chosen = self._choose_scheme()
        if self.chosen is None:
            vm = system.create_vm(self._architecture.vm_type("none"))
        else:
            vm = self.chosen.vm
        self.kvm: Vm = self._cleanup.enter_context(vm)
        if self.chosen is not None:
            self._cleanup.callback(self.chosen.backing.close)
        scheme = "none" if self.chosen is None else self.chosen.scheme
        self.platform = self._architecture.platform(
            system, vm, self._guest, self._config.guest_options(), scheme
        )

    def _choose_scheme(self) -> Chosen | None:
        """Scheme and private backing, in a VM of the kind that they need; None: nothing private."""
        config, guest = self._config, self._guest
        if config.private_memory is None:
            return None
        from vmm.host.choice import Wanted, choose  # an ordinary VM has none

        return choose(
            self._architecture,
            self.system,
            Wanted(
                config.scheme,
                config.private_memory,
                self.ram[-1].end,
                two_addresses=guest.two_addresses,
                host_loads=guest.host_loads_private,
                own_backing=None if self._own is None else self._own.make_backing,
            ),
        )

    def _lay_out_memory(self) -> None:
        """Backings, GuestMemory and the scheme's memslots."""
        chosen, size = self.chosen, self.ram[-1].end
        self.scheme: Scheme = PlainScheme()
        backing = None
        private: list[Range] = []
        if chosen is not None:
            from vmm.conversion.making import make_scheme

            self.scheme = make_scheme(
                chosen.scheme,
                lambda: self._architecture.private_bit(self.system, size),
                self._parked,
                None if self._own is None or self._own.scheme is None else self._own.make_scheme,
            )
            backing = chosen.backing
            private = self._guest.private_ranges(self.ram)
        in_place = backing is not None and backing.traits.in_place
        shared = backing if in_place and backing else self._make_shared(size)
        common = self._guest.unpaged if self.scheme.alias else NOWHERE
        self.memory = make_memory(
            self.scheme,
            self.ram,
            shared,
            backing,
            private,
            common,
            lending=self._config.iommu,
        )
        self._cleanup.callback(self.memory.close)
        # KVM waits for a grace period of its own with every memslot.
        self._memslots = threading.Thread(target=self._make_memslots, name="memslots")
        self._memslots_failure: BaseException | None = None
        self._memslots.start()
        self._cleanup.callback(self._memslots.join)

    def _make_shared(self, size: int) -> Backing:
        """The shared side. Raises OSError."""
        if not self._config.has_back_ends:
            return MemfdBacking(size, "pyvmm-shared")
        # Other processes get it: none may cut it off under the guest's feet.
        from vmm.memory.backings.sealed_memfd import SealedMemfdBacking

        return SealedMemfdBacking(size, "pyvmm-shared")

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

    def _create_vcpus(self) -> None:
        count = self._config.cpus
        limit = self.kvm.check_extension(ioctls.KVM_CAP_MAX_VCPUS)
        if count > limit > 0:
            raise HostError(f"--cpus {count}: this host's KVM takes {limit} at most; use fewer")
        self.platform.create_vcpus(count, self.scheme.alias, self._cleanup)

    def map_ahead(self, areas: list[Range]) -> None:
        """Map what the loader filled or will fill, or the guest is sure to write, in one go: each
        page would cost the guest a fault. Nothing else, so that residency stays what the guest
        uses. Where KVM can't, private memory is at least there, which makes faults shorter.
        """
        if not self.memory.told:
            return  # what a protected guest hasn't touched isn't donated
        maps = self.kvm.check_extension(ioctls.KVM_CAP_PRE_FAULT_MEMORY) > 0
        for area in areas:
            for run, state in self.memory.states(area):
                is_private = state is PageState.PRIVATE
                start, end = page_align_down(run.start), page_align_up(run.end)
                with suppress(KvmError):  # else the guest's faults do it one by one
                    if maps:
                        alias = self.scheme.alias if is_private else self.scheme.shared_alias
                        maps = self._map(start | alias, end - start)
                    if not maps and is_private and self.memory.private is not None:
                        self.memory.private.allocate(start, end - start)

    def _map(self, gpa: int, size: int) -> bool:
        """Whether KVM maps ahead: with shadow paging it can't."""
        try:
            self.platform.vcpus[0].pre_fault_memory(gpa, size)
        except KvmError:
            return False
        return True
