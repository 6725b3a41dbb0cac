"""The model of KVM as a platform for the conformance suite and for random programs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import cast

from kvm_bindings.x86_64 import Vcpu, Vm
from tests.support.fake_kvm import FakeKernel, FakeSystem, FakeVm
from tests.support.fake_kvm.system import CPUID
from vmm.arch.x86_64.cpuid import choose_c_bit
from vmm.conversion.scheme import Scheme
from vmm.conversion.schemes.in_place import InPlaceScheme
from vmm.conversion.schemes.remap import Parking
from vmm.core.ranges import PAGE_SIZE, Range, page_align_down
from vmm.machine.schemes import make_scheme
from vmm.selftest.guest import WORD, Gate, GuestCpu, GuestStopped


class FakeGuestCpu:
    """A GuestCpu whose accesses the model carries out, page by page."""

    def __init__(self, vm: FakeVm, number: int, gate: Gate) -> None:
        self._vm = vm
        self._gate = gate
        self.vcpu = cast(Vcpu, vm.create_vcpu(number))

    def read(self, address: int) -> int:
        return int.from_bytes(self._read(address, WORD), "little")

    def write(self, address: int, word: int) -> None:
        self._write(address, word.to_bytes(WORD, "little"))

    def fill(self, address: int, size: int, word: int) -> None:
        for start, length in _pages(address, size):
            self._write(start, word.to_bytes(WORD, "little") * (length // WORD))

    def holds(self, address: int, size: int, word: int) -> bool:
        return all(
            self._read(start, length) == word.to_bytes(WORD, "little") * (length // WORD)
            for start, length in _pages(address, size)
        )

    def interrupt(self) -> None:
        """No access of the model waits for anything."""

    def _read(self, address: int, size: int) -> bytes:
        with self._gate.running():
            found = self._vm.guest_read(address, size)
        if isinstance(found, bytes):
            return found
        raise GuestStopped(found)

    def _write(self, address: int, data: bytes) -> None:
        with self._gate.running():
            exit = self._vm.guest_write(address, data)
        if exit is not None:
            raise GuestStopped(exit)


def _pages(address: int, size: int) -> list[tuple[int, int]]:
    """The range cut at page boundaries, as (start, size)."""
    end = address + size
    starts = [address, *range(page_align_down(address) + PAGE_SIZE, end, PAGE_SIZE)]
    return [(start, min(end, page_align_down(start) + PAGE_SIZE) - start) for start in starts]


class FakePlatform:
    """A FakeKernel's /dev/kvm, and guests on it."""

    is_modelled = True

    def __init__(self, kernel: FakeKernel | None = None) -> None:
        self.kernel = kernel or FakeKernel()
        self.system = FakeSystem(self.kernel).as_system()

    def scheme(self, name: str, parked: Parking) -> Scheme:
        if name == "in-place":
            return InPlaceScheme(patience=0.0)  # who holds a page here never lets go meanwhile
        return make_scheme(name, lambda: choose_c_bit(CPUID), parked)

    def guests(
        self, opened: ExitStack, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
    ) -> list[GuestCpu]:
        return [FakeGuestCpu(cast(FakeVm, vm), number, gate) for number in range(count)]
