"""A snapshot's folder: `state`, `memory` and perhaps `private`, written whole or not at all.

`state` is a line, and JSON behind it:

    pyvmm-snapshot 2 <SHA-256 of the JSON> <its bytes>

`memory` holds the shared pages, offset = guest-physical address, and `private` the private ones;
what the machine's memory doesn't hold is a hole. The JSON has an entry for each piece of them, with
its SHA-256. Nothing of that is a secret's seal: who can write the folder can write anything, so
that all of it is looked at as if a guest had written it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from vmm.core.errors import UsageError, in_words
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.core.saved import BadState, Saved

MAGIC = "pyvmm-snapshot"
VERSION = 2
STATE, MEMORY, PRIVATE = "state", "memory", "private"
PIECE = 4 << 20
"""Bytes of memory that have a checksum together, at most."""
MOST_STATE = 64 << 20
MOST_PIECES = 1 << 20
_LONGEST_LINE = 128
_ADDRESSES = 1 << 52


def pieces(runs: Sequence[Sequence[int]]) -> Iterator[Range]:
    """Runs (gpa, size) cut into pieces."""
    for gpa, size in runs:
        for start in range(gpa, gpa + size, PIECE):
            yield Range(start, min(PIECE, gpa + size - start))


def checksums(fd: int, runs: Sequence[Sequence[int]]) -> list[list[Any]]:
    """What is in a memory's file, as [gpa, size, SHA-256] for each piece. Raises OSError."""
    return [
        [piece.start, piece.size, hashlib.sha256(_read(fd, piece)).hexdigest()]
        for piece in pieces(runs)
    ]


def _read(fd: int, piece: Range) -> bytes:
    """The piece's bytes, fewer where the file ends. Raises OSError."""
    data = os.pread(fd, piece.size, piece.start)
    while len(data) < piece.size:
        more = os.pread(fd, piece.size - len(data), piece.start + len(data))
        if not more:
            break
        data += more
    return data


def packed(state: dict[str, Any]) -> bytes:
    """The `state` file's bytes."""
    text = json.dumps(state).encode()
    line = f"{MAGIC} {VERSION} {hashlib.sha256(text).hexdigest()} {len(text)}\n"
    return line.encode() + text


def unpacked(data: bytes, where: str) -> Saved:
    """What `packed` has packed. Raises BadState."""
    line, _, text = data.partition(b"\n")
    words = line[:_LONGEST_LINE].split(b" ")
    if words[0] != MAGIC.encode() or len(words) != 4:
        raise BadState(f"{where} is no snapshot's state: it doesn't begin with {MAGIC}")
    if words[1] != str(VERSION).encode():
        raise BadState(
            f"{where} has version {words[1].decode('ascii', 'replace')!r:.20} of the format, and "
            f"this pyvmm reads version {VERSION}; restore it with the pyvmm that made it"
        )
    if words[3] != str(len(text)).encode():
        raise BadState(f"{where} is cut short, or has grown: it has {len(text)} bytes of state")
    if hashlib.sha256(text).hexdigest().encode() != words[2]:
        raise BadState(f"{where} is damaged: its SHA-256 is another one")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise BadState(f"{where} is no JSON behind its first line") from None
    return Saved(values, where)


class SnapshotFolder:
    """A snapshot to restore: its state, and pieces of memory as they are asked for.

    `close` closes its files; any number of times.
    """

    def __init__(self, path: str) -> None:
        """Raises BadState for whatever is wrong with what can be told now."""
        self.path = path
        self._fds: dict[str, int] = {}
        try:
            fd = self._open(STATE)
            size = os.fstat(fd).st_size
            if size > MOST_STATE:
                raise BadState(f"{self._name(STATE)} has {size} bytes, {MOST_STATE} are the most")
            self.state = unpacked(_read(fd, Range(0, size)), self._name(STATE))
        except OSError as error:
            self.close()
            raise BadState(
                f"--restore {path}: {self._name(STATE)} can't be read: {in_words(error)}"
            ) from None
        except BaseException:
            self.close()
            raise

    def _name(self, file: str) -> str:
        return os.path.join(self.path, file)

    def _open(self, file: str) -> int:
        if file in self._fds:
            return self._fds[file]
        path = self._name(file)
        try:
            # Non-blocking: a FIFO in its place must not hang.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadState(
                f"--restore {self.path}: {path} can't be read: {reason}; give a folder that "
                "pyvmm ctl PATH snapshot has made"
            ) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BadState(f"--restore {self.path}: {path} is no regular file")
        self._fds[file] = fd
        return fd

    def contents(self, saved: Saved, file: str) -> Iterator[tuple[Range, bytes]]:
        """The pieces of a memory's file that `saved` lists under its name, in address order, each
        checked. Raises BadState."""
        last = 0
        for at, row in enumerate(saved.rows(file, MOST_PIECES)):
            if not (
                type(row) is list
                and [type(one) for one in row] == [int, int, str]
                and last <= row[0] < _ADDRESSES
                and 0 < row[1] <= PIECE
                and not (row[0] | row[1]) % PAGE_SIZE
            ):
                raise saved.bad(
                    f"{file}[{at}] is no piece of memory behind the last one: whole pages, "
                    f"{PIECE:#x} bytes at most, and their SHA-256"
                )
            piece = Range(row[0], row[1])
            last = piece.end
            try:
                data = _read(self._open(file), piece)
            except OSError as error:
                raise saved.bad(f"{self._name(file)} can't be read: {error.strerror}") from None
            if len(data) != piece.size:
                raise saved.bad(f"{self._name(file)} is cut short: it ends before {piece.end:#x}")
            if hashlib.sha256(data).hexdigest() != row[2]:
                raise saved.bad(f"{self._name(file)} is damaged at {piece}: another SHA-256")
            yield piece, data

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


@contextmanager
def new_folder(path: str) -> Iterator[str]:
    """A folder to fill in the block, which becomes `path` at its end, with all that is in it on the
    disk, and is gone after an exception. Only its owner may look into it.

    Raises UsageError where `path` is there already or can't be; OSError.
    """
    path = os.path.abspath(path)
    if os.path.lexists(path):
        raise UsageError(f"{path} is there already; name a folder that isn't")
    try:
        making = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    except OSError as error:
        raise UsageError(f"{path} can't be made: {error.strerror}") from None
    try:
        yield making
        for name in os.listdir(making):
            _sync(os.path.join(making, name))
        _sync(making)
        os.rename(making, path)  # an empty folder in its place, made meanwhile, is replaced
        try:
            _sync(os.path.dirname(path))
        except OSError:
            os.rename(path, making)
            raise
    finally:
        # By their names first: to list a folder takes a descriptor, and there may be none left.
        for name in (STATE, MEMORY, PRIVATE):
            with suppress(OSError):
                os.unlink(os.path.join(making, name))
        try:
            os.rmdir(making)
        except OSError:
            shutil.rmtree(making, ignore_errors=True)


def new_file(folder: str, name: str) -> int:
    """A new file to read and write, for its owner alone. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(os.path.join(folder, name), flags, 0o600)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
