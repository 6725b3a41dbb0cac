"""An ELF core file of a guest's shared memory, as gdb, crash and drgn open them.

A PT_LOAD segment for each run of shared pages. Private pages are in none, unless they were asked
for: a debugger says that it can't access them, and nothing in the file stands for them. Addresses
are guest-physical, in p_paddr and in p_vaddr alike: crash and drgn walk the guest's page tables
themselves, gdb shows physical memory. Notes: NT_PRSTATUS and NT_PRFPREG of each vCPU; VMCOREINFO
where the guest has one in what is there, and with it QEMU's note of registers (by which crash
knows whose file it is); and one of our own, PYVMM, with the page states as text.
Source: ELF-64 object file format; include/uapi/linux/elfcore.h and arch/x86/include/asm/elf.h.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from vmm.core.ranges import PAGE_SIZE, page_align_up

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_ET_CORE, _EM_X86_64, _EV_CURRENT = 4, 62, 1
_PT_LOAD, _PT_NOTE = 1, 4
_NT_PRSTATUS, _NT_PRFPREG = 1, 2
PYVMM_STATES = 0x50595653
"""The type of the note named PYVMM: no other's, for binutils looks at types alone."""
_PRSTATUS = struct.Struct("<iiihxxQQiiii16s16s16s16s27Qixxxx")
_USER_REGS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
    *("rax", "rcx", "rdx", "rsi", "rdi"),
)
_QEMU_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr")
_QEMU = struct.Struct("<II18Q")
_QEMU_SEGMENT = struct.Struct("<IIIIQ")
_VMCOREINFO_NAME = b"VMCOREINFO\0\0"
_MOST_VMCOREINFO = PAGE_SIZE
_SCAN = 16 << 20


def data_offset(page_states: int, vcpus: int) -> int:
    """Where in the file guest-physical address 0 is, with room before for the headers of so many
    runs of pages and vCPUs, and for their notes."""
    headers = _HEADER.size + _SEGMENT.size * (page_states + 1)
    notes = vcpus * 2048 + page_states * 64 + _MOST_VMCOREINFO + 4096
    return page_align_up(headers + notes)


class TooMany(ValueError):
    """The headers don't fit before the memory."""


def headers(
    present: Sequence[Sequence[int]],
    vcpus: Sequence[Mapping[str, Any]],
    states: Sequence[Sequence[int | str]],
    vmcoreinfo: bytes | None,
    offset: int,
    aliased: Sequence[Sequence[int]] = (),
    alias: int = 0,
) -> bytes:
    """The file's first bytes: its memory follows, guest-physical address 0 at `offset`.

    `present`: runs [gpa, size] of it that are in the file. `vcpus`: Platform.core_vcpus.
    `states`: all runs of pages [gpa, size, state]. `aliased`: runs that are at their address with
    the bit `alias`, too, as the guest's page tables name them: crash leaves the bit out, since
    VMCOREINFO says so, drgn doesn't. Raises TooMany.
    """
    notes = b"".join(_vcpu_notes(number, vcpu) for number, vcpu in enumerate(vcpus, start=1))
    if vmcoreinfo is not None:
        # With QEMU's and without VMCOREINFO drgn refuses the file, which it can show else.
        notes += b"".join(_note(b"QEMU", 0, _qemu_state(vcpu)) for vcpu in vcpus)
        notes += _note(b"VMCOREINFO", 0, vmcoreinfo)
    text = "".join(f"{gpa:#x} {size:#x} {state}\n" for gpa, size, state in states)
    notes += _note(b"PYVMM", PYVMM_STATES, text.encode())
    places = [(gpa, gpa, size) for gpa, size in present]
    places += [(gpa | alias, gpa, size) for gpa, size in aliased if alias]
    count = len(places) + 1
    notes_at = _HEADER.size + _SEGMENT.size * count
    if notes_at + len(notes) > offset or count >= 0xFFFF:
        raise TooMany(f"{count} segments and {len(notes)} bytes of notes")
    ident = b"\x7fELF" + bytes((2, 1, _EV_CURRENT)) + bytes(9)
    segments = [_SEGMENT.pack(_PT_NOTE, 0, notes_at, 0, 0, len(notes), len(notes), 4)]
    segments += [
        # Aligned to nothing: crash takes a file whose first PT_LOAD says that it is page-aligned
        # for netdump's, in whose way it dies of QEMU's notes.
        _SEGMENT.pack(_PT_LOAD, 7, offset + gpa, address, address, size, size, 0)
        for address, gpa, size in places
    ]
    header = _HEADER.pack(
        ident, _ET_CORE, _EM_X86_64, _EV_CURRENT, 0, _HEADER.size, 0, 0,
        _HEADER.size, _SEGMENT.size, count, 0, 0, 0,
    )  # fmt: skip
    return header + b"".join(segments) + notes


def _note(name: bytes, kind: int, data: bytes) -> bytes:
    """Name and data are each filled up to four bytes."""
    held = name + b"\0"
    made = _NOTE.pack(len(held), len(data), kind)
    return (
        made + held.ljust(-(-len(held) // 4) * 4, b"\0") + data.ljust(-(-len(data) // 4) * 4, b"\0")
    )


def _vcpu_notes(number: int, vcpu: Mapping[str, Any]) -> bytes:
    """The vCPU as a thread, whose id is 1 for vCPU 0."""
    regs, sregs = vcpu["regs"], vcpu["sregs"]
    user = [regs[name] for name in _USER_REGS]
    user += [0xFFFF_FFFF_FFFF_FFFF, regs["rip"], sregs["cs"]["selector"], regs["rflags"]]
    user += [regs["rsp"], sregs["ss"]["selector"], sregs["fs"]["base"], sregs["gs"]["base"]]
    user += [sregs[name]["selector"] for name in ("ds", "es", "fs", "gs")]
    status = _PRSTATUS.pack(
        0, 0, 0, 0, 0, 0, number, 0, 0, 0, bytes(16), bytes(16), bytes(16), bytes(16), *user, 1
    )
    fpu = bytes.fromhex(vcpu["fpu"])
    return _note(b"CORE", _NT_PRSTATUS, status) + _note(b"CORE", _NT_PRFPREG, fpu)


def _qemu_state(vcpu: Mapping[str, Any]) -> bytes:
    """struct QEMUCPUState of version 1: what crash reads of QEMU's dumps."""
    regs, sregs = vcpu["regs"], vcpu["sregs"]
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")
    values = [regs[name] for name in (*names, *(f"r{n}" for n in range(8, 16)), "rip", "rflags")]
    segments = b"".join(_segment(sregs[name]) for name in _QEMU_SEGMENTS)
    for table in (sregs["gdt"], sregs["idt"]):
        segments += _QEMU_SEGMENT.pack(0, table["limit"], 0, 0, table["base"])
    control = [sregs["cr0"], 0, sregs["cr2"], sregs["cr3"], sregs["cr4"]]
    rest = segments + struct.pack("<6Q", *control, vcpu["kernel_gs_base"])
    return _QEMU.pack(1, _QEMU.size + len(rest), *values) + rest


def _segment(segment: Mapping[str, int]) -> bytes:
    """Flags are the descriptor's second word, without the base (SDM vol. 3, 3.4.5)."""
    flags = segment["type"] << 8 | segment["s"] << 12 | segment["dpl"] << 13
    flags |= segment["present"] << 15 | segment["avl"] << 20 | segment["l"] << 21
    flags |= segment["db"] << 22 | segment["g"] << 23
    return _QEMU_SEGMENT.pack(segment["selector"], segment["limit"], flags, 0, segment["base"])


def find_vmcoreinfo(fd: int, offset: int, runs: Sequence[Sequence[int]]) -> bytes | None:
    """What Linux has noted for those who read its dumps, if it is in these runs [gpa, size] of the
    file: an ELF note that begins on a page. It is a guest's word. Raises OSError."""
    mark = _VMCOREINFO_NAME + b"OSRELEASE="
    for gpa, size in runs:
        start = gpa
        while (start := _next_data(fd, offset, start)) < gpa + size:
            # And what a note that begins on the last page may have behind it.
            most = min(_SCAN + 2 * PAGE_SIZE, gpa + size - start)
            data = os.pread(fd, most, offset + start)
            start += _SCAN
            at = data.find(mark)
            while at >= 0:
                note = at - _NOTE.size
                if note >= 0 and note % PAGE_SIZE == 0:
                    name, length, kind = _NOTE.unpack_from(data, note)
                    text = data[at + len(_VMCOREINFO_NAME) :][:length]
                    fits = 0 < length <= _MOST_VMCOREINFO and len(text) == length
                    if (name, kind) == (11, 0) and fits and b"PAGESIZE=" in text:
                        return text
                at = data.find(mark, at + 1)
    return None


def _next_data(fd: int, offset: int, gpa: int) -> int:
    """The first page from there on that isn't in a hole of the file, which is sparse and may be
    large; past all addresses where there is none."""
    try:
        found = os.lseek(fd, offset + gpa, os.SEEK_DATA)
    except OSError:  # ENXIO
        return 1 << 64
    return gpa + (found - offset - gpa) // PAGE_SIZE * PAGE_SIZE
