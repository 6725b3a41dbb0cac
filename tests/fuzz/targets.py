"""Fuzz targets: bytes in; whatever they say, pyvmm stays in order. Raises where it doesn't.

    python -m tests.fuzz.guided NAME [--seconds N] [--seed N]      hypothesis, guided by coverage
    python -m tests.fuzz.guided NAME --atheris [libFuzzer words]   where atheris is installed

The corpus (tests/fuzz/corpus/NAME.txt) has one input a line, in hexadecimal, and what it is.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvm_bindings.exits import HypercallExit, IoExit, MemoryFaultExit
from tests.support.conversion import share, unshare
from tests.support.fake_kvm import FakeKernel, FakeVm
from tests.support.fake_platform import FakePlatform
from tests.support.fake_vcpu import FakeVcpu
from tests.support.images import CODECS, build_bzimage, build_elf, memfd
from tests.support.images import FakeMemory as ImageMemory
from tests.support.iommu import IommuRig
from tests.support.x86 import exit_handlers
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.kernel import load_kernel_image
from vmm.boot import decompress
from vmm.boot.errors import ImageError
from vmm.core.errors import GuestMemoryError
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.bus import PortBus, PortDevice
from vmm.devices.virtio.iommu import T_ATTACH, T_DETACH, T_UNMAP
from vmm.exits.handlers import bank_of
from vmm.exits.outcome import Outcome
from vmm.memory.guest_memory import PageState
from vmm.memory.lending import READ, WRITE, Endpoint, IommuMemory
from vmm.selftest.entries import Combination
from vmm.selftest.rig import RAM_GPA, Rig

CORPUS = Path(__file__).parent / "corpus"
PAGES = 16
_MOST_RECORDS = 16
_U64 = (1 << 64) - 1
_PLATFORM = FakePlatform(FakeKernel.sw_protected())


def records(data: bytes, form: str) -> Iterator[tuple[int, ...]]:
    """`data` cut into records, the last one filled up with zeros."""
    size = struct.calcsize(form)
    for start in range(0, min(len(data), size * _MOST_RECORDS), size):
        yield struct.unpack(form, data[start : start + size].ljust(size, b"\0"))


class Guest:
    """Exit handlers over a VM with attributes, half of its pages shared; `check` each exit."""

    def __init__(self) -> None:
        self.rig = Rig(_PLATFORM, Combination("attributes", "guest_memfd-plain"), pages=PAGES,
                       private=[Range(RAM_GPA, PAGES // 2 * PAGE_SIZE)])  # fmt: skip
        self.outcomes: list[Outcome] = []
        self.ports = PortBus()
        self.handlers = exit_handlers(
            self.rig.memory, self.rig.converter, self.outcomes.append, ports=self.ports
        )
        self.vcpus = [FakeVcpu(index=0), FakeVcpu(index=1)]
        self.start = self.rig.memory.bytes_in(PageState.SHARED)

    def handle(self, exit: Any, vcpu: int = 0) -> None:
        self.handlers.table[type(exit)][1](self.vcpus[vcpu], exit)

    def check(self) -> None:
        """KVM, page states and accounting agree, and nothing is in between."""
        memory, counts = self.rig.memory, self.rig.converter.accounting
        states = memory.states()
        assert sum(area.size for area, _ in states) == memory.ram_bytes
        vm = self.rig.vm
        assert isinstance(vm, FakeVm)
        for area, state in states:
            assert state in (PageState.SHARED, PageState.PRIVATE), state
            attributes = [value for _, value in vm.attributes.runs(area)]
            assert attributes == [0 if state is PageState.SHARED else 8], (area, attributes)
        shared = memory.bytes_in(PageState.SHARED)
        assert shared == self.start + counts.share.bytes - counts.unshare.bytes

    def close(self) -> None:
        self.rig.close()


@contextmanager
def guest() -> Iterator[Guest]:
    made = Guest()
    try:
        yield made
    finally:
        made.close()


def is_answer(value: int) -> bool:
    """0 or a negative errno."""
    return -4095 <= value <= 0


def hypercall(data: bytes) -> None:
    """Records of four u64: GPA, pages, attributes, hypercall number (0 stands for the one that
    is meant). KVM's own checks come first, as a guest can't get round them."""
    with guest() as under_test:
        for gpa, pages, attributes, number in records(data, "<4Q"):
            frame = gpa >> 12
            if gpa % PAGE_SIZE or not pages or (frame + pages) & _U64 <= frame:
                continue
            before = under_test.rig.memory.states()
            args = (gpa, pages, attributes, 0, 0, 0)
            under_test.handle(HypercallExit(number or 12, args, 0))
            answer = under_test.vcpus[0].hypercalls.pop()
            assert is_answer(answer), answer
            if answer:
                assert under_test.rig.memory.states() == before
            under_test.check()


def fault(data: bytes) -> None:
    """Records of four u64: flags, GPA, size, errno (0: EFAULT) of KVM_EXIT_MEMORY_FAULT."""
    with guest() as under_test:
        for flags, gpa, size, number in records(data, "<4Q"):
            stopped = len(under_test.outcomes)
            before = under_test.rig.memory.states()
            under_test.handle(MemoryFaultExit(flags, gpa, size, number & 0xFFFF or 14))
            if len(under_test.outcomes) > stopped:
                assert under_test.outcomes[-1].exit_status == 1
                assert under_test.rig.memory.states() == before
            under_test.check()


def doorbell(data: bytes) -> None:
    """Records of 12 bytes: direction and vCPU, register offset, size, times, and a u64."""
    with guest() as under_test:
        for how, offset, size, times, value in records(data, "<4BQ"):
            vcpu, is_write = how >> 1 & 1, bool(how & 1)
            width = (1, 2, 4)[size % 3]
            count = 1 + times % 3
            words = struct.pack("<Q", value) * 3
            port = layout.DOORBELL_PORT + offset % (layout.DOORBELL_PORTS + 4)
            payload = words[: width * count] if is_write else b""
            under_test.handle(IoExit(port, width, count, is_write, payload), vcpu)
            if not is_write:
                assert len(under_test.vcpus[vcpu].io.pop()) == width * count
            under_test.check()
        for vcpu in range(2):
            result = doorbell_bank(under_test.ports, vcpu).read(0x0C, 4)
            assert result < 1 << 32 and is_answer(result - (1 << 32) if result >> 31 else -result)


def doorbell_bank(ports: PortBus, vcpu: int) -> PortDevice:
    """The registers as that vCPU sees them."""
    found = ports.find(layout.DOORBELL_PORT)
    assert found is not None
    return bank_of(found[0], vcpu)


class _Here:
    """Decompression in this process, so that an exception nobody foresaw shows itself."""

    def __init__(self, work: Callable[[], int], _name: str) -> None:
        self.result = work

    def close(self) -> None:
        """Nothing runs elsewhere."""


IMAGES = (build_elf(), *(build_bzimage(codec=codec) for codec in CODECS))


def image(data: bytes) -> None:
    """A byte that picks an image, two that cut it (0: nothing is), then patches: offset (u16),
    length (u8), bytes."""
    picked = IMAGES[data[0] % len(IMAGES)] if data else b""
    length = int.from_bytes(data[1:3], "little")
    changed = bytearray(picked[:length] if length else picked)
    rest = data[3:]
    while len(rest) > 3:
        start = int.from_bytes(rest[:2], "little") % max(len(changed), 1)
        size = rest[2] % 9
        changed[start : start + size] = rest[3 : 3 + size]
        rest = rest[3 + size :]
    fd = memfd(bytes(changed))
    ram = Range(0, 4 << 20)
    try:
        with (
            patch.object(decompress, "IsolatedWork", _Here),
            load_kernel_image(fd) as kernel,
        ):
            kernel.check_fits([ram])
            kernel.load(ImageMemory(ram.size, step=1 << 20))
    except ImageError as error:
        assert str(error).isprintable()
    finally:
        os.close(fd)


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


TARGETS: dict[str, Callable[[bytes], None]] = {
    "hypercall": hypercall,
    "fault": fault,
    "doorbell": doorbell,
    "image": image,
    "iommu": iommu,
    "dma": dma,
}


def corpus(name: str) -> list[bytes]:
    """The inputs kept for a target: hexadecimal, and what they are after a #."""
    lines = (CORPUS / f"{name}.txt").read_text().splitlines()
    return [bytes.fromhex(line.partition("#")[0]) for line in lines if line.partition("#")[0]]
