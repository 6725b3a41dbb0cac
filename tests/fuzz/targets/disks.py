"""What is found on a disk that somebody brings: its format, partitions, a root file system."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from tests.fuzz.drawing import patched, patches
from tests.fuzz.targets.registry import target
from vmm.core.disk_image import check_raw
from vmm.core.errors import UsageError
from vmm.core.root_disk import find_root, split_root

SIZE = 160 << 10
"""Enough for a btrfs superblock in a partition that begins at 64 KiB."""
_MOST_READS = 3000
"""128 partitions, each looked at a few times, and no loop."""
_MOST_TOLD = 4096
_KINDS = ("ext4", "xfs", "squashfs", "erofs", "btrfs")
_UUID = uuid.UUID("0d9cd6c0-1e6a-4a0e-9a4e-0c2a6f0b7d55")
_ROOT = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
_WANTED = ("", "part=1", "part=2", "part=200", f"UUID={_UUID}", "LABEL=rootfs", "PARTLABEL=root",
           f"PARTUUID={uuid.UUID(int=1)}")  # fmt: skip


class _Reads:
    """os.pread that counts."""

    def __init__(self) -> None:
        self.count = 0
        self._pread = os.pread

    def __call__(self, fd: int, size: int, offset: int) -> bytes:
        self.count += 1
        assert self.count <= _MOST_READS and size <= 1 << 20, (self.count, size)
        return self._pread(fd, size, offset)


@contextmanager
def disk(content: bytes) -> Iterator[int]:
    """A file with these bytes; how often it is read is bounded."""
    fd = os.memfd_create("disk")
    try:
        os.write(fd, content)
        with patch.object(os, "pread", _Reads()):
            yield fd
    finally:
        os.close(fd)


def _ext4(label: bytes = b"rootfs") -> bytes:
    block = bytearray(4096)
    block[0x438:0x43A] = b"\x53\xef"
    block[0x468:0x478] = _UUID.bytes
    block[0x478 : 0x478 + len(label)] = label
    return bytes(block)


def _with(*pieces: tuple[int, bytes]) -> bytes:
    content = bytearray(SIZE)
    for at, piece in pieces:
        content[at : at + len(piece)] = piece
    return bytes(content)


def _gpt(*kinds: uuid.UUID) -> list[tuple[int, bytes]]:
    header = b"EFI PART".ljust(72, b"\0") + struct.pack("<QII", 2, 128, 128)
    entries = b"".join(
        kind.bytes_le
        + uuid.UUID(int=n + 1).bytes_le
        + struct.pack("<QQQ", 64 * (n + 1), 64 * (n + 2), 0)
        + "root".encode("utf-16-le").ljust(72, b"\0")
        for n, kind in enumerate(kinds)
    )
    return [(0x1FE, b"\x55\xaa"), (512, header), (1024, entries)]


def _disks() -> Iterator[bytes]:
    mbr = struct.pack("<4xB3xII", 0x83, 64, 64)
    erofs = bytes(1024) + b"\xe2\xe1\xf5\xe0" + bytes(44) + _UUID.bytes + b"e"
    btrfs = bytes(0x20) + _UUID.bytes + bytes(16) + b"_BHRfS_M"
    images = [
        _with((0, _ext4())),
        _with((0, b"XFSB" + bytes(28) + _UUID.bytes + bytes(60) + b"label")),
        _with((0, b"hsqs")),
        _with((0, erofs)),
        _with((0x10000, btrfs), (0x1012B, b"label")),
        _with((0x1FE, b"\x55\xaa"), (0x1B8, b"abcd"), (0x1BE, mbr), (64 * 512, _ext4())),
        _with(*_gpt(_ROOT), (64 * 512, _ext4())),
        _with(*_gpt(_UUID, _ROOT), (64 * 512, _ext4()), (128 * 512, _ext4(b"other"))),
    ]
    for number, image in enumerate(images):
        for wanted in {number % len(_WANTED), 0, 4}:
            yield bytes([wanted]) + patches(bytes(SIZE), image)


@target("root-disk", _disks, longest=2048)
def root_disk(data: bytes) -> None:
    """A byte that says what is looked for, then patches of a disk of zeros."""
    wanted = _WANTED[data[0] % len(_WANTED)] if data else ""
    with disk(patched(bytes(SIZE), data[1:])) as fd:
        try:
            root = find_root(wanted, [("disk", fd)])
        except UsageError as error:
            assert len(str(error)) < _MOST_TOLD
            return
        assert root.file_system.kind in _KINDS and root.disk == 0
        assert 0 <= root.partition <= 128
        words = root.kernel_words()
        assert words.isascii() and len(words.split()) == 3
        if root.partition:
            again = find_root(f"part={root.partition}", [("disk", fd)])
            assert again == root
        tag = root.file_system.uuid
        assert tag == "" or str(uuid.UUID(tag)) == tag


@target("root-option", lambda: [b"disk.img,part=2,ro", b"UUID=x", b"a,,b,part=1", b",part=x"])
def root_option(data: bytes) -> None:
    """--root's value: what names a disk gives one, and a number."""
    text = data.replace(b"\0", b"").decode("utf-8", "surrogateescape")
    try:
        added, wanted = split_root(text)
    except UsageError:
        return
    if added is None:
        assert wanted == text
    else:
        others = added.replace(",,", "\0").split(",")[1:]
        assert added and not any(word.partition("=")[0] == "part" for word in others)
        assert wanted == "" or int(wanted.removeprefix("part=")) >= 0


_MAGICS = (b"QFI\xfb", b"QED\0", b"KDMV", b"COWD", b"# Disk Descriptor", b"vhdxfile", b"conectix")


def _images() -> Iterator[bytes]:
    for magic in _MAGICS:
        yield struct.pack("<H", 1024) + patches(bytes(1024), magic.ljust(1024, b"\0"))
    yield struct.pack("<H", 1024) + patches(bytes(1024), bytes(512) + b"conectix".ljust(512, b"\0"))
    yield struct.pack("<H", 512)
    yield struct.pack("<H", 513)


@target("disk-image", _images)
def disk_image(data: bytes) -> None:
    """The file's size (u16), then patches: what is no plain disk is refused, and by name."""
    size = int.from_bytes(data[:2].ljust(2, b"\0"), "little") % 4096
    content = patched(bytes(size), data[2:])
    with disk(content) as fd:
        assert check_raw(fd, "--disk", "d", raw=True) == size if size and not size % 512 else True
        try:
            told = check_raw(fd, "--disk", "d")
        except UsageError as error:
            assert str(error).isprintable()
            return
    assert told == size and size % 512 == 0
    assert not any(content.startswith(magic) for magic in _MAGICS)
    assert content[-512:-504] != b"conectix"
