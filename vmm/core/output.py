"""Files that a user names for output, and the one loop that writes all of something.

A file is replaced as a whole: its new content is written beside it and renamed over it, so that
neither a full disk nor a kill leaves half of it, or nothing where something was. Nothing is
synced: a machine that loses power may lose it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator

from vmm.core.errors import OutputError, UsageError, limit_met
from vmm.core.lean_typing import Protocol

NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM))
"""What says nothing against a path: it may be different in a minute."""
READER_SECONDS = 10.0
"""How long a reader of a pipe may keep us waiting for room in it."""
_PIECE = 1 << 16
_MOST_LINKS = 40


def write_all(fd: int, data: bytes | memoryview, patience: float | None = None) -> None:
    """Write all of `data`, in as many calls as it takes; Python itself repeats what a signal ends.

    A non-blocking fd is waited for, at most `patience` seconds at a time: None is without end.
    Raises OSError: ENOSPC, EPIPE and so on, ETIMEDOUT after `patience`.
    """
    view = memoryview(data)
    while view:
        try:
            written = os.write(fd, view)
            if not written:
                raise OSError(errno.EIO, "nothing more is written")
            view = view[written:]
        except BlockingIOError:
            _wait_writable(fd, patience)


def _wait_writable(fd: int, patience: float | None) -> None:
    import select  # most writes never wait

    waiter = select.poll()
    waiter.register(fd, select.POLLOUT)
    if not waiter.poll(None if patience is None else patience * 1000):
        raise OSError(errno.ETIMEDOUT, "nobody reads it")


class Writer(Protocol):
    """What `Output.open` hands out."""

    def write(self, text: str) -> None: ...


class _Pieces:
    """Collects text and writes it in large pieces."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._held: list[bytes] = []
        self._size = 0

    def write(self, text: str) -> None:
        # File names may hold what is no character.
        self.add(text.encode("utf-8", "backslashreplace"))

    def add(self, data: bytes) -> None:
        self._held.append(data)
        self._size += len(data)
        if self._size >= _PIECE:
            self.flush()

    def flush(self) -> None:
        write_all(self._fd, b"".join(self._held), READER_SECONDS)
        self._held, self._size = [], 0


class Output:
    """One output, looked at before the work is done: a bad path costs no run.

    A regular file is replaced (mode 0666 less the umask; a symbolic link stays one). FIFOs,
    terminals, /dev/stdout and the like are opened now, without waiting, and written in place.
    "-" is /dev/stdout.
    """

    def __init__(self, name: str, path: str, reads: Iterable[str] = ()) -> None:
        """`name` is what messages call it, as in "--report r.json"; `reads` are files that must
        not be replaced by it, and folders whose files must not. Raises UsageError where the path
        is no good; a disk that is full now may not be so later."""
        self.name = name
        self._fd: int | None = None
        path = "/dev/stdout" if path == "-" else path
        try:
            if _is_descriptor(path):
                self._path = path
                self._fd = _open_in_place(path, os.O_APPEND)
                return
            self._path = os.path.realpath(path)
            try:
                mode = os.stat(self._path).st_mode
            except FileNotFoundError:
                mode = stat.S_IFREG
                if path.endswith("/") or not os.path.basename(path):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
            if stat.S_ISREG(mode):
                _refuse_replacing(name, self._path, reads)
                self._probe()
            elif stat.S_ISBLK(mode):
                raise UsageError(f"{name} cannot be written: it is a block device; {_ANOTHER}")
            else:
                self._fd = _open_in_place(self._path, 0)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if isinstance(error, OSError) and error.errno == errno.ENXIO:
                reason = "nobody reads it"
            remedy = limit_met(error) if isinstance(error, OSError) else ""
            raise UsageError(
                f"{name} cannot be written: {reason}{remedy or f'; {_ANOTHER}'}"
            ) from None

    @property
    def file(self) -> str | None:
        """The path that is replaced; None where it is written in place."""
        return self._path if self._fd is None else None

    def _probe(self) -> None:
        """Find out whether the file could be replaced, leaving it as it is. Raises OSError."""
        if os.path.exists(self._path) and not os.access(self._path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            temporary, fd = self._temporary()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
        else:
            os.close(fd)
            os.unlink(temporary)

    def _temporary(self) -> tuple[str, int]:
        path = os.path.join(os.path.dirname(self._path), f".pyvmm-{os.urandom(8).hex()}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return path, os.open(path, flags, 0o666)

    @contextlib.contextmanager
    def open(self) -> Iterator[Writer]:
        """Write to it within the block; a file is replaced when the block ends well.

        Raises OutputError when the disk is full or the like: the file is as it was.
        """
        with self._pieces() as pieces:
            yield pieces

    def write(self, data: bytes) -> None:
        """The whole content at once. Raises OutputError."""
        with self._pieces() as pieces:
            pieces.add(data)

    @contextlib.contextmanager
    def _pieces(self) -> Iterator[_Pieces]:
        temporary = None
        try:
            if self._fd is not None:
                pieces = _Pieces(self._fd)
                yield pieces
                pieces.flush()
                return
            temporary, fd = self._temporary()
            try:
                pieces = _Pieces(fd)
                yield pieces
                pieces.flush()
            finally:
                os.close(fd)  # some file systems say only here that they are full
            os.replace(temporary, self._path)
            temporary = None
        except OSError as error:
            raise OutputError(
                f"{self.name} could not be written: {error.strerror}"
                f"{limit_met(error) or _remedy(error)}"
            ) from error
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def close(self) -> None:
        """Close what is open; any number of times."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


_ANOTHER = "give another path"


def _refuse_replacing(name: str, path: str, reads: Iterable[str]) -> None:
    """Raise UsageError for a file that is there and is one of `reads`, or in one."""
    for other in reads:
        read = os.path.realpath(other)
        if os.path.exists(path) and (path == read or path.startswith(f"{read}{os.sep}")):
            where = "is" if path == read else "is in"
            raise UsageError(f"{name} {where} {other}, which is read; {_ANOTHER}")


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; make room, or give a path on another file system"
    return f"; {_ANOTHER}"


def _open_in_place(path: str, flags: int) -> int:
    """Never waits: a FIFO without a reader is ENXIO. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | flags)
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENOTSUP, "it is a block device")
    return fd


def _is_descriptor(path: str) -> bool:
    """Whether `path` leads through /proc/PID/fd, as /dev/stdout does: then what it names is open
    already, and must not have another file put in its place."""
    for _ in range(_MOST_LINKS):
        if os.path.realpath(os.path.dirname(path)).startswith("/proc/"):
            return True
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except (OSError, ValueError):
            return False
    return False
