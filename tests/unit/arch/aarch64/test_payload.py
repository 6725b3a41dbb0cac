"""arm64's payload: the information page, and addresses that Python and assembly must agree on."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

import firmware
from vmm.arch.aarch64 import layout, payload
from vmm.arch.aarch64.payload import PayloadInfo
from vmm.core.ranges import PAGE_SIZE

SOURCES = Path(payload.payload_image()).parent


def equ(file: str, name: str) -> int:
    """The value of a `.equ` line, a sum of numbers and RAM."""
    found = re.search(
        rf"^\.equ {name},\s+([\w +]+?)\s*(?://.*)?$", (SOURCES / file).read_text(), re.M
    )
    assert found is not None, name
    terms = [term.strip() for term in found[1].split("+")]
    return sum(equ(file, term) if term.isalpha() else int(term, 0) for term in terms)


def test_info_page_is_one_page_with_the_fields_in_their_places() -> None:
    info = PayloadInfo(0x4400_0000, 1 << 39, has_disk=True, has_doorbell=True)

    page = info.page()

    assert len(page) == PAGE_SIZE
    fields = struct.unpack_from("<9Q", page)
    assert page[:8] == b"PVMMINFO"
    assert fields[1:6] == (0x4000_0000, 0x4400_0000, 0x4020_0000, 1 << 39, 0b011)
    assert fields[6:] == (layout.DOORBELL_GPA, layout.UART_GPA, layout.PCI_ECAM_GPA)


@pytest.mark.parametrize(
    ("words", "flags"),
    [({}, 0), ({"has_disk": True}, 1), ({"has_doorbell": True}, 2), ({"has_pkvm": True}, 4)],
)
def test_info_page_has_a_flag_for_each_ability(words: dict[str, bool], flags: int) -> None:
    page = PayloadInfo(0x4400_0000, **words).page()

    assert struct.unpack_from("<Q", page, equ("defs.inc", "INFO_FLAGS"))[0] == flags


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAM", layout.RAM_START),
        ("MIN_PRIVATE_START", payload.PRIVATE_START),
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
    assert f". = {payload.PAYLOAD_GPA:#x};" in (SOURCES / "payload.ld").read_text()


def test_image_and_information_stay_below_the_tested_memory() -> None:
    size = Path(payload.payload_image()).stat().st_size

    assert payload.INFO_GPA + PAGE_SIZE <= payload.PAYLOAD_GPA
    assert payload.PAYLOAD_GPA + size <= payload.PRIVATE_START
