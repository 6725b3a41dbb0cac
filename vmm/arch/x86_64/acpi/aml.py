"""As much of the ACPI Machine Language as a static description of devices takes.

ACPI 6.5, chapter 20 (AML) and 6.4 (resource descriptors). Every function returns the bytes of one
term; terms nest by concatenation. Names are written as in ASL: "\\_SB_", "PCI0".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

ZERO, ONE = b"\x00", b"\x01"

# 20.2.5: opcodes
_NAME, _SCOPE, _BUFFER, _PACKAGE, _DEVICE = b"\x08", b"\x10", b"\x11", b"\x12", b"\x5b\x82"
_BYTE, _WORD, _DWORD, _QWORD = b"\x0a", b"\x0b", b"\x0c", b"\x0e"
_ROOT, _DUAL, _MULTI = b"\\", b"\x2e", b"\x2f"


def name_string(path: str) -> bytes:
    """A name path (20.2.2): segments are four characters, shorter ones padded with "_"."""
    root, rest = (_ROOT, path[1:]) if path.startswith("\\") else (b"", path)
    segments = [segment.ljust(4, "_").encode("ascii") for segment in rest.split(".") if segment]
    if any(len(segment) != 4 for segment in segments):
        raise ValueError(f"ACPI name {path!r} has a segment of more than four characters")
    prefix = {0: b"\0", 1: b"", 2: _DUAL}.get(len(segments), _MULTI + bytes([len(segments) & 0xFF]))
    return root + prefix + b"".join(segments)


def package_length(size: int) -> bytes:
    """The length that opens a block of `size` bytes; it counts itself (20.2.4)."""
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"AML block of {size} bytes is longer than a package length can say")


def integer(value: int) -> bytes:
    """The shortest constant with this value."""
    if value in (0, 1):
        return ONE if value else ZERO
    for prefix, width in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4), (_QWORD, 8)):
        if value < 1 << 8 * width:
            return prefix + value.to_bytes(width, "little")
    raise ValueError(f"AML integer {value:#x} has more than 64 bits")


def eisa_id(text: str) -> bytes:
    """A seven-character EISA id such as "PNP0A03" as an integer constant (19.6.36)."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    vendor = letters[0] << 10 | letters[1] << 5 | letters[2]
    return _DWORD + struct.pack(">HH", vendor, int(text[3:], 16))


def _block(opcode: bytes, content: bytes) -> bytes:
    return opcode + package_length(len(content)) + content


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)"""
    return _NAME + name_string(path) + value


def package(elements: Iterable[bytes]) -> bytes:
    """Package () { elements }, at most 255 of them"""
    items = list(elements)
    return _block(_PACKAGE, bytes([len(items)]) + b"".join(items))


def buffer(data: bytes) -> bytes:
    """Buffer (len) { data }"""
    return _block(_BUFFER, integer(len(data)) + data)


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) { terms }"""
    return _block(_SCOPE, name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) { terms }"""
    return _block(_DEVICE, name_string(path) + b"".join(terms))


# --- resource descriptors ------------------------------------------------------------------------


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { descriptors }, closed by an end tag with no checksum (6.4.2.9)."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(base: int, length: int) -> bytes:
    """IO (Decode16, base, base, 1, length) (6.4.2.5)"""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq(number: int) -> bytes:
    """IRQNoFlags () {number}: edge, active high, as ISA devices have it (6.4.2.1)"""
    return struct.pack("<BH", 0x22, 1 << number)


# Word address space (6.4.3.5.3): resource type, then general flags: producer, both ends fixed,
# positive decode.
_FIXED_PRODUCER = 0x0C
_IO_ENTIRE_RANGE = 0x03


def _word_space(kind: int, type_flags: int, first: int, last: int) -> bytes:
    return struct.pack(
        "<BHBBBHHHHH",
        *(0x88, 13, kind, _FIXED_PRODUCER, type_flags),
        *(0, first, last, 0, last - first + 1),
    )


def memory_window(first: int, last: int) -> bytes:
    """DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, ...)

    6.4.3.5.2, with 32-bit numbers.
    """
    memory, read_write = 0, 1
    return struct.pack(
        "<BHBBBIIIII",
        *(0x87, 23, memory, _FIXED_PRODUCER, read_write),
        *(0, first, last, 0, last - first + 1),
    )


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0, first, last, 0, n)"""
    return _word_space(2, 0, first, last)


def io_window(first: int, last: int) -> bytes:
    """WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, 0, first, last, ...)"""
    return _word_space(1, _IO_ENTIRE_RANGE, first, last)
