"""A guest that means ill drives its virtual IOMMU, beside a model of 100 lines that says what has
to come of it: each status, each byte that a device reads, each page's state."""

from __future__ import annotations

import random

from tests.support.conversion import share, unshare
from tests.support.iommu import SHARED_PAGES, IommuRig, map_request, unmap_request
from tests.support.memory import page
from vmm.core.errors import GuestMemoryError
from vmm.core.ranges import PAGE_SIZE
from vmm.devices.virtio import iommu
from vmm.memory.guest_memory import PageState
from vmm.memory.lending import READ, WRITE

RAM_PAGES = 32
DOMAINS = (0, 1, 2, 0xFFFF, 0x10000)
ENDPOINTS = (1 << 3, 2 << 3, 3 << 3, 0x99)
BASES = (0, 0x1000, 0x10_0000, 0xFEDF_E000, 0xFEEF_F000, (1 << 48) - page(4), (1 << 64) - page(2))
_MSI = range(0xFEE00, 0xFEF00)  # page numbers


class Model:
    """What the specification and vmm/docs/devices.md say, page by page."""

    def __init__(self) -> None:
        self.shared = [number < SHARED_PAGES for number in range(RAM_PAGES)]
        self.domains: dict[int, int] = {}
        # By endpoint: the first IOVA page of a mapping -> (pages, first GPA page, access, lent).
        self.spaces: dict[int, dict[int, tuple[int, int, int, bool]]] = {}
        self.bytes = {
            (number, side): bytes((number, side)) for number in range(RAM_PAGES) for side in (0, 1)
        }

    def lent(self) -> set[int]:
        return {
            number
            for space in self.spaces.values()
            for count, first, _, lent in space.values()
            if lent
            for number in range(first, first + count)
        }

    def attach(self, domain: int, endpoint: int, flags: int) -> int:
        if flags & ~1:
            return iommu.S_INVAL
        if endpoint not in ENDPOINTS[:3]:
            return iommu.S_NOENT
        if domain > 0xFFFF:
            return iommu.S_RANGE
        if flags:
            return iommu.S_UNSUPP
        if domain in self.domains:
            return iommu.S_OK if self.domains[domain] == endpoint else iommu.S_UNSUPP
        self._leave(endpoint)
        self.domains[domain] = endpoint
        self.spaces[endpoint] = {}
        return iommu.S_OK

    def _leave(self, endpoint: int) -> None:
        self.domains = {d: e for d, e in self.domains.items() if e != endpoint}
        self.spaces.pop(endpoint, None)

    def detach(self, domain: int, endpoint: int) -> int:
        if endpoint not in ENDPOINTS[:3]:
            return iommu.S_NOENT
        if self.domains.get(domain) != endpoint:
            return iommu.S_INVAL
        self._leave(endpoint)
        return iommu.S_OK

    def map(self, domain: int, iova: int, size: int, gpa: int, flags: int) -> int:
        if flags & ~3 or not flags:
            return iommu.S_INVAL
        if domain not in self.domains:
            return iommu.S_NOENT
        end = iova + size
        # What the request can't say wraps at 64 bits, and has its end before its start then.
        if (iova | size | gpa) % PAGE_SIZE or not size or end > 1 << 48:
            return iommu.S_RANGE
        first, count, target = iova // PAGE_SIZE, size // PAGE_SIZE, gpa // PAGE_SIZE
        if first < _MSI.stop and first + count > _MSI.start:
            return iommu.S_INVAL
        space = self.spaces[self.domains[domain]]
        if any(at < first + count and first < at + n for at, (n, *_) in space.items()):
            return iommu.S_INVAL
        if target + count > RAM_PAGES:
            return iommu.S_FAULT
        kinds = set(self.shared[target : target + count])
        if len(kinds) > 1:
            return iommu.S_INVAL
        space[first] = (count, target, flags, not kinds.pop())
        return iommu.S_OK

    def unmap(self, domain: int, iova: int, size: int, reserved: int) -> int:
        if reserved:
            return iommu.S_INVAL
        if domain not in self.domains:
            return iommu.S_NOENT
        start, last = iova, (iova + size - 1) & ((1 << 64) - 1)
        if last < start:
            return iommu.S_RANGE
        space = self.spaces[self.domains[domain]]
        hit = [
            at for at, (n, *_) in space.items() if at * PAGE_SIZE <= last and page(at + n) > start
        ]
        if any(at * PAGE_SIZE < start or page(at + space[at][0]) - 1 > last for at in hit):
            return iommu.S_RANGE
        for at in hit:
            del space[at]
        return iommu.S_OK

    def where(self, endpoint: int, iova: int, access: int) -> tuple[int, int] | None:
        """The page and the side (1: private) of an access by a device; None: it is refused."""
        for at, (count, first, flags, lent) in self.spaces.get(endpoint, {}).items():
            number = iova // PAGE_SIZE - at
            if 0 <= number < count and flags & access:
                found = first + number
                if lent:
                    return found, 1
                return (found, 0) if self.shared[found] else None
        return None

    def convert(self, first: int, count: int, to_shared: bool) -> bool:
        """Whether it is carried out. The side that a page leaves is gone."""
        area = range(first, first + count)
        if self.lent() & set(area):
            return False
        if all(self.shared[number] == to_shared for number in area):
            return True  # nothing is to be done
        for number in area:
            self.shared[number] = to_shared
            self.bytes[number, int(to_shared)] = b"\0\0"
        return True


class Program:
    """Random requests, accesses and conversions on both, compared after each."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.rig = IommuRig(pages_of_ram=RAM_PAGES)
        self.model = Model()
        self.devices = {1 << 3: self.rig.device}
        for slot in (2, 3):
            self.devices[slot << 3] = self.rig.another(f"net{slot}", slot)[1]
        for (number, side), data in self.model.bytes.items():
            (self.rig.private if side else self.rig.shared).pwrite(data, page(number))

    def close(self) -> None:
        self.rig.close()

    def iova(self) -> int:
        rng = self.rng
        near = [page(at) for space in self.model.spaces.values() for at in space]
        base = rng.choice((*BASES, *near[:8]))
        return int(base + rng.choice((0, 0, 0, page(1), page(2), 1, 512)))

    def size(self) -> int:
        return int(
            self.rng.choice((PAGE_SIZE, PAGE_SIZE, page(2), page(3), page(7), 0, 100, 1 << 40))
        )

    def step(self) -> str:
        kinds = ("attach", "detach", "map", "map", "map", "unmap", "access", "access", "convert")
        kind: str = self.rng.choice((*kinds, "garbage", "host"))
        if self.rng.random() < 0.005:
            kind = "reset"
        told = getattr(self, f"_{kind}")()
        self.check()
        return f"{kind} {told}"

    def _attach(self) -> str:
        rng = self.rng
        domain, endpoint = rng.choice(DOMAINS), rng.choice(ENDPOINTS)
        flags = rng.choice((0, 0, 0, 1, 2))
        expected = self.model.attach(domain, endpoint, flags)
        assert self.rig.attach(domain, endpoint, flags) == expected
        return f"{domain} {endpoint:#x} {flags}: {expected}"

    def _detach(self) -> str:
        domain, endpoint = self.rng.choice(DOMAINS), self.rng.choice(ENDPOINTS)
        expected = self.model.detach(domain, endpoint)
        assert self.rig.detach(domain, endpoint) == expected
        return f"{domain} {endpoint:#x}: {expected}"

    def _map(self) -> str:
        rng = self.rng
        domain, iova, size = rng.choice(DOMAINS[:4]), self.iova(), self.size()
        gpa = rng.choice((page(rng.randrange(RAM_PAGES + 2)), rng.getrandbits(64)))
        flags = rng.choice((READ, WRITE, 3, 3, 3, 0, 4, 1 << 31))
        expected = self.model.map(domain, iova % (1 << 64), size, gpa, flags)
        iova %= 1 << 64
        status = self.rig.ask(map_request(iova, size, gpa, flags, domain))
        assert status == expected, f"map {iova:#x} {size:#x} {gpa:#x}: {status}, not {expected}"
        return f"{domain} {iova:#x} {size:#x} {gpa:#x} {flags}: {expected}"

    def _unmap(self) -> str:
        domain, iova, size = self.rng.choice(DOMAINS[:4]), self.iova() % (1 << 64), self.size()
        reserved = self.rng.choice((0, 0, 0, 1))
        expected = self.model.unmap(domain, iova, size, reserved)
        status = self.rig.ask(unmap_request(iova, size, domain, reserved))
        assert status == expected, f"unmap {iova:#x} {size:#x}: {status}, not {expected}"
        return f"{domain} {iova:#x} {size:#x}: {expected}"

    def _access(self) -> str:
        endpoint = self.rng.choice(list(self.devices))
        iova = self.iova() & -PAGE_SIZE
        own = self.model.spaces.get(endpoint)
        if own and self.rng.random() < 0.7:
            iova = page(self.rng.choice(list(own)) + self.rng.choice((0, 0, 1, 2, -1)))
        write = self.rng.random() < 0.5
        device, where = (
            self.devices[endpoint],
            self.model.where(endpoint, iova, WRITE if write else READ),
        )
        data = self.rng.randbytes(2)
        try:
            if write:
                device.pwrite(data, iova)
                found = None
            else:
                found = device.pread(2, iova)
        except GuestMemoryError:
            assert where is None, f"{iova:#x} is mapped, and refused"
            return "refused"
        assert where is not None, f"{iova:#x} is not mapped, and was reached"
        if write:
            self.model.bytes[where] = data
        else:
            assert found == self.model.bytes[where]
        return f"{endpoint:#x} {iova:#x} {'w' if write else 'r'}"

    def _convert(self) -> str:
        rng = self.rng
        first = rng.randrange(RAM_PAGES)
        count = rng.randint(1, min(3, RAM_PAGES - first))
        to_shared = rng.random() < 0.5
        request = (share if to_shared else unshare)(first, count)
        done = self.rig.converter.convert(request) == 0
        assert done == self.model.convert(first, count, to_shared)
        return f"{first} {count} {to_shared}: {done}"

    def _garbage(self) -> str:
        rng = self.rng
        data = bytes((rng.choice((0, 1, 2, 3, 4, 5, 6, 255)),)) + rng.randbytes(rng.randrange(80))
        used, _ = self.rig.raw(data[: rng.choice((1, 4, 19, len(data)))], rng.choice((0, 3)))
        assert used == 0  # no room for a status: nothing was carried out
        return data.hex()

    def _host(self) -> str:
        number = self.rng.randrange(RAM_PAGES)
        lent = number in self.model.lent()
        try:
            found = self.rig.memory.pread(2, page(number))
        except GuestMemoryError:
            assert not self.model.shared[number] or lent
            return "refused"
        assert self.model.shared[number] and found == self.model.bytes[number, 0]
        return str(number)

    def _reset(self) -> str:
        self.rig.machine.driver.status = 0
        self.rig.machine.up()
        self.model.domains, self.model.spaces = {}, {}
        return ""

    def check(self) -> None:
        """Page states are the model's, and nothing is kept that the guest has not mapped."""
        lent = self.model.lent()
        for number in range(RAM_PAGES):
            expected = PageState.SHARED if self.model.shared[number] else PageState.PRIVATE
            if number in lent:
                expected = PageState.LENT
            assert self.rig.state(number) is expected, f"page {number}"
        assert self.rig.memory.mapped == sum(map(len, self.model.spaces.values()))
        assert len(self.rig.iommu._events) <= iommu.MOST_EVENTS
