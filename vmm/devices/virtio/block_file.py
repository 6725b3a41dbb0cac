"""The file or block device behind a disk: what `--disk FILE[,OPTION...]` opens."""

from __future__ import annotations

import os
import stat

from vmm.core.errors import UsageError
from vmm.memory.transfer import ENGINES

SECTOR = 512
SERIAL_BYTES = 20

_SYNTAX = f"FILE[,ro][,serial=TEXT][,io={'|'.join(ENGINES)}]"


class DiskFile:
    """An open disk: `sectors` of 512 bytes on `fd`, which this object owns.

    `engine` names how its bytes are to be moved.
    """

    __slots__ = ("engine", "fd", "path", "read_only", "sectors", "serial")

    def __init__(
        self, fd: int, path: str, sectors: int, read_only: bool, serial: bytes, engine: str = "auto"
    ) -> None:
        self.fd = fd
        self.path = path
        self.sectors = sectors
        self.read_only = read_only
        self.serial = serial
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
    name, *options = spec.replace(",,", "\0").split(",")
    path = name.replace("\0", ",")
    if not path:
        raise UsageError(f"--disk {spec!r} names no file; write --disk {_SYNTAX}")
    read_only = False
    serial = os.path.basename(path)
    engine = "auto"
    for option in options:
        key, equals, value = option.replace("\0", ",").partition("=")
        if key == "ro" and not equals:
            read_only = True
        elif key == "serial" and value:
            serial = value
        elif key == "io" and value in ENGINES:
            engine = value
        else:
            raise UsageError(f"--disk {spec}: unknown option {option!r}; write {_SYNTAX}")
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
    return DiskFile(fd, path, size // SECTOR, read_only, identity, engine)


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
