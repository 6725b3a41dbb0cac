"""The core file's headers, read back by the layout of ELF alone."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest

from vmm.snapshot import core_file

PAGE = 4096
SEGMENT = dict.fromkeys(
    ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "avl"), 0
)
NAMES = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip", "rflags")


def vcpu(number: int) -> dict[str, Any]:
    regs = {name: number << 8 | at for at, name in enumerate(NAMES)}
    regs |= {f"r{at}": number << 8 | 0x80 | at for at in range(8, 16)}
    names = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr")
    sregs: dict[str, Any] = {name: dict(SEGMENT) for name in names}
    sregs["cs"] = {**SEGMENT, "selector": 0x10, "type": 11, "s": 1, "present": 1, "l": 1}
    sregs["gs"] = {**SEGMENT, "base": 0xFFFF_8880_0000_0000}
    sregs |= {name: {"base": 1, "limit": 2} for name in ("gdt", "idt")}
    sregs |= {"cr0": 10, "cr2": 12, "cr3": 13, "cr4": 14}
    return {"regs": regs, "sregs": sregs, "fpu": "ab" * 512, "kernel_gs_base": 99}


STATES: list[list[Any]] = [[0, PAGE, "shared"], [PAGE, PAGE, "private"], [2 * PAGE, PAGE, "shared"]]
SHARED = [[0, PAGE], [2 * PAGE, PAGE]]


class Parsed:
    """Segments and notes of a core file."""

    def __init__(self, data: bytes) -> None:
        header = struct.unpack_from("<16sHHIQQQIHHHHHH", data)
        assert header[0][:7] == b"\x7fELF\x02\x01\x01"
        assert header[1:3] == (4, 62), "a core file of x86-64"
        where, size, count = header[5], header[9], header[10]
        self.segments = [
            struct.unpack_from("<IIQQQQQQ", data, where + at * size) for at in range(count)
        ]
        self.notes: list[tuple[bytes, int, bytes]] = []
        (note,) = [segment for segment in self.segments if segment[0] == 4]
        at, end = note[2], note[2] + note[5]
        while at < end:
            name_size, size, kind = struct.unpack_from("<III", data, at)
            name = data[at + 12 : at + 12 + name_size].rstrip(b"\0")
            at += 12 + (name_size + 3 & ~3)
            self.notes.append((name, kind, data[at : at + size]))
            at += size + 3 & ~3

    def loads(self) -> list[tuple[int, ...]]:
        """(offset, virtual address, physical address, bytes in the file, bytes in memory)."""
        return [segment[2:7] for segment in self.segments if segment[0] == 1]


def test_private_pages_are_in_no_segment() -> None:
    offset = core_file.data_offset(3, 1)

    parsed = Parsed(core_file.headers(SHARED, [vcpu(0)], STATES, None, offset))

    assert parsed.loads() == [
        (offset, 0, 0, PAGE, PAGE),
        (offset + 2 * PAGE, 2 * PAGE, 2 * PAGE, PAGE, PAGE),
    ]
    ours = [data for name, kind, data in parsed.notes if (name, kind) == (b"PYVMM", 0x50595653)]
    assert ours == [b"0x0 0x1000 shared\n0x1000 0x1000 private\n0x2000 0x1000 shared\n"]


def test_private_pages_that_are_there_are_at_both_of_their_addresses() -> None:
    """As the guest's page tables name them, for drgn."""
    runs = [row[:2] for row in STATES]

    parsed = Parsed(
        core_file.headers(runs, [vcpu(0)], STATES, None, 1 << 20, [[PAGE, PAGE]], 1 << 38)
    )

    assert [load for load in parsed.loads() if load[0] == (1 << 20) + PAGE] == [
        ((1 << 20) + PAGE, PAGE, PAGE, PAGE, PAGE),
        ((1 << 20) + PAGE, 1 << 38 | PAGE, 1 << 38 | PAGE, PAGE, PAGE),
    ]
    assert len(parsed.loads()) == 4


def test_memory_without_an_address_bit_is_there_once() -> None:
    runs = [row[:2] for row in STATES]

    parsed = Parsed(core_file.headers(runs, [], STATES, None, 1 << 20, [[PAGE, PAGE]], 0))

    assert len(parsed.loads()) == 3


def test_segments_are_as_crash_expects_them_of_a_kdump() -> None:
    """It goes by the first: page-aligned, it is a netdump's file to it."""
    parsed = Parsed(core_file.headers(SHARED, [vcpu(0)], STATES, None, 1 << 20))

    assert {segment[7] for segment in parsed.segments if segment[0] == 1} == {0}


def test_each_vcpu_has_its_registers() -> None:
    parsed = Parsed(core_file.headers([], [vcpu(0), vcpu(1)], [], None, 1 << 20))

    statuses = [data for name, kind, data in parsed.notes if (name, kind) == (b"CORE", 1)]
    assert [len(data) for data in statuses] == [336, 336]
    assert [struct.unpack_from("<i", data, 32)[0] for data in statuses] == [1, 2]
    user = struct.unpack_from("<27Q", statuses[1], 112)
    assert user[0] == 0x180 | 15 and user[10] == 0x100
    assert user[16:20] == (0x100 | 8, 0x10, 0x100 | 9, 0x100 | 6)  # rip, cs, eflags, rsp
    assert user[22] == 0xFFFF_8880_0000_0000
    assert [data for name, kind, data in parsed.notes if (name, kind) == (b"CORE", 2)] == (
        [b"\xab" * 512] * 2
    )


def test_note_of_qemu_is_for_those_who_find_vmcoreinfo_too() -> None:
    parsed = Parsed(core_file.headers([], [vcpu(0)], [], None, 1 << 20))

    assert {name for name, _, _ in parsed.notes} == {b"CORE", b"PYVMM"}, "else drgn refuses it"


def test_note_of_qemu_has_the_control_registers() -> None:
    noted = b"OSRELEASE=6.12"
    parsed = Parsed(core_file.headers([], [vcpu(0)], [], noted, 1 << 20))

    assert (b"VMCOREINFO", 0, noted) in parsed.notes
    ((_, _, data),) = [note for note in parsed.notes if note[0] == b"QEMU"]
    assert struct.unpack_from("<II", data) == (1, len(data))
    assert struct.unpack_from("<6Q", data, len(data) - 48) == (10, 0, 12, 13, 14, 99)
    code = struct.unpack_from("<IIIIQ", data, 8 + 18 * 8)
    assert code == (0x10, 0, 11 << 8 | 1 << 12 | 1 << 15 | 1 << 21, 0, 0)


def test_headers_that_have_no_room_are_refused() -> None:
    with pytest.raises(core_file.TooMany):
        core_file.headers(SHARED, [vcpu(0)], STATES, None, PAGE // 4)


def test_room_for_headers_is_enough_for_the_most_runs() -> None:
    rows: list[list[Any]] = [
        [at << 40, 1 << 38, "private" if at & 1 else "shared"] for at in range(32768)
    ]
    shared = [row[:2] for row in rows if row[2] == "shared"]
    offset = core_file.data_offset(len(rows), 64)

    made = core_file.headers(shared, [vcpu(0)] * 64, rows, b"x" * PAGE, offset)

    assert len(made) <= offset and offset % PAGE == 0


@pytest.mark.parametrize("at", [0, 5 * PAGE, (16 << 20) - PAGE, 40 << 20])
def test_vmcoreinfo_is_found_on_a_page(tmp_path: Path, at: int) -> None:
    text = b"OSRELEASE=6.12\nPAGESIZE=4096\n" + b"A=1\n" * 1000
    note = struct.pack("<III", 11, len(text), 0) + b"VMCOREINFO\0\0" + text
    with (tmp_path / "core").open("wb") as file:
        os.pwrite(file.fileno(), note, 100 + at)  # behind a hole
        file.truncate(100 + at + len(note) + PAGE)
    size = -(-(at + len(note)) // PAGE) * PAGE

    fd = os.open(tmp_path / "core", os.O_RDONLY)
    try:
        assert core_file.find_vmcoreinfo(fd, 100, [[0, size]]) == text
        assert core_file.find_vmcoreinfo(fd, 100 + PAGE // 2, [[0, size]]) is None
    finally:
        os.close(fd)


@pytest.mark.parametrize("length", [0, 4097, 0xFFFF_FFFF])
def test_vmcoreinfo_of_a_hostile_length_is_none(tmp_path: Path, length: int) -> None:
    text = b"OSRELEASE=6.12\nPAGESIZE=4096\n"
    note = struct.pack("<III", 11, length, 0) + b"VMCOREINFO\0\0" + text
    (tmp_path / "core").write_bytes(note.ljust(2 * PAGE, b"\0"))

    with (tmp_path / "core").open("rb") as file:
        assert core_file.find_vmcoreinfo(file.fileno(), 0, [[0, 2 * PAGE]]) is None
