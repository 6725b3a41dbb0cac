"""The payload info page, field by field."""

from __future__ import annotations

import struct

from vmm.arch.x86_64.payload import PayloadInfo


def test_info_page_of_private_guest_has_every_field() -> None:
    page = PayloadInfo(512 << 20, c_bit_mask=1 << 38, doorbell_port=0x500, has_disk=True).page()

    assert len(page) == 4096
    assert page[:8] == b"PVMMINFO"
    assert struct.unpack_from("<Q", page)[0] == 0x4F464E494D4D5650
    assert struct.unpack_from("<7Q", page, 8) == (
        *(512 << 20, 1 << 38, 0x20_0000, 0x500, 1, 0x3F8, 0x604),
    )
    assert struct.unpack_from("<I", page, 64)[0] == 0x3400
    assert not any(page[68:])


def test_info_page_of_ordinary_guest_has_no_c_bit_doorbell_or_disk() -> None:
    page = PayloadInfo(64 << 20).page()

    assert struct.unpack_from("<Q", page, 16)[0] == 0
    assert struct.unpack_from("<Q", page, 32)[0] == 0
    assert struct.unpack_from("<Q", page, 40)[0] == 0
