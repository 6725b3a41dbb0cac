"""The file or block device behind a disk: what `--disk FILE[,OPTION...]` opens."""

from __future__ import annotations

import contextlib
import os
import stat

from vmm.core.disk_image import SECTOR, check_raw, in_use, is_read_only_device, lock
from vmm.core.errors import UsageError, one_line
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.suboptions import Suboptions
from vmm.memory.transfer import ENGINES

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

SERIAL_BYTES = 20

SYNTAX = (
    f"FILE[,ro][,serial=TEXT][,queues=N][,io={'|'.join(ENGINES)}][,format=raw][,share=on][,process]"
)
MOST_QUEUES = 16
_SAMPLES, _SAMPLE_BYTES = 64, 32 << 10
"""What of a disk is looked at to tell it from others, in equal distances from its beginning on."""


class DiskFile:
    """An open disk: `sectors` of 512 bytes on `fd`, which this object owns.

    `engine` names how its bytes are to be moved, `queues` how many requests at the same time;
    `apart`: whether the device is to have a process of its own.
    """

    __slots__ = ("apart", "engine", "fd", "path", "queues", "read_only", "sectors", "serial")

    def __init__(
        self,
        fd: int,
        path: str,
        sectors: int,
        read_only: bool,
        serial: bytes,
        engine: str = "auto",
        queues: int = 1,
        apart: bool = False,
    ) -> None:
        self.fd = fd
        self.path = path
        self.sectors = sectors
        self.read_only = read_only
        self.serial = serial
        self.queues = queues
        self.engine = engine
        self.apart = apart

    def identity(self) -> State:
        """What tells this disk, as it is now, from others, and from what it will be. Raises
        OSError."""
        found = os.fstat(self.fd)
        return {
            "path": one_line(os.path.abspath(self.path)),
            "sectors": self.sectors,
            # A device file's time says nothing of what is on the device.
            "changed_ns": found.st_mtime_ns if stat.S_ISREG(found.st_mode) else 0,
            "sample": self._sample(),
        }

    def _sample(self) -> int:
        """A checksum over some of the disk."""
        from binascii import crc32  # for snapshots alone

        total = 0
        step = max(self.sectors * SECTOR // _SAMPLES // SECTOR * SECTOR, _SAMPLE_BYTES)
        for number in range(_SAMPLES):
            total = crc32(os.pread(self.fd, _SAMPLE_BYTES, number * step), total)
        return total

    def require(self, saved: Saved) -> None:
        """Raises BadState unless this is the disk that `identity` was asked of, unchanged."""
        path = saved.text("path", 1 << 14)
        sectors = saved.number("sectors", 1 << 55)
        changed = saved.number("changed_ns", 1 << 63)
        sample = saved.number("sample", 0xFFFF_FFFF)
        here = self.identity()
        what = ""
        if sectors != self.sectors:
            what = f"it has {self.sectors} sectors, and had {sectors}"
        elif changed != here["changed_ns"] or sample != here["sample"]:
            what = "it was written to since (a copy has to keep the time: cp --preserve)"
        if what:
            raise saved.bad(
                f"--disk {self.path} is not as the guest left {path!r}: {what}; give the disk as "
                "it was at the snapshot"
            )

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ReadAhead:
    """Whether the kernel reads ahead of a disk's reads: where they have to be waited for, and data
    follow.

    It reads ahead as much as the file's device is set to, which may be 8 MiB at a time. Data it
    asks the device for, and goes on; holes it fills with zeros at once, in the time of the thread
    that reads: some 2 ms for each MiB. And once it has read ahead, it does so again when a read
    meets what was, whatever it was advised since: that has to be dropped.

    Any thread may call: what two of them confuse is one look more or less.
    """

    WAITED = 0.0005
    """Seconds: a read of a MiB that takes longer has not found all of it in the host's memory."""
    EVERY = 8 << 20
    """Bytes read between two looks, where nothing has to be waited for because of it."""
    AHEAD = 32 << 20
    """Bytes that are looked at: as many as may be read ahead before the next look."""
    DROPPED = 16 << 20
    """Bytes that may have been read ahead."""

    __slots__ = ("_fd", "_is_on", "_left")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._is_on = False
        self._left = self.EVERY
        advise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def is_due(self, seconds: float, size: int) -> bool:
        """A read of so many bytes took so long; whether to `look`."""
        if seconds >= self.WAITED and seconds * (1 << 20) >= self.WAITED * size:
            return True
        if self._is_on:
            self._left -= size
        return self._left <= 0

    def look(self, position: int) -> None:
        """A read ended there: look at what follows."""
        from vmm.devices.virtio.read_ahead import drop, holes  # a start does without

        self._left = self.EVERY
        found, was_on = holes(self._fd, position, self.AHEAD), self._is_on
        wanted = not found
        if wanted != was_on:
            self._is_on = wanted
            advice = os.POSIX_FADV_NORMAL if wanted else os.POSIX_FADV_RANDOM
            advise(self._fd, 0, 0, advice)
        if not wanted:
            end = position + self.DROPPED
            # Holes always: other programs' reads may have been read ahead of, too. Data cost
            # another read, and nothing is read ahead of them but by this.
            near = [(position, end)] if was_on else [part for part in found if part[0] < end]
            drop(self._fd, near)


def advise(fd: int, offset: int, size: int, advice: int) -> None:
    """posix_fadvise(2). Advice that isn't taken (by a kernel without it, by a file system) costs
    time, and nothing else."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, size, advice)


def open_disk(spec: str) -> DiskFile:
    """Open the disk that `spec` names; a comma in a file name is written twice.

    It is locked against other machines until it is closed: a writer wants it alone. Raises
    UsageError for whatever is wrong with it.
    """
    words = Suboptions("--disk", spec, SYNTAX)
    path = words.first("file")
    read_only = words.flag("ro")
    serial = _serial(words, path)
    queues = words.take_number("queues", 1, MOST_QUEUES) or 1
    engine = words.take_word("io", ENGINES) or "auto"
    raw = words.take_word("format", ("raw",)) is not None
    shared = words.take_word("share", ("on", "off")) == "on"
    apart = words.flag("process")
    words.finish()
    if apart and queues > 1:
        raise UsageError(
            f"--disk {path}: a process of its own serves one queue; leave queues={queues} away"
        )
    fd = _open(path, read_only)
    try:
        size = check_raw(fd, "--disk", path, raw=raw)
        if not read_only and is_read_only_device(fd):
            raise UsageError(
                f"--disk {path} is a read-only device; to open it read-only, write --disk {path},ro"
            )
        if not shared and not lock(fd, write=not read_only):
            raise in_use("--disk", path, write=not read_only)
    except OSError as error:
        os.close(fd)
        raise UsageError(
            f"--disk {path} cannot be looked at and locked: {error.strerror or error}; name "
            "another file, or add share=on to go without the lock"
        ) from error
    except BaseException:
        os.close(fd)
        raise
    return DiskFile(fd, path, size // SECTOR, read_only, serial, engine, queues, apart)


def _serial(words: Suboptions, path: str) -> bytes:
    """What get-id answers: as given, or as much of the file's name as there is room for."""
    given = words.take("serial")
    if given is None:
        return os.fsencode(os.path.basename(path))[:SERIAL_BYTES]
    serial = os.fsencode(given)
    if len(serial) > SERIAL_BYTES:
        raise words.error(f"the serial has {len(serial)} bytes, {SERIAL_BYTES} at most fit")
    return serial


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
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        os.close(fd)
        raise UsageError(f"--disk {path} cannot be looked at: {error.strerror}") from error
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        os.set_blocking(fd, True)
        return fd
    os.close(fd)
    what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
    raise UsageError(f"--disk {path} is {what}; name a file or block device")
