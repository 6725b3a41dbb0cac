"""Files that a user gives to be read: regular ones, of bounded size, opened without ever waiting.

What a path names is found out before it is opened, and again after: a FIFO would wait for a
writer, a device may do something when it is opened, /dev/zero never ends.
"""

from __future__ import annotations

import os
import stat

from vmm.core.errors import UsageError
from vmm.core.lean_typing import Any

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a symbolic link",
}
JSON_DEPTH = 32


class Unusable(UsageError):
    """A file that can't be used; `reason` says why, without naming it."""

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        super().__init__(f"{name} {reason}; {remedy}")
        self.reason = reason


def kind_of(mode: int) -> str:
    """What a file is, by its st_mode: "a FIFO" and the like."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def open_given(
    path: str,
    name: str,
    remedy: str,
    *,
    most: int,
    folder: int | None = None,
    follow: bool = True,
) -> int:
    """An fd for reading a regular file of at most `most` bytes.

    `name` is what errors call it, `folder` an fd that a relative `path` starts from; without
    `follow`, a symbolic link is refused as well. Raises Unusable.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        found = os.stat(path, dir_fd=folder, follow_symlinks=follow)
        if not stat.S_ISREG(found.st_mode):
            raise _is_no_file(found.st_mode, name, remedy)
        fd = os.open(path, flags | (0 if follow else os.O_NOFOLLOW), dir_fd=folder)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Unusable(name, f"cannot be read: {reason}", remedy) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):  # another one by now
            raise _is_no_file(found.st_mode, name, remedy)
        if found.st_size > most:
            raise Unusable(name, f"has {found.st_size} bytes, {most} at most are read", remedy)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_no_file(mode: int, name: str, remedy: str) -> Unusable:
    return Unusable(name, f"is {kind_of(mode)}, not a regular file", remedy)


def read_given(
    path: str,
    name: str,
    remedy: str,
    *,
    most: int,
    folder: int | None = None,
    follow: bool = True,
) -> bytes:
    """The bytes of such a file, see `open_given`. Raises Unusable."""
    fd = open_given(path, name, remedy, most=most, folder=folder, follow=follow)
    try:
        pieces: list[bytes] = []
        left = most + 1  # a file in /proc says that it has 0 bytes, and any may grow
        while left and (piece := os.read(fd, min(left, 1 << 20))):
            pieces.append(piece)
            left -= len(piece)
    except OSError as error:
        raise Unusable(name, f"cannot be read: {error.strerror}", remedy) from error
    finally:
        os.close(fd)
    if not left:
        raise Unusable(name, f"has more than the {most} bytes that are read", remedy)
    return b"".join(pieces)


def read_json(
    path: str,
    name: str,
    remedy: str,
    *,
    most: int,
    folder: int | None = None,
    follow: bool = True,
) -> Any:
    """What such a file says as JSON, at most JSON_DEPTH deep; no NaN, no infinity.

    Raises Unusable.
    """
    import json  # no guest's way leads here

    text = read_given(path, name, remedy, most=most, folder=folder, follow=follow)
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise Unusable(name, f"is nested more than {JSON_DEPTH} deep", remedy) from None
    except ValueError as error:
        raise Unusable(name, f"is no JSON: {error}", remedy) from None
    level = [data]
    for _ in range(JSON_DEPTH + 1):
        level = [
            inner
            for each in level
            if isinstance(each, list | dict)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return data
    raise Unusable(name, f"is nested more than {JSON_DEPTH} deep", remedy)


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number in JSON")
