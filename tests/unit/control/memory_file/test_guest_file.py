"""Guest memory with a file's semantics: short counts, errnos, data and holes."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

import pytest

from vmm.control.memory_file.guest_file import GuestFile
from vmm.core.errors import AccessDenied
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState

LOW, HOLE_END, END = 1 << 20, 2 << 20, 3 << 20
PRIVATE = Range(0x8_0000, 0x4_0000)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """RAM from 0 to 1 MiB, a part of it private, and from 2 to 3 MiB."""
    ram = [Range(0, LOW), Range(HOLE_END, END - HOLE_END)]
    made = GuestMemory(ram, MemfdBacking(END), MemfdBacking(END), [PRIVATE])
    made.pwrite(b"start", 0)
    made.pwrite(b"last", PRIVATE.start - 4)
    assert made.private is not None
    made.private.pwrite(b"secret", PRIVATE.start)
    yield made
    made.close()


def read(file: GuestFile, size: int, offset: int, announce: object = None) -> bytes:
    buffer = bytearray(size)
    done = file.read_into(memoryview(buffer), offset, announce)  # type: ignore[arg-type]
    return bytes(buffer[:done])


def refusal(file: GuestFile, size: int, offset: int) -> int | None:
    with pytest.raises(OSError) as caught:
        read(file, size, offset)
    return caught.value.errno


def test_shared_memory_is_read_and_written_at_its_gpa(memory: GuestMemory) -> None:
    file = GuestFile(memory)

    assert file.write(memoryview(b"STA"), 0, None) == 3

    assert read(file, 5, 0) == b"STArt"
    assert file.size == END


def test_read_into_private_memory_is_short_then_refused(memory: GuestMemory) -> None:
    file = GuestFile(memory)

    assert read(file, 100, PRIVATE.start - 4) == b"last"
    assert refusal(file, 100, PRIVATE.start) == errno.EACCES
    assert file.counts["refused"] == 1


def test_write_into_private_memory_is_short_then_refused(memory: GuestMemory) -> None:
    file = GuestFile(memory)

    assert file.write(memoryview(b"LASTsecrets"), PRIVATE.start - 4, None) == 4

    with pytest.raises(PermissionError):
        file.write(memoryview(b"x"), PRIVATE.start, None)
    assert memory.private is not None
    assert memory.private.pread(6, PRIVATE.start) == b"secret"


def test_hole_of_ram_is_a_fault_and_the_end_is_the_end(memory: GuestMemory) -> None:
    file = GuestFile(memory)

    assert len(read(file, PAGE_SIZE, LOW - 10)) == 10
    assert refusal(file, 10, LOW) == errno.EFAULT
    assert len(read(file, 100, END - 7)) == 7
    assert read(file, 100, END) == b""


def test_write_past_the_end_has_no_room(memory: GuestMemory) -> None:
    with pytest.raises(OSError) as caught:
        GuestFile(memory).write(memoryview(b"x"), END, None)

    assert caught.value.errno == errno.ENOSPC


def test_converting_page_is_refused(memory: GuestMemory) -> None:
    file = GuestFile(memory)
    memory.begin_conversion(Range(0x1000, PAGE_SIZE), PageState.PRIVATE)

    assert len(read(file, 0x3000, 0)) == 0x1000
    assert refusal(file, 1, 0x1000) == errno.EACCES

    memory.abandon_conversion()


def test_policy_is_asked_about_what_would_be_touched_and_no_more(memory: GuestMemory) -> None:
    asked: list[tuple[Range, bool]] = []

    def announce(area: Range, is_write: bool, named: str | None) -> None:
        asked.append((area, is_write))

    assert read(GuestFile(memory), 100, PRIVATE.start - 4, announce) == b"last"

    assert asked == [(Range(PRIVATE.start - 4, 4), False)]


def test_policy_that_says_no_is_eacces(memory: GuestMemory) -> None:
    def announce(area: Range, is_write: bool, named: str | None) -> None:
        raise AccessDenied("no")

    file = GuestFile(memory)
    with pytest.raises(PermissionError):
        file.write(memoryview(b"x"), 0, announce)

    assert memory.pread(5, 0) == b"start"


def test_data_are_the_shared_runs_and_all_else_is_a_hole(memory: GuestMemory) -> None:
    file = GuestFile(memory)

    assert file.seek(0, os.SEEK_DATA) == 0
    assert file.seek(5, os.SEEK_HOLE) == PRIVATE.start
    assert file.seek(PRIVATE.start, os.SEEK_HOLE) == PRIVATE.start
    assert file.seek(PRIVATE.start + 9, os.SEEK_DATA) == PRIVATE.end
    assert file.seek(PRIVATE.end, os.SEEK_HOLE) == LOW
    assert file.seek(LOW, os.SEEK_DATA) == HOLE_END
    assert file.seek(HOLE_END, os.SEEK_HOLE) == END


@pytest.mark.parametrize(("offset", "whence"), [(END, os.SEEK_DATA), (END, os.SEEK_HOLE)])
def test_seek_past_the_end_finds_nothing(memory: GuestMemory, offset: int, whence: int) -> None:
    with pytest.raises(OSError) as caught:
        GuestFile(memory).seek(offset, whence)

    assert caught.value.errno == errno.ENXIO


def test_states_are_lines_and_changes_are_counted(memory: GuestMemory) -> None:
    file = GuestFile(memory)
    before = file.changes
    memory.begin_conversion(Range(0, PAGE_SIZE), PageState.PRIVATE)
    memory.finish_conversion(PageState.PRIVATE)

    lines = file.states_text().decode().splitlines()

    assert lines[0] == "0x0000000000000000 0x1000 private"
    assert lines[-1] == f"{HOLE_END:#018x} 0x100000 shared"
    assert file.changes == before + 1
    assert file.data_bytes == END - LOW - PRIVATE.size - PAGE_SIZE


class Answered:
    """Takes a read's answer, and notes which way it came."""

    def __init__(self) -> None:
        self.got: bytes | None = None
        self.by_address = False

    def data(self, data: bytes | bytearray | memoryview) -> None:
        self.got = bytes(data)

    def at(self, address: int, size: int) -> None:
        self.got = ctypes.string_at(address, size)
        self.by_address = True


def test_memory_that_is_there_is_answered_out_of_the_mapping(memory: GuestMemory) -> None:
    memory.pwrite(b"\xa5" * (64 << 10), HOLE_END)
    answer = Answered()

    GuestFile(memory).read((64 << 10) - 100, HOLE_END + 50, None, answer)

    assert answer.by_address and answer.got == b"\xa5" * ((64 << 10) - 100)


def test_untouched_memory_reads_as_zeros_and_stays_untouched(memory: GuestMemory) -> None:
    before = memory.shared.resident_bytes()
    answer = Answered()

    GuestFile(memory).read(64 << 10, HOLE_END, None, answer)

    assert not answer.by_address and answer.got == bytes(64 << 10)
    assert memory.shared.resident_bytes() == before


def test_private_page_ends_an_answer_whatever_the_mapping_has(memory: GuestMemory) -> None:
    memory.pwrite(b"\xa5" * (64 << 10), PRIVATE.start - (64 << 10))
    memory.shared.pwrite(b"\x5a" * (64 << 10), PRIVATE.start)  # as a late discard leaves it
    file, answer = GuestFile(memory), Answered()

    file.read(128 << 10, PRIVATE.start - (64 << 10), None, answer)

    assert answer.got == b"\xa5" * (64 << 10)
    with pytest.raises(OSError) as refused:
        file.read(64 << 10, PRIVATE.start, None, Answered())
    assert refused.value.errno == errno.EACCES


def test_policys_answer_is_asked_for_before_memory_is_answered(memory: GuestMemory) -> None:
    memory.pwrite(b"\xa5" * (64 << 10), HOLE_END)
    asked: list[Range] = []
    answer = Answered()

    GuestFile(memory).read(64 << 10, HOLE_END, lambda area, *_: asked.append(area), answer)

    assert asked == [Range(HOLE_END, 64 << 10)] and answer.got == b"\xa5" * (64 << 10)


def test_read_past_the_end_is_answered_with_nothing(memory: GuestMemory) -> None:
    answer = Answered()

    GuestFile(memory).read(4096, END + 4096, None, answer)

    assert answer.got == b""
