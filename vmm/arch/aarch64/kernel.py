"""A kernel Image opened, checked and uncompressed.

Documentation/arch/arm64/booting.rst: a 64-byte header, then the kernel as it is to lie in memory.
It comes bare, as a gzip file (Image.gz), or in an EFI zboot program, which has the compressed
Image inside (drivers/firmware/efi/libstub/zboot-header.S).
"""

from __future__ import annotations

import struct
from contextlib import ExitStack, closing

from vmm.arch.aarch64 import layout
from vmm.boot.identify import PREFIX, describe
from vmm.boot.kernel import MIB, KernelFile, Memory, transfer_exactly
from vmm.boot.source import DEFAULT_LIMIT, PathOrFd, Source
from vmm.core.lean_typing import TYPE_CHECKING, Enum, NamedTuple
from vmm.core.ranges import Range, page_align_up

if TYPE_CHECKING:
    from collections.abc import Iterable


MAGIC = b"ARM\x64"
HEADER_SIZE = 64
_MAGIC_AT = 56
_HEADER = struct.Struct("<4x4xQQQ24x4s4x")
"""code0, code1, text_offset, image_size, flags, three reserved words, magic, PE header."""
OLD_TEXT_OFFSET = 0x8_0000  # of kernels before 3.17, whose image_size is 0
BIG_ENDIAN = 1 << 0
MAX_TEXT_OFFSET = layout.KERNEL_ALIGNMENT
LARGEST_IMAGE = DEFAULT_LIMIT

GZIP_MAGIC = b"\x1f\x8b\x08"
_ZBOOT_MAGIC = b"MZ\0\0zimg"
_ZBOOT = struct.Struct("<II8x32s")  # from offset 8: payload's offset, its size, compression
_ZBOOT_AT = 8

WANTED = "give an arm64 Image, Image.gz or EFI zboot vmlinuz"
CORRUPT = "the image is truncated or corrupt, get a fresh copy"


class Kind(Enum):
    """The files that can be booted."""

    IMAGE = "Image"
    GZIP = "gzip"
    ZBOOT = "zboot"


def identify(source: Source) -> Kind:
    """Which bootable kind the file is; ImageError that names it where it is none."""
    prefix = source.prefix(PREFIX)
    if prefix[_MAGIC_AT : _MAGIC_AT + len(MAGIC)] == MAGIC:
        return Kind.IMAGE
    if prefix.startswith(GZIP_MAGIC):
        return Kind.GZIP
    if prefix.startswith(_ZBOOT_MAGIC):
        return Kind.ZBOOT
    if prefix[0x202:0x206] == b"HdrS":
        raise source.error("is an x86 bzImage, not for arm64", WANTED)
    if prefix.startswith(b"\x7fELF"):
        raise source.error("is an ELF file, which arm64 does not boot", WANTED)
    raise source.error(*describe(source, prefix, "arm64", WANTED))


class Header(NamedTuple):
    """What an Image's header says. Sizes are bytes."""

    text_offset: int
    """Where the Image goes, counted from a 2 MiB aligned address."""
    image_size: int
    """How much memory from there on is the kernel's, what follows the file's bytes included."""


def parse_header(source: Source) -> Header:
    """The checked header. Raises ImageError for a file that isn't an Image that can run here."""
    raw = source.read(0, HEADER_SIZE, "the Image header")
    text_offset, image_size, flags, magic = _HEADER.unpack(raw)
    if magic != MAGIC:
        raise source.error(f"is no arm64 Image (its magic is {magic.hex(' ')})", WANTED)
    if image_size == 0:  # before Linux 3.17, which says nothing of its size
        text_offset, image_size = OLD_TEXT_OFFSET, page_align_up(source.size)
    elif flags & BIG_ENDIAN:
        raise source.error(
            f"is a big-endian arm64 kernel (flags {flags:#x})", "give a little-endian one"
        )
    if text_offset >= MAX_TEXT_OFFSET or text_offset % 8:
        raise source.error(
            f"its text_offset {text_offset:#x} is not below {MAX_TEXT_OFFSET:#x}, by 8", CORRUPT
        )
    if not source.size <= image_size <= LARGEST_IMAGE:
        raise source.error(
            f"its image_size is {image_size} bytes where the file has {source.size} "
            f"(at most {LARGEST_IMAGE})",
            CORRUPT,
        )
    return Header(text_offset, image_size)


class KernelImage(NamedTuple):
    """A kernel ready to be loaded; close it once it is in memory."""

    source: Source
    header: Header

    @property
    def memory(self) -> Range:
        """The guest-physical range that belongs to the kernel while it starts."""
        start = layout.RAM_START + self.header.text_offset
        return Range(start, page_align_up(start + self.header.image_size) - start)

    @property
    def entry(self) -> int:
        """The guest-physical address of the first instruction: the Image's first byte."""
        return self.memory.start

    def check_fits(self, ram: Iterable[Range], reserved: Iterable[Range] = ()) -> None:
        """ImageError unless the kernel's memory lies in one range of `ram`, off `reserved`."""
        areas, kept = list(ram), list(reserved)
        if any(area.contains(self.memory) for area in areas) and not any(
            span.overlaps(self.memory) for span in kept
        ):
            return
        end = max((area.end for area in areas), default=layout.RAM_START)
        needed = self.memory.end - layout.RAM_START + sum(span.size for span in kept)
        needed += layout.POOL_SIZE  # what alignment may take
        raise self.source.error(
            f"the kernel needs guest memory at {self.memory}, RAM ends at {end:#x}",
            f"use --mem {-(-needed // MIB)}M or more",
        )

    def load(self, memory: Memory) -> None:
        """Move the file's bytes to their place. What lies past them (bss) is *not* written:
        fresh guest memory is zero."""
        transfer_exactly(self.source, memory, 0, self.memory.start, self.source.size)

    def close(self) -> None:
        self.source.close()


class OpenedKernel:
    """A kernel whose header is checked, and which is being uncompressed beside us if need be."""

    def __init__(self, path_or_fd: PathOrFd, limit: int = LARGEST_IMAGE) -> None:
        """Opens the file; `limit` bounds the uncompressed size in bytes.

        Raises ImageError for what is recognisably not a bootable arm64 kernel.
        """
        self._file = KernelFile(path_or_fd)
        source = self._file.source
        with ExitStack() as opened:
            opened.callback(self._file.close)
            kind = identify(source)
            if kind is Kind.IMAGE:
                parse_header(source)
            elif kind is Kind.GZIP:
                self._file.uncompress(0, source.size, limit)
            else:
                self._file.uncompress(*_zboot_payload(source), limit)
            opened.pop_all()

    def finish(self) -> KernelImage:
        """The checked image, which the caller closes. Raises ImageError for a bad one."""
        with ExitStack() as opened:
            source = opened.enter_context(closing(self._file.finish()))
            image = KernelImage(source, parse_header(source))
            opened.pop_all()
        return image

    def close(self) -> None:
        """Give up what isn't finished; any number of times, and no harm after `finish`."""
        self._file.close()


def _zboot_payload(source: Source) -> tuple[int, int]:
    """Where the compressed Image is in a zboot program, as (offset, size in bytes).

    struct { u32 mz; char type[4]; u32 payload_offset, payload_size, reserved[2];
             char compression[32]; }; the compression's name is not needed: its magic tells.
    """
    raw = source.read(_ZBOOT_AT, _ZBOOT.size, "the zboot header")
    offset, size, _ = _ZBOOT.unpack(raw)
    if offset < _ZBOOT_AT + _ZBOOT.size or size == 0 or offset + size > source.size:
        raise source.error(
            f"its zboot payload of {size} bytes at {offset:#x} is not inside the file of "
            f"{source.size} bytes",
            CORRUPT,
        )
    return offset, size
