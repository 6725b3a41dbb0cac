"""Each kind of holder of a page, injected: on a memfd, which /proc shows like a guest_memfd."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.holders import pipes_of_the_test
from vmm.conversion.holders import holders
from vmm.core.ranges import PAGE_SIZE

SIZE = 8 * PAGE_SIZE
AboutUs = Callable[[int, int], list[str]]


@pytest.fixture
def about_us() -> AboutUs:
    """Who holds a page of a file, as far as it is this test."""
    of_the_test = pipes_of_the_test()
    return lambda fd, page: of_the_test(holders(fd, page * PAGE_SIZE))


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def memfd(opened: ExitStack) -> int:
    fd = os.memfd_create("held", os.MFD_CLOEXEC)
    opened.callback(os.close, fd)
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"x" * SIZE, 0)
    return fd


def mapping(opened: ExitStack, memfd: int) -> mmap.mmap:
    made = mmap.mmap(memfd, SIZE)
    opened.callback(made.close)
    return made


def pipe(opened: ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        opened.callback(os.close, end)
    return ends


def test_page_that_nobody_holds_has_no_holder(
    about_us: AboutUs, opened: ExitStack, memfd: int
) -> None:
    mapping(opened, memfd)

    assert about_us(memfd, 0) == []


def test_page_in_a_pipe_is_held_until_it_is_read(
    about_us: AboutUs, opened: ExitStack, memfd: int
) -> None:
    reading, writing = pipe(opened)
    os.splice(memfd, writing, PAGE_SIZE, offset_src=PAGE_SIZE)

    during = about_us(memfd, 1)
    os.read(reading, PAGE_SIZE)

    assert len(during) == 1
    assert f"{PAGE_SIZE} bytes wait in the pipe of fd " in during[0]
    assert about_us(memfd, 1) == []


def test_buffer_of_a_system_call_under_way_is_named_with_its_thread(
    about_us: AboutUs, opened: ExitStack, memfd: int
) -> None:
    reading, writing = pipe(opened)
    buffer = memoryview(mapping(opened, memfd))
    opened.callback(buffer.release)
    part = buffer[3 * PAGE_SIZE : 4 * PAGE_SIZE]
    opened.callback(part.release)
    file = opened.enter_context(os.fdopen(reading, "rb", buffering=0, closefd=False))
    reader = threading.Thread(target=lambda: file.readinto(part))
    reader.start()
    try:
        state = Path(f"/proc/self/task/{reader.native_id}/syscall")
        deadline = time.monotonic() + 30
        while state.read_text().startswith("running") and time.monotonic() < deadline:
            pass
        held, beside = about_us(memfd, 3), about_us(memfd, 5)
    finally:
        os.write(writing, b"y")
        reader.join()

    assert held == [
        f"{held[0].split(':')[0]}: thread {reader.native_id} is in read on fd {reading} "
        "with the page as its buffer"
    ]
    assert beside == []


# Maps the file whose fd it gets, and says so; then it reads into page 2 and on, for ever.
_READER = """
import mmap, os, sys
memfd, kind, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
open("/proc/self/comm", "w").write("blk-process")
size = os.fstat(memfd).st_size
page = memoryview(mmap.mmap(memfd, size))[2 * 4096 :]
if kind == "direct":
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
else:
    file, page = 0, page[:4096]
print("ready", flush=True)
while True:
    os.preadv(file, [page], 0) if kind == "direct" else os.readv(file, [page])
"""


@pytest.fixture
def reader(opened: ExitStack, tmp_path: Path) -> Callable[[int, str], int]:
    """Starts another process that has the page as its buffer; its id."""

    def start(memfd: int, kind: str) -> int:
        path = tmp_path / "file"
        path.write_bytes(bytes(os.fstat(memfd).st_size))
        process = opened.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", _READER, str(memfd), kind, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[memfd],
            )
        )
        opened.callback(process.kill)
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            pytest.skip("the file system has no O_DIRECT")
        return process.pid

    return start


def found_of(process: int, memfd: int) -> str:
    """What is said of that process, once it is seen in its call."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for words in holders(memfd, 2 * PAGE_SIZE):
            if words.startswith(f"process {process} "):
                return words
    return ""


def test_page_of_a_read_from_a_file_opened_direct_is_named(
    opened: ExitStack, reader: Callable[[int, str], int], tmp_path: Path
) -> None:
    kind = subprocess.check_output(["stat", "-f", "-c", "%T", str(tmp_path)], text=True).strip()
    if kind == "tmpfs":
        pytest.skip("on tmpfs nobody waits for a disk; set TMPDIR to a directory on one")
    memfd = os.memfd_create("large", os.MFD_CLOEXEC)
    opened.callback(os.close, memfd)
    os.ftruncate(memfd, 32 << 20)  # takes a while
    process = reader(memfd, "direct")

    words = found_of(process, memfd)

    assert words.startswith(f"process {process} (blk-process): thread {process} is in preadv")
    assert words.endswith("(O_DIRECT) with the page among its buffers")


def test_another_process_with_the_page_as_its_buffer_is_told_by_name(
    memfd: int, reader: Callable[[int, str], int]
) -> None:
    process = reader(memfd, "pipe")

    words = found_of(process, memfd)

    assert words == (
        f"process {process} (blk-process): thread {process} is in readv on fd 0 "
        "with the page among its buffers"
    )


def test_buffer_registered_with_io_uring_is_named(
    about_us: AboutUs, opened: ExitStack, memfd: int
) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)
    ring = libc.syscall(425, 2, parameters)  # io_uring_setup
    if ring < 0:
        pytest.skip(f"no io_uring here: {os.strerror(ctypes.get_errno())}")
    opened.callback(os.close, ring)
    mapped = mapping(opened, memfd)
    view = ctypes.c_char.from_buffer(mapped)
    address = ctypes.addressof(view) + 2 * PAGE_SIZE
    vector = struct.pack("=QQ", address, PAGE_SIZE)
    registered = libc.syscall(427, ring, 0, vector, 1)  # IORING_REGISTER_BUFFERS
    del view
    if registered < 0:
        pytest.skip(f"buffers can't be registered here: {os.strerror(ctypes.get_errno())}")

    assert any("registered as a buffer of the io_uring" in words for words in about_us(memfd, 2))
    assert not any("io_uring" in words for words in about_us(memfd, 4))
