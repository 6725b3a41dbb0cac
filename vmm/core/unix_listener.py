"""A Unix socket to listen on, where the user named one."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator

from vmm.core.errors import UsageError, limit_met

AGAIN_SECONDS = 1.0
"""When it is tried again to take a caller for whom the host had no memory."""
_open: set[UnixListener] = set()


def listening() -> list[UnixListener]:
    """Those of this process that are open."""
    return list(_open)


_REMEDY = (
    "; give a path of at most 107 bytes in a directory that you may write to, where nothing is yet"
)


class UnixListener:
    """Listens at `path`, without ever blocking; `close` removes the socket."""

    def __init__(self, option: str, path: str, *, owner_only: bool = False) -> None:
        """Raises UsageError, which names `option`. A socket left behind there by a process that
        has ended is replaced. `owner_only`: nobody else may connect (mode 0600)."""
        self.path = path
        self.rest = 0.0
        """For how many seconds there is no point in a `take`. Who waits on the fd meanwhile is
        told of the same caller for ever."""
        self._spare = -1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Given up for a moment to hang up on a caller for whom there is no fd: who is not
            # taken would be announced for ever.
            self._spare = _spare_fd()
            _remove_stale(path)
            with _umask(0o177) if owner_only else contextlib.nullcontext():
                self._socket.bind(path)
            self._inode = os.lstat(path).st_ino
            self._socket.listen(16)
            # Before it listened, it looked like a socket that was left behind.
            if _inode(path) != self._inode:
                raise FileExistsError(errno.EADDRINUSE, "another process has just taken it")
        except (OSError, ValueError) as error:
            self._socket.close()
            if self._spare >= 0:
                os.close(self._spare)
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            limit = limit_met(error) if isinstance(error, OSError) else ""
            raise UsageError(
                f"{option}{path}: cannot listen there: {reason}{limit or _REMEDY}"
            ) from error
        self._socket.setblocking(False)
        self.fd = self._socket.fileno()
        _open.add(self)

    @property
    def descriptors(self) -> tuple[int, int]:
        """All that must be open for callers to be taken."""
        return self.fd, self._spare

    def accept(self) -> socket.socket | None:
        """Who has come, non-blocking; None when nobody has, or there was no fd left for them.

        Raises OSError where who has come can be neither taken nor turned away now (ENOMEM).
        """
        try:
            caller, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._turn_away():
                raise
            return None
        caller.setblocking(False)
        return caller

    def take(self) -> socket.socket | None:
        """As `accept`; None also where nobody can be taken now, and then `rest` is the time."""
        self.rest = 0.0
        try:
            return self.accept()
        except OSError:
            self.rest = AGAIN_SECONDS
            return None

    def _turn_away(self) -> bool:
        """Hang up on who has come; whether they are gone."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        try:
            caller, _ = self._socket.accept()
            caller.close()
        except BlockingIOError:
            pass
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                self._spare = _spare_fd()
        return True

    def close(self) -> None:
        _open.discard(self)
        if self._socket.fileno() >= 0:
            self.remove()
            self._socket.close()
            if self._spare >= 0:
                os.close(self._spare)

    def remove(self) -> None:
        """Take the socket's path away, if it is this one's still."""
        # While it is open, no other file gets its inode's number.
        with contextlib.suppress(OSError):
            if _inode(self.path) == self._inode:
                _take_away(self.path, lambda aside: _inode(aside) == self._inode)


def _spare_fd() -> int:
    """Of no file: a device's process can open none. Raises OSError."""
    return os.eventfd(0, os.EFD_CLOEXEC)


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    """What is made within the block never has the permissions in `mask`, not for a moment."""
    former = os.umask(mask)
    try:
        yield
    finally:
        os.umask(former)


def _inode(path: str) -> int | None:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return None


def _remove_stale(path: str) -> None:
    """Remove a socket at which nobody listens; whatever else is there stays."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return  # bind says what is wrong
    except FileNotFoundError:
        return
    if _nobody_listens(path):
        _take_away(path, _nobody_listens)


def _nobody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


def _take_away(path: str, is_it: Callable[[str], bool]) -> None:
    """Remove the socket at `path`, if it is the one that is meant and no other one.

    Another process may put its own there between a look and an unlink. So it is moved aside
    first, looked at once more where nobody else can exchange it, and moved back if it isn't.
    """
    with contextlib.ExitStack() as opened:
        folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, folder)
        name, aside = os.path.basename(path), f".pyvmm-{os.urandom(8).hex()}"
        try:
            os.rename(name, aside, src_dir_fd=folder, dst_dir_fd=folder)
        except FileNotFoundError:
            return
        # Short enough for a socket's address, however long the folder's path is.
        if not is_it(f"/proc/self/fd/{folder}/{aside}"):
            with contextlib.suppress(FileExistsError):  # nor is a third one replaced
                os.link(aside, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        os.unlink(aside, dir_fd=folder)
