"""Images of each kind, good and hostile: what is taken, what is loaded where, what is refused."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.images import build_bzimage, build_elf, memfd
from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.kernel import HEADER_SIZE, KernelImage, OpenedKernel, parse_header
from vmm.boot.errors import ImageError
from vmm.boot.source import open_source
from vmm.core.ranges import PAGE_SIZE, Range

BODY = bytes(range(256)) * 20


def image(
    *,
    text_offset: int = 0,
    image_size: int = 64 << 10,
    flags: int = 0b1010,
    magic: bytes = b"ARM\x64",
    body: bytes = BODY,
) -> bytes:
    """A small Image: the header of booting.rst, then bytes."""
    header = struct.pack("<IIQQQ24x4sI", 0x9100_4D4D, 0, text_offset, image_size, flags, magic, 0)
    return header + body


def zboot(
    payload: bytes,
    *,
    offset: int = 0x1000,
    size: int | None = None,
    name: bytes = b"gzip",
    machine: bytes = b"\xcd\x23\x82\x81",
) -> bytes:
    """A zboot program around a payload: the DOS header's fields that Linux' build fills in."""
    size = len(payload) if size is None else size
    header = struct.pack("<2s2x4sII8x32s4s", b"MZ", b"zimg", offset, size, name, machine)
    return header.ljust(0x1000, b"\0") + payload


def opened(path: Path, data: bytes) -> KernelImage:
    path.write_bytes(data)
    kernel = OpenedKernel(path)
    try:
        return kernel.finish()
    finally:
        kernel.close()


class Memory:
    """Guest memory that notes what is moved into it."""

    def __init__(self) -> None:
        self.written: dict[int, bytes] = {}

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        self.written[gpa] = os.pread(src_fd, size, src_offset)
        return len(self.written[gpa])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "Image"


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda data: data,
        gzip.compress,
        lambda data: zboot(gzip.compress(data)),
        lambda data: zboot(lzma.compress(data), name=b"xzkern"),
    ],
    ids=["Image", "gzip", "zboot-gzip", "zboot-xz"],
)
def test_kernel_of_each_kind_is_loaded_at_its_offset(path: Path, wrapped: object) -> None:
    data = image(text_offset=0x8_0000)
    kernel = opened(path, wrapped(data))  # type: ignore[operator]
    memory = Memory()

    kernel.load(memory)
    kernel.close()

    start = layout.RAM_START + 0x8_0000
    assert memory.written == {start: data}
    assert kernel.entry == start
    assert kernel.memory == Range(start, 64 << 10)


def test_kernel_of_before_3_17_is_taken_by_its_file_size(path: Path) -> None:
    kernel = opened(path, image(text_offset=0x1234_5678, image_size=0))
    kernel.close()

    size = -(-(HEADER_SIZE + len(BODY)) // PAGE_SIZE) * PAGE_SIZE
    assert kernel.memory == Range(layout.RAM_START + 0x8_0000, size)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (image(magic=b"ARM\x65"), "no known kernel image|EFI"),
        (image()[:40], "truncated|no known"),
        (image(flags=0b1011), "big-endian"),
        (image(text_offset=2 << 20), "text_offset"),
        (image(text_offset=2**64 - 8), "text_offset"),
        (image(text_offset=4), "text_offset"),
        (image(image_size=HEADER_SIZE), "image_size"),  # smaller than the file
        (image(image_size=2**64 - 1), "image_size"),
        (image(image_size=1 << 40), "image_size"),
        (gzip.compress(image())[:-9], "gzip payload"),
        (gzip.compress(b"\0" * 5000), "is no arm64 Image"),
        (gzip.compress(b""), "Image header"),
        (zboot(b""), "zboot payload"),
        (zboot(b"x", size=2), "zboot payload"),
        (zboot(b"x", offset=2**32 - 1, size=2**32 - 1), "zboot payload"),
        (zboot(b"x", offset=0, size=16), "zboot payload"),
        (zboot(b"nothing that is known", name=b"gzip"), "unknown compression"),
        (zboot(gzip.compress(image()), size=30), "gzip payload"),
        (zboot(gzip.compress(image()))[:30], "truncated|zboot header"),
        (build_bzimage(), "x86 bzImage, not for arm64"),
        (build_elf(), "ELF file"),
        (b"MZ\0\0" + bytes(1000), "EFI program"),
        (b"hello", "no known kernel image"),
    ],
)
def test_kernel_that_is_none_is_refused_in_one_line(path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        opened(path, data)

    text = str(caught.value)
    assert text.startswith("kernel ") and "\n" not in text and "; " in text


def test_kernel_that_unpacks_to_more_than_the_limit_is_refused(path: Path) -> None:
    path.write_bytes(gzip.compress(bytes(1 << 20)))
    kernel = OpenedKernel(path, limit=1 << 16)

    with pytest.raises(ImageError, match="more than 65536 bytes"):
        kernel.finish()


def test_kernel_that_does_not_fit_says_how_much_memory_it_takes(path: Path) -> None:
    kernel = opened(path, image(image_size=100 << 20))

    with pytest.raises(ImageError, match=r"use --mem 10\dM or more"):
        kernel.check_fits([Range(layout.RAM_START, 64 << 20)])
    kernel.close()


def test_kernel_that_reaches_into_a_reserved_place_is_refused(path: Path) -> None:
    kernel = opened(path, image(image_size=32 << 20))
    ram = Range(layout.RAM_START, 33 << 20)

    kernel.check_fits([ram])
    with pytest.raises(ImageError, match="use --mem"):
        kernel.check_fits([ram], [layout.pool_place(ram)])
    kernel.close()


@pytest.mark.parametrize("size", [1 << 20, 30 << 20, (31 << 20) + 4096, 100 << 20])
def test_kernel_fits_into_the_memory_that_the_refusal_names(path: Path, size: int) -> None:
    kernel = opened(path, image(image_size=size))
    small = Range(layout.RAM_START, size)
    with pytest.raises(ImageError) as caught:
        kernel.check_fits([small], [layout.pool_place(small), layout.tree_place(small)])
    found = re.search(r"use --mem (\d+)M", str(caught.value))
    assert found is not None

    ram = Range(layout.RAM_START, int(found[1]) << 20)
    places = [layout.pool_place(ram), layout.tree_place(ram)]
    kernel.check_fits([ram], places)
    kernel.close()
    assert not any(place.overlaps(kernel.memory) for place in places)
    assert int(found[1]) << 20 <= size + (8 << 20)


@given(st.binary(min_size=HEADER_SIZE - 8, max_size=200), st.booleans())
def test_header_of_any_bytes_is_refused_or_lies_in_bounds(data: bytes, with_magic: bool) -> None:
    if with_magic:
        data = data[:56] + b"ARM\x64" + data[60:]
    with open_source(memfd(data), "kernel") as source:
        try:
            header = parse_header(source)
        except ImageError:
            return
    assert header.text_offset < 2 << 20
    assert len(data) <= header.image_size <= 1 << 30
