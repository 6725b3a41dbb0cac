"""Builders of kernel images, small enough to see through: ELFs, bzImages, payloads, and a memory.

Every builder makes a valid image; a test that wants a wrong one changes a named field with `patch`
or hands in a wrong number.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import os
import struct
import sys
from dataclasses import dataclass, field

import lz4.block

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KERNEL_BASE = 0x100000
LZ4_BLOCK = 8 << 20
CODECS = ("gzip", "bzip2", "lzma", "xz", "lz4", "zstd", "none")

# struct setup_header, offsets from the start of the file (boot.rst's table).
HEADER_FIELDS = {
    "setup_sects": (0x1F1, "<B"),
    "syssize": (0x1F4, "<I"),
    "boot_flag": (0x1FE, "<H"),
    "jump_opcode": (0x200, "<B"),
    "jump_distance": (0x201, "<B"),
    "magic": (0x202, "<I"),
    "version": (0x206, "<H"),
    "kernel_version": (0x20E, "<H"),
    "loadflags": (0x211, "<B"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "relocatable_kernel": (0x234, "<B"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "payload_offset": (0x248, "<I"),
    "payload_length": (0x24C, "<I"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
}
# Elf64_Ehdr, and Elf64_Phdr of segment 0 as `build_elf` lays it out.
ELF_FIELDS = {
    "class": (4, "<B"),
    "data": (5, "<B"),
    "e_type": (16, "<H"),
    "e_machine": (18, "<H"),
    "e_entry": (24, "<Q"),
    "e_phoff": (32, "<Q"),
    "e_phentsize": (54, "<H"),
    "e_phnum": (56, "<H"),
    "p_type": (64, "<I"),
    "p_offset": (72, "<Q"),
    "p_paddr": (88, "<Q"),
    "p_filesz": (96, "<Q"),
    "p_memsz": (104, "<Q"),
}
FIELDS = {**HEADER_FIELDS, **ELF_FIELDS}


def patch(image: bytes, **values: int) -> bytes:
    """`image` with named header fields overwritten."""
    changed = bytearray(image)
    for name, value in values.items():
        offset, form = FIELDS[name]
        struct.pack_into(form, changed, offset, value)
    return bytes(changed)


@dataclass(frozen=True, slots=True)
class Part:
    """One PT_LOAD: `data` at `paddr`, taking `memsz` bytes there (default: as many as data)."""

    paddr: int
    data: bytes
    memsz: int | None = None


DEFAULT_PARTS = (
    Part(KERNEL_BASE, b"\xf4" * 0x1800, 0x2000),
    Part(KERNEL_BASE + 0x4000, bytes(range(256)) * 8, 0x3000),
)


def build_elf(parts: tuple[Part, ...] = DEFAULT_PARTS, entry: int = KERNEL_BASE) -> bytes:
    """An ELF64 x86-64 executable: header, program headers, then each part's bytes."""
    header_size = 64 + 56 * len(parts)
    table, body = b"", b""
    for part in parts:
        memsz = len(part.data) if part.memsz is None else part.memsz
        offset = header_size + len(body)
        table += struct.pack(
            "<IIQQQQQQ", 1, 7, offset, part.paddr, part.paddr, len(part.data), memsz, 0x1000
        )
        body += part.data
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, 62, 1, entry, 64, 0, 0, 64, 56, len(parts), 0, 0, 0
    )
    return header + table + body


@functools.cache
def compress(data: bytes, codec: str) -> bytes:
    """`data` as the kernel's build compresses it: all but gzip get the size appended."""
    size = struct.pack("<I", len(data))
    if codec == "gzip":
        return gzip.compress(data, mtime=0)
    if codec == "bzip2":
        return bz2.compress(data) + size
    if codec == "lzma":
        return lzma.compress(data, lzma.FORMAT_ALONE) + size
    if codec == "xz":
        filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
        return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters) + size
    if codec == "zstd":
        return zstd.compress(data) + size
    if codec == "lz4":
        out = bytes.fromhex("02214c18")
        for start in range(0, len(data), LZ4_BLOCK):
            block = lz4.block.compress(data[start : start + LZ4_BLOCK], store_size=False)
            out += struct.pack("<I", len(block)) + block
        return out + size
    if codec == "none":
        return data
    raise ValueError(codec)


def build_bzimage(
    payload: bytes | None = None,
    *,
    elf: bytes | None = None,
    codec: str = "gzip",
    version: int = 0x020F,
    version_text: bytes = b"6.99-test (a@b) #1\0",
    **values: int,
) -> bytes:
    """A bzImage around `payload`, or around `elf` compressed with `codec`."""
    if payload is None:
        payload = compress(build_elf() if elf is None else elf, codec)
    setup_sects, lead = 3, 0x80
    start = (setup_sects + 1) * 512
    code = bytes(lead) + payload
    code += bytes(-len(code) % 16)
    setup = bytearray(start)
    setup[0x300 : 0x300 + len(version_text)] = version_text
    fields = {
        "setup_sects": setup_sects,
        "syssize": len(code) // 16,
        "boot_flag": 0xAA55,
        "jump_opcode": 0xEB,
        "jump_distance": 0x6A if version >= 0x20F else 0x66,
        "magic": int.from_bytes(b"HdrS", "little"),
        "version": version,
        "kernel_version": 0x100,
        "loadflags": 1,
        "initrd_addr_max": 0x7FFFFFFF,
        "kernel_alignment": 0x200000,
        "relocatable_kernel": 1,
        "xloadflags": 1,
        "cmdline_size": 2047,
        "payload_offset": lead,
        "payload_length": len(payload),
        "pref_address": KERNEL_BASE,
        "init_size": 16 << 20,
    }
    return patch(bytes(setup) + code, **{**fields, **values})


def memfd(data: bytes) -> int:
    """A file descriptor of a file that holds `data`; the caller closes it."""
    fd = os.memfd_create("image")
    os.write(fd, data)
    return fd


@dataclass(slots=True)
class FakeMemory:
    """Guest RAM in a bytearray from GPA 0, filled through `transfer_in` alone.

    At most `step` bytes move in one call, as a file system may do it.
    """

    size: int = 4 << 20
    step: int = 4096
    ram: bytearray = field(init=False)
    calls: list[tuple[int, int, int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.ram = bytearray(self.size)

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        if gpa < 0 or gpa + size > self.size:
            raise AssertionError(f"transfer outside of RAM: {gpa:#x} + {size:#x}")
        self.calls.append((src_offset, gpa, size))
        data = os.pread(src_fd, min(size, self.step), src_offset)
        self.ram[gpa : gpa + len(data)] = data
        return len(data)
