"""The cpio writer, read back by a reader made from the format's description."""

from __future__ import annotations

import stat

from vmm.core.cpio import CpioWriter


class Entry:
    """One entry as the kernel's unpacker sees it."""

    def __init__(self, archive: bytes, at: int) -> None:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        self.inode, self.mode, self.links, self.size = fields[0], fields[1], fields[4], fields[6]
        self.device = (fields[9], fields[10])
        name_size = fields[11]
        raw = archive[at + 110 : at + 110 + name_size]
        assert raw.endswith(b"\0")
        self.name = raw[:-1].decode()
        start = at + (110 + name_size + 3) // 4 * 4
        self.content = archive[start : start + self.size]
        self.next = start + (self.size + 3) // 4 * 4


def entries(archive: bytes) -> list[Entry]:
    found: list[Entry] = []
    at = 0
    while not found or found[-1].name != "TRAILER!!!":
        found.append(Entry(archive, at))
        at = found[-1].next
    assert not archive[at:].strip(b"\0")
    return found[:-1]


def test_file_with_odd_length_comes_back_whole() -> None:
    archive = CpioWriter()
    archive.file("init", b"#!/bin/sh\n", 0o755)
    archive.file("x", b"")

    first, second = entries(archive.finish())

    assert (first.name, first.content, first.mode) == ("init", b"#!/bin/sh\n", 0o100755)
    assert (second.name, second.content) == ("x", b"")


def test_nested_file_is_preceded_by_its_directories_once() -> None:
    archive = CpioWriter()
    archive.file("/a/b/one", b"1")
    archive.file("a/b/two", b"2")

    names = [(e.name, stat.S_ISDIR(e.mode)) for e in entries(archive.finish())]

    assert names == [("a", True), ("a/b", True), ("a/b/one", False), ("a/b/two", False)]


def test_symlink_holds_its_target() -> None:
    archive = CpioWriter()
    archive.symlink("bin/sh", "busybox")

    link = entries(archive.finish())[-1]

    assert stat.S_ISLNK(link.mode) and link.content == b"busybox"


def test_character_device_has_its_numbers_and_no_content() -> None:
    archive = CpioWriter()
    archive.character_device("dev/console", 5, 1)

    device = entries(archive.finish())[-1]

    assert stat.S_ISCHR(device.mode) and device.device == (5, 1) and device.size == 0


def test_inodes_differ_so_that_nothing_becomes_a_hard_link() -> None:
    archive = CpioWriter()
    for name in "abc":
        archive.file(name, name.encode())

    inodes = [e.inode for e in entries(archive.finish())]

    assert len(set(inodes)) == 3 and 0 not in inodes


def test_archive_is_padded_to_whole_sectors() -> None:
    archive = CpioWriter()
    archive.file("a", b"abc")

    assert len(archive.finish()) % 512 == 0
