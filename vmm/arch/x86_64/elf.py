"""ELF64 x86-64 executables (vmlinux): which bytes of the file belong where in guest memory.

Reads the ELF header and the program headers by pread, never the file. The ELF header is that of
the generic ABI, "Object Files"; e_machine numbers are its registry's.
"""

from __future__ import annotations

import itertools
import struct

from vmm.boot.source import Source
from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import Range

ELF_MAGIC = b"\x7fELF"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")

CLASS_64 = 2
DATA_LITTLE = 1
MACHINE_X86_64 = 62
TYPE_EXECUTABLE = 2
TYPE_DYNAMIC = 3  # a relocatable kernel: loaded at its p_paddr all the same
PT_LOAD = 1
PT_INTERP = 3

MAX_PROGRAM_HEADERS = 128  # vmlinux has five; what comes from a linker has a dozen
MAX_PHYSICAL = 1 << 51  # as for bzImage: far from a wrap of 64 bits, beyond any RAM
MAX_LOADED = 1 << 30  # bytes of guest memory that a kernel's segments may take together

MACHINES = {
    2: "SPARC",
    3: "32-bit x86",
    8: "MIPS",
    20: "32-bit PowerPC",
    21: "64-bit PowerPC",
    22: "s390",
    40: "32-bit ARM",
    43: "64-bit SPARC",
    50: "Itanium",
    183: "arm64",
    243: "RISC-V",
    258: "LoongArch",
}
TYPES = {0: "no file type", 1: "a relocatable object or module", 4: "a core dump"}

CORRUPT = "the file is truncated or corrupt, get a fresh copy"
WANTED = "give an x86-64 vmlinux or bzImage"


class Segment(NamedTuple):
    """`filesz` bytes at `offset` of the file belong at guest-physical `paddr`.

    The segment takes `memsz` bytes there; those past `filesz` (bss) are zero.
    """

    offset: int
    paddr: int
    filesz: int
    memsz: int

    @property
    def memory(self) -> Range:
        return Range(self.paddr, self.memsz)


class ElfImage(NamedTuple):
    """A checked ELF: `entry` is guest-physical, inside the file-backed part of a segment.

    `segments` are in address order, don't overlap, and none is empty.
    """

    entry: int
    segments: tuple[Segment, ...]

    @property
    def memory_start(self) -> int:
        return self.segments[0].paddr

    @property
    def memory_end(self) -> int:
        """The first guest-physical address past the last segment, its bss included."""
        return self.segments[-1].memory.end


def is_elf(prefix: bytes) -> bool:
    """Whether a file that starts so claims to be an ELF."""
    return prefix[:4] == ELF_MAGIC


def parse_elf(source: Source) -> ElfImage:
    """The loadable segments and entry of an x86-64 ELF; ImageError for anything else."""
    ident, kind, machine, entry, phoff, phentsize, phnum = _header(source)
    if ident[4] != CLASS_64:
        raise source.error(f"is a 32-bit ELF for {_machine_name(machine)}", WANTED)
    if machine != MACHINE_X86_64:
        raise source.error(
            f"is an ELF for {_machine_name(machine)} (e_machine {machine}), not for x86-64", WANTED
        )
    if kind not in (TYPE_EXECUTABLE, TYPE_DYNAMIC):
        name = TYPES.get(kind, "of an unknown type")
        raise source.error(f"is an ELF that is not executable: {name} (e_type {kind})", WANTED)
    if phentsize != _PROGRAM_HEADER.size:
        raise source.error(f"has ELF program headers of {phentsize} bytes, not 56", CORRUPT)
    if not 0 < phnum <= MAX_PROGRAM_HEADERS:
        raise source.error(
            f"has {phnum} ELF program headers, 1 to {MAX_PROGRAM_HEADERS} are possible", WANTED
        )
    table = source.read(phoff, phnum * _PROGRAM_HEADER.size, "the ELF program header table")
    segments = []
    for number in range(phnum):
        fields = _PROGRAM_HEADER.unpack_from(table, number * _PROGRAM_HEADER.size)
        p_type, _flags, offset, _vaddr, paddr, filesz, memsz, _align = fields
        if p_type == PT_INTERP:
            raise source.error("is a program for user space (PT_INTERP), not a kernel", WANTED)
        if p_type == PT_LOAD and (memsz or filesz):
            segment = Segment(offset, paddr, filesz, memsz)
            _check_segment(source, number, segment)
            segments.append(segment)
    segments.sort(key=lambda segment: segment.paddr)
    _check_together(source, segments, entry)
    return ElfImage(entry, tuple(segments))


def _header(source: Source) -> tuple[bytes, int, int, int, int, int, int]:
    """The ELF header's fields that matter, whatever the class; byte order checked."""
    head = source.read(0, _HEADER.size, "the ELF header")
    ident: bytes = head[:16]
    if not is_elf(ident):
        raise source.error("is not an ELF", WANTED)
    if ident[5] != DATA_LITTLE:
        order = "big-endian" if ident[5] == 2 else "of an unknown byte order"
        machine = int.from_bytes(head[18:20], "big")
        raise source.error(f"is an ELF {order} for {_machine_name(machine)}", WANTED)
    _, kind, machine, _version, entry, phoff, _shoff, _flags, _ehsize, phentsize, phnum, *_ = (
        _HEADER.unpack(head)
    )
    return ident, kind, machine, entry, phoff, phentsize, phnum


def _machine_name(machine: int) -> str:
    return MACHINES.get(machine, "x86-64" if machine == MACHINE_X86_64 else "an unknown machine")


def _check_segment(source: Source, number: int, segment: Segment) -> None:
    """One PT_LOAD by itself: in the file, in physical memory, no larger in file than in memory."""
    where = f"ELF segment {number}"
    if segment.filesz > segment.memsz:
        raise source.error(
            f"{where} has {segment.filesz} bytes in the file for {segment.memsz} in memory",
            CORRUPT,
        )
    if segment.offset + segment.filesz > source.size:
        raise source.error(
            f"{where} ends at byte {segment.offset + segment.filesz}, the file has {source.size}",
            CORRUPT,
        )
    if segment.paddr + segment.memsz > MAX_PHYSICAL:
        raise source.error(
            f"{where} at {segment.memory} is outside any machine's physical memory", CORRUPT
        )


def _check_together(source: Source, segments: list[Segment], entry: int) -> None:
    """The segments (in address order) as a whole, and the entry."""
    if not segments:
        raise source.error("has no ELF segment to load (PT_LOAD)", WANTED)
    total = sum(segment.memsz for segment in segments)
    if total > MAX_LOADED:
        raise source.error(
            f"its ELF segments take {total} bytes of memory, more than {MAX_LOADED}", CORRUPT
        )
    for low, high in itertools.pairwise(segments):
        if low.memory.overlaps(high.memory):
            raise source.error(f"its ELF segments {low.memory} and {high.memory} overlap", CORRUPT)
    if not any(s.paddr <= entry < s.paddr + s.filesz for s in segments):
        raise source.error(
            f"its entry {entry:#x} is not a physical address inside a loaded segment",
            "give a vmlinux linked for direct entry, or the bzImage",
        )
