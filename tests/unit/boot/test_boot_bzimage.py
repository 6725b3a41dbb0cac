"""The setup header: what is read from a good one, and every bad field refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.images import build_bzimage, patch
from vmm.arch.x86_64.bzimage import SetupHeader, parse_setup_header
from vmm.boot.errors import ImageError
from vmm.boot.source import open_source


def parse(tmp_path: Path, image: bytes) -> SetupHeader:
    path = tmp_path / "bzImage"
    path.write_bytes(image)
    with open_source(path, "kernel") as source:
        return parse_setup_header(source)


def test_header_valid_fields_are_the_files(tmp_path: Path) -> None:
    image = build_bzimage(b"P" * 100, init_size=0x123000, pref_address=0x1000000)

    header = parse(tmp_path, image)

    assert header.protocol == "2.15"
    assert (header.pref_address, header.init_size) == (0x1000000, 0x123000)
    assert (header.cmdline_size, header.initrd_addr_max) == (2047, 0x7FFFFFFF)
    assert (header.kernel_alignment, header.relocatable) == (0x200000, True)
    assert header.kernel_version == "6.99-test (a@b) #1"
    start = header.payload_start
    assert image[start : start + header.payload_length] == b"P" * 100


@pytest.mark.parametrize(
    ("version", "end"), [(0x20C, 0x268), (0x20D, 0x268), (0x20E, 0x268), (0x20F, 0x26C)]
)
def test_header_each_64bit_version_raw_bytes_reach_its_end(
    tmp_path: Path, version: int, end: int
) -> None:
    image = build_bzimage(version=version)

    header = parse(tmp_path, image)

    assert header.raw == image[0x1F1:end]
    assert header.version == version


def test_header_setup_sects_zero_means_four(tmp_path: Path) -> None:
    image = build_bzimage(b"P" * 100, setup_sects=0, payload_offset=0, payload_length=64)
    image += bytes(512)

    header = parse(tmp_path, image)

    assert header.setup_sects == 4
    assert header.payload_start == 5 * 512


def test_header_version_pointer_zero_gives_none(tmp_path: Path) -> None:
    assert parse(tmp_path, build_bzimage(kernel_version=0)).kernel_version is None


def test_header_version_text_with_escapes_is_made_printable(tmp_path: Path) -> None:
    header = parse(tmp_path, build_bzimage(version_text=b"6\x1b[2J\n\xff\0"))

    assert header.kernel_version == "6\\x1b[2J\\n\\xff"


BAD = [
    ({"version": 0x20B}, "boot protocol 2.11"),
    ({"version": 0x200}, "boot protocol 2.00"),
    ({"version": 0x300}, "boot protocol 3.00"),
    ({"xloadflags": 0}, "32-bit kernel"),
    ({"loadflags": 0}, "zImage"),
    ({"jump_opcode": 0xE9}, "no jump"),
    ({"jump_distance": 0x65}, "no jump"),
    ({"jump_distance": 0x80}, "no jump"),
    ({"payload_length": 0}, "no payload"),
    ({"payload_length": 0xFFFFFFFF}, "not inside the protected-mode code"),
    ({"payload_offset": 0xFFFFFFFF}, "not inside the protected-mode code"),
    ({"syssize": 0}, "not inside the protected-mode code"),
    ({"syssize": 0xFFFFFFFF, "payload_length": 1 << 20}, "truncated"),
    ({"setup_sects": 255}, "truncated"),
    ({"kernel_alignment": 0}, "kernel_alignment"),
    ({"kernel_alignment": 0x200001}, "kernel_alignment"),
    ({"kernel_alignment": 0x800}, "kernel_alignment"),
    ({"pref_address": 0}, "pref_address"),
    ({"pref_address": 0x100001}, "pref_address"),
    ({"pref_address": 0xFFFFFFFFFFFFF000}, "pref_address"),
    ({"init_size": 0}, "init_size"),
    ({"cmdline_size": 0}, "cmdline_size"),
    ({"initrd_addr_max": 0}, "initrd_addr_max"),
    ({"kernel_version": 0x600}, "version string"),
    ({"kernel_version": 0xFFFF}, "version string"),
]


@pytest.mark.parametrize(("values", "words"), BAD)
def test_header_bad_field_is_refused_by_name(
    tmp_path: Path, values: dict[str, int], words: str
) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        parse(tmp_path, patch(build_bzimage(), **values))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0x206, 0x207, 0x208, 0x20F, 0x264, 0x26B, 0x26C, 0x400, 0x801])
def test_header_file_cut_off_is_an_image_error(tmp_path: Path, size: int) -> None:
    with pytest.raises(ImageError, match=r"truncated|ends"):
        parse(tmp_path, build_bzimage()[:size])
