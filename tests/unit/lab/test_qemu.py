"""The emulator's command line, as far as a user's disks go into it."""

from __future__ import annotations

from pathlib import Path

from vmm.lab.job import Drive
from vmm.lab.qemu import _block_node, _in_one_slot


def test_drive_is_locked_by_the_emulator_unless_it_is_shared() -> None:
    alone = _block_node("drive0", Drive(Path("/d,1.img"), read_only=True))
    shared = _block_node("drive0", Drive(Path("/d,1.img"), read_only=False, shared=True))

    assert alone["file"] == {"driver": "file", "filename": "/d,1.img", "read-only": True}
    assert isinstance(shared["file"], dict) and shared["file"]["locking"] == "off"


def test_drives_are_functions_of_one_slot_whose_first_comes_last() -> None:
    plugged = _in_one_slot([{"drive": "drive1"}, {"drive": "drive2"}, {"drive": "drive3"}])

    assert [(one["drive"], one["addr"]) for one in plugged] == [
        ("drive3", "10.2"),
        ("drive2", "10.1"),
        ("drive1", "10.0"),
    ]
    assert all(one["multifunction"] for one in plugged)
