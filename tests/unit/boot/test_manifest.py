"""Parts and their digests, and the measurement over a launch."""

from __future__ import annotations

import hashlib
import os

import pytest

from vmm.boot.errors import ImageError
from vmm.boot.manifest import FilePart, Part, digests, measurement

MIB = 1 << 20


def test_digest_of_bytes_is_sha256() -> None:
    # FIPS 180-2, B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    assert Part("abc", 0, 3, b"abc").digest().hex() == expected


@pytest.mark.parametrize("size", [1, MIB - 1, MIB, 2 * MIB + 17])
def test_digest_of_a_files_part_is_that_of_its_bytes_alone(size: int) -> None:
    content = os.urandom(size)
    fd = os.memfd_create("image")
    os.write(fd, b"before" + content + b"behind")

    found = Part("part", 0, size, FilePart(fd, 6, "file")).digest()
    os.close(fd)

    assert found == hashlib.sha256(content).digest()


def test_digest_of_a_file_that_is_short_says_where_it_ended() -> None:
    fd = os.memfd_create("image")
    os.write(fd, b"short")

    with pytest.raises(ImageError, match="kernel x: the file ended at byte 5 while"):
        Part("part", 0, 10, FilePart(fd, 2, "kernel x")).digest()
    os.close(fd)


def test_digest_of_a_file_that_cannot_be_read_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="kernel x: reading at 2 failed: Bad file descriptor"):
        Part("part", 0, 10, FilePart(-1, 2, "kernel x")).digest()


@pytest.mark.parametrize("processors", [1, 2, 16])
def test_digests_are_in_the_parts_order_whoever_works_them_out(
    processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    contents = [bytes([number]) * size for number, size in enumerate((1, 3 * MIB, 7, MIB, 2 * MIB))]
    parts = [Part("part", 0, len(content), content) for content in contents]

    assert digests(parts) == [hashlib.sha256(content).digest() for content in contents]
    assert digests([]) == []


def test_first_part_that_cannot_be_read_is_the_one_that_is_told() -> None:
    unreadable = [Part("part", 0, size, FilePart(-1, size, "kernel x")) for size in (3, 9, 5)]

    with pytest.raises(ImageError, match="reading at 3 failed"):
        digests([Part("part", 0, 1, b"a"), *unreadable])


@pytest.mark.parametrize(
    "other",
    [
        [("a", b"12"), ("b", b"4")],
        [("a", b"1"), ("b", b"23")],
        [("b", b"3"), ("a", b"12")],
        [("a", b"12")],
        [("a", b"12"), ("b", b"3"), ("", b"")],
        [("ab", b"123")],
        [("c", b"12"), ("b", b"3")],
    ],
)
def test_measurement_of_anything_else_differs(other: list[tuple[str, bytes]]) -> None:
    assert measurement(other) != measurement([("a", b"12"), ("b", b"3")])


def test_measurement_stays_what_it_is_by_definition() -> None:
    """Its encoding is part of what users compare across versions."""
    data = b"pyvmm launch measurement 1\0" + (1).to_bytes(8, "little") + b"a"
    data += (2).to_bytes(8, "little") + b"12"

    assert measurement([("a", b"12")]) == hashlib.sha256(data).hexdigest()
