"""Memslots replaced: one address on a VM of the ordinary kind."""

from __future__ import annotations

import errno
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from kvm_bindings import KvmError, Vm, ioctls
from vmm.conversion.scheme import private_side, set_slot
from vmm.core.errors import HostError
from vmm.core.events import Kind
from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory, PageState

Parking = Callable[[], AbstractContextManager[object]]
"""Called by a vCPU's thread: inside the context no vCPU of the VM runs guest code."""


class Piece(NamedTuple):
    """A memslot: guest memory that one side stands behind."""

    area: Range
    private: bool


class RemapScheme:
    """A memslot for every run of pages of one side, never two neighbours of the same side.

    KVM can't change a memslot's size, so that a conversion deletes the memslots that it touches
    and makes new ones. Between these steps a guest's access would find nothing there and become
    MMIO: the vCPUs are parked meanwhile.
    """

    name = "remap"
    alias = 0
    shared_alias = 0
    converts_on_fault = False
    told = True
    side_by_side = False  # its lists are one, and what is taken back needs its memslots

    def __init__(self, parked: Parking = nullcontext) -> None:
        """`parked` is for VMs with several vCPUs; one that asks for a conversion doesn't run."""
        self._parked = parked
        # The memslots in address order, as three parallel lists.
        self._starts: list[int] = []
        self._pieces: list[Piece] = []
        self._numbers: list[int] = []
        self._free: list[int] = []
        self._fresh = itertools.count()
        self._limit = 0

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        self._vm, self._memory = vm, memory
        self._private = private_side(memory, self.name)
        self._limit = vm.check_extension(ioctls.KVM_CAP_NR_MEMSLOTS)
        pieces = [Piece(run, state is not PageState.SHARED) for run, state in memory.states()]
        self._replace(0, 0, pieces)

    @property
    def memslots(self) -> list[Piece]:
        """The memslots there are, in address order."""
        return list(self._pieces)

    def apply(self, area: Range, kind: Kind) -> None:
        self._become(area, private=kind is Kind.UNSHARE)

    def revert(self, area: Range, kind: Kind) -> None:
        self._become(area, private=kind is Kind.SHARE)

    def _become(self, area: Range, *, private: bool) -> None:
        """Give `area` (RAM) that side, joined with what lies around it on the same side."""
        first = bisect_right(self._starts, area.start) - 1
        last = bisect_left(self._starts, area.end)  # past the last memslot touched
        touched = self._pieces[first:last]
        if all(piece.private == private for piece in touched):
            return
        start, end = area.start, area.end
        before = after = None
        head, tail = touched[0], touched[-1]
        if head.private == private:
            start = head.area.start
        elif head.area.start < start:
            before = Piece(Range(head.area.start, start - head.area.start), head.private)
        if tail.private == private:
            end = tail.area.end
        elif tail.area.end > end:
            after = Piece(Range(end, tail.area.end - end), tail.private)
        # Neighbours of the wanted side that the area merely meets join it.
        if start == area.start and before is None and self._meets(first - 1, start, private):
            first -= 1
            start = self._pieces[first].area.start
        if end == area.end and after is None and self._continues(last, end, private):
            end = self._pieces[last].area.end
            last += 1
        middle = Piece(Range(start, end - start), private)
        pieces = [piece for piece in (before, middle, after) if piece is not None]
        with self._parked():
            self._replace(first, last, pieces)

    def _meets(self, index: int, address: int, private: bool) -> bool:
        if index < 0:
            return False
        piece = self._pieces[index]
        return piece.private == private and piece.area.end == address

    def _continues(self, index: int, address: int, private: bool) -> bool:
        if index >= len(self._pieces):
            return False
        piece = self._pieces[index]
        return piece.private == private and piece.area.start == address

    def _replace(self, first: int, last: int, pieces: list[Piece]) -> None:
        """Memslots [first, last) of the lists become `pieces`; all of it or, raising, nothing."""
        count = len(self._pieces) - (last - first) + len(pieces)
        if count > self._limit:
            raise OSError(
                errno.ENOSPC,
                f"{count} memslots would be needed, and KVM has {self._limit}; use --scheme cbit, "
                "or let the guest convert larger ranges",
            )
        old, numbers = self._pieces[first:last], self._numbers[first:last]
        taken = [self._number() for _ in pieces[len(numbers) :]]
        new_numbers = [*numbers, *taken][: len(pieces)]
        deleted = made = 0
        try:
            for number in numbers:
                self._vm.set_user_memory_region(number, 0, 0, 0)
                deleted += 1
            for number, piece in zip(new_numbers, pieces, strict=True):
                self._make(number, piece)
                made += 1
        except KvmError as error:
            self._free.extend(taken)
            self._restore(new_numbers[:made], old[:deleted], numbers[:deleted], error)
            raise
        self._starts[first:last] = [piece.area.start for piece in pieces]
        self._pieces[first:last] = pieces
        self._numbers[first:last] = new_numbers
        self._free.extend(numbers[len(pieces) :])

    def _number(self) -> int:
        """A slot number that is not in use; never past KVM's limit, as no gaps are left."""
        return self._free.pop() if self._free else next(self._fresh)

    def _restore(
        self, made: list[int], old: list[Piece], numbers: list[int], error: KvmError
    ) -> None:
        """Put the memslots back that a failed replacement has deleted, without the ones it made."""
        try:
            for number in made:
                self._vm.set_user_memory_region(number, 0, 0, 0)
            for number, piece in zip(numbers, old, strict=True):
                self._make(number, piece)
        except KvmError as second:
            raise HostError(
                f"memslots that a failed conversion has deleted cannot be made again: {second} "
                f"(after {error}); the guest cannot go on"
            ) from second

    def _make(self, number: int, piece: Piece) -> None:
        backing = self._private if piece.private else self._memory.shared
        set_slot(self._vm, number, piece.area.start, piece.area, backing)
