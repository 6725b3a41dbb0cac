"""The port and window of a strict guest's loader, asked by well-behaved and hostile guests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.fake_memory import FakeMemory
from vmm.boot.manifest import FilePart, Part
from vmm.core.ranges import Range
from vmm.devices.load_window import PORT_DONE, PORT_FAILED, PORT_FILL, LoadWindow

WINDOW, SIZE = 0x4000, 0x1000


class Rig:
    """A window with what came of it."""

    def __init__(self, parts: list[Part]) -> None:
        self.memory = FakeMemory()
        self.loaded = 0
        self.reasons: list[str] = []
        self.window = LoadWindow(self.memory, self._loaded, self.reasons.append)
        self.window.open(WINDOW, SIZE, parts)

    def _loaded(self) -> None:
        self.loaded += 1

    def ask(self, number: int) -> bytes:
        """What the window holds after chunk `number` was asked for."""
        self.window.write(PORT_FILL, 4, number)
        return self.memory.pread(SIZE, WINDOW)


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("image")
    os.write(fd, b"head" + b"f" * SIZE + b"tail")
    yield fd
    os.close(fd)


@pytest.fixture
def rig(file: int) -> Iterator[Rig]:
    parts = [
        Part("bytes", 0x10_0000, SIZE + 3, b"b" * SIZE + b"end"),
        Part("kernel", 0x20_0000, SIZE + 4, FilePart(file, 4, "vmlinuz")),
    ]
    made = Rig(parts)
    yield made
    made.memory.close()


def test_chunks_come_in_the_order_of_the_parts(rig: Rig) -> None:
    assert rig.ask(0) == b"b" * SIZE
    assert rig.ask(1).startswith(b"endb")
    assert rig.ask(2) == b"f" * SIZE
    assert rig.ask(3).startswith(b"tailf")
    assert rig.reasons == []


@pytest.mark.parametrize("number", [4, 0xFFFF_FFFF])
def test_chunk_that_is_none_ends_the_run(rig: Rig, number: int) -> None:
    rig.ask(number)

    assert rig.reasons == [f"asked for chunk {number}, there are 4"]
    assert not rig.window.is_open


def test_after_it_is_done_nothing_is_filled(rig: Rig) -> None:
    rig.window.write(PORT_DONE, 4, 2)
    rig.window.write(PORT_DONE, 4, 2)

    assert rig.ask(0) == bytes(SIZE)
    rig.window.write(PORT_FAILED, 4, 1)
    assert (rig.loaded, rig.reasons) == (1, [])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1, "bytes is not what its manifest says (SHA-256 differs)"),
        (2, "kernel is not what its manifest says (SHA-256 differs)"),
        (0, "failed with code 0x0"),
        (3, "failed with code 0x3"),
        (0xFFFF_0001, "found no header of its own"),
        (0xFFFF_0002, "could not convert its window back to private memory"),
    ],
)
def test_failure_is_told_with_the_part(rig: Rig, code: int, reason: str) -> None:
    rig.window.write(PORT_FAILED, 4, code)

    assert rig.reasons == [reason]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("offset", [PORT_FILL, PORT_DONE, PORT_FAILED, 2, 0xB])
def test_access_of_another_size_or_place_does_nothing(rig: Rig, offset: int, size: int) -> None:
    rig.window.write(offset, size, 0xFFFF)

    assert (rig.loaded, rig.reasons) == (0, [])
    assert rig.window.read(offset, size) == (1 << 8 * size) - 1


def test_window_that_the_guest_made_private_ends_the_run(rig: Rig) -> None:
    rig.memory.private.append(Range(WINDOW, SIZE))

    rig.window.write(PORT_FILL, 4, 0)
    assert len(rig.reasons) == 1 and rig.reasons[0].startswith("bytes has no place: ")


def test_file_that_shrank_ends_the_run(rig: Rig, file: int) -> None:
    os.ftruncate(file, 4)

    rig.window.write(PORT_FILL, 4, 2)
    assert rig.reasons == ["the file of vmlinuz ended while it was loaded"]


def test_file_that_cannot_be_read_ends_the_run() -> None:
    rig = Rig([Part("initrd", 0x10_0000, 8, FilePart(-1, 0, "initrd"))])

    rig.window.write(PORT_FILL, 4, 0)
    rig.memory.close()
    assert rig.reasons == ["initrd could not be read: Bad file descriptor"]
