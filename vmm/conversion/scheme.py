"""What a scheme is: the mechanism that makes KVM honour page states. The schemes themselves are
in `vmm.conversion.schemes`, one file each."""

from __future__ import annotations

from collections.abc import Sequence

from kvm_bindings import Vm
from vmm.core.events import Kind
from vmm.core.lean_typing import Protocol
from vmm.core.ranges import NOWHERE, Range
from vmm.memory.backing import Backing
from vmm.memory.guest_memory import GuestMemory


class Scheme(Protocol):
    """How one VM tells private from shared pages.

    `apply` makes KVM honour a conversion, all of it or (raising) nothing; `revert` takes an
    `apply` back. Both raise OSError (KvmError is one), HostError when KVM is left in between.
    A range may be in the wanted state already, in part or whole. Discarding the losing side's
    pages is the transaction's work, after `apply`.
    """

    name: str
    alias: int
    """The bit of a guest-physical address that picks the private side; 0: one address for both."""
    shared_alias: int
    """The bit that marks the shared page to a device and its guest; 0: no address has one."""
    told: bool
    """Whether the host is told of conversions, and asked before; else it has no part in them."""
    converts_on_fault: bool
    """Whether KVM_EXIT_MEMORY_FAULT means that the guest wants the page in the other state."""

    side_by_side: bool
    """Whether several threads may `apply` and `revert` at once, for ranges that don't overlap. If
    not, a conversion goes from its `apply` to its end (or its `revert`) before the next one's."""

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        """Make memslots, and what else KVM has to know, of memory in its first state."""

    def apply(self, area: Range, kind: Kind) -> None: ...
    def revert(self, area: Range, kind: Kind) -> None: ...


def set_slot(
    vm: Vm,
    number: int,
    gpa: int,
    area: Range,
    backing: Backing,
    guest_memfd: Backing | None = None,
) -> None:
    """Map `area` of a backing (offset = GPA without C-bit) at guest-physical `gpa`.

    `guest_memfd` is what private faults are served from; by default the backing, if it is one.
    Raises KvmError.
    """
    if guest_memfd is None and backing.is_guest_memfd:
        guest_memfd = backing
    hva = backing.hva + area.start
    if guest_memfd is None:
        vm.set_user_memory_region(number, gpa, area.size, hva)
    else:
        vm.set_user_memory_region2(number, gpa, area.size, hva, guest_memfd.fd, area.start)


def make_memory(
    scheme: Scheme,
    ram: Sequence[Range],
    shared: Backing,
    backing: Backing | None,
    private: Sequence[Range],
    common: Range = NOWHERE,
    *,
    lending: bool = False,
) -> GuestMemory:
    """Guest memory of the scheme's kind; arguments as GuestMemory has them. `lending`: of the kind
    that a virtual IOMMU needs, which not every scheme has (`matrix.LENDING`)."""
    if lending:
        from vmm.memory.lending import LendingMemory

        if not scheme.told or scheme.shared_alias:
            raise ValueError(f"the {scheme.name} scheme lends no memory")
        return LendingMemory(ram, shared, backing, private, common)
    if not scheme.told:
        from vmm.memory.backings.protected_memfd import ProtectedMemfdBacking
        from vmm.memory.observed_memory import ObservedMemory

        if not isinstance(shared, ProtectedMemfdBacking):
            raise ValueError(f"the {scheme.name} scheme does not take {shared.name}")
        return ObservedMemory(ram, shared)
    if scheme.shared_alias:
        from vmm.memory.aliased_memory import AliasedMemory

        return AliasedMemory(ram, shared, backing, private, shared_bit=scheme.shared_alias)
    return GuestMemory(ram, shared, backing, private, common)


def private_side(memory: GuestMemory, scheme: str) -> Backing:
    """The private backing. Raises ValueError when there is none."""
    if memory.private is None:
        raise ValueError(f"the {scheme} scheme needs a private backing")
    return memory.private
