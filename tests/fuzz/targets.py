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
}


def corpus(name: str) -> list[bytes]:
    """The inputs kept for a target: hexadecimal, and what they are after a #."""
    lines = (CORPUS / f"{name}.txt").read_text().splitlines()
    return [bytes.fromhex(line.partition("#")[0]) for line in lines if line.partition("#")[0]]
