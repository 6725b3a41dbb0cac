"""A VM with private memory for one case: backings, GuestMemory, scheme, converter, guests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

from kvm_bindings import Vm
from vmm.arch.guest_cpu import CODE_SIZE, WORD, Gate, GuestCpu
from vmm.conversion.making import make_backing
from vmm.conversion.scheme import make_memory
from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backing import Backing
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Policy
from vmm.selftest.entries import Combination
from vmm.selftest.platform import Platform

RAM_GPA = CODE_SIZE
"""Where the memory under test starts; what lies below is the guests' code."""


class Rig:
    """One VM. A context manager. Pages are numbered from RAM_GPA."""

    def __init__(
        self,
        platform: Platform,
        combination: Combination,
        *,
        pages: int = 16,
        ram: Sequence[Range] | None = None,
        private: Sequence[Range] | None = None,
        vcpus: int = 1,
        policies: Sequence[Policy] = (),
        wrap: Callable[[Backing], Backing] = lambda backing: backing,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """All of `ram` (default: `pages` pages at RAM_GPA) starts private unless `private` says
        which parts do. `wrap` puts something between GuestMemory and its backings.

        Raises HostError or OSError (KvmError is one) where the host lacks something, everything
        closed.
        """
        self.ram = list(ram) if ram is not None else [Range(RAM_GPA, pages * PAGE_SIZE)]
        gate = Gate()
        self.scheme = platform.scheme(combination.scheme, gate.closed)
        with ExitStack() as opened:
            self.vm: Vm = opened.enter_context(
                platform.system.create_vm(platform.vm_type(combination.scheme))
            )
            size = self.ram[-1].end
            behind = wrap(make_backing(self.vm, combination.backing, size))
            opened.callback(behind.close)
            shared = behind
            if not behind.traits.in_place:
                shared = wrap(MemfdBacking(size, "pyvmm-shared"))
                opened.callback(shared.close)
            self.memory: GuestMemory = make_memory(
                self.scheme, self.ram, shared, behind, self.ram if private is None else private
            )
            self.scheme.install(self.vm, self.memory)
            self.converter = Converter(self.memory, self.scheme, *policies, clock=clock)
            self.guests: Sequence[GuestCpu] = platform.guests(
                opened, self.vm, vcpus, self.ram, self._bit, gate
            )
            self.memory.launched()
            self._opened = opened.pop_all()

    @property
    def has_aliases(self) -> bool:
        """Whether the guest picks the side with the address, and can reach both sides."""
        return bool(self._bit)

    @property
    def _bit(self) -> int:
        """The address bit, whichever side it marks."""
        return self.scheme.alias | self.scheme.shared_alias

    @property
    def private(self) -> Backing:
        """The private side's backing."""
        assert self.memory.private is not None
        return self.memory.private

    # -- addresses ----------------------------------------------------------------------------

    def gpa(self, page: int) -> int:
        """The page's guest-physical address, without the C-bit."""
        return RAM_GPA + page * PAGE_SIZE

    def area(self, first: int, count: int) -> Range:
        return Range(self.gpa(first), count * PAGE_SIZE)

    def state(self, page: int) -> PageState:
        return self.memory.states(self.area(page, 1))[0][1]

    def alias(self, page: int, *, private: bool) -> int:
        """The page's address on one side; with one address for both, that one."""
        return self.gpa(page) | (self.scheme.alias if private else self.scheme.shared_alias)

    def device_gpa(self, page: int) -> int:
        """The shared page's address, as the guest's drivers give it to a device."""
        return self.gpa(page) | self.scheme.shared_alias

    def address(self, page: int) -> int:
        """Where the guest finds the page as it is now."""
        return self.alias(page, private=self.state(page) is not PageState.SHARED)

    # -- the guest ----------------------------------------------------------------------------

    def share(self, first: int, count: int, cpu: int = 0) -> int:
        """The guest's request to share pages; its answer."""
        return self.request(Kind.SHARE, self.gpa(first), count, cpu)

    def unshare(self, first: int, count: int, cpu: int = 0) -> int:
        return self.request(Kind.UNSHARE, self.gpa(first), count, cpu)

    def request(self, kind: Kind, gpa: int, pages: int, cpu: int = 0, reserved: int = 0) -> int:
        """A request with whatever numbers the guest makes up."""
        return self.converter.convert(ConversionRequest(kind, gpa, pages, cpu, "test", reserved))

    def read(self, page: int, cpu: int = 0) -> int:
        """The page's first word, as the guest sees it."""
        return self.guests[cpu].read(self.address(page))

    def write(self, page: int, word: int, cpu: int = 0) -> None:
        self.guests[cpu].write(self.address(page), word)

    def fill(self, first: int, count: int, word: int, cpu: int = 0) -> None:
        """Every word of pages that are in one state."""
        self.guests[cpu].fill(self.address(first), count * PAGE_SIZE, word)

    def holds(self, first: int, count: int, word: int, cpu: int = 0) -> bool:
        """Whether every word of pages (in one state) is `word`, seen by the guest."""
        return self.guests[cpu].holds(self.address(first), count * PAGE_SIZE, word)

    # -- the host -----------------------------------------------------------------------------

    def host_read(self, page: int) -> int:
        """The page's first word, by GuestMemory. Raises GuestMemoryError."""
        return int.from_bytes(self.memory.pread(WORD, self.device_gpa(page)), "little")

    def host_write(self, page: int, word: int) -> None:
        self.memory.pwrite(word.to_bytes(WORD, "little"), self.device_gpa(page))

    def host_fill(self, first: int, count: int, word: int) -> None:
        size = count * PAGE_SIZE
        self.memory.pwrite(word.to_bytes(WORD, "little") * (size // WORD), self.device_gpa(first))

    def host_holds(self, first: int, count: int, word: int) -> bool:
        size = count * PAGE_SIZE
        expected = word.to_bytes(WORD, "little") * (size // WORD)
        return self.memory.pread(size, self.device_gpa(first)) == expected

    # -- ending -------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Stop every vCPU for good; from any thread."""
        for guest in self.guests:
            guest.interrupt()

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
