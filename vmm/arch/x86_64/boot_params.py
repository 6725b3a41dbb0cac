"""The zero page (struct boot_params) and the e820 map: what Linux learns at its 64-bit entry.

Offsets: Documentation/arch/x86/zero-page.rst and boot.rst, uapi/asm/bootparam.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.bzimage import HEADER_LIMIT, HEADER_START, LOADED_HIGH, XLF_KERNEL_64
from vmm.core.errors import UsageError
from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import PAGE_SIZE, Range

# struct boot_params
ACPI_RSDP_ADDR = 0x070  # u64
EXT_RAMDISK_IMAGE, EXT_RAMDISK_SIZE, EXT_CMD_LINE_PTR = 0x0C0, 0x0C4, 0x0C8  # u32, bits 63:32
E820_ENTRIES, E820_TABLE, E820_MAX = 0x1E8, 0x2D0, 128

# struct setup_header, as offsets in boot_params
BOOT_FLAG, JUMP, MAGIC, VERSION = 0x1FE, 0x200, 0x202, 0x206
TYPE_OF_LOADER, LOADFLAGS = 0x210, 0x211
RAMDISK_IMAGE, RAMDISK_SIZE = 0x218, 0x21C
CMD_LINE_PTR, INITRD_ADDR_MAX, KERNEL_ALIGNMENT = 0x228, 0x22C, 0x230
XLOADFLAGS, CMDLINE_SIZE, HARDWARE_SUBARCH, SETUP_DATA = 0x236, 0x238, 0x23C, 0x250
HEADER_END_2_15 = 0x26C

LOADER_UNDEFINED = 0xFF
KASLR_FLAG = 1 << 1  # loadflags
XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1  # xloadflags

_U32 = 0xFFFF_FFFF


class E820Type:
    """Memory types of the ACPI specification's address map interfaces (15.1)."""

    RAM = 1
    RESERVED = 2
    ACPI = 3


class E820Entry(NamedTuple):
    """One line of the memory map: `size` bytes from `start`."""

    start: int
    size: int
    type: int


def e820_map(ram: Sequence[Range], low_ram: Range = layout.LOW_RAM) -> list[E820Entry]:
    """The PC memory map over the RAM ranges; the first of them starts at 0 and passes 1 MiB.

    The low megabyte is cut as every PC has it, but of RAM there `low_ram` alone is named. The ACPI
    tables' place is type 3: under SEV Linux maps that encrypted like RAM, and would look for a
    *reserved* range unencrypted.
    """
    if not ram or ram[0].start != 0 or ram[0].end <= layout.HIGH_RAM_START:
        found = ", ".join(str(span) for span in ram) or "none"
        raise UsageError(f"guest RAM must start at 0 and be larger than 1 MiB, not {found}")
    entries = [
        E820Entry(low_ram.start, low_ram.size, E820Type.RAM),
        E820Entry(layout.LOW_RAM_END, layout.EBDA_END - layout.LOW_RAM_END, E820Type.RESERVED),
        E820Entry(layout.ACPI_GPA, layout.ACPI_END - layout.ACPI_GPA, E820Type.ACPI),
        E820Entry(layout.HIGH_RAM_START, ram[0].end - layout.HIGH_RAM_START, E820Type.RAM),
    ]
    entries += [E820Entry(span.start, span.size, E820Type.RAM) for span in ram[1:]]
    if len(entries) > E820_MAX:
        raise UsageError(f"{len(ram)} RAM ranges do not fit the e820 map's {E820_MAX} entries")
    return entries


def synthetic_header() -> bytes:
    """A protocol 2.15 setup header for a bare ELF kernel, which has none of its own."""
    page = bytearray(HEADER_END_2_15)
    struct.pack_into("<H", page, BOOT_FLAG, 0xAA55)
    # A short jump over the header: its second byte is where loaders learn the header's end.
    struct.pack_into("<BB", page, JUMP, 0xEB, HEADER_END_2_15 - MAGIC)
    struct.pack_into("<4sH", page, MAGIC, b"HdrS", 0x020F)
    page[LOADFLAGS] = LOADED_HIGH
    struct.pack_into("<I", page, INITRD_ADDR_MAX, 0x7FFF_FFFF)
    struct.pack_into("<I", page, KERNEL_ALIGNMENT, 2 * layout.MIB)
    struct.pack_into("<H", page, XLOADFLAGS, XLF_KERNEL_64 | XLF_CAN_BE_LOADED_ABOVE_4G)
    struct.pack_into("<I", page, CMDLINE_SIZE, layout.CMDLINE_MAX - 1)
    return bytes(page[HEADER_START:])


def command_line(text: str, limit: int = layout.CMDLINE_MAX - 1) -> bytes:
    """`text` as the kernel reads it, with its NUL; `limit` is the header's cmdline_size."""
    data = text.encode("utf-8", "surrogateescape")
    limit = min(limit, layout.CMDLINE_MAX - 1)
    if b"\0" in data:
        raise UsageError("the kernel command line contains a NUL character: remove it")
    if len(data) > limit:
        raise UsageError(
            f"the kernel command line has {len(data)} bytes, this kernel takes {limit}: "
            "shorten --append"
        )
    return data + b"\0"


def _check_header(header: bytes) -> bytes:
    """The header cut to its own stated length, refused when it is none."""
    magic = header[MAGIC - HEADER_START : MAGIC - HEADER_START + 4]
    if magic != b"HdrS":
        raise UsageError(f"setup header has magic {magic!r}, not b'HdrS': not a bzImage")
    end = MAGIC + header[JUMP + 1 - HEADER_START]
    if not SETUP_DATA + 8 <= end <= HEADER_LIMIT or len(header) < end - HEADER_START:
        raise UsageError(
            f"setup header ends at {end:#x} and {len(header)} bytes of it are there: "
            f"expected an end from {SETUP_DATA + 8:#x} to {HEADER_LIMIT:#x}"
        )
    return header[: end - HEADER_START]


def boot_params(
    ram: Sequence[Range],
    *,
    setup_header: bytes | None = None,
    cmdline_gpa: int = layout.CMDLINE_GPA,
    initrd: Range | None = None,
    rsdp_gpa: int = 0,
    low_ram: Range = layout.LOW_RAM,
) -> bytes:
    """The zero page, 4096 bytes.

    `setup_header` is the kernel's own from file offset 0x1f1 on, None for a bare ELF. What a
    boot loader has to fill in is overwritten, so nothing of that is taken from the image. The
    command line's text goes to `cmdline_gpa` separately (`command_line`).
    Raises UsageError for a header that is none and an initrd the kernel can't take.
    """
    header = synthetic_header() if setup_header is None else _check_header(setup_header)
    page = bytearray(PAGE_SIZE)
    page[HEADER_START : HEADER_START + len(header)] = header

    page[TYPE_OF_LOADER] = LOADER_UNDEFINED
    # The kernel is entered past its decompressor, so nobody has randomised its place.
    page[LOADFLAGS] = page[LOADFLAGS] & ~KASLR_FLAG | LOADED_HIGH
    struct.pack_into("<I", page, HARDWARE_SUBARCH, 0)
    struct.pack_into("<Q", page, SETUP_DATA, 0)

    struct.pack_into("<I", page, CMD_LINE_PTR, cmdline_gpa & _U32)
    struct.pack_into("<I", page, EXT_CMD_LINE_PTR, cmdline_gpa >> 32)
    _put_initrd(page, initrd)
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, rsdp_gpa)

    entries = e820_map(ram, low_ram)
    page[E820_ENTRIES] = len(entries)
    for index, entry in enumerate(entries):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * index, *entry)
    return bytes(page)


def _put_initrd(page: bytearray, initrd: Range | None) -> None:
    span = initrd or Range(0, 0)
    (xloadflags,) = struct.unpack_from("<H", page, XLOADFLAGS)
    if span.end > layout.FOUR_GIB and not xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G:
        raise UsageError(
            f"initrd at {span} lies above 4 GiB and this kernel cannot take it there: "
            "use a smaller initrd"
        )
    struct.pack_into("<II", page, RAMDISK_IMAGE, span.start & _U32, span.size & _U32)
    struct.pack_into("<II", page, EXT_RAMDISK_IMAGE, span.start >> 32, span.size >> 32)
