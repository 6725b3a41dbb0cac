"""What a strict guest loads by itself: its parts, their digests, and the measurement of a launch.

Arithmetic on bytes and files alone, so that a measurement can be worked out where no guest runs.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from vmm.boot.errors import ImageError
from vmm.core.lean_typing import NamedTuple

_PIECE = 1 << 20
_DOMAIN = b"pyvmm launch measurement 1\0"


class FilePart(NamedTuple):
    """Where in a file a part's bytes lie; the fd is somebody else's, and stays open for long
    enough. `name` says in messages what file that is."""

    fd: int
    offset: int
    name: str


class Part(NamedTuple):
    """`size` bytes (not 0) that belong at `gpa` in the guest's private memory."""

    name: str
    """For messages and reports: "kernel", "initrd", "command line"."""
    gpa: int
    size: int
    content: bytes | FilePart

    def digest(self) -> bytes:
        """SHA-256 of its bytes. Raises ImageError where the file is short or can't be read."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).digest()
        found = hashlib.sha256()
        buffer = bytearray(min(_PIECE, self.size))
        view = memoryview(buffer)
        fd, offset, name = self.content
        done = 0
        while done < self.size:
            wanted = min(_PIECE, self.size - done)
            try:
                moved = os.preadv(fd, [view[:wanted]], offset + done)
            except OSError as error:
                raise ImageError(
                    f"{name}: reading at {offset + done} failed: {error.strerror}; check the disk "
                    "that holds it"
                ) from error
            if moved == 0:
                raise ImageError(
                    f"{name}: the file ended at byte {offset + done} while it was measured; do not "
                    "change it while it is booted"
                )
            found.update(view[:moved])
            done += moved
        return found.digest()


def digests(parts: Sequence[Part]) -> list[bytes]:
    """Of each part, in their order, by one thread for each processor: SHA-256 takes as long as all
    else before a strict guest's start. Raises ImageError as `Part.digest` does."""
    found: dict[int, bytes] = {}
    errors: dict[int, ImageError] = {}
    waiting = deque(sorted(range(len(parts)), key=lambda number: -parts[number].size))

    def work() -> None:
        while waiting:
            try:
                number = waiting.popleft()
            except IndexError:
                return  # the other took the last one
            try:
                found[number] = parts[number].digest()
            except ImageError as error:
                errors[number] = error

    others = min(len(os.sched_getaffinity(0)), len(parts)) - 1
    threads = [threading.Thread(target=work) for _ in range(others)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return [found[number] for number in range(len(parts))]


def measurement(records: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256, as hexadecimal digits, over named byte strings in their order.

    Each is preceded by its name and size, so that no two lists of records are alike in bytes.
    """
    found = hashlib.sha256(_DOMAIN)
    for name, data in records:
        label = name.encode()
        found.update(len(label).to_bytes(8, "little") + label)
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()
