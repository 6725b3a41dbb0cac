"""What the rooms about the host need of an architecture; vmm.arch.Architecture is the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvm_bindings import System, Vm
    from vmm.host.capability import Capability
    from vmm.host.probes.micro_guest import MicroGuest, Verb


class HostArchitecture(Protocol):
    """An architecture as the host's KVM shows it."""

    name: str
    """As `uname -m` says it."""

    lab: str
    """The command that runs such guests on an emulated machine, and where it can be given."""
    without_kvm: str
    """Why there may be no /dev/kvm, after "this machine has no KVM, or"."""

    @property
    def schemes(self) -> Sequence[str]:
        """Those of vmm.conversion.matrix.SCHEMES that there can be here, strongest first."""
        ...

    @property
    def vm_types(self) -> Mapping[int, str]:
        """KVM_CREATE_VM's arguments that make sense here, with their names; 0 is "default"."""
        ...

    @property
    def needed(self) -> Sequence[tuple[str, int]]:
        """The capabilities that every run needs besides vmm.host.kvm.NEEDED: (name, number)."""
        ...

    def open_system(self, path: str) -> System:
        """Open the device file of KVM. Raises OSError."""
        ...

    def vm_type(self, scheme: str) -> int:
        """KVM_CREATE_VM's argument for a VM under the scheme ("none": an ordinary VM)."""
        ...

    def prepare_vm(self, vm: Vm, scheme: str) -> None:
        """Have a fresh VM of the scheme's type do what the scheme needs of KVM besides.

        Raises KvmError where this KVM can't; the scheme doesn't serve then.
        """
        ...

    def private_bit(self, system: System, ram_end: int) -> int:
        """The number of the address bit that picks the side for guests whose RAM ends there
        (bytes), under schemes with two addresses: the private one (cbit) or the shared (realm).
        Raises HostError where there is none."""
        ...

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
        """A guest of a few instructions that does what the verb says. Raises KvmError."""
        ...

    def capabilities(self) -> Sequence[Capability]:
        """The lines of `pyvmm check`, in order; the first is KVM itself."""
        ...
