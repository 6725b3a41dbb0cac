"""The Linux/x86 setup header of a bzImage, for every version of its 64-bit protocol (2.12 on).

Offsets and meanings are those of the kernel's Documentation/arch/x86/boot.rst, "The Real-Mode
Kernel Header". Nothing in the header is trusted: each field is checked before it is handed on.
"""

from __future__ import annotations

import struct

from vmm.boot.source import Source, printable
from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import PAGE_SIZE

SECTOR = 512
HEADER_START = 0x1F1  # setup_sects, the header's first field; the same offset in boot_params
# boot_params gives the header the bytes up to edd_mbr_sig_buffer. A jump of at most +0x7f from
# 0x202 ends before it, so the one check of the jump's sign below bounds the header.
HEADER_LIMIT = 0x290
BOOT_FLAG = 0xAA55
SETUP_MAGIC = b"HdrS"
JUMP_SHORT = 0xEB

VERSION_64BIT = 0x020C  # 2.12 (Linux 3.8): xloadflags
VERSION_KERNEL_INFO = 0x020F  # 2.15 (Linux 5.5); 2.14 is "burnt", the same as 2.13
HEADER_END_2_12 = 0x268  # past handover_offset
HEADER_END_2_15 = 0x26C  # past kernel_info_offset

LOADED_HIGH = 1 << 0  # loadflags
XLF_KERNEL_64 = 1 << 0  # xloadflags

# x86-64 addresses at most 52 bits of physical memory; half of that leaves sums far from a wrap.
MAX_PHYSICAL = 1 << 51
MAX_VERSION_TEXT = 512

# The fields from 0x1f1 to the end of init_size, in the order of boot.rst's table.
_FIELDS = struct.Struct("<BHIHHHHH4sHIHHBBHIIIIHBBIIIBBHIIQIIQQI")
assert HEADER_START + _FIELDS.size == 0x264

CORRUPT = "the file is corrupt or hostile, get a fresh copy"


class SetupHeader(NamedTuple):
    """What a loader needs of a bzImage's setup header, checked.

    `raw` is the header as the file has it, from offset 0x1f1 to its own end (0x202 plus the jump
    at 0x200): what belongs at 0x1f1 in boot_params. `payload_start` is an offset into the file,
    `payload_offset` the same from the start of the protected-mode code. Sizes are bytes.
    `cmdline_size` counts no NUL. `initrd_addr_max` is the last address an initrd may occupy.
    """

    raw: bytes
    version: int
    loadflags: int
    xloadflags: int
    setup_sects: int
    payload_offset: int
    payload_length: int
    payload_start: int
    pref_address: int
    init_size: int
    cmdline_size: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable: bool
    kernel_version: str | None

    @property
    def protocol(self) -> str:
        """The boot protocol's version as people write it: "2.15"."""
        return f"{self.version >> 8}.{self.version & 0xFF:02}"


def is_bzimage(prefix: bytes) -> bool:
    """Whether a file that starts so (at least 0x206 bytes) has an x86 setup header."""
    return prefix[0x1FE:0x200] == b"\x55\xaa" and prefix[0x202:0x206] == SETUP_MAGIC


def parse_setup_header(source: Source) -> SetupHeader:
    """Read and check the setup header of a file for which `is_bzimage` holds.

    Raises ImageError for an old protocol, a 32-bit kernel, and every field out of its bounds.
    """
    head = source.read(0, min(source.size, HEADER_LIMIT), "the setup header")
    if not is_bzimage(head):
        raise source.error("has no x86 setup header", "give an x86-64 bzImage or ELF vmlinux")
    version = _check_version(source, head)
    raw = _raw_header(source, head, version)
    (
        setup_sects,
        _root_flags,
        syssize,
        _ram_size,
        _vid_mode,
        _root_dev,
        _boot_flag,
        _jump,
        _magic,
        _version,
        _realmode_swtch,
        _start_sys_seg,
        version_pointer,
        _type_of_loader,
        loadflags,
        _setup_move_size,
        _code32_start,
        _ramdisk_image,
        _ramdisk_size,
        _bootsect_kludge,
        _heap_end_ptr,
        _ext_loader_ver,
        _ext_loader_type,
        _cmd_line_ptr,
        initrd_addr_max,
        kernel_alignment,
        relocatable,
        _min_alignment,
        xloadflags,
        cmdline_size,
        _hardware_subarch,
        _hardware_subarch_data,
        payload_offset,
        payload_length,
        _setup_data,
        pref_address,
        init_size,
    ) = _FIELDS.unpack_from(head, HEADER_START)
    if not xloadflags & XLF_KERNEL_64:
        raise source.error(
            f"is a 32-bit kernel (xloadflags {xloadflags:#x} lack XLF_KERNEL_64)",
            "give an x86-64 kernel",
        )
    if not loadflags & LOADED_HIGH:
        raise source.error(f"is a zImage, loaded low (loadflags {loadflags:#x})", "give a bzImage")
    setup_sects = setup_sects or 4  # boot.rst: 0 means 4
    protected_start = (setup_sects + 1) * SECTOR
    payload_start = _check_payload(source, protected_start, syssize, payload_offset, payload_length)
    _check_addresses(source, pref_address, init_size, kernel_alignment, initrd_addr_max)
    if cmdline_size == 0:
        raise source.error("allows a command line of 0 bytes (cmdline_size)", CORRUPT)
    return SetupHeader(
        raw=raw,
        version=version,
        loadflags=loadflags,
        xloadflags=xloadflags,
        setup_sects=setup_sects,
        payload_offset=payload_offset,
        payload_length=payload_length,
        payload_start=payload_start,
        pref_address=pref_address,
        init_size=init_size,
        cmdline_size=cmdline_size,
        initrd_addr_max=initrd_addr_max,
        kernel_alignment=kernel_alignment,
        relocatable=bool(relocatable),
        kernel_version=_version_text(source, version_pointer, protected_start),
    )


def _check_version(source: Source, head: bytes) -> int:
    """The protocol version, which stands in every header that has the magic."""
    if len(head) < 0x208:
        raise source.error("ends inside its setup header", "get a fresh copy")
    version = int.from_bytes(head[0x206:0x208], "little")
    if version >> 8 != 2 or version < VERSION_64BIT:
        raise source.error(
            f"speaks boot protocol {version >> 8}.{version & 0xFF:02}, 2.12 or a later 2.x is "
            "needed",
            "give an x86-64 kernel of Linux 3.8 or later",
        )
    return version


def _raw_header(source: Source, head: bytes, version: int) -> bytes:
    """The header's bytes from 0x1f1 to the end that its jump instruction tells."""
    opcode, displacement = head[0x200], head[0x201]
    end = 0x202 + displacement
    least = HEADER_END_2_15 if version >= VERSION_KERNEL_INFO else HEADER_END_2_12
    if opcode != JUMP_SHORT or displacement > 0x7F or end < least:
        raise source.error(
            f"its setup header starts with bytes {opcode:02x} {displacement:02x}, no jump past "
            f"{least:#x}",
            CORRUPT,
        )
    if len(head) < end:
        raise source.error(
            f"ends at {len(head):#x} inside its setup header, which ends at {end:#x}",
            "the file is truncated, get a fresh copy",
        )
    return head[HEADER_START:end]


def _check_payload(
    source: Source, protected_start: int, syssize: int, offset: int, length: int
) -> int:
    """The payload's place in the file; it must lie in the protected-mode code and in the file."""
    if length == 0:
        raise source.error(
            "has no payload (payload_length 0)", "give a bzImage as the kernel's build makes it"
        )
    start = protected_start + offset
    code_size = syssize * 16
    if offset + length > code_size:
        raise source.error(
            f"its payload [{offset:#x}, {offset + length:#x}) is not inside the protected-mode "
            f"code of {code_size:#x} bytes (syssize)",
            CORRUPT,
        )
    if start + length > source.size:
        raise source.error(
            f"its payload ends at byte {start + length}, the file has {source.size}",
            "the file is truncated, get a fresh copy",
        )
    return start


def _check_addresses(
    source: Source, pref_address: int, init_size: int, alignment: int, initrd_addr_max: int
) -> None:
    """The fields that speak of guest-physical memory."""
    if alignment < PAGE_SIZE or alignment & (alignment - 1):
        raise source.error(
            f"kernel_alignment {alignment:#x} is not a power of two of a page or more", CORRUPT
        )
    if pref_address == 0 or pref_address % PAGE_SIZE or pref_address > MAX_PHYSICAL:
        raise source.error(
            f"pref_address {pref_address:#x} is not a page of physical memory", CORRUPT
        )
    if init_size == 0:
        raise source.error("needs no memory to start (init_size 0)", CORRUPT)
    if initrd_addr_max < PAGE_SIZE:
        raise source.error(f"initrd_addr_max {initrd_addr_max:#x} leaves no memory", CORRUPT)


def _version_text(source: Source, pointer: int, protected_start: int) -> str | None:
    """The human-readable version, or None where the header has none."""
    if pointer == 0:
        return None
    start = pointer + 0x200
    if start >= protected_start:
        raise source.error(
            f"its version string at {start:#x} is not inside the setup code of "
            f"{protected_start:#x} bytes",
            CORRUPT,
        )
    size = min(MAX_VERSION_TEXT, protected_start - start)
    text = source.read(start, size, "the version string").split(b"\0", 1)[0]
    return printable(text.decode("utf-8", "backslashreplace"))
