"""The matrix's rows and columns: what can be tested. A new scheme or backing needs its entry."""

from __future__ import annotations

from kvm_bindings import Vm
from vmm.arch.x86_64.cpuid import choose_c_bit
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.machine.schemes import make_backing
from vmm.memory.backing import Backing
from vmm.selftest.platform import Platform
from vmm.selftest.rig import BackingEntry, SchemeEntry

DEFAULT_VM = 0


def _c_bit(platform: Platform) -> int:
    return choose_c_bit(platform.system.supported_cpuid())


SCHEMES = (
    SchemeEntry(
        "cbit",
        DEFAULT_VM,
        alias_mask=lambda platform: 1 << _c_bit(platform),
        make=lambda platform: CbitScheme(_c_bit(platform)),
    ),
)


def _backing(name: str) -> BackingEntry:
    def create(vm: Vm, size: int) -> Backing:
        return make_backing(vm, name, size)

    return BackingEntry(name, create)


BACKINGS = tuple(map(_backing, ("memfd", "guest_memfd-mmap", "guest_memfd")))
