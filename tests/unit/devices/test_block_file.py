"""What `--disk` accepts, and the one line that it answers otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm.core.errors import UsageError
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

    disk = open_disk(f"{image},ro,io=pread,serial=a,,b-and-much-more-than-twenty-bytes")

    assert disk.read_only
    assert disk.engine == "pread"
    assert disk.serial == b"a,b-and-much-more-th"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(disk.fd, b"x", 0)
    disk.close()


def test_open_disk_name_with_a_comma_is_written_twice(tmp_path: Path) -> None:
    (tmp_path / "a,ro").write_bytes(bytes(512))

    disk = open_disk(f"{tmp_path}/a,,ro")

    assert not disk.read_only
    disk.close()


def test_open_disk_odd_size_is_rounded_down(image: Path) -> None:
    image.write_bytes(bytes(1535))

    disk = open_disk(str(image))

    assert disk.sectors == 2
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
        ("{dir}/fifo", "neither a file nor a block device"),
        ("{dir}/fifo,ro", "neither a file nor a block device"),
        ("/dev/null", "neither a file nor a block device"),
        ("{dir}/disk.img,rw", "unknown option 'rw'"),
        ("{dir}/disk.img,", "unknown option ''"),
        ("{dir}/disk.img,ro=1", "'ro' takes no value"),
        ("{dir}/disk.img,serial=", "'serial' has no value"),
        ("{dir}/disk.img/x", "cannot be read and written: Not a directory"),
        ("{dir}/" + "n" * 300, "cannot be read and written: File name too long"),
    ],
)
def test_open_disk_bad_spec_is_a_usage_error(
    image: Path, tmp_path: Path, spec: str, message: str
) -> None:
    (tmp_path / "empty").touch()
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
