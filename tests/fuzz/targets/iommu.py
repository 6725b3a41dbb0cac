"""The virtual IOMMU: its requests, and what devices behind it reach."""

from __future__ import annotations

import contextlib
import os
import struct

from tests.fuzz.drawing import Choices, recorded
from tests.fuzz.iommu_model import Program
from tests.fuzz.targets.conversions import PAGES, records
from tests.fuzz.targets.registry import target
from tests.support.conversion import share, unshare
from tests.support.iommu import IommuRig
from vmm.core.errors import GuestMemoryError
from vmm.core.ranges import PAGE_SIZE
from vmm.devices.virtio.iommu import T_ATTACH, T_DETACH, T_UNMAP
from vmm.memory.guest_memory import PageState
from vmm.memory.lending import READ, WRITE, Endpoint, IommuMemory


@target("iommu", runs=60)
def iommu(data: bytes) -> None:
    """Requests to the virtual IOMMU, well formed and not, between accesses by its devices."""
    rig = IommuRig(pages_of_ram=PAGES * 2)
    devices = [rig.device, rig.another("net0", 2)[1]]
    try:
        for verb, number, domain, start, last, physical, flags in records(data, "<BBHQQQI"):
            device = devices[number % 2]
            if verb % 8 == 6:
                with contextlib.suppress(GuestMemoryError):
                    device.pwrite(bytes(flags % 9000), start)
            elif verb % 8 == 7:
                with contextlib.suppress(GuestMemoryError):
                    device.pread(flags % 9000, start)
            else:
                rig.raw(_iommu_request(verb, number, domain, start, last, physical, flags), 68)
            _check_lending(rig)
        rig.machine.driver.status = 0
        assert rig.memory.mapped == rig.memory.bytes_in(PageState.LENT) == 0
    finally:
        rig.close()


def _iommu_request(
    verb: int, number: int, domain: int, start: int, last: int, physical: int, flags: int
) -> bytes:
    head = struct.pack("<B3xI", verb % 8, domain)
    fields = struct.pack("<QQQI", start, last, physical, flags)
    if verb % 8 in (T_ATTACH, T_DETACH):
        fields = struct.pack("<III", number % 4 << 3, flags & 3, 0)
    elif verb % 8 == T_UNMAP:
        fields = struct.pack("<QQI", start, last, flags & 1)
    return head + fields + bytes(40)


@target("dma", runs=60)
def dma(data: bytes) -> None:
    """Two devices behind the IOMMU read, write and transfer, while the guest maps, unmaps and
    converts under them: what they reach is what a look at the table, page by page, says."""
    rig = IommuRig(pages_of_ram=PAGES * 2)
    devices = [(rig.endpoint, rig.device), rig.another("net0", 2)]
    file = os.memfd_create("file")
    try:
        os.pwrite(file, bytes(range(256)) * 64, 0)
        for page in range(PAGES * 2):
            rig.shared.pwrite(bytes((page, 1)) * 2048, page * PAGE_SIZE)
            rig.private.pwrite(bytes((page, 2)) * 2048, page * PAGE_SIZE)
        for verb, number, first, second, size in records(data, "<BBBBI"):
            endpoint, device = devices[number % 2]
            count, domain = 1 + size % 4, number % 3
            if verb % 8 == 0:
                rig.attach(domain, endpoint.number)
            elif verb % 8 == 1:
                rig.detach(domain, endpoint.number)
            elif verb % 8 in (2, 3):
                rig.map(first % 16 * PAGE_SIZE, second % (PAGES * 2), count, size >> 8 & 3, domain)
            elif verb % 8 == 4:
                rig.unmap(first % 16 * PAGE_SIZE, count, domain)
            elif verb % 8 == 5:
                ask = share if size & 1 else unshare
                rig.converter.convert(ask(first % (PAGES * 2), 1 + second % 3))
            else:
                _access(rig, endpoint, device, file, verb, first, second, size)
            _check_lending(rig)
    finally:
        os.close(file)
        rig.close()


def _access(
    rig: IommuRig,
    endpoint: Endpoint,
    device: IommuMemory,
    file: int,
    verb: int,
    first: int,
    second: int,
    size: int,
) -> None:
    """One access to two pieces, or a transfer to or from the first of them."""
    pieces = [first % 16 * PAGE_SIZE + size % 4096, 1 + (size >> 12) % 9000,
              second % 16 * PAGE_SIZE, 1 + second * 16]  # fmt: skip
    is_write, is_transfer = bool(verb & 1), bool(verb & 8)
    pieces = pieces[:2] if is_transfer else pieces
    wanted = _reached(rig, endpoint, pieces, WRITE if is_write else READ)
    sides = {False: rig.shared, True: rig.private}
    before = {private: side.pread(PAGES * 2 * PAGE_SIZE, 0) for private, side in sides.items()}
    total = sum(pieces[1::2])
    payload = bytes(range(1, 252)) * (total // 251 + 1)
    if is_write and is_transfer:
        payload = os.pread(file, total, 0)
    got = b""
    try:
        if is_write:
            if is_transfer:
                assert device.transfer_in(file, 0, pieces[0], total) == total
            else:
                device.write_many(pieces, payload[:total])
        elif is_transfer:
            assert device.transfer_out(pieces[0], total, file, 0) == total
            got = os.pread(file, total, 0)
        else:
            got = bytes(device.read_many(pieces))
    except GuestMemoryError:
        assert wanted is None, f"{pieces} are mapped, and were refused"
        wanted = []
    else:
        assert wanted is not None, f"{pieces} are not mapped, and were reached"
        if not is_write:
            assert got == b"".join(before[side][at : at + n] for at, n, side in wanted)
    after = {private: bytearray(data) for private, data in before.items()}
    if is_write:
        done = 0
        for at, length, private in wanted:
            after[private][at : at + length] = payload[done : done + length]
            done += length
    for private, side in sides.items():
        assert side.pread(PAGES * 2 * PAGE_SIZE, 0) == after[private], "another byte has changed"


def _reached(
    rig: IommuRig, endpoint: Endpoint, pieces: list[int], access: int
) -> list[tuple[int, int, bool]] | None:
    """(gpa, size, private) for each part of a page; None where some of it is not mapped so."""
    found = []
    for iova, size in zip(pieces[::2], pieces[1::2], strict=True):
        at = iova
        while at < iova + size:
            part = min(PAGE_SIZE - at % PAGE_SIZE, iova + size - at)
            mappings = [] if endpoint.space is None else endpoint.space.mappings
            mine = [m for m in mappings if m.iova <= at < m.iova + m.size and m.access & access]
            if not mine:
                return None
            gpa = mine[0].gpa + at - mine[0].iova
            if not mine[0].lent and rig.state(gpa // PAGE_SIZE) is not PageState.SHARED:
                return None
            found.append((gpa, part, mine[0].lent))
            at += part
    return found


def _check_lending(rig: IommuRig) -> None:
    """A page is lent by as many mappings as there are, and by none twice at one address."""
    spaces = [e.space for e in rig.iommu._endpoints.values() if e.space is not None]
    counts = [0] * (PAGES * 2)
    for space in spaces:
        ends = [m.iova + m.size for m in space.mappings]
        assert all(end <= start for end, start in zip(ends, space.starts[1:], strict=False))
        for mapping in space.mappings:
            for page in range(mapping.area.start // PAGE_SIZE, mapping.area.end // PAGE_SIZE):
                counts[page] += mapping.lent
    for page, count in enumerate(counts):
        assert rig.memory._again.get(page * PAGE_SIZE) == max(count - 1, 0)
        assert (rig.state(page) is PageState.LENT) == bool(count)
    assert rig.memory.mapped == sum(map(len, spaces))


_STEPS = 60


def _play(choices: Choices) -> None:
    program = Program(choices)
    try:
        for _ in range(_STEPS):
            if choices.spent:
                break
            program.step()
    finally:
        program.close()


@target("iommu-program", lambda: [recorded(_play, seed) for seed in range(6)], runs=20)
def iommu_program(data: bytes) -> None:
    """Programs of requests, accesses and conversions beside a model: each answer is the model's."""
    _play(Choices(data))
