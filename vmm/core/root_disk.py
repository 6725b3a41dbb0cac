"""Which disk or partition a guest's root file system is on: read from the disks themselves.

A disk may be whatever its last user left on it, so every number is checked and every loop bounded.
Formats: UEFI 2.10, 5.3 (GPT); Documentation/filesystems/ext4/super.rst, erofs.rst and squashfs.rst
of Linux; "XFS Algorithms & Data Structures"; btrfs' on-disk format.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Sequence

from vmm.core.disk_image import SECTOR
from vmm.core.errors import UsageError
from vmm.core.lean_typing import NamedTuple

_MOST_PARTITIONS = 128
_LINUX_ROOTS = {
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "x86-64",
    "b921b045-1df0-41c3-af44-4c6f280d3fae": "arm64",
}
"""Partition types of the Discoverable Partitions Specification."""
TAGS = ("UUID", "LABEL", "PARTUUID", "PARTLABEL")


class FileSystem(NamedTuple):
    """`kind` is the kernel's name of the driver that mounts it."""

    kind: str
    uuid: str = ""
    label: str = ""

    @property
    def is_read_only(self) -> bool:
        """Whether it can't be written at all."""
        return self.kind in ("squashfs", "erofs")


class Partition(NamedTuple):
    """`start` is in bytes."""

    number: int
    start: int
    type: str = ""
    uuid: str = ""
    name: str = ""


class Root(NamedTuple):
    """A root file system: `disk` counts from 0, `partition` from 1 (0: the whole disk)."""

    disk: int
    partition: int
    file_system: FileSystem
    read_only: bool = False

    @property
    def device(self) -> str:
        """Linux' name of it where the disks are virtio disks, in their order."""
        name, index = "", self.disk + 1
        while index:
            index, letter = divmod(index - 1, 26)
            name = chr(ord("a") + letter) + name
        return f"/dev/vd{name}{self.partition or ''}"

    def kernel_words(self) -> str:
        """What the kernel's command line says of it."""
        mode = "ro" if self.read_only or self.file_system.is_read_only else "rw"
        return f"root={self.device} rootfstype={self.file_system.kind} {mode}"


def split_root(text: str) -> tuple[str | None, str]:
    """`--root`'s value as (the disk that it adds, as --disk takes it, or None; what to look for).

    FILE[,part=N][,a disk's settings] adds FILE as the first disk: "" or "part=N" is looked for on
    it. UUID=..., LABEL=..., PARTUUID=... and PARTLABEL=... are looked for on the other disks.
    """
    if text.partition("=")[0] in TAGS:
        return None, text
    file, *words = text.replace(",,", "\0").split(",")
    parts = [word for word in words if word.partition("=")[0] == "part"]
    if len(parts) > 1 or not file:
        raise UsageError(f"--root {text}: write --root FILE[,part=N][,ro] or UUID=... or LABEL=...")
    if parts and not parts[0].removeprefix("part=").isdecimal():
        part = parts[0].replace("\0", ",,")
        raise UsageError(f"--root {text}: {part!r} is no partition's number, as in part=1")
    disk = ",".join([file, *(word for word in words if word not in parts)])
    return disk.replace("\0", ",,"), parts[0] if parts else ""


def find_root(wanted: str, disks: Sequence[tuple[str, int]]) -> Root:
    """The root file system that `wanted` names (see `split_root`) on `disks`: (name, fd) of each.

    Raises UsageError with what there is where nothing fits.
    """
    tag, _, value = wanted.partition("=")
    if tag in TAGS:
        return _find_tagged(tag, value, disks)
    name, fd = disks[0]
    found = partitions(fd)
    if tag == "part":
        return _root_of(name, fd, 0, found, int(value))
    if not found:
        whole = file_system(fd)
        if whole is None:
            raise UsageError(
                f"--root {name}: no file system that is known is in it (ext4, xfs, btrfs, "
                "squashfs, erofs), and no partition table; pyvmm lab image makes one"
            )
        return Root(0, 0, whole)
    typed = [p for p in found if p.type in _LINUX_ROOTS]
    candidates = [p for p in typed or found if file_system(fd, p.start) is not None]
    if len(candidates) == 1:
        return _root_of(name, fd, 0, found, candidates[0].number)
    raise UsageError(
        f"--root {name}: {'no' if not candidates else 'more than one'} partition with a file "
        f"system for Linux; there are {_listed(fd, found)}: choose one with ,part=N"
    )


def _find_tagged(tag: str, value: str, disks: Sequence[tuple[str, int]]) -> Root:
    seen: list[str] = []
    for index, (_, fd) in enumerate(disks):
        for part in (Partition(0, 0), *partitions(fd)):
            known = file_system(fd, part.start)
            has = {
                "UUID": "" if known is None else known.uuid,
                "LABEL": "" if known is None else known.label,
                "PARTUUID": part.uuid,
                "PARTLABEL": part.name,
            }[tag]
            is_it = has.lower() == value.lower() if "UUID" in tag else has == value
            if value and is_it:
                if known is None:
                    raise UsageError(f"--root {tag}={value}: no known file system is in it")
                return Root(index, part.number, known)
            if has:
                seen.append(has)
    names = ", ".join(seen[:8]) if seen else "none"
    if not disks:
        raise UsageError(f"--root {tag}={value}: looked for on the disks, and there is no --disk")
    raise UsageError(f"--root {tag}={value}: no disk has it; there are: {names}")


def _root_of(name: str, fd: int, disk: int, found: Sequence[Partition], number: int) -> Root:
    for part in found:
        if part.number == number:
            known = file_system(fd, part.start)
            if known is None:
                raise UsageError(f"--root {name},part={number}: no known file system is in it")
            return Root(disk, number, known)
    there = _listed(fd, found) if found else "no partition table"
    raise UsageError(f"--root {name},part={number}: no such partition; there is {there}")


def _listed(fd: int, found: Sequence[Partition]) -> str:
    words = []
    for part in found[:8]:
        known = file_system(fd, part.start)
        kind = "unknown" if known is None else known.kind
        words.append(f"{part.number} ({' '.join(filter(None, (part.name, kind)))})")
    return ", ".join(words)


def file_system(fd: int, start: int = 0) -> FileSystem | None:
    """The file system that begins at that byte; None where none is known."""
    head = _read(fd, start, 0x900)
    if head[0x438:0x43A] == b"\x53\xef":  # ext2 and ext3 are mounted by ext4's driver, too
        return FileSystem("ext4", _uuid(head[0x468:0x478]), _text(head[0x478:0x488]))
    if head[:4] == b"XFSB":
        return FileSystem("xfs", _uuid(head[32:48]), _text(head[108:120]))
    if head[:4] == b"hsqs":
        return FileSystem("squashfs")
    if head[1024:1028] == b"\xe2\xe1\xf5\xe0":
        return FileSystem("erofs", _uuid(head[1072:1088]), _text(head[1088:1104]))
    block = _read(fd, start + 0x10000, 0x230)
    if block[0x40:0x48] == b"_BHRfS_M":
        return FileSystem("btrfs", _uuid(block[0x20:0x30]), _text(block[0x12B:0x22B]))
    return None


def partitions(fd: int) -> list[Partition]:
    """Those of a GPT, else the primary ones of an MBR; none where there is no table."""
    head = _read(fd, 0, 2 * SECTOR)
    if head[SECTOR : SECTOR + 8] == b"EFI PART":
        return _gpt(fd, head[SECTOR:])
    # The first sector of a file system may end like a partition table.
    if head[0x1FE:0x200] != b"\x55\xaa" or file_system(fd) is not None:
        return []
    found = []
    serial = int.from_bytes(head[0x1B8:0x1BC], "little")
    for index in range(4):
        entry = head[0x1BE + 16 * index :][:16]
        first = int.from_bytes(entry[8:12], "little")
        if entry[4] and first:
            where = f"{serial:08x}-{index + 1:02x}"
            found.append(Partition(index + 1, first * SECTOR, f"{entry[4]:02x}", where))
    return found


def _gpt(fd: int, header: bytes) -> list[Partition]:
    table, count, size = struct.unpack_from("<QII", header, 72)
    if not 128 <= size <= 4096:
        return []
    found = []
    for index in range(min(count, _MOST_PARTITIONS)):
        entry = _read(fd, table * SECTOR + index * size, 128)
        if len(entry) < 128 or not any(entry[:16]):
            continue
        (first,) = struct.unpack_from("<Q", entry, 32)
        name = entry[56:128].decode("utf-16-le", "replace").split("\0")[0]
        kind, own = (str(uuid.UUID(bytes_le=entry[at : at + 16])) for at in (0, 16))
        found.append(Partition(index + 1, first * SECTOR, kind, own, name))
    return found


def _read(fd: int, offset: int, size: int) -> bytes:
    """What the disk has there; nothing beyond its end, however far a table says."""
    if offset >= 1 << 62:
        return b""
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        raise UsageError(f"--root: the disk cannot be read: {error.strerror}") from error


def _uuid(data: bytes) -> str:
    return str(uuid.UUID(bytes=data)) if len(data) == 16 and any(data) else ""


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode("utf-8", "replace")
