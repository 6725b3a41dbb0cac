"""A VM's memslots: the rules of kvm_set_memory_region (virt/kvm/kvm_main.c)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

from kvm_bindings import ioctls
from tests.support.fake_kvm.guest_memfd import FakeGuestMemfd
from tests.support.fake_kvm.kernel import EEXIST, EINVAL
from vmm.core.ranges import PAGE_SIZE, Range

LOG_DIRTY, READONLY, GUEST_MEMFD = 1 << 0, 1 << 1, ioctls.KVM_MEM_GUEST_MEMFD
U64 = 1 << 64
USER_END = (1 << 47) - PAGE_SIZE
"""Where user-space addresses end with four levels of page tables (TASK_SIZE_MAX)."""
MOST_PAGES = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES


@dataclass
class Slot:
    """One memslot. `guest_memfd` is None without, or with one that has been closed."""

    number: int
    area: Range
    hva: int
    flags: int
    guest_memfd: FakeGuestMemfd | None = None
    offset: int = 0
    gmem_only: bool = False

    @property
    def backed_by_guest_memfd(self) -> bool:
        """Whether its pages can come from a guest_memfd at all, closed by now or not."""
        return bool(self.flags & GUEST_MEMFD)


class Refusal(Exception):
    """An ioctl's errno, on its way to the method that knows the ioctl's name."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SlotTable:
    """All slots, by number and by guest-physical address."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._slots: dict[int, Slot] = {}
        self._starts: list[tuple[int, int]] = []

    def all(self) -> list[Slot]:
        """The slots in address order."""
        return [self._slots[number] for _, number in self._starts]

    def at(self, gpa: int) -> Slot | None:
        """The slot that holds the address."""
        index = bisect_right(self._starts, (gpa, self._most)) - 1
        if index < 0:
            return None
        slot = self._slots[self._starts[index][1]]
        return slot if gpa < slot.area.end else None

    def set(
        self,
        number: int,
        gpa: int,
        size: int,
        hva: int,
        flags: int,
        guest_memfd: FakeGuestMemfd | int | None = None,
        offset: int = 0,
    ) -> bool:
        """KVM_SET_USER_MEMORY_REGION2 on a table; whether anything changed. `guest_memfd` may be
        the errno that looking its fd up gave. Raises Refusal."""
        self._check(number, gpa, size, hva, flags, offset)
        old = self._slots.get(number)
        if size == 0:
            if old is None:
                raise Refusal(EINVAL)
            self._drop(old)
            return True
        area = Range(gpa, size)
        if old is not None and not self._require_change(old, area, hva, flags):
            return False
        if (old is None or old.area.start != gpa) and self._overlaps(area, number):
            raise Refusal(EEXIST)
        new = Slot(number, area, hva, flags)
        if flags & GUEST_MEMFD:
            if guest_memfd is None or isinstance(guest_memfd, int):
                raise Refusal(guest_memfd or EINVAL)
            if refused := guest_memfd.bind(number, offset, size):
                raise Refusal(refused)
            new.guest_memfd, new.offset = guest_memfd, offset
            new.gmem_only = guest_memfd.mappable
        if old is not None:
            self._drop(old)
        self._slots[number] = new
        insort(self._starts, (gpa, number))
        return True

    def _check(self, number: int, gpa: int, size: int, hva: int, flags: int, offset: int) -> None:
        allowed = GUEST_MEMFD if flags & GUEST_MEMFD else LOG_DIRTY | READONLY
        unaligned = size % PAGE_SIZE or gpa % PAGE_SIZE or hva % PAGE_SIZE
        if flags & ~allowed or unaligned or hva + size > USER_END:
            raise Refusal(EINVAL)
        if flags & GUEST_MEMFD and (offset % PAGE_SIZE or offset + size >= U64):
            raise Refusal(EINVAL)
        if number >= self._most or gpa + size >= U64 or size // PAGE_SIZE > MOST_PAGES:
            raise Refusal(EINVAL)

    def _require_change(self, old: Slot, area: Range, hva: int, flags: int) -> bool:
        """Whether there is anything to do about a slot that exists."""
        if flags & GUEST_MEMFD:
            raise Refusal(EINVAL)  # such slots are immutable
        fixed = READONLY | GUEST_MEMFD
        if hva != old.hva or area.size != old.area.size or (flags ^ old.flags) & fixed:
            raise Refusal(EINVAL)
        return area.start != old.area.start or flags != old.flags

    def _overlaps(self, area: Range, number: int) -> bool:
        index = bisect_right(self._starts, (area.end - 1, self._most)) - 1
        # Slots are disjoint, so that only the nearest ones can reach into `area`; the slot
        # that is being moved does not count.
        while index >= 0:
            slot = self._slots[self._starts[index][1]]
            if slot.number != number:
                return slot.area.overlaps(area)
            index -= 1
        return False

    def _drop(self, slot: Slot) -> None:
        if slot.guest_memfd is not None:
            slot.guest_memfd.unbind(slot.number)
        del self._slots[slot.number]
        del self._starts[bisect_left(self._starts, (slot.area.start, slot.number))]
