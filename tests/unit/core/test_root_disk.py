"""Which disk or partition --root means: of images as tools leave them, and as nobody should."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.core.errors import UsageError
from vmm.core.root_disk import FileSystem, Partition, Root, find_root, partitions, split_root

MIB = 1 << 20
UUID = "0d9cd6c0-1e6a-4a0e-9a4e-0c2a6f0b7d55"
LINUX = "0fc63daf-8483-4772-8e79-3d69d8477de4"
ROOT_X86 = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
BIOS = "21686148-6449-6e6f-744e-656564454649"
Find = Callable[..., Root]


def ext4(label: str = "rootfs", own: str = UUID) -> bytes:
    """As much of a superblock as tells what it is."""
    data = bytearray(4096)
    data[0x438:0x43A] = b"\x53\xef"
    data[0x468:0x478] = uuid.UUID(own).bytes
    data[0x478 : 0x478 + len(label)] = label.encode()
    return bytes(data)


def xfs(label: str = "x") -> bytes:
    return b"XFSB" + bytes(28) + uuid.UUID(UUID).bytes + bytes(60) + label.encode().ljust(12, b"\0")


def btrfs() -> bytes:
    block = bytearray(0x400)
    block[0x40:0x48] = b"_BHRfS_M"
    block[0x20:0x30] = uuid.UUID(UUID).bytes
    block[0x12B:0x130] = b"butty"
    return bytes(0x10000) + bytes(block)


def gpt(*entries: tuple[str, int, str, bytes]) -> bytes:
    """A disk with (type, start in MiB, name, content) partitions."""
    disk = bytearray(16 * MIB)
    disk[0x1FE:0x200] = b"\x55\xaa"
    disk[512:520] = b"EFI PART"
    struct.pack_into("<QII", disk, 512 + 72, 2, 128, 128)
    for index, (kind, start, name, content) in enumerate(entries):
        at = 1024 + 128 * index
        disk[at : at + 16] = uuid.UUID(kind).bytes_le
        disk[at + 16 : at + 32] = uuid.UUID(int=index + 1).bytes_le
        struct.pack_into("<QQ", disk, at + 32, start * MIB // 512, (start + 1) * MIB // 512)
        disk[at + 56 : at + 56 + 2 * len(name)] = name.encode("utf-16-le")
        disk[start * MIB : start * MIB + len(content)] = content
    return bytes(disk)


@pytest.fixture
def find(tmp_path: Path) -> Iterator[Find]:
    """find(wanted, disk's bytes...)."""
    with ExitStack() as stack:

        def call(wanted: str, *disks: bytes) -> Root:
            opened = []
            for index, content in enumerate(disks):
                path = tmp_path / f"disk{index}"
                path.write_bytes(content.ljust(1 << 17, b"\0"))
                fd = os.open(path, os.O_RDONLY)
                stack.callback(os.close, fd)
                opened.append((path.name, fd))
            return find_root(wanted, opened)

        yield call


@pytest.mark.parametrize(
    ("content", "kind"),
    [(ext4(), "ext4"), (xfs(), "xfs"), (btrfs(), "btrfs"), (b"hsqs" + bytes(100), "squashfs")],
)
def test_whole_disk_with_a_file_system_is_the_root(find: Find, content: bytes, kind: str) -> None:
    root = find("", content)

    assert (root.device, root.file_system.kind) == ("/dev/vda", kind)


def test_kernel_words_name_device_driver_and_mode(find: Find) -> None:
    assert find("", ext4()).kernel_words() == "root=/dev/vda rootfstype=ext4 rw"
    assert find("", b"hsqs" + bytes(99)).kernel_words() == "root=/dev/vda rootfstype=squashfs ro"
    assert Root(27, 3, FileSystem("xfs"), True).kernel_words().startswith("root=/dev/vdab3 ")


def test_partition_of_the_root_type_is_taken_before_others(find: Find) -> None:
    disk = gpt((BIOS, 1, "", b""), (LINUX, 2, "data", ext4("data")), (ROOT_X86, 3, "", ext4()))

    assert find("", disk).device == "/dev/vda3"


def test_only_partition_with_a_file_system_is_the_root(find: Find) -> None:
    assert find("", gpt((BIOS, 1, "", b""), (LINUX, 2, "", xfs()))).device == "/dev/vda2"


def test_mbr_partition_is_found(find: Find) -> None:
    disk = bytearray(4 * MIB)
    disk[0x1FE:0x200] = b"\x55\xaa"
    disk[0x1BE + 4] = 0x83
    struct.pack_into("<I", disk, 0x1BE + 8, MIB // 512)
    disk[MIB : MIB + 4096] = ext4()

    assert find("", bytes(disk)).device == "/dev/vda1"


def test_several_candidates_are_refused_with_what_there_is(find: Find) -> None:
    disk = gpt((LINUX, 1, "one", ext4()), (LINUX, 2, "two", xfs()))

    with pytest.raises(
        UsageError, match=r"more than one .* 1 \(one ext4\), 2 \(two xfs\).*,part=N"
    ):
        find("", disk)
    assert find("part=2", disk).device == "/dev/vda2"


@pytest.mark.parametrize(
    ("wanted", "device"),
    [
        (f"UUID={UUID.upper()}", "/dev/vdb"),
        ("LABEL=rootfs", "/dev/vdb"),
        ("PARTLABEL=second", "/dev/vda2"),
        ("PARTUUID=00000000-0000-0000-0000-000000000002", "/dev/vda2"),
    ],
)
def test_tag_is_looked_for_on_all_disks(find: Find, wanted: str, device: str) -> None:
    first = gpt((BIOS, 1, "first", b""), (LINUX, 2, "second", b"hsqs" + bytes(100)))

    assert find(wanted, first, ext4()).device == device


def test_unknown_uuid_is_refused_with_those_there_are(find: Find) -> None:
    with pytest.raises(UsageError, match=f"no disk has it; there are: {UUID}"):
        find("UUID=1234", ext4())


def test_tag_without_disks_says_so(find: Find) -> None:
    with pytest.raises(UsageError, match="there is no --disk"):
        find("LABEL=rootfs")


@pytest.mark.parametrize("content", [b"", b"\xff" * 70000, b"just text" * 9000])
def test_image_that_is_no_file_system_is_refused(find: Find, content: bytes) -> None:
    with pytest.raises(UsageError, match="no file system that is known is in it"):
        find("", content)


def test_partition_that_is_not_there_is_refused(find: Find) -> None:
    with pytest.raises(UsageError, match="no such partition; there is 1"):
        find("part=7", gpt((LINUX, 1, "", ext4())))
    with pytest.raises(UsageError, match="no known file system"):
        find("part=1", gpt((LINUX, 1, "", b"")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("disk.img", ("disk.img", "")),
        ("disk.img,part=2,ro", ("disk.img,ro", "part=2")),
        ("a,,b.img,serial=x", ("a,,b.img,serial=x", "")),
        ("part=0,part=0", ("part=0", "part=0")),
        ("part=1", ("part=1", "")),
        ("UUID=12", (None, "UUID=12")),
        ("LABEL=x y", (None, "LABEL=x y")),
    ],
)
def test_value_is_a_disk_and_what_to_look_for(text: str, expected: tuple[str | None, str]) -> None:
    assert split_root(text) == expected


@pytest.mark.parametrize("text", ["", ",part=1", "d,part=x", "d,part=1,part=2", "d,part="])
def test_damaged_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--root"):
        split_root(text)


def test_comma_in_a_damaged_value_is_shown_as_it_was_written() -> None:
    with pytest.raises(UsageError, match="'part=1,,ro' is no partition's number"):
        split_root("d,part=1,,ro")


@given(st.binary(min_size=92, max_size=92), st.binary(max_size=4096))
def test_hostile_partition_table_gives_partitions_or_none(header: bytes, table: bytes) -> None:
    fd = os.memfd_create("disk")
    try:
        os.write(fd, bytes(512) + b"EFI PART" + header[8:] + table)
        assert all(isinstance(part, Partition) for part in partitions(fd))
    finally:
        os.close(fd)


def test_image_of_mke2fs_is_known(find: Find, tmp_path: Path) -> None:
    program = shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if program is None:
        pytest.skip("mke2fs is not here")
    image = tmp_path / "made.ext4"
    command = [program, "-q", "-F", "-t", "ext4", "-L", "mine", "-U", UUID, str(image), "4096k"]
    subprocess.run(command, check=True)

    assert find("", image.read_bytes()).file_system == FileSystem("ext4", UUID, "mine")
