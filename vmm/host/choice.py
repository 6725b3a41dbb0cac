"""Picks scheme and private backing: the strongest that this host has and the guest can use, each
found out by trying, and remembers why the stronger ones were not taken."""

from __future__ import annotations

import errno

from kvm_bindings import KvmError, System, Vm, ioctls
from vmm.conversion.making import make_backing
from vmm.conversion.matrix import (
    BACKINGS,
    FOR_LINUX,
    NEEDS,
    ONLY_WHEN_NAMED,
    TWO_ADDRESSES,
    backings_for,
)
from vmm.core.errors import HostError, in_words
from vmm.core.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.backing import Backing

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.host.architecture import HostArchitecture

_NOT_THERE = (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS)
"""What KVM answers to something that it doesn't know; all else is a failure of its own."""

_ONE_ADDRESS_ONLY = "the guest picks the side by an address bit, which this scheme does not have"


class Wanted(NamedTuple):
    """What the user asked for, and what the guest can do."""

    scheme: str
    """One of SCHEMES, or "auto"."""
    backing: str
    """One of BACKINGS, or "auto"."""
    size: int
    """Bytes of the backing: the end of guest RAM."""
    two_addresses: bool
    """Whether the guest knows only Linux' ways: an address bit by which it picks the side, or
    pKVM's hypercalls."""
    host_loads: bool
    """Whether the host fills private pages before the guest runs."""
    own_backing: Callable[[int], Backing] | None = None
    """Makes the user's own backing of a size, in the place of the one that `backing` names."""


class Chosen(NamedTuple):
    """A VM with the scheme's name and the private backing; the caller closes both."""

    vm: Vm
    scheme: str
    backing: Backing
    not_taken: dict[str, str]
    """The stronger schemes, each with the reason why it does not serve."""


def choose(architecture: HostArchitecture, system: System, wanted: Wanted) -> Chosen:
    """Open what the wish comes to. Raises HostError naming what is there instead."""
    reasons: dict[str, str] = {}
    for scheme in architecture.schemes:
        if wanted.scheme not in ("auto", scheme):
            continue
        opened = try_scheme(architecture, system, scheme, wanted)
        if not isinstance(opened, str):
            vm, backing = opened
            return Chosen(vm, scheme, backing, reasons)
        reasons[scheme] = opened
    raise HostError(_refusal(architecture, system, wanted, reasons))


def try_scheme(
    architecture: HostArchitecture, system: System, scheme: str, wanted: Wanted
) -> tuple[Vm, Backing] | str:
    """A VM of the scheme's kind and a backing for it, or why there is none.

    Raises HostError for what is no lack of the host's, memory for one.
    """
    if wanted.two_addresses and scheme not in FOR_LINUX:
        return _ONE_ADDRESS_ONLY
    names = backings_for(scheme, host_loads=wanted.host_loads)
    if wanted.backing != "auto":
        names = [name for name in names if name == wanted.backing]
        if not names:
            return f"does not take --private-mem={wanted.backing}"
    else:
        names = [name for name in names if name not in ONLY_WHEN_NAMED]
    try:
        if scheme in TWO_ADDRESSES:
            architecture.private_bit(system, wanted.size)
        vm = system.create_vm(architecture.vm_type(scheme))
    except HostError as error:
        return str(error)
    except KvmError as error:
        return _lacks(scheme, error)
    try:
        architecture.prepare_vm(vm, scheme)
        if scheme == "attributes":
            _try_attributes(vm)
        backing = _first_backing(vm, names, wanted.size, wanted.own_backing)
        if scheme == "in-place":
            _try_in_place(backing)
    except KvmError as error:
        vm.close()
        return _lacks(scheme, error)
    except BaseException:
        vm.close()
        raise
    if isinstance(backing, str):
        vm.close()
        return backing
    return vm, backing


def _first_backing(
    vm: Vm, names: list[str], size: int, own: Callable[[int], Backing] | None = None
) -> Backing | str:
    """The first that can be had, or why the first one can't."""
    reason = ""
    for name in names:
        try:
            return make_backing(vm, name, size) if own is None else own(size)
        except OSError as error:
            lacking = error.errno in _NOT_THERE or name == "memfd-hugetlb"
            if not lacking:
                raise HostError(in_words(error)) from None
            reason = reason or _lacks(name, error)
    return reason


# -- does it behave? ------------------------------------------------------------------------------


def _try_attributes(vm: Vm) -> None:
    """Set and clear one page's attribute; KVM needs no memslot for it. Raises KvmError."""
    for attribute in (ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE, 0):
        vm.set_memory_attributes(0, PAGE_SIZE, attribute)


def _try_in_place(backing: Backing | str) -> None:
    """A page that is made private must be out of the host's reach, and come back. Raises KvmError
    (also when it is not)."""
    from vmm.memory.backings.guest_memfd import InPlaceBacking

    if isinstance(backing, str) or not isinstance(backing, InPlaceBacking):
        return
    try:
        for attribute, reached in ((ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE, False), (0, True)):
            backing.guest_memfd.set_memory_attributes2(0, PAGE_SIZE, attribute)
            if _is_reached(backing) != reached:
                raise KvmError(
                    "KVM_SET_MEMORY_ATTRIBUTES2",
                    errno.EOPNOTSUPP,
                    f"{attribute=:#x}",
                    f"the page is {'out of' if reached else 'in'} the host's reach afterwards",
                )
    except BaseException:
        backing.close()
        raise


def _is_reached(backing: Backing) -> bool:
    try:
        backing.pread(1, 0)
    except OSError:
        return False
    return True


# -- words ----------------------------------------------------------------------------------------


def _lacks(name: str, error: OSError) -> str:
    words = str(error) if isinstance(error, KvmError) else error.strerror or str(error)
    need = NEEDS.get(name)
    return f"{words}; {need}" if need else words


def available(
    architecture: HostArchitecture, system: System, *, two_addresses: bool, host_loads: bool
) -> dict[str, list[str]]:
    """The schemes that this host has for such a guest, each with the backings that it takes."""
    found: dict[str, list[str]] = {}
    for name, schemes in BACKINGS.items():
        for scheme in (each for each in schemes if each in architecture.schemes):
            wanted = Wanted(scheme, name, 2 << 20, two_addresses, host_loads)
            try:
                opened = try_scheme(architecture, system, scheme, wanted)
            except HostError:
                continue
            if not isinstance(opened, str):
                vm, backing = opened
                backing.close()
                vm.close()
                found.setdefault(scheme, []).append(name)
    return {scheme: found[scheme] for scheme in architecture.schemes if scheme in found}


def _refusal(
    architecture: HostArchitecture, system: System, wanted: Wanted, reasons: dict[str, str]
) -> str:
    there = available(
        architecture,
        system,
        two_addresses=wanted.two_addresses,
        host_loads=wanted.host_loads,
    )
    here = "; ".join(f"{scheme} with {', '.join(names)}" for scheme, names in there.items())
    takers = BACKINGS.get(wanted.backing, architecture.schemes)
    schemes_by_reason: dict[str, list[str]] = {}
    for scheme, why in reasons.items():
        if scheme in takers:
            schemes_by_reason.setdefault(why, []).append(scheme)
    telling = [f"{', '.join(schemes)}: {why}" for why, schemes in schemes_by_reason.items()]
    words = [f"--private-mem={wanted.backing}"]
    if wanted.scheme != "auto":
        words.insert(0, f"--scheme {wanted.scheme}")
    return (
        f"{' '.join(words)}: not on this host ({'; '.join(telling)}); what works here: "
        f"{here or 'nothing, run without --private-mem'}"
    )
