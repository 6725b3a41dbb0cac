"""Kernel images: ELF, bzImage with every compression, and arm64's Image in its three wrappings."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from unittest.mock import patch

from tests.fuzz.drawing import patched
from tests.fuzz.targets.registry import target
from tests.support.images import CODECS, build_bzimage, build_elf, compress, memfd
from tests.support.images import FakeMemory as ImageMemory
from vmm.arch.aarch64 import kernel as arm_kernel
from vmm.arch.aarch64.layout import RAM_START
from vmm.arch.x86_64.kernel import load_kernel_image
from vmm.boot import decompress
from vmm.boot.errors import ImageError
from vmm.core.ranges import Range

RAM = Range(0, 4 << 20)
LIMIT = 1 << 22
"""Bytes that may come out of a compressed kernel."""
MOST_READS = 4096


class Here:
    """Decompression in this process, so that an exception nobody foresaw shows itself."""

    def __init__(self, work: Callable[[], int], _name: str) -> None:
        self.result = work

    def close(self) -> None:
        """Nothing runs elsewhere."""


class _CountedReads:
    """os.pread with a bound: each part of a file is looked at a few times at most."""

    def __init__(self) -> None:
        self.left = MOST_READS
        self._pread = os.pread

    def __call__(self, fd: int, size: int, offset: int) -> bytes:
        self.left -= 1
        assert self.left > 0, f"more than {MOST_READS} reads of one image"
        return self._pread(fd, size, offset)


@contextmanager
def opened(data: bytes) -> Iterator[int]:
    """The image as a file; only an ImageError of one line may come of it, nothing stays open."""
    fd = memfd(data)
    before = len(os.listdir("/proc/self/fd"))
    try:
        reads = _CountedReads()
        with patch.object(decompress, "IsolatedWork", Here), patch.object(os, "pread", reads):
            yield fd
    except ImageError as error:
        assert str(error).isprintable()
    finally:
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before - 1, "a file stays open"


def changed(images: list[bytes], data: bytes) -> bytes:
    """A byte that picks an image, two that cut it (0: nothing is), then patches."""
    picked = images[data[0] % len(images)] if data else images[0]
    length = int.from_bytes(data[1:3], "little")
    return patched(picked[:length] if length else picked, data[3:])


def _load_x86(image: bytes) -> None:
    with opened(image) as fd, load_kernel_image(fd, LIMIT) as kernel:
        kernel.check_fits([RAM])
        memory = ImageMemory(RAM.size, step=1 << 20)
        kernel.load(memory)
        for segment in kernel.segments:
            loaded = memory.ram[segment.paddr : segment.paddr + segment.filesz]
            held = os.pread(kernel.source.fd, segment.filesz, segment.offset)
            assert len(held) == segment.filesz
            assert loaded == held, segment


ELVES = [build_elf()]
BZIMAGES = [build_bzimage(codec=codec) for codec in CODECS]


def _field(offset: int, form: str, value: int) -> bytes:
    piece = struct.pack(form, value)
    return struct.pack("<HBB", offset, 0, len(piece)) + piece


def _elves() -> list[bytes]:
    wrong = [(16, "<H", 1), (32, "<Q", 1 << 63), (54, "<H", 57), (56, "<H", 0xFFFF),
             (24, "<Q", 0), (72, "<Q", 1 << 40), (88, "<Q", (1 << 64) - 1), (96, "<Q", 1 << 50),
             (104, "<Q", 0), (64, "<I", 4)]  # fmt: skip
    return [bytes(3), *(bytes(3) + _field(*each) for each in wrong)]


@target("elf", _elves)
def elf(data: bytes) -> None:
    """An ELF: cut, and patched anywhere."""
    _load_x86(changed(ELVES, data))


def _bzimages() -> list[bytes]:
    wrong = [(0x1F1, "<B", 64), (0x206, "<H", 0x200), (0x20E, "<H", 0xFFFF),
             (0x248, "<I", 1 << 31),
             (0x24C, "<I", 5), (0x258, "<Q", 1 << 60), (0x260, "<I", 0),
             (0x236, "<H", 0)]  # fmt: skip
    whole = [bytes((number, 0, 0)) for number in range(len(BZIMAGES))]
    return [*whole, *(bytes(3) + _field(*each) for each in wrong)]


@target("bzimage", _bzimages)
def bzimage(data: bytes) -> None:
    """A bzImage of some compression: cut, and patched anywhere."""
    _load_x86(changed(BZIMAGES, data))


_SMALL = b"\x7fELF" + bytes(range(64)) * 4


@target("payload", lambda: [compress(_SMALL, codec) for codec in CODECS], longest=1024)
def payload(data: bytes) -> None:
    """A whole bzImage, whose payload is the input: one of the compressions' own formats."""
    _load_x86(build_bzimage(payload=data))


def _image(flags: int = 0b1010, body: bytes = bytes(range(256)) * 4) -> bytes:
    head = struct.pack("<IIQQQ24x4sI", 0x9100_4D4D, 0, 0, 64 << 10, flags, b"ARM\x64", 0)
    return head + body


def _zboot(inside: bytes) -> bytes:
    head = struct.pack(
        "<2s2x4sII8x32s4s", b"MZ", b"zimg", 0x100, len(inside), b"gzip", b"\xcd#\x82\x81"
    )
    return head.ljust(0x100, b"\0") + inside


_PACKED = gzip.compress(_image(), mtime=0)
ARM_IMAGES = [_image(), _PACKED, _zboot(_PACKED), _zboot(compress(_image(), "zstd"))]


def _arm_images() -> list[bytes]:
    wrong = [(8, "<Q", 1), (16, "<Q", 0), (16, "<Q", 1 << 40), (24, "<Q", 1), (56, "<I", 0)]
    zboot = [(8, "<I", 0), (8, "<I", 0xFFFF_FFF0), (12, "<I", 0)]
    whole = [bytes((number, 0, 0)) for number in range(len(ARM_IMAGES))]
    return [
        *whole,
        *(bytes(3) + _field(*each) for each in wrong),
        *(b"\2\0\0" + _field(*each) for each in zboot),
    ]


@target("arm-image", _arm_images)
def arm_image(data: bytes) -> None:
    """An Image, bare, in gzip or in a zboot program: cut, and patched anywhere."""
    with opened(changed(ARM_IMAGES, data)) as fd:
        with closing(arm_kernel.OpenedKernel(fd, LIMIT)) as opening:
            kernel = opening.finish()
        with closing(kernel):
            kernel.check_fits([Range(RAM_START, RAM.size)])
            assert kernel.memory.start >= RAM_START and kernel.memory.end <= RAM_START + RAM.size
            assert kernel.source.size <= kernel.header.image_size
            kernel.load(_AtRamStart(RAM.size, step=1 << 20))


class _AtRamStart(ImageMemory):
    """Guest RAM that begins where arm64's does."""

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        return super().transfer_in(src_fd, src_offset, gpa - RAM_START, size)
