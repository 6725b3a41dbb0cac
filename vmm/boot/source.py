"""Files that images are read from: opened without risk of blocking, read by bounded pread only.

Everything in an image is hostile. A parser asks `Source.read` for bytes at an offset and gets
exactly those, or an `ImageError` that names what it was after.
"""

from __future__ import annotations

import os
import stat
from types import TracebackType

from vmm.boot.errors import ImageError
from vmm.core.errors import one_line

# Nothing that a parser wants in one piece is larger (an LZ4 block is the largest, 8 MiB and a
# bit); a larger request can only come from a number in the image that was not checked.
MAX_READ = 16 << 20

DEFAULT_LIMIT = 1 << 30
"""The largest uncompressed kernel that is taken, in bytes."""

PathOrFd = str | os.PathLike[str] | int


def printable(text: str, limit: int = 256) -> str:
    """`text` fit for one line on a terminal: a hostile image must not send escape sequences."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return one_line(cut)


class Source:
    """A regular file (or memfd) of `size` bytes behind `fd`, owned and closed by this object.

    `name` says in messages what it is: "kernel vmlinuz", "initrd /boot/initrd.img".
    """

    __slots__ = ("fd", "name", "size")

    def __init__(self, fd: int, size: int, name: str) -> None:
        self.fd = fd
        self.size = size
        self.name = name

    def read(self, offset: int, size: int, what: str) -> bytes:
        """Exactly `size` bytes at `offset`; ImageError where the file doesn't have them."""
        if offset < 0 or size < 0 or size > MAX_READ or offset + size > self.size:
            raise self.error(
                f"{what} at [{offset:#x}, {offset + size:#x}) is not inside the file of "
                f"{self.size} bytes",
                "the file is truncated or corrupt, get a fresh copy",
            )
        pieces = []
        done = 0
        while done < size:
            try:
                piece = os.pread(self.fd, size - done, offset + done)
            except OSError as exc:
                raise self.error(
                    f"reading {what} at {offset + done:#x} failed: {exc.strerror}",
                    "check the disk that holds it",
                ) from exc
            if not piece:
                raise self.error(
                    f"the file shrank to {offset + done} bytes while {what} was read",
                    "do not change it while it is booted",
                )
            pieces.append(piece)
            done += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def prefix(self, size: int) -> bytes:
        """The first `size` bytes of the file, fewer where it is shorter."""
        return self.read(0, min(size, self.size), "the start of the file")

    def error(self, problem: str, remedy: str) -> ImageError:
        """An ImageError about this file: what is wrong with it; what to do."""
        return ImageError(f"{self.name}: {problem}; {remedy}")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_source(path_or_fd: PathOrFd, role: str) -> Source:
    """Open an image for reading; `role` ("kernel", "initrd") starts every message about it.

    A file descriptor is duplicated: the caller's stays the caller's. Raises ImageError for
    whatever is missing, unreadable, empty or not a regular file.
    """
    if isinstance(path_or_fd, int):
        name = f"{role} (file descriptor {path_or_fd})"
    else:
        name = f"{role} {printable(os.fsdecode(path_or_fd))}"
    try:
        if isinstance(path_or_fd, int):
            fd = os.dup(path_or_fd)
        else:
            # O_NONBLOCK: opening a FIFO must not wait for a writer, it is refused below.
            fd = os.open(path_or_fd, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as exc:
        raise ImageError(f"{name}: no such file; check the path given for the {role}") from exc
    except PermissionError as exc:
        raise ImageError(f"{name}: permission denied; make it readable for this user") from exc
    except (OSError, ValueError) as exc:
        # ValueError: a NUL byte in the path.
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise ImageError(
            f"{name}: cannot be opened: {reason}; check the path given for the {role}"
        ) from exc
    source = Source(fd, 0, name)
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise source.error("is a directory", f"name the {role} file itself")
        if not stat.S_ISREG(status.st_mode):
            raise source.error("is not a regular file", "copy it to a file first")
        if status.st_size == 0:
            raise source.error("is empty (0 bytes)", "get a fresh copy")
        source.size = status.st_size
        # A caller's fd may be write-only: find out here, not in the middle of a header.
        source.read(0, 1, "the first byte")
    except BaseException:
        source.close()
        raise
    return source
