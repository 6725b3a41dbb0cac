"""arm64's payload: the information page, and addresses that Python and assembly must agree on."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

import firmware
from vmm.arch.aarch64 import layout, payload
from vmm.arch.aarch64.payload import PayloadInfo
from vmm.core.ranges import PAGE_SIZE, Range

SOURCES = Path(firmware.payload_path("aarch64")).parent


def equ(file: str, name: str) -> int:
    """The value of a `.equ` line, a sum of numbers and RAM."""
    found = re.search(
        rf"^\.equ {name},\s+([\w +]+?)\s*(?://.*)?$", (SOURCES / file).read_text(), re.M
    )
    assert found is not None, name
    terms = [term.strip() for term in found[1].split("+")]
    return sum(equ(file, term) if term.isalpha() else int(term, 0) for term in terms)


RAM = Range(0x4000_0000, 0x400_0000)


def test_info_page_is_one_page_with_the_fields_in_their_places() -> None:
    page = PayloadInfo(RAM, "realm", has_disk=True).page()

    assert len(page) == PAGE_SIZE
    fields = struct.unpack_from("<9Q", page)
    assert page[:8] == b"PVMMINFO"
    assert fields[1:6] == (0x4000_0000, 0x4400_0000, 0x4020_0000, 1 << 39, 0b011)
    assert fields[6:] == (layout.DOORBELL_GPA, layout.UART_GPA, layout.PCI_ECAM_GPA)


@pytest.mark.parametrize(
    ("scheme", "mask", "flags"),
    [("none", 0, 0), ("remap", 0, 0b010), ("realm", 1 << 39, 0b010), ("pkvm", 0, 0b100)],
)
def test_info_page_says_how_to_convert_under_each_scheme(
    scheme: str, mask: int, flags: int
) -> None:
    page = PayloadInfo(RAM, scheme, has_disk=False).page()

    assert struct.unpack_from("<Q", page, equ("defs.inc", "INFO_FLAGS"))[0] == flags
    assert struct.unpack_from("<Q", page, equ("defs.inc", "INFO_SHARED_MASK"))[0] == mask


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAM", layout.RAM_START),
        ("MIN_PRIVATE_START", layout.PAYLOAD_PRIVATE_START),
        ("MIN_RAM_BYTES", firmware.MIN_RAM_BYTES),
        ("DEFAULT_SERIAL", layout.UART_GPA),
        ("DEFAULT_DOORBELL", layout.DOORBELL_GPA),
        ("INFO_MAGIC", payload.MAGIC),
        ("FLAG_DISK", payload.FLAG_DISK.bit_length() - 1),
        ("FLAG_DOORBELL", payload.FLAG_DOORBELL.bit_length() - 1),
        ("FLAG_PKVM", payload.FLAG_PKVM.bit_length() - 1),
    ],
)
def test_constant_of_the_sources_is_what_python_says(name: str, value: int) -> None:
    assert equ("defs.inc", name) == value


def test_image_is_linked_where_it_is_loaded() -> None:
    assert f". = {layout.PAYLOAD_GPA:#x};" in (SOURCES / "payload.ld").read_text()


def test_image_and_information_stay_below_the_tested_memory() -> None:
    size = Path(firmware.payload_path("aarch64")).stat().st_size

    assert layout.PAYLOAD_INFO_GPA + PAGE_SIZE <= layout.PAYLOAD_GPA
    assert layout.PAYLOAD_GPA + size <= layout.PAYLOAD_PRIVATE_START
