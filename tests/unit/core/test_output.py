"""Output is written whole: short writes, full pipes and disks, files replaced or left as they
were."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from vmm.core.errors import OutputError, UsageError
from vmm.core.output import Output, write_all


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))

    with open(tmp_path / "f", "wb") as file:
        write_all(file.fileno(), b"0123456789")

    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_pipe_that_is_full_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data = os.urandom(1 << 20)

    def send() -> None:
        write_all(writer, data)
        os.close(writer)

    thread = threading.Thread(target=send)
    thread.start()

    with os.fdopen(reader, "rb") as file:
        received = file.read()
    thread.join()

    assert received == data


def test_pipe_that_nobody_reads_is_waited_for_only_so_long() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    with pytest.raises(OSError, match="nobody reads it") as caught:
        write_all(writer, bytes(1 << 20), patience=0.0)

    assert caught.value.errno == errno.ETIMEDOUT
    os.close(reader)
    os.close(writer)


def test_output_that_fails_leaves_the_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_text("as it was")
    output = Output("--html f", str(tmp_path / "f"))

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match="--html f could not be written: Disk quota") as caught:
        output.write(b"new")

    assert caught.value.exit_status == 1
    assert (tmp_path / "f").read_text() == "as it was"
    assert os.listdir(tmp_path) == ["f"]


def test_output_looked_at_leaves_everything_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("as it was")

    Output("--html f", str(tmp_path / "f"))
    Output("--html g", str(tmp_path / "g"))

    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_text() == "as it was"


def test_output_on_a_disk_that_is_full_now_is_no_bad_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full)
        output = Output("--html f", str(tmp_path / "f"))
    output.write(b"new")

    assert (tmp_path / "f").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("path", "reason"),
    [(".", "Is a directory"), ("a/", "Is a directory"), ("a/b", "No such file"), ("", "."),
     ("a\0b", "null byte"), ("/proc/version", ".")],
)  # fmt: skip
def test_path_that_is_no_good_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UsageError, match=f"--html x cannot be written: .*{reason}.*another path"):
        Output("--html x", path)

    assert os.listdir(tmp_path) == []


def test_text_that_is_no_unicode_is_written(tmp_path: Path) -> None:
    with Output("--html f", str(tmp_path / "f")).open() as file:
        file.write("a\udcffb")

    assert (tmp_path / "f").read_text() == "a\\udcffb"
