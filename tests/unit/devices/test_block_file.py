"""What `--disk` accepts, and the one line that it answers otherwise."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

import pytest

from vmm.core import disk_image
from vmm.core.errors import UsageError
from vmm.devices.virtio import block_file
from vmm.devices.virtio.block_file import open_disk


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


def test_open_disk_plain_file_is_writable_and_named_after_itself(image: Path) -> None:
    disk = open_disk(str(image))

    assert (disk.sectors, disk.read_only, disk.serial) == (8, False, b"disk.img")
    assert os.pwrite(disk.fd, b"x", 0) == 1
    disk.close()
    disk.close()


def test_open_disk_options_are_taken(image: Path) -> None:
    image.chmod(0o444)

    disk = open_disk(f"{image},ro,io=pread,serial=a,,b-twenty-bytes-abc")

    assert disk.read_only
    assert disk.engine == "pread"
    assert disk.serial == b"a,b-twenty-bytes-abc"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(disk.fd, b"x", 0)
    disk.close()


def test_open_disk_name_with_a_comma_is_written_twice(tmp_path: Path) -> None:
    (tmp_path / "a,ro").write_bytes(bytes(512))

    disk = open_disk(f"{tmp_path}/a,,ro")

    assert not disk.read_only
    disk.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "names no file"),
        (",ro", "names no file"),
        ("{dir}/none.img", "no such file"),
        ("{dir}/none.img,ro", "no such file"),
        ("{dir}", "is a directory"),
        ("{dir},ro", "is a directory"),
        ("{dir}/empty", "less than one sector"),
        ("{dir}/odd", "1535 bytes are no multiple of the 512 of a sector; .*truncate -s %512"),
        ("{dir}/odd,ro,format=raw", "1535 bytes are no multiple"),
        ("{dir}/fifo", "neither a file nor a block device"),
        ("{dir}/fifo,ro", "neither a file nor a block device"),
        ("/dev/null", "neither a file nor a block device"),
        ("{dir}/disk.img,rw", "unknown option 'rw'"),
        ("{dir}/disk.img,", "unknown option ''"),
        ("{dir}/disk.img,ro=1", "'ro' takes no value"),
        ("{dir}/disk.img,serial=", "'serial' has no value"),
        ("{dir}/disk.img,serial=one-more-than-twenty-", "serial has 21 bytes, 20 at most"),
        ("{dir}/disk.img,format=qcow2", "format=qcow2 is none of raw"),
        ("{dir}/disk.img,share=yes", "share=yes is none of on, off"),
        ("{dir}/disk.img/x", "cannot be read and written: Not a directory"),
        ("{dir}/" + "n" * 300, "cannot be read and written: File name too long"),
    ],
)
def test_open_disk_bad_spec_is_a_usage_error(
    image: Path, tmp_path: Path, spec: str, message: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(bytes(1535))
    os.mkfifo(tmp_path / "fifo")
    open_fds = len(os.listdir("/proc/self/fd"))

    with pytest.raises(UsageError, match=message) as caught:
        open_disk(spec.format(dir=tmp_path))

    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == open_fds


def test_open_disk_not_writable_says_how_to_open_it(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anything, so the kernel's answer is made here."""

    def deny(path: str, _flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", deny)

    with pytest.raises(UsageError, match=rf"Permission denied; .* write --disk {image},ro"):
        open_disk(str(image))


FORMATS = [
    ("qcow2", 0, b"QFI\xfb"),
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"COWD"),
    ("VMDK", 0, b"# Disk DescriptorFile"),
    ("VHDX", 0, b"vhdxfile"),
    ("VHD", 0, b"conectix"),
    ("VHD", 4096 - 512, b"conectix"),
    ("VDI", 0x40, b"\x7f\x10\xda\xbe"),
]


@pytest.mark.parametrize(("name", "offset", "magic"), FORMATS)
def test_open_disk_image_in_a_format_of_its_own_is_refused_unless_told(
    image: Path, name: str, offset: int, magic: bytes
) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(magic)
    before = image.read_bytes()

    with pytest.raises(UsageError, match=rf"is a {name} image.*qemu-img convert .*format=raw"):
        open_disk(str(image))
    disk = open_disk(f"{image},format=raw")

    assert disk.sectors == 8
    disk.close()
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("", "", True),
        ("", ",ro", True),
        (",ro", "", True),
        (",ro", ",ro", False),
        ("", ",share=on", False),
        (",share=on", "", False),
        (",share=off", "", True),
    ],
)
def test_open_disk_second_user_of_an_image_is_refused_unless_it_shares(
    image: Path, first: str, second: str, refused: bool
) -> None:
    held = open_disk(f"{image}{first}")

    if refused:
        with pytest.raises(UsageError, match=r"in use by another machine, or given twice; .*share"):
            open_disk(f"{image}{second}")
    else:
        open_disk(f"{image}{second}").close()
    held.close()

    open_disk(str(image)).close()  # its lock has gone with it


def test_open_disk_file_system_without_locks_is_let_through(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(_fd: int, _command: int, _lock: bytes) -> bytes:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "fcntl", no_locks)

    open_disk(str(image)).close()


def test_open_disk_device_that_takes_no_writes_is_asked_for_it(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine has no such device to spare: the kernel's answer is made here."""
    monkeypatch.setattr(block_file, "is_read_only_device", lambda fd: True)

    with pytest.raises(UsageError, match=rf"is a read-only device; .* write --disk {image},ro"):
        open_disk(str(image))
    open_disk(f"{image},ro").close()


@pytest.mark.parametrize(("answer", "read_only"), [(0, False), (1, True)])
def test_block_device_is_asked_whether_it_takes_writes(
    image: Path, monkeypatch: pytest.MonkeyPatch, answer: int, read_only: bool
) -> None:
    asked = []

    def ioctl(_fd: int, request: int, _space: bytes) -> bytes:
        asked.append(request)
        return struct.pack("i", answer)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with image.open("rb") as file:
        assert not disk_image.is_read_only_device(file.fileno())  # a file: nobody is asked
        monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)

        assert disk_image.is_read_only_device(file.fileno()) is read_only

    assert asked == [0x125E]  # BLKROGET
