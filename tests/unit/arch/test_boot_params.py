"""The zero page, read back at the offsets the kernel documents."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.arch.x86_64.boot_params import E820Type, boot_params, command_line, e820_map
from vmm.core.errors import UsageError
from vmm.core.ranges import Range

RAM = [Range(0, 512 << 20)]


def kernel_header(
    *, end: int = 0x26C, magic: bytes = b"HdrS", loadflags: int = 1, xloadflags: int = 3
) -> bytes:
    """A bzImage's setup header as it stands at file offset 0x1f1, with hostile leftovers."""
    image = bytearray(0x300)
    image[0x200:0x202] = bytes([0xEB, end - 0x202])
    image[0x202:0x206] = magic
    struct.pack_into("<H", image, 0x206, 0x20F)
    image[0x211] = loadflags
    struct.pack_into("<I", image, 0x228, 0xDEADBEEF)
    struct.pack_into("<H", image, 0x236, xloadflags)
    struct.pack_into("<I", image, 0x23C, 0x1234)
    struct.pack_into("<Q", image, 0x250, 0x1122334455667788)
    struct.pack_into("<I", image, 0x260, 0xABCDEF)
    return bytes(image[0x1F1:end])


def u32(page: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", page, at)[0])


def u64(page: bytes, at: int) -> int:
    return int(struct.unpack_from("<Q", page, at)[0])


def e820_of(page: bytes) -> list[tuple[int, int, int]]:
    return [struct.unpack_from("<QQI", page, 0x2D0 + 20 * i) for i in range(page[0x1E8])]


def test_zero_page_of_bzimage_keeps_its_header() -> None:
    page = boot_params(RAM, setup_header=kernel_header())

    assert len(page) == 4096
    assert page[0x202:0x206] == b"HdrS"
    assert u32(page, 0x260) == 0xABCDEF


def test_zero_page_of_bzimage_overwrites_what_loaders_own() -> None:
    page = boot_params(RAM, setup_header=kernel_header(loadflags=0b10), rsdp_gpa=0xE0000)

    assert page[0x210] == 0xFF
    assert page[0x211] == 1, "LOADED_HIGH set, KASLR_FLAG clear"
    assert u32(page, 0x228) == 0x20000
    assert u32(page, 0x23C) == 0
    assert u64(page, 0x250) == 0
    assert u64(page, 0x70) == 0xE0000


def test_zero_page_of_bare_elf_has_a_synthetic_header() -> None:
    page = boot_params(RAM)

    assert page[0x1FE:0x200] == b"\x55\xaa"
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", page, 0x206)[0] == 0x20F
    assert 0x202 + page[0x201] == 0x26C
    assert page[0x211] & 1
    assert u32(page, 0x238) == 2047


def test_zero_page_sentinel_is_clear() -> None:
    # A kernel that finds 0x1ef nonzero throws half of the page away.
    assert boot_params(RAM, setup_header=kernel_header())[0x1EF] == 0


def test_zero_page_header_of_old_protocol_is_not_read_past_its_end() -> None:
    header = kernel_header(end=0x268) + b"\xee" * 64

    page = boot_params(RAM, setup_header=header)

    assert not any(page[0x268:0x2D0])


def test_zero_page_initrd_below_4_gib_uses_the_low_fields() -> None:
    page = boot_params(RAM, setup_header=kernel_header(), initrd=Range(0x1F00_0000, 0x12345))

    assert (u32(page, 0x218), u32(page, 0x21C)) == (0x1F00_0000, 0x12345)
    assert (u32(page, 0xC0), u32(page, 0xC4)) == (0, 0)


def test_zero_page_initrd_above_4_gib_uses_the_ext_fields() -> None:
    page = boot_params(RAM, setup_header=kernel_header(), initrd=Range(0x1_2000_0000, 5))

    assert (u32(page, 0x218), u32(page, 0x21C)) == (0x2000_0000, 5)
    assert (u32(page, 0xC0), u32(page, 0xC4)) == (1, 0)


def test_zero_page_initrd_above_4_gib_for_old_kernel_raises() -> None:
    with pytest.raises(UsageError, match="initrd at"):
        boot_params(RAM, setup_header=kernel_header(xloadflags=1), initrd=Range(0x1_0000_0000, 5))


@pytest.mark.parametrize(
    "header",
    [b"", kernel_header(magic=b"nope"), kernel_header(end=0x240), kernel_header()[:50]],
)
def test_zero_page_with_bad_header_raises(header: bytes) -> None:
    with pytest.raises(UsageError, match="setup header"):
        boot_params(RAM, setup_header=header)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_zero_page_of_random_header_raises_only_usage_errors(tail: bytes) -> None:
    header = kernel_header()[:0x11] + b"HdrS" + tail
    try:
        page = boot_params(RAM, setup_header=header)
    except UsageError:
        return
    assert len(page) == 4096


def test_e820_cuts_the_low_megabyte_like_a_pc() -> None:
    page = boot_params(RAM)

    assert e820_of(page) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xE0000, 0x20000, 3),
        (0x100000, (512 << 20) - 0x100000, 1),
    ]


def test_e820_continues_above_4_gib() -> None:
    entries = e820_map([Range(0, 3 << 30), Range(4 << 30, 1 << 30)])

    assert entries[-2:] == [
        (0x100000, (3 << 30) - 0x100000, E820Type.RAM),
        (4 << 30, 1 << 30, E820Type.RAM),
    ]


@pytest.mark.parametrize("ram", [[], [Range(0, 1 << 20)], [Range(4096, 1 << 30)]])
def test_e820_without_low_ram_raises(ram: list[Range]) -> None:
    with pytest.raises(UsageError, match="1 MiB"):
        e820_map(ram)


def test_command_line_ends_with_nul() -> None:
    assert command_line("console=ttyS0") == b"console=ttyS0\0"


def test_command_line_of_exactly_the_limit_fits() -> None:
    assert len(command_line("x" * 2047)) == 2048


@pytest.mark.parametrize(("text", "limit"), [("x" * 2048, 4096), ("x" * 256, 255), ("é" * 6, 10)])
def test_command_line_too_long_raises_with_both_numbers(text: str, limit: int) -> None:
    with pytest.raises(UsageError, match=rf"{len(text.encode())} bytes.*--append"):
        command_line(text, limit)


def test_command_line_with_nul_raises() -> None:
    with pytest.raises(UsageError, match="NUL"):
        command_line("a\0b")
