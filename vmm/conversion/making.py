"""Makes private backings and schemes by their names in the matrix."""

from __future__ import annotations

from collections.abc import Callable

from kvm_bindings import Vm, ioctls
from vmm.conversion.matrix import TWO_ADDRESSES
from vmm.conversion.scheme import Scheme
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.memory.backing import Backing
from vmm.memory.backings.memfd import MemfdBacking

if TYPE_CHECKING:
    from vmm.conversion.schemes.remap import Parking

_LABEL = "pyvmm-private"
_MMAP, _INIT_SHARED = ioctls.GUEST_MEMFD_FLAG_MMAP, ioctls.GUEST_MEMFD_FLAG_INIT_SHARED
GUEST_MEMFD_FLAGS = {
    "guest_memfd-plain": 0,
    "guest_memfd": _MMAP,
    "guest_memfd-mmap": _MMAP | _INIT_SHARED,
    "guest_memfd-in-place": _MMAP | _INIT_SHARED,
}


def make_backing(vm: Vm, name: str, size: int) -> Backing:
    """A new private backing by its name in BACKINGS. Raises OSError (KvmError is one)."""
    flags = GUEST_MEMFD_FLAGS.get(name)
    if flags is not None:
        from vmm.memory.backings import guest_memfd

        classes: dict[str, Callable[[int, int], Backing]] = {
            "guest_memfd-plain": guest_memfd.PlainGuestMemfdBacking,
            "guest_memfd": guest_memfd.GuestMemfdBacking,
            "guest_memfd-mmap": guest_memfd.MappedGuestMemfdBacking,
        }
        made = vm.create_guest_memfd(size, flags)
        # Seen by trying: no released kernel has it.
        file_io = flags & _INIT_SHARED and made.has_file_io()
        if name == "guest_memfd-in-place":
            if file_io:
                return guest_memfd.InPlaceFdIoBacking(made, size)
            return guest_memfd.InPlaceGuestMemfdBacking(made, size)
        if file_io:
            return guest_memfd.FdIoGuestMemfdBacking(made.fd, size)
        return classes[name](made.fd, size)
    if name == "memfd-hugetlb":
        from vmm.memory.backings.hugetlb_memfd import HugetlbMemfdBacking

        return HugetlbMemfdBacking(size, _LABEL)
    if name == "memfd-sealed":
        from vmm.memory.backings.sealed_memfd import SealedMemfdBacking

        return SealedMemfdBacking(size, _LABEL)
    if name == "memfd-protected":
        from vmm.memory.backings.protected_memfd import ProtectedMemfdBacking

        return ProtectedMemfdBacking(size, _LABEL)
    return MemfdBacking(size, _LABEL)


def scheme_class(name: str) -> type[Scheme]:
    """The class of the scheme with that name."""
    if name == "attributes":
        from vmm.conversion.schemes.attributes import AttributesScheme

        return AttributesScheme
    if name == "in-place":
        from vmm.conversion.schemes.in_place import InPlaceScheme

        return InPlaceScheme
    if name == "remap":
        from vmm.conversion.schemes.remap import RemapScheme

        return RemapScheme
    if name == "pkvm":
        from vmm.conversion.schemes.pkvm import PkvmScheme

        return PkvmScheme
    if name == "realm":
        from vmm.conversion.schemes.realm import RealmScheme

        return RealmScheme
    from vmm.conversion.schemes.cbit import CbitScheme

    return CbitScheme


def make_scheme(
    name: str,
    bit: Callable[[], int],
    parked: Parking,
    make: Callable[..., Scheme] | None = None,
) -> Scheme:
    """The scheme of that name; `bit` is asked for the address bit where there is one, `parked`
    keeps vCPUs out of the guest. `make`: another one in its place, of the user's own."""
    made: Callable[..., Scheme] = scheme_class(name) if make is None else make
    if name == "remap":
        return made(parked)
    return made(bit()) if name in TWO_ADDRESSES else made()
