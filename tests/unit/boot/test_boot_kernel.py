"""Kernel and initrd from a path to guest memory, and what people give by mistake."""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.images import (
    CODECS,
    DEFAULT_PARTS,
    KERNEL_BASE,
    FakeMemory,
    Part,
    build_bzimage,
    build_elf,
    memfd,
    patch,
)
from vmm.arch.x86_64.kernel import Kind, load_kernel_image
from vmm.boot.errors import ImageError
from vmm.boot.kernel import place_initrd, transfer_exactly
from vmm.boot.source import open_source
from vmm.core.errors import UsageError
from vmm.core.ranges import Range

MIB = 1 << 20


def load_initrd(
    path: Path, memory: FakeMemory, ram: Range, limit: int, occupied: Sequence[Range] = ()
) -> Range:
    """As a guest does it: find a place, then move the bytes there."""
    with open_source(path, "initrd") as source:
        place = place_initrd(source, ram, limit, occupied)
        transfer_exactly(source, memory, 0, place.start, place.size)
        return place


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    return tmp_path / "image"


def assert_loaded(memory: FakeMemory) -> None:
    for part in DEFAULT_PARTS:
        end = part.paddr + len(part.data)
        assert memory.ram[part.paddr : end] == part.data
        assert not any(memory.ram[end : end + 0x800])


@pytest.mark.parametrize("codec", CODECS)
def test_kernel_bzimage_of_each_codec_is_loaded(image_path: Path, codec: str) -> None:
    image_path.write_bytes(build_bzimage(codec=codec))
    memory = FakeMemory()

    with load_kernel_image(image_path) as kernel:
        kernel.load(memory)

        assert kernel.kind is Kind.BZIMAGE
        assert kernel.entry == KERNEL_BASE
        assert kernel.setup_header is not None
        assert kernel.memory == Range(KERNEL_BASE, 16 * MIB)
    assert_loaded(memory)


def test_kernel_bare_elf_is_loaded_from_the_file_itself(image_path: Path) -> None:
    image_path.write_bytes(build_elf())
    memory = FakeMemory()

    with load_kernel_image(image_path) as kernel:
        kernel.load(memory)

        assert kernel.kind is Kind.ELF
        assert kernel.setup_header is None
        assert os.path.samestat(os.fstat(kernel.source.fd), image_path.stat())
        assert kernel.memory_end == KERNEL_BASE + 0x7000
    assert_loaded(memory)


def test_kernel_from_fd_leaves_the_callers_fd_open() -> None:
    fd = memfd(build_bzimage())

    with load_kernel_image(fd) as kernel:
        assert kernel.entry == KERNEL_BASE

    os.close(fd)  # OSError if it had been closed


def test_kernel_closed_leaves_no_file_open(image_path: Path) -> None:
    image_path.write_bytes(build_bzimage())
    before = sorted(os.listdir("/proc/self/fd"))

    kernel = load_kernel_image(image_path)
    kernel.close()
    kernel.close()

    assert sorted(os.listdir("/proc/self/fd")) == before


def test_kernel_payload_larger_than_init_size_is_refused(image_path: Path) -> None:
    image_path.write_bytes(build_bzimage(init_size=0x1000))

    with pytest.raises(ImageError, match="more than 4096 bytes"):
        load_kernel_image(image_path)


def test_kernel_payload_that_is_no_elf_is_refused(image_path: Path) -> None:
    image_path.write_bytes(build_bzimage(gzip.compress(b"not an ELF, but long enough " * 9)))

    with pytest.raises(ImageError, match=r"\(uncompressed\): is not an ELF"):
        load_kernel_image(image_path)


def test_kernel_file_that_shrinks_while_loading_is_refused(image_path: Path) -> None:
    image_path.write_bytes(build_elf())

    with load_kernel_image(image_path) as kernel:
        os.truncate(image_path, 0x1000)

        with pytest.raises(ImageError, match="ended at byte 4096"):
            kernel.load(FakeMemory())


def test_kernel_transfer_error_is_an_image_error(image_path: Path) -> None:
    class Broken(FakeMemory):
        def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
            raise OSError(5, "Input/output error")

    image_path.write_bytes(build_elf())

    with (
        load_kernel_image(image_path) as kernel,
        pytest.raises(ImageError, match="Input/output error"),
    ):
        kernel.load(Broken())


def test_kernel_that_fits_ram_is_accepted(image_path: Path) -> None:
    image_path.write_bytes(build_bzimage())

    with load_kernel_image(image_path) as kernel:
        kernel.check_fits([Range(0, 17 * MIB)], [Range(0x7000, 0x1000)])


@pytest.mark.parametrize(
    ("ram", "reserved", "words"),
    [
        ([Range(0, 16 * MIB)], [], "use --mem 17M or more"),
        ([], [], "use --mem 17M or more"),
        ([Range(0, 2 * MIB), Range(4 * MIB, 64 * MIB)], [], "linked to run in RAM"),
        ([Range(0, 64 * MIB)], [Range(KERNEL_BASE + 0x1000, 0x10)], "which the boot needs"),
    ],
)
def test_kernel_that_does_not_fit_is_refused(
    image_path: Path, ram: list[Range], reserved: list[Range], words: str
) -> None:
    image_path.write_bytes(build_bzimage())

    with load_kernel_image(image_path) as kernel, pytest.raises(ImageError, match=words):
        kernel.check_fits(ram, reserved)


def pe(machine: int) -> bytes:
    head = bytearray(0x1000)
    head[:2] = b"MZ"
    head[0x3C:0x40] = (0x80).to_bytes(4, "little")
    head[0x80:0x86] = b"PE\0\0" + machine.to_bytes(2, "little")
    return bytes(head)


def at(offset: int, data: bytes) -> bytes:
    return bytes(offset) + data + bytes(0x1000)


MISTAKES = [
    (b"MZ" + at(0x36, b"ARM\x64"), "arm64 kernel Image"),
    (b"MZ" + at(0x36, b"RSC\x05"), "RISC-V kernel Image"),
    (b"MZ" + at(0x36, b"\xcd\x23\x82\x81"), "LoongArch kernel Image"),
    (at(0x24, bytes.fromhex("18286f01")), "32-bit ARM zImage"),
    (pe(0x8664), r"PE only\) for x86-64"),
    (pe(0xAA64), r"PE only\) for arm64"),
    (b"MZ\0\0zimg" + bytes(0x400), "zboot"),
    (b"MZ" + b"\xff" * 0x1000, r"PE only\) for an unknown machine"),
    (b"MZ", r"PE only\) for an unknown machine"),
    (b"\x27\x05\x19\x56" + bytes(100), "uImage"),
    (b"070701" + bytes(600), "initramfs"),
    (b"!<arch>\ndebian-binary", "archive or Debian package"),
    (b"#!/bin/sh\n", "a script"),
    (gzip.compress(b"x" * 100), r"bare gzip file \(magic 1f 8b 08\)"),
    (at(0x1FE, b"\x55\xaa"), "boot sector"),
    (patch(build_elf(), e_machine=183), "arm64"),
    (patch(build_bzimage(), xloadflags=0), "32-bit kernel"),
    (b"\0", "starts with 00"),
    (b"\x1b[2J\n\x07text", "starts with 1b 5b"),
]


@pytest.mark.parametrize(("image", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_kernel_that_is_something_else_is_named(image_path: Path, image: bytes, words: str) -> None:
    image_path.write_bytes(image)

    with pytest.raises(ImageError, match=words) as caught:
        load_kernel_image(image_path)

    text = str(caught.value)
    assert text.startswith(f"kernel {image_path}")
    assert text.isprintable()
    assert "; " in text  # the problem; the remedy
    assert isinstance(caught.value, UsageError)


def test_kernel_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        load_kernel_image(tmp_path / "none")


def test_kernel_empty_is_refused(image_path: Path) -> None:
    image_path.touch()

    with pytest.raises(ImageError, match="is empty"):
        load_kernel_image(image_path)


def test_kernel_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a directory"):
        load_kernel_image(tmp_path)


def test_kernel_fifo_is_refused_without_waiting_for_a_writer(image_path: Path) -> None:
    os.mkfifo(image_path)

    with pytest.raises(ImageError, match="not a regular file"):
        load_kernel_image(image_path)


def test_kernel_device_is_refused() -> None:
    with pytest.raises(ImageError, match="not a regular file"):
        load_kernel_image("/dev/zero")


def test_kernel_unreadable_is_refused(image_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)

    with pytest.raises(ImageError, match="permission denied; make it readable"):
        load_kernel_image(image_path)


def test_kernel_write_only_fd_is_refused(image_path: Path) -> None:
    image_path.write_bytes(build_elf())
    fd = os.open(image_path, os.O_WRONLY)
    try:
        with pytest.raises(ImageError, match="Bad file descriptor"):
            load_kernel_image(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, -1])
def test_kernel_impossible_path_is_refused(path: str | int) -> None:
    with pytest.raises(ImageError, match="cannot be opened") as caught:
        load_kernel_image(path)

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_initrd_is_put_page_aligned_at_the_top_of_ram(image_path: Path) -> None:
    image_path.write_bytes(b"initrd" * 1000)
    memory = FakeMemory()

    place = load_initrd(image_path, memory, Range(0, 4 * MIB), 1 << 31, [Range(MIB, MIB)])

    assert place == Range(4 * MIB - 0x2000, 6000)
    assert memory.ram[place.start : place.end] == b"initrd" * 1000


def test_initrd_stays_below_the_limit(image_path: Path) -> None:
    image_path.write_bytes(b"i" * 5000)

    place = load_initrd(image_path, FakeMemory(), Range(0, 4 * MIB), 3 * MIB + 1)

    assert place == Range(3 * MIB - 0x2000, 5000)


def test_initrd_goes_below_what_is_occupied(image_path: Path) -> None:
    image_path.write_bytes(b"i" * 5000)
    occupied = [Range(3 * MIB, MIB), Range(3 * MIB - 0x1800, 0x100)]

    place = load_initrd(image_path, FakeMemory(), Range(0, 4 * MIB), 1 << 31, occupied)

    assert place == Range(3 * MIB - 0x4000, 5000)


def test_initrd_last_page_is_shared_with_nobody(image_path: Path) -> None:
    image_path.write_bytes(b"i" * 5000)
    occupied = [Range(4 * MIB - 0x800, 0x800)]

    place = load_initrd(image_path, FakeMemory(), Range(0, 4 * MIB), 1 << 31, occupied)

    assert place == Range(4 * MIB - 0x3000, 5000)


def test_initrd_that_would_start_below_ram_is_refused(image_path: Path) -> None:
    image_path.write_bytes(b"i" * (2 * MIB))

    with pytest.raises(ImageError, match="do not fit"):
        load_initrd(image_path, FakeMemory(), Range(3 * MIB, MIB), 1 << 31)


def test_initrd_that_does_not_fit_beside_the_kernel_names_the_memory_needed(
    image_path: Path,
) -> None:
    image_path.write_bytes(b"i" * (2 * MIB))

    with pytest.raises(ImageError, match="use --mem 5M or more"):
        load_initrd(
            image_path, FakeMemory(), Range(0x10000, 4 * MIB), 1 << 31, [Range(MIB, 2 * MIB)]
        )


def test_initrd_without_room_in_ram_that_starts_higher_names_a_size_not_an_address(
    image_path: Path,
) -> None:
    image_path.write_bytes(bytes(3 * MIB))
    ram = Range(1 << 30, 4 * MIB)
    kernel = Range(ram.start, 2 * MIB)

    with (
        open_source(image_path, "initrd") as source,
        pytest.raises(ImageError, match="use --mem 5M or more"),
    ):
        place_initrd(source, ram, 1 << 40, [kernel])


def test_initrd_above_every_address_the_kernel_takes_is_refused(image_path: Path) -> None:
    image_path.write_bytes(b"i" * (2 * MIB))

    with pytest.raises(ImageError, match="make it smaller"):
        load_initrd(image_path, FakeMemory(), Range(0, 4 * MIB), MIB)


def test_initrd_larger_than_ram_is_refused_before_a_byte_moves(image_path: Path) -> None:
    with image_path.open("wb") as file:
        file.truncate(1 << 40)
    memory = FakeMemory()

    with pytest.raises(ImageError, match="do not fit"):
        load_initrd(image_path, memory, Range(0, 4 * MIB), 1 << 31)
    assert memory.calls == []


@pytest.mark.parametrize("name", ["", "none"])
def test_initrd_missing_or_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match=r"^initrd .*(no such file|is a directory)"):
        load_initrd(tmp_path / name, FakeMemory(), Range(0, MIB), 1 << 31)


def test_kernel_parts_builder_segments_far_apart_load_where_they_say(image_path: Path) -> None:
    parts = (Part(0x300000, b"far"), Part(0x1000, b"near"))
    image_path.write_bytes(build_elf(parts, entry=0x1000))
    memory = FakeMemory()

    with load_kernel_image(image_path) as kernel:
        kernel.load(memory)

    assert memory.ram[0x1000:0x1004] == b"near"
    assert memory.ram[0x300000:0x300003] == b"far"
