"""The file or block device behind a disk: what `--disk FILE[,OPTION...]` opens."""

from __future__ import annotations

import os
import stat

from vmm.core.errors import UsageError
from vmm.core.suboptions import Suboptions
from vmm.memory.transfer import ENGINES

SECTOR = 512
SERIAL_BYTES = 20

SYNTAX = f"FILE[,ro][,serial=TEXT][,queues=N][,io={'|'.join(ENGINES)}]"
MOST_QUEUES = 16


class DiskFile:
    """An open disk: `sectors` of 512 bytes on `fd`, which this object owns.

    `engine` names how its bytes are to be moved, `queues` how many requests at the same time.
    """

    __slots__ = ("engine", "fd", "path", "queues", "read_only", "sectors", "serial")

    def __init__(
        self,
        fd: int,
        path: str,
        sectors: int,
        read_only: bool,
        serial: bytes,
        engine: str = "auto",
        queues: int = 1,
    ) -> None:
        self.fd = fd
        self.path = path
        self.sectors = sectors
        self.read_only = read_only
        self.serial = serial
        self.queues = queues
        self.engine = engine

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_disk(spec: str) -> DiskFile:
    """Open the disk that `spec` names; a comma in a file name is written twice.

    A file whose size is no multiple of 512 is used up to its last whole sector; what follows
    is neither shown nor touched. Raises UsageError for whatever is wrong with it.
    """
    words = Suboptions("--disk", spec, SYNTAX)
    path = words.first("file")
    read_only = words.flag("ro")
    serial = words.take("serial") or os.path.basename(path)
    queues = words.take_number("queues", 1, MOST_QUEUES) or 1
    engine = words.take_word("io", ENGINES) or "auto"
    words.finish()
    fd = _open(path, read_only)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        os.close(fd)
        raise UsageError(f"--disk {path}: its size can't be found: {error.strerror}") from error
    if size < SECTOR:
        os.close(fd)
        raise UsageError(
            f"--disk {path}: {size} bytes are less than one sector of {SECTOR}; "
            f"make it larger, for example with: truncate -s 1G {path}"
        )
    identity = serial.encode("utf-8", "surrogateescape")[:SERIAL_BYTES]
    return DiskFile(fd, path, size // SECTOR, read_only, identity, engine, queues)


def _open(path: str, read_only: bool) -> int:
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    try:
        # Non-blocking, so that a FIFO put here by mistake is an error and not a hang.
        fd = os.open(path, flags | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise UsageError(
            f"--disk {path}: no such file; make one, for example with: truncate -s 1G {path}"
        ) from error
    except IsADirectoryError as error:
        raise UsageError(f"--disk {path} is a directory; name a file or block device") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        wanted = "read" if read_only else "read and written"
        hint = "" if read_only else f"; to open it read-only, write --disk {path},ro"
        raise UsageError(f"--disk {path} cannot be {wanted}: {reason}{hint}") from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        os.set_blocking(fd, True)
        return fd
    os.close(fd)
    what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
    raise UsageError(f"--disk {path} is {what}; name a file or block device")
