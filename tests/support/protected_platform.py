"""pKVM modelled as a platform for the conformance suite: guests own pages of the VMM's mapping."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import cast

from kvm_bindings import Vcpu, Vm
from tests.support.fake_kvm import FakeVm
from tests.support.fake_platform import FakePlatform
from tests.support.protected import ProtectedGuest
from vmm.arch.guest_cpu import WORD, Gate, GuestCpu
from vmm.conversion.schemes.pkvm import MEM_SHARE, MEM_UNSHARE, PkvmScheme
from vmm.conversion.schemes.remap import Parking
from vmm.core.ranges import PAGE_SIZE, Range, page_align_down
from vmm.memory.backings.protected_memfd import ProtectedMemfdBacking
from vmm.memory.guest_memory import GuestMemory

INVALID_PARAMETER = -3


class ModelledPkvm(PkvmScheme):
    """Remembers the memory, so that guests find it."""

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        super().install(vm, memory)
        assert isinstance(memory.shared, ProtectedMemfdBacking)
        self.backing = memory.shared


class ProtectedCpu:
    """A GuestCpu that gets each page at its first touch, and makes pKVM's hypercalls."""

    def __init__(self, guest: ProtectedGuest, owned: dict[int, bool], vcpu: Vcpu) -> None:
        self._guest = guest
        self._owned = owned
        self.vcpu = vcpu

    def _touch(self, address: int, size: int) -> None:
        for page in range(page_align_down(address), address + size, PAGE_SIZE):
            if page not in self._owned:
                self._owned[page] = True
                self._guest.unshare(Range(page, PAGE_SIZE))

    def read(self, address: int) -> int:
        self._touch(address, WORD)
        return int.from_bytes(self._guest.peek(WORD, address), "little")

    def write(self, address: int, word: int) -> None:
        self.fill(address, WORD, word)

    def fill(self, address: int, size: int, word: int) -> None:
        self._touch(address, size)
        self._guest.poke(word.to_bytes(WORD, "little") * (size // WORD), address)

    def holds(self, address: int, size: int, word: int) -> bool:
        self._touch(address, size)
        return self._guest.peek(size, address) == word.to_bytes(WORD, "little") * (size // WORD)

    def interrupt(self) -> None:
        """No access of the model waits for anything."""

    def hypercall(self, function: int, *arguments: int) -> int:
        page = arguments[0]
        if function not in (MEM_SHARE, MEM_UNSHARE) or page % PAGE_SIZE:
            return INVALID_PARAMETER
        self._touch(page, 1)
        keeps = function == MEM_UNSHARE
        if self._owned[page] is keeps:
            return INVALID_PARAMETER
        self._owned[page] = keeps
        change = self._guest.unshare if keeps else self._guest.share
        change(Range(page, PAGE_SIZE))
        return 0


class ProtectedPlatform(FakePlatform):
    """VMs of the model of KVM, whose memory is the guest's as pKVM has it."""

    def scheme(self, name: str, parked: Parking) -> ModelledPkvm:
        assert name == "pkvm"
        self._made = ModelledPkvm()
        return self._made

    def guests(
        self, opened: ExitStack, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
    ) -> list[GuestCpu]:
        guest = ProtectedGuest(self._made.backing)
        opened.callback(guest.close)
        owned: dict[int, bool] = {}
        fake = cast(FakeVm, vm)
        return [
            ProtectedCpu(guest, owned, cast(Vcpu, fake.create_vcpu(number)))
            for number in range(count)
        ]
