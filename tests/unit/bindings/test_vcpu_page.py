"""Exits decoded from hand-made kvm_run pages: what no machine at hand produces on demand.

The vCPU's fd is a memfd, so that the test writes the page that the vCPU has mapped, and
KVM_RUN is a function of the test's.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvm_bindings import KvmError, aarch64, owned_fd
from kvm_bindings import vcpu as vcpu_module
from kvm_bindings.exits import (
    EXIT_NAMES,
    ArmDebugExit,
    ArmNisvExit,
    DebugExit,
    Exit,
    FailEntryExit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    RdmsrExit,
    ShutdownExit,
    SystemEventExit,
    UnknownExit,
    WrmsrExit,
)
from kvm_bindings.x86_64 import Vcpu

EXIT_REASON, UNION = 8, 32
RING_PAGE = 2
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
RING = RING_PAGE * PAGE_SIZE  # KVM's pages are the host's
SIZE = 3 * PAGE_SIZE
DECODED = {2, 3, 4, 5, 6, 8, 9, 17, 24, 29, 30}  # reasons that have a class
DATA = 4096  # where KVM puts the bytes of port I/O: behind the structure


class Page:
    """A kvm_run page to fill, and the vCPU that reads it. `result` is what KVM_RUN returns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fd = os.memfd_create("kvm_run")
        os.truncate(self.fd, SIZE)
        self.result = 0
        self.vcpu = Vcpu(os.dup(self.fd), 3, SIZE, RING_PAGE)
        monkeypatch.setattr(vcpu_module, "lib", self)

    def pyvmm_ioctl_value(self, fd: int, request: int, value: int) -> int:
        return self.result

    def fill(self, reason: int, union: bytes, result: int = 0) -> None:
        os.pwrite(self.fd, struct.pack("<I", reason), EXIT_REASON)
        os.pwrite(self.fd, union, UNION)
        self.result = result

    def run(self, reason: int, union: bytes = b"", result: int = 0) -> Exit:
        self.fill(reason, union, result)
        return self.vcpu.run()

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.fd, size, offset)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    made = Page(monkeypatch)
    yield made
    made.vcpu.close()
    os.close(made.fd)


def io_union(direction: int, size: int, port: int, count: int, offset: int = DATA) -> bytes:
    return struct.pack("<BBHIQ", direction, size, port, count, offset)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (4, 1), (1, 4096), (2, 5), (4, 1024)])
def test_port_write_carries_all_its_data(page: Page, size: int, count: int) -> None:
    data = os.urandom(size * count)
    os.pwrite(page.fd, data, DATA)

    exit = page.run(2, io_union(1, size, 0x3F8, count))

    assert exit == IoExit(0x3F8, size, count, True, data)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (4, 1), (2, 300)])
def test_answer_to_a_port_read_lands_where_kvm_looks(page: Page, size: int, count: int) -> None:
    exit = page.run(2, io_union(0, size, 0xCFC, count, DATA + 64))
    data = os.urandom(size * count)

    page.vcpu.answer_io(data)

    assert exit == IoExit(0xCFC, size, count, False, b"")
    assert page.read(len(data) + 1, DATA + 64) == data + b"\0"


def test_data_of_an_exit_is_a_copy(page: Page) -> None:
    os.pwrite(page.fd, b"first", DATA)
    exit = page.run(2, io_union(1, 1, 1, 5))

    os.pwrite(page.fd, b"later", DATA)

    assert isinstance(exit, IoExit)
    assert exit.data == b"first"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_write_has_the_bytes_written(page: Page, size: int) -> None:
    data = bytes(range(1, 9))

    exit = page.run(6, struct.pack("<Q8sIB", 0xFEE0_0000, data, size, 1))

    assert exit == MmioExit(0xFEE0_0000, size, True, data[:size])


def test_answer_to_an_mmio_read_lands_where_kvm_looks(page: Page) -> None:
    exit = page.run(6, struct.pack("<Q8sIB", 0xD000_0000, bytes(8), 4, 0))

    page.vcpu.answer_mmio(b"\xff\xee\xdd\xcc")

    assert exit == MmioExit(0xD000_0000, 4, False, b"")
    assert page.read(8, UNION + 8) == b"\xff\xee\xdd\xcc" + bytes(4)


def test_hypercall_has_all_arguments_and_its_answer_is_a_signed_64_bit_value(page: Page) -> None:
    args = (0x1000, (1 << 64) - 1, 0x10, 4, 5, 6)

    exit = page.run(3, struct.pack("<Q6QQQ", 12, *args, 0, 1))
    page.vcpu.answer_hypercall(-errno.EINVAL)

    assert exit == HypercallExit(12, args, 1)
    assert struct.unpack("<q", page.read(8, UNION + 56)) == (-errno.EINVAL,)


@pytest.mark.parametrize("number", [errno.EFAULT, 133], ids=["EFAULT", "EHWPOISON"])
@pytest.mark.parametrize(("flags", "private"), [(8, True), (0, False)])
def test_memory_fault_comes_with_a_failed_run(
    page: Page, number: int, flags: int, private: bool
) -> None:
    exit = page.run(39, struct.pack("<QQQ", flags, 0x4000, 0x1000), -number)

    assert exit == MemoryFaultExit(flags, 0x4000, 0x1000, number)
    assert isinstance(exit, MemoryFaultExit)
    assert exit.private is private


def test_fault_of_the_host_is_an_error_not_a_memory_fault(page: Page) -> None:
    """A shared page whose HVA is unmapped: EFAULT with another reason (field notes, 3b)."""
    with pytest.raises(KvmError, match=r"KVM_RUN\(vcpu=3, exit_reason=0\) failed: EFAULT"):
        page.run(0, result=-errno.EFAULT)


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN])
@pytest.mark.parametrize("stale", [0, 2, 10, 39])
def test_interrupted_run_is_no_exit_whatever_the_page_says(
    page: Page, number: int, stale: int
) -> None:
    assert page.run(stale, result=-number) == InterruptedExit(number)


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF, errno.ENOTTY, errno.EINVAL])
def test_other_failure_of_the_run_is_an_error(page: Page, number: int) -> None:
    with pytest.raises(KvmError) as raised:
        page.run(2, result=-number)

    assert raised.value.errno == number


@pytest.mark.parametrize("reason", [1, 2, 8], ids=["INVAL", "UNKNOWN", "FILTER"])
def test_msr_read_and_its_answer(page: Page, reason: int) -> None:
    exit = page.run(29, struct.pack("<B7xIIQ", 1, reason, 0xC001_0131, 0))

    page.vcpu.answer_msr(1 << 40 | 1, known=True)

    assert isinstance(exit, RdmsrExit)
    assert exit == RdmsrExit(0xC001_0131, reason)
    assert page.read(1, UNION) == b"\0"
    assert struct.unpack("<Q", page.read(8, UNION + 16)) == (1 << 40 | 1,)


def test_msr_write_and_its_refusal(page: Page) -> None:
    exit = page.run(30, struct.pack("<B7xIIQ", 0, 2, 0x4B56_4D08, (1 << 64) - 1))

    page.vcpu.answer_msr(None, known=False)

    assert isinstance(exit, WrmsrExit)
    assert exit == WrmsrExit(0x4B56_4D08, (1 << 64) - 1, 2)
    assert page.read(1, UNION) == b"\1"
    assert struct.unpack("<Q", page.read(8, UNION + 16)) == ((1 << 64) - 1,)


@pytest.mark.parametrize("count", [0, 1, 16])
def test_system_event_has_its_data(page: Page, count: int) -> None:
    words = tuple(range(100, 116))

    exit = page.run(24, struct.pack("<II16Q", 2, count, *words))

    assert isinstance(exit, SystemEventExit)
    assert exit == SystemEventExit(2, words[:count])


def test_fail_entry_has_reason_and_cpu(page: Page) -> None:
    exit = page.run(9, struct.pack("<QI", 0x8000_0021, 5))

    assert isinstance(exit, FailEntryExit)
    assert exit == FailEntryExit(0x8000_0021, 5)


INSTRUCTION = bytes.fromhex("c4e26937c0")


@pytest.mark.parametrize(
    ("flags", "size", "expected"),
    [
        (1, 5, INSTRUCTION),
        (1, 15, INSTRUCTION + bytes(10)),
        (1, 200, INSTRUCTION + bytes(10)),
        (1, 0, b""),
        (0, 5, b""),
        (2, 5, b""),
    ],
)
def test_failed_emulation_has_the_instruction_where_kvm_gives_it(
    page: Page, flags: int, size: int, expected: bytes
) -> None:
    union = struct.pack("<IIQB15s", 1, 4, flags, size, INSTRUCTION)

    exit = page.run(17, union)

    assert isinstance(exit, InternalErrorExit)
    assert (exit.suberror, exit.instruction, len(exit.data)) == (1, expected, 4)
    assert exit.data[0] == flags


def test_failed_emulation_of_an_old_kernel_has_no_instruction(page: Page) -> None:
    assert page.run(17, struct.pack("<II", 1, 0)) == InternalErrorExit(1, (), b"")


def test_internal_error_of_another_kind_has_its_words_and_no_instruction(page: Page) -> None:
    exit = page.run(17, struct.pack("<II3Q", 3, 3, 1, 0x8000_0000, 9))

    assert exit == InternalErrorExit(3, (1, 0x8000_0000, 9), b"")


@pytest.mark.parametrize("count", [17, 0xFFFF_FFFF])
@pytest.mark.parametrize("reason", [17, 24])
def test_more_words_than_the_structure_holds_are_cut_off(
    page: Page, reason: int, count: int
) -> None:
    exit = page.run(reason, struct.pack("<II16Q", 3, count, *range(16)))

    assert isinstance(exit, InternalErrorExit | SystemEventExit)
    assert exit.data == tuple(range(16))


@pytest.mark.parametrize(("reason", "expected"), [(5, HltExit()), (8, ShutdownExit())])
def test_exit_without_fields(page: Page, reason: int, expected: Exit) -> None:
    assert page.run(reason) == expected


def test_debug_exit_has_the_exception_and_what_it_is_about(page: Page) -> None:
    exit = page.run(4, struct.pack("<IIQQQ", 1, 0, 0xFFFF_FFFF_8100_0000, 0xFFFF_4FF0, 0x402))

    assert exit == DebugExit(1, 0xFFFF_FFFF_8100_0000, 0xFFFF_4FF0, 0x402)


@pytest.mark.parametrize("reason", sorted({*EXIT_NAMES, 999} - DECODED))
def test_exit_without_a_class_is_data(page: Page, reason: int) -> None:
    raw = os.urandom(256)

    exit = page.run(reason, raw)

    assert exit == UnknownExit(reason, raw)
    assert isinstance(exit, UnknownExit)
    assert exit.name == EXIT_NAMES.get(reason, f"exit {reason}")


def test_arm64_access_that_the_processor_does_not_describe(page: Page) -> None:
    page.fill(28, struct.pack("<QQ", 0x1_0046, 0x0900_0010))
    vcpu = aarch64.Vcpu(os.dup(page.fd), 0, SIZE)

    exit = vcpu.run()

    vcpu.close()
    assert isinstance(exit, ArmNisvExit)
    assert exit == ArmNisvExit(0x1_0046, 0x0900_0010)


def test_debug_exit_of_arm64_is_a_syndrome_and_an_address(page: Page) -> None:
    page.fill(4, struct.pack("<IIQ", 0xD200_0062, 1, 0xFFFF_8000_0000_1000))
    vcpu = aarch64.Vcpu(os.dup(page.fd), 0, SIZE)

    exit = vcpu.run()

    vcpu.close()
    assert exit == ArmDebugExit(0xD200_0062, 0xFFFF_8000_0000_1000)


@pytest.mark.parametrize("reason", [2, 29, 30])
def test_x86_exit_is_mere_data_on_arm64(page: Page, reason: int) -> None:
    page.fill(reason, bytes(256))
    vcpu = aarch64.Vcpu(os.dup(page.fd), 0, SIZE)

    exit = vcpu.run()

    vcpu.close()
    assert exit == UnknownExit(reason, bytes(256))


def ring_entry(address: int, data: bytes, *, port: bool) -> bytes:
    return struct.pack("<QII8s", address, len(data), port, data)


def test_coalesced_writes_are_taken_out_oldest_first_each_as_what_it_is(page: Page) -> None:
    entries = [
        ring_entry(0x70, b"\x0f", port=True),
        ring_entry(0xD000_0004, b"\1\2\3\4", port=False),
    ]
    os.pwrite(page.fd, struct.pack("<II", 0, 2) + b"".join(entries), RING)
    assert page.vcpu.has_coalesced_writes
    assert page.vcpu.oldest_coalesced_write == 0

    found = list(page.vcpu.coalesced_writes())

    assert found == [
        IoExit(0x70, 1, 1, True, b"\x0f"),
        MmioExit(0xD000_0004, 4, True, b"\1\2\3\4"),
    ]
    assert struct.unpack("<II", page.read(8, RING)) == (2, 2)
    assert not page.vcpu.has_coalesced_writes
    assert page.vcpu.oldest_coalesced_write is None


def test_coalesced_writes_go_round_the_end_of_the_ring(page: Page) -> None:
    last = (PAGE_SIZE - 8) // 24 - 1
    os.pwrite(page.fd, struct.pack("<II", last, 1), RING)
    for position, number in ((last, 1), (0, 2)):
        entry = ring_entry(number, bytes([number]), port=True)
        os.pwrite(page.fd, entry, RING + 8 + 24 * position)

    writes = list(page.vcpu.coalesced_writes())

    assert writes == [IoExit(number, 1, 1, True, bytes([number])) for number in (1, 2)]


def fill_ring(page: Page, entries: list[bytes], first: int = 0) -> None:
    os.pwrite(page.fd, struct.pack("<II", first, len(entries)) + b"".join(entries), RING)


def test_coalesced_bytes_for_one_port_come_as_one_string(page: Page) -> None:
    bytes_out = [ring_entry(0x3F8, bytes([letter]), port=True) for letter in b"login"]
    index = ring_entry(0xCF8, b"\x04\0\0\x80", port=True)
    fill_ring(page, [*bytes_out, index, ring_entry(0x3F8, b":", port=True)])

    found = list(page.vcpu.coalesced_writes())

    assert found == [
        IoExit(0x3F8, 1, 5, True, b"login"),
        IoExit(0xCF8, 4, 1, True, b"\x04\0\0\x80"),
        IoExit(0x3F8, 1, 1, True, b":"),
    ]
    assert struct.unpack("<II", page.read(8, RING)) == (7, 7)


@pytest.mark.parametrize(
    "second",
    [
        ring_entry(0x3F9, b"b", port=True),
        ring_entry(0x3F8, b"b", port=False),
        ring_entry(0x3F8, b"bc", port=True),
    ],
    ids=["another port", "memory", "a word"],
)
def test_coalesced_byte_is_joined_to_nothing_but_bytes_for_its_port(
    page: Page, second: bytes
) -> None:
    fill_ring(page, [ring_entry(0x3F8, b"a", port=True), second])

    found = list(page.vcpu.coalesced_writes())

    assert found[0] == IoExit(0x3F8, 1, 1, True, b"a")
    assert len(found) == 2


def test_coalesced_string_stays_in_the_ring_until_it_is_carried_out(page: Page) -> None:
    """Another vCPU that finds the ring empty goes on, and relies on what was written."""
    fill_ring(page, [ring_entry(0x3F8, b"a", port=True)] * 3)

    next(page.vcpu.coalesced_writes())

    assert struct.unpack("<II", page.read(8, RING)) == (0, 3)


def test_coalesced_writes_that_come_meanwhile_are_left(page: Page) -> None:
    """Two other vCPUs that write without end must not keep this one's exit waiting."""
    fill_ring(page, [ring_entry(0x3F8, b"a", port=True)] * 2)
    writes = page.vcpu.coalesced_writes()
    first = next(writes)
    fill_ring(page, [ring_entry(0x3F8, b"a", port=True)] * 3)

    assert first == IoExit(0x3F8, 1, 2, True, b"aa")
    assert list(writes) == []
    assert struct.unpack("<II", page.read(8, RING)) == (2, 3)


def test_coalesced_write_of_more_than_the_entry_holds_is_cut_off(page: Page) -> None:
    entry = struct.pack("<QII8s", 0x70, 0xFFFF_FFFF, 1, bytes(range(8)))
    os.pwrite(page.fd, struct.pack("<II", 0, 1) + entry, RING)

    assert list(page.vcpu.coalesced_writes()) == [IoExit(0x70, 8, 1, True, bytes(range(8)))]


def test_immediate_exit_is_the_byte_that_kvm_reads(page: Page) -> None:
    page.vcpu.immediate_exit = True
    assert page.read(2, 0) == b"\0\1"
    assert page.vcpu.immediate_exit is True

    page.vcpu.immediate_exit = False
    assert page.read(2, 0) == b"\0\0"


class PreFaulting:
    """KVM_PRE_FAULT_MEMORY that gets a page further with each call, or fails."""

    def __init__(self, results: list[int]) -> None:
        self.results = results
        self.seen: list[tuple[int, int]] = []

    def pyvmm_ioctl_pointer(self, fd: int, request: int, argument: Any) -> int:
        self.seen.append((argument.gpa, argument.size))
        result = self.results[len(self.seen) - 1]
        if result == 0:
            argument.gpa += 0x1000
            argument.size -= 0x1000
        return result


def test_pre_fault_goes_on_where_it_was_interrupted(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvm = PreFaulting([0, -errno.EINTR, 0, -errno.EAGAIN, 0])
    monkeypatch.setattr(owned_fd, "lib", kvm)

    page.vcpu.pre_fault_memory(0x4000, 0x3000)

    sizes = [size for _, size in kvm.seen]
    assert sizes == [0x3000, 0x2000, 0x2000, 0x1000, 0x1000]
    assert kvm.seen[-1] == (0x6000, 0x1000)


def test_pre_fault_that_fails_names_the_whole_range(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owned_fd, "lib", PreFaulting([0, -errno.EOPNOTSUPP]))

    with pytest.raises(KvmError, match=r"KVM_PRE_FAULT_MEMORY\(gpa=0x4000, size=0x3000\) failed"):
        page.vcpu.pre_fault_memory(0x4000, 0x3000)


def test_close_unmaps_and_closes_once(page: Page) -> None:
    before = set(os.listdir("/proc/self/fd"))
    made = Vcpu(os.dup(page.fd), 0, SIZE)
    address = made._address

    made.close()
    made.close()

    assert set(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert f"{address:x}-" not in maps.read()


def test_many_threads_decoding_at_once_agree(page: Page) -> None:
    """cffi makes its types at first use; vcpu.py makes them all at import instead."""
    page.fill(3, struct.pack("<Q6QQQ", 12, 1, 2, 3, 4, 5, 6, 0, 0))
    start = threading.Barrier(8)
    seen: list[Exit] = []

    def decode() -> None:
        vcpu = Vcpu(os.dup(page.fd), 0, SIZE)
        start.wait(30)
        seen.append(vcpu.run())
        vcpu.close()

    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert seen == [HypercallExit(12, (1, 2, 3, 4, 5, 6), 0)] * 8


def test_vcpu_whose_page_cannot_be_mapped_closes_its_fd() -> None:
    fd = os.memfd_create("kvm_run")

    with pytest.raises(KvmError, match="mmap"):
        Vcpu(fd, 0, 0)

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
