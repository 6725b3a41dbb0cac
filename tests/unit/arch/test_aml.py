"""AML terms against encodings worked out by hand from ACPI 6.5, chapter 20 and 6.4."""

from __future__ import annotations

import pytest

from vmm.arch.x86_64.acpi import aml


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("PCI0", b"PCI0"),
        ("\\_SB", b"\\_SB_"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
        ("\\", b"\\\0"),
    ],
)
def test_name_string_of_each_form_is_encoded(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


def test_name_string_with_long_segment_raises() -> None:
    with pytest.raises(ValueError, match="ABCDE"):
        aml.name_string("ABCDE")


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, b"\x00"),
        (1, b"\x01"),
        (2, b"\x0a\x02"),
        (0x100, b"\x0b\x00\x01"),
        (0x1FFFF, b"\x0c\xff\xff\x01\x00"),
        (1 << 32, b"\x0e\0\0\0\0\x01\0\0\0"),
    ],
)
def test_integer_takes_the_shortest_form(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


def decode_package_length(data: bytes) -> tuple[int, int]:
    """(total length, bytes it takes), 20.2.4."""
    extra = data[0] >> 6
    if not extra:
        return data[0] & 0x3F, 1
    total = data[0] & 0xF
    for i in range(extra):
        total |= data[1 + i] << 4 + 8 * i
    return total, 1 + extra


@pytest.mark.parametrize("size", [0, 1, 62, 63, 64, 4093, 4094, 4095, 70_000, 1_100_000])
def test_package_length_counts_itself(size: int) -> None:
    encoded = aml.package_length(size)

    total, width = decode_package_length(encoded)

    assert width == len(encoded)
    assert total == size + width


def test_package_length_past_28_bits_raises() -> None:
    with pytest.raises(ValueError, match="longer"):
        aml.package_length(1 << 28)


def test_eisa_id_of_pci_root_is_the_known_constant() -> None:
    assert aml.eisa_id("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"


def test_resources_end_with_an_end_tag() -> None:
    template = aml.resources(aml.io(0x3F8, 8), aml.irq(4))

    # Buffer: opcode, package length, size 13 as a byte constant; IO; IRQ; end tag.
    assert template == (
        b"\x11\x10\x0a\x0d" + b"\x47\x01\xf8\x03\xf8\x03\x01\x08" + b"\x22\x10\x00" + b"\x79\x00"
    )


def test_io_window_length_matches_its_ends() -> None:
    window = aml.io_window(0xC000, 0xFFFF)

    assert window[0] == 0x88
    assert int.from_bytes(window[1:3], "little") == len(window) - 3
    assert [int.from_bytes(window[i : i + 2], "little") for i in range(6, 16, 2)] == [
        *(0, 0xC000, 0xFFFF, 0, 0x4000),
    ]
