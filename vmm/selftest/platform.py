"""Where cases run: a KVM that makes VMs, and guests for them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from kvm_bindings import System, Vm
from vmm.arch.guest_cpu import Gate, GuestCpu
from vmm.conversion.making import make_scheme
from vmm.conversion.scheme import Scheme
from vmm.conversion.schemes.remap import Parking
from vmm.core.ranges import Range

if TYPE_CHECKING:
    from vmm.arch.protocol import Architecture


class Platform(Protocol):
    """A KVM, or a model of one."""

    @property
    def system(self) -> System:
        """The KVM, open."""
        ...

    is_modelled: bool

    def vm_type(self, scheme: str) -> int:
        """KVM_CREATE_VM's argument for a VM under the scheme."""
        ...

    def scheme(self, name: str, parked: Parking) -> Scheme:
        """A new scheme of that name. Raises HostError where there can't be one."""
        ...

    def guests(
        self, opened: ExitStack, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
    ) -> Sequence[GuestCpu]:
        """`count` vCPUs that can reach `ram` (at or above CODE_SIZE), closed with `opened`."""
        ...


class KvmPlatform:
    """This host's KVM."""

    is_modelled = False

    def __init__(self, architecture: Architecture, system: System) -> None:
        self.system = system
        self._architecture = architecture

    def vm_type(self, scheme: str) -> int:
        return self._architecture.vm_type(scheme)

    def scheme(self, name: str, parked: Parking) -> Scheme:
        return make_scheme(name, lambda: self._architecture.private_bit(self.system, 0), parked)

    def guests(
        self, opened: ExitStack, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
    ) -> Sequence[GuestCpu]:
        made = self._architecture.guest_cpus(self.system, vm, count, ram, alias, gate)
        return opened.enter_context(made)
