"""The folder that `--memory-file` names: made ready before the run, left as it was found.

A run that was killed leaves a mount behind that nobody serves; it is found and taken away.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess

from vmm.core.errors import HostError, UsageError

_DEVICE = "/dev/fuse"
_MNT_DETACH = 2


class Place:
    """A folder with nothing in it, on which something can be mounted."""

    def __init__(self, path: str) -> None:
        """Makes the folder where there is none. Raises UsageError and HostError, one line each."""
        if not path or "\0" in path:
            raise UsageError("--memory-file needs a folder's path")
        self.path = os.path.abspath(path)
        self._made = False
        _require_fuse(path)
        try:
            self._prepare()
        except OSError as error:
            raise UsageError(
                f"--memory-file {path}: {error.strerror or error}; give an empty folder, or a name "
                "in a folder that you may write to"
            ) from error

    def _prepare(self) -> None:
        try:
            os.stat(self.path)
        except FileNotFoundError:
            os.mkdir(self.path, 0o700)
            self._made = True
            return
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            # What a killed run has left: mounted, and nobody there. Ours made the folder, too.
            unmount(self.path)
            os.stat(self.path)
            self._made = not os.listdir(self.path)
        if os.path.ismount(self.path):
            raise OSError(errno.EBUSY, "something is mounted there, perhaps by another run")
        if os.listdir(self.path):
            raise OSError(errno.ENOTEMPTY, "there is something in that folder")

    def leave(self, *, mounted: bool) -> None:
        """Unmount what still is, and remove the folder if it was made here."""
        if mounted:
            with contextlib.suppress(OSError):
                unmount(self.path)
        if self._made:
            with contextlib.suppress(OSError):
                os.rmdir(self.path)

    def left_behind(self) -> str:
        """What is there still after `leave`, and what takes it away; empty: nothing. Not while it
        is mounted and served: the answer might not come."""
        try:
            os.lstat(self.path)
        except FileNotFoundError:
            return ""
        except OSError:  # nobody serves it
            return f"it stays mounted; take it away with: umount {self.path}"
        return f"the folder stays behind; remove it with: rmdir {self.path}" if self._made else ""


def _require_fuse(path: str) -> None:
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        raise HostError(
            f"--memory-file {path}: {_DEVICE} is missing or not yours to open (modprobe fuse; in a "
            "container it has to be given)"
        )
    if os.geteuid() and shutil.which("fusermount3") is None:
        raise HostError(
            f"--memory-file {path}: only root mounts without fusermount3; install Debian's fuse3"
        )
    from vmm.control.memory_file.libfuse import Library

    try:
        Library()
    except (OSError, AttributeError) as error:
        raise HostError(
            f"--memory-file {path}: libfuse 3 can't be loaded ({error}); install Debian's fuse3"
        ) from None


def unmount(path: str) -> None:
    """Take a mount away, at once for new users of it. Raises OSError."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(path), _MNT_DETACH):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        return
    done = subprocess.run(
        ["fusermount3", "-u", "-z", path],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise OSError(errno.EBUSY, "fusermount3 -u fails", path)
