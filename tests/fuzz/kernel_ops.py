"""What a random program does to KVM itself: ioctls, holes, host and guest accesses.

Each operation is plain data, so that a program can be printed, repeated and shortened.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from kvm_bindings import fdops
from vmm.core.ranges import PAGE_SIZE

PAGES = 12
"""Pages of guest-physical memory that programs play with, and of the memfd behind them."""
SLOTS, GUEST_MEMFDS = 5, 3
GMEM_PAGES = 8


class CreateGuestMemfd(NamedTuple):
    size: int
    flags: int


class SetSlot(NamedTuple):
    """KVM_SET_USER_MEMORY_REGION2, or the older ioctl where `old_ioctl`."""

    number: int
    gpa: int  # from the area's start
    size: int
    hva: int  # from the mapping's start
    flags: int
    guest_memfd: int  # an index; -1: the plain memfd's fd, which is no guest_memfd
    offset: int
    old_ioctl: bool


class SetAttributes(NamedTuple):
    gpa: int
    size: int
    attributes: int


class ConvertInPlace(NamedTuple):
    """KVM_SET_MEMORY_ATTRIBUTES2."""

    guest_memfd: int
    offset: int
    size: int
    attributes: int


class VmIo(NamedTuple):
    """A host access by the VM's fd: "pread" or "pwrite"."""

    what: str
    page: int
    word: int


class Fallocate(NamedTuple):
    guest_memfd: int
    mode: int
    offset: int
    size: int


class GuestMemfdIo(NamedTuple):
    """A host access: "pread", "pwrite", "map", "resident", through the mapping "load", "store"."""

    guest_memfd: int
    what: str
    offset: int
    word: int


class CloseGuestMemfd(NamedTuple):
    guest_memfd: int


class HostRead(NamedTuple):
    page: int


class HostWrite(NamedTuple):
    page: int
    word: int


class GuestRead(NamedTuple):
    page: int


class GuestWrite(NamedTuple):
    page: int
    word: int


Op = (
    CreateGuestMemfd
    | SetSlot
    | SetAttributes
    | ConvertInPlace
    | VmIo
    | Fallocate
    | GuestMemfdIo
    | CloseGuestMemfd
    | HostRead
    | HostWrite
    | GuestRead
    | GuestWrite
)
Program = list[Op]

_KEEP, _PUNCH = fdops.FALLOC_FL_KEEP_SIZE, fdops.FALLOC_FL_PUNCH_HOLE


class Generator:
    """Random programs: mostly sensible, with a share of arguments that no kernel takes."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._gmems = 0

    def program(self, length: int) -> Program:
        """`length` operations after a guest_memfd and a memslot or two."""
        start: Program = [self._create() for _ in range(self._chance.choice((1, 2, 2, 3)))]
        start += [self._slot(wide=True) for _ in range(self._chance.randint(1, 2))]
        return start + [self._op() for _ in range(length)]

    def _op(self) -> Op:
        chance = self._chance
        page = chance.randrange(PAGES)
        match chance.randrange(28):
            case 0 if chance.random() < 0.3:
                return CloseGuestMemfd(self._gmem())
            case 0:
                return self._create()
            case 1 | 2 | 3:
                return self._slot()
            case 4 | 5 | 6:
                gpa, size = self._range(PAGES)
                return SetAttributes(gpa, size, chance.choice((0, 0, 8, 8, 8, 8, 8, 1, 9)))
            case 7 | 8:
                offset, size = self._range(GMEM_PAGES + 2)
                mode = chance.choice((_KEEP | _PUNCH,) * 6 + (_KEEP, _KEEP, _PUNCH, 0))
                return Fallocate(self._gmem(), mode, offset, size)
            case 9 | 10 | 11:
                what = chance.choice(
                    ("pread", "pwrite", "map", "load", "load", "store", "store", "resident")
                )
                offset = chance.randrange(GMEM_PAGES + 1) * PAGE_SIZE
                return GuestMemfdIo(self._gmem(), what, offset, self._word())
            case 12:
                return HostRead(page)
            case 13 | 14:
                return HostWrite(page, self._word())
            case 15 | 16 | 17 | 18:
                return GuestWrite(page, self._word())
            case 24 | 25:
                offset, size = self._range(GMEM_PAGES + 1)
                attributes = chance.choice((0, 0, 0, 8, 8, 8, 8, 1, 9))
                return ConvertInPlace(self._gmem(), offset, size, attributes)
            case 26:
                return VmIo(chance.choice(("pread", "pwrite")), page, self._word())
        return GuestRead(page)

    def _create(self) -> CreateGuestMemfd:
        chance = self._chance
        size = chance.choice((GMEM_PAGES, GMEM_PAGES, GMEM_PAGES, 1)) * PAGE_SIZE
        flags = chance.choice((0, 0, 1, 1, 2, 3, 3))
        if chance.random() < 0.05:
            size = chance.choice((0, 1, PAGE_SIZE + 512, (1 << 63) + PAGE_SIZE))
        elif chance.random() < 0.05:
            flags = chance.choice((4, 1 << 31, 1 << 63, 5))
        else:
            self._gmems += 1
        return CreateGuestMemfd(size, flags)

    def _slot(self, *, wide: bool = False) -> SetSlot:
        chance = self._chance
        number = chance.randrange(SLOTS)
        gpa, size = (0, GMEM_PAGES * PAGE_SIZE) if wide else self._range(PAGES)
        if not wide and chance.random() < 0.3:
            size = 0  # deletes
        flags = chance.choice((0, 0, 4, 4, 4, 4)) if chance.random() < 0.85 else self._odd_flags()
        hva = gpa if chance.random() < 0.7 else PAGE_SIZE * chance.randrange(PAGES)
        offset = gpa if chance.random() < 0.6 else PAGE_SIZE * chance.randrange(GMEM_PAGES)
        gmem = self._gmem()
        if chance.random() < 0.15:
            match chance.randrange(4):
                case 0:
                    number = chance.choice((32764, 65535, 1 << 20))
                case 1:
                    hva += 512
                case 2:
                    offset = chance.choice((1, (1 << 64) - PAGE_SIZE, 1 << 63))
                case 3:
                    gmem = -1
        return SetSlot(number, gpa, size, hva, flags, gmem, offset, chance.random() < 0.1)

    def _odd_flags(self) -> int:
        return self._chance.choice((1, 2, 5, 6, 8, 1 << 31))

    def _range(self, pages: int) -> tuple[int, int]:
        chance = self._chance
        first = chance.randrange(pages)
        size = chance.randint(1, min(8, pages - first)) * PAGE_SIZE
        start = first * PAGE_SIZE
        if chance.random() < 0.04:
            start += chance.choice((1, 512, PAGE_SIZE - 1))
        if chance.random() < 0.04:
            size = chance.choice((0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1))
        return start, size

    def _gmem(self) -> int:
        """Mostly one that exists."""
        return self._chance.randrange(max(1, min(self._gmems, GUEST_MEMFDS)))

    def _word(self) -> int:
        return self._chance.getrandbits(63) | 1
