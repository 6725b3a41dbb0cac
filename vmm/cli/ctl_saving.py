"""`pyvmm ctl PATH dump FILE` and `snapshot DIR`: this process makes the files, since the running
pyvmm may open none, and hands them over open."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vmm.core.errors import OutputError, UsageError, in_words
from vmm.snapshot import core_file
from vmm.snapshot.folder import MEMORY, PRIVATE, STATE, checksums, new_file, new_folder, packed

Ask = Callable[[dict[str, Any], Sequence[int]], dict[str, Any]]
"""Sends a request with open files; the answer."""


def send_files(connection: socket.socket, line: bytes, files: Sequence[int]) -> None:
    """A line, with open files that come along with its first byte."""
    if not files:
        connection.sendall(line)
        return
    sent = connection.sendmsg(
        [line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files).tobytes())]
    )
    connection.sendall(line[sent:])


def dump(ask: Ask, path: str, *, with_private: bool = False) -> dict[str, Any]:
    """Make the core file. The answer to print; with "ok" false there is no file."""
    with _new_file(path) as fd:
        answer = ask({"command": "dump", "private": with_private}, [fd])
        if answer.get("ok") is not True:
            raise _Refused(answer)
        pages, vcpus, offset = answer["pages"], answer["vcpus"], answer["offset"]
        present = [row[:2] for row in pages if with_private or row[2] == "shared"]
        noted = core_file.find_vmcoreinfo(fd, offset, present)
        private = [row[:2] for row in pages if with_private and row[2] == "private"]
        alias = answer["alias"]
        head = core_file.headers(present, vcpus, pages, noted, offset, private, alias)
        _write(fd, head, 0)
        os.fsync(fd)
    return {
        "ok": True,
        "vcpus": len(vcpus),
        "shared_bytes": _bytes_of(pages, "shared"),
        "private_bytes": _bytes_of(pages, "private") if with_private else 0,
        "left_out_bytes": 0 if with_private else _bytes_of(pages, "private"),
        "vmcoreinfo": noted is not None,
    }


def snapshot(ask: Ask, path: str, *, with_private: bool, then_quit: bool) -> dict[str, Any]:
    """Make the folder. The answer to print; with "ok" false there is no folder."""
    was_running = True
    if then_quit:
        status = _require(ask({"command": "status"}, []))
        was_running = status["state"] == "running"
        _require(ask({"command": "pause"}, []))
    try:
        with new_folder(path) as folder, contextlib.ExitStack() as opened:
            files = []
            for name in (MEMORY, PRIVATE)[: 1 + with_private]:
                fd = new_file(folder, name)
                opened.callback(os.close, fd)
                files.append(fd)
            answer = _require(ask({"command": "snapshot", "private": with_private}, files))
            state = {"state": answer["state"], "pages": answer["pages"]}
            state[MEMORY] = checksums(files[0], answer["memory"])
            state[PRIVATE] = checksums(files[1], answer["private"]) if with_private else None
            fd = new_file(folder, STATE)
            opened.callback(os.close, fd)
            _write(fd, packed(state), 0)
    except BaseException:
        if then_quit and was_running:
            ask({"command": "resume"}, [])
        raise
    if then_quit:
        _require(ask({"command": "quit"}, []))
    left_out = 0 if with_private else _bytes_of(answer["pages"], "private")
    return {
        "ok": True,
        "shared_bytes": sum(row[1] for row in answer["memory"]),
        "private_bytes": sum(row[1] for row in answer["private"]) if with_private else 0,
        "left_out_bytes": left_out,
    }


def _bytes_of(pages: Sequence[Sequence[Any]], state: str) -> int:
    return sum(row[1] for row in pages if row[2] == state)


class _Refused(Exception):
    """The running pyvmm's refusal, to be printed as it is."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__()
        self.answer = answer


def _require(answer: dict[str, Any]) -> dict[str, Any]:
    if answer.get("ok") is not True:
        raise _Refused(answer)
    return answer


def carried_out(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` says, or the refusal. Raises OutputError where a file can't be written."""
    try:
        return make()
    except _Refused as refused:
        return refused.answer
    except OSError as error:
        raise OutputError(f"it could not be written: {in_words(error)}") from error


def _write(fd: int, data: bytes, offset: int) -> None:
    with memoryview(data) as view:
        done = 0
        while done < len(data):
            written = os.pwrite(fd, view[done:], offset + done)
            if not written:
                raise OSError(errno.EIO, "nothing more is written")
            done += written


@contextmanager
def _new_file(path: str) -> Iterator[int]:
    """A file to fill in the block, that is at `path` when all went well, and nowhere otherwise."""
    path = os.path.abspath(path)
    if os.path.lexists(path):
        raise UsageError(f"{path} is there already; name a file that isn't")
    try:
        fd, making = tempfile.mkstemp(
            prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path)
        )
    except OSError as error:
        raise UsageError(f"{path} can't be made: {error.strerror}") from None
    try:
        yield fd
        os.rename(making, path)
    except BaseException:
        os.unlink(making)
        raise
    finally:
        os.close(fd)
