"""The cpio writer, read back by a reader made from the format's description."""

from __future__ import annotations

import stat

from tests.support.cpio import entries
from vmm.core.cpio import CpioWriter


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
