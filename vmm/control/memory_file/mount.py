"""The file system of `--memory-file DIR`: `memory`, `states` and `changes` in a FUSE mount.

libfuse by mfusepy, on a thread of its own: its loop waits in C, and takes one request at a time.
What it asks for is done there, under GuestMemory's rules, as a device's accesses are.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import mfusepy

from vmm.control.memory_file.guest_file import Announce, GuestFile
from vmm.control.memory_file.place import Place
from vmm.core.errors import HostError, one_line
from vmm.core.event_loop import EventLoop
from vmm.core.ranges import PAGE_SIZE
from vmm.policy import PolicyError, PolicyKill

MEMORY, STATES, CHANGES = "/memory", "/states", "/changes"
MOST_OPEN = 64
"""How many times the files may be open at once: a text of page states is held for each."""
MOUNT_SECONDS = 10.0
_END_SECONDS = 2.0
_UNNAMED = "?"

LARGE = 64 << 10
"""From this size on a read moves pages instead of copying their bytes once more."""
_PIPE_BYTES = 2 << 20
# fuse_common.h
_CAP_SPLICE_WRITE, _CAP_SPLICE_MOVE = 1 << 7, 1 << 8
_BUF_IS_FD = 1 << 1

_libfuse = mfusepy._libfuse
_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
_libc.free.restype, _libc.free.argtypes = None, (ctypes.c_void_p,)
_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


_no_log = _Log(lambda level, text, arguments: None)
"""libfuse would print to stderr, where each error is one line of ours."""


class _Open:
    """One open file: its text, if it has one, and for `changes` who waits for the next."""

    __slots__ = ("announce", "seen", "text", "waiter")

    def __init__(self, announce: Announce | None, text: bytes | None) -> None:
        self.announce = announce
        self.text = text
        self.seen = -1
        self.waiter: Any = None


class _Files:
    """What libfuse calls, by mfusepy's names for it. On the mount's thread."""

    use_ns = True

    def __init__(
        self,
        guest: GuestFile,
        watcher: Callable[[str], Announce | None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self.guest = guest
        self.ready = threading.Event()
        self.ending = False
        self._watcher = watcher
        self._fail = fail
        self._began = time.time_ns()
        self._open: dict[int, _Open] = {}
        self._next = 1
        self.opens = 0
        self.pipe = _Pipe() if guest.moves else None
        self.waiting = False
        """Whether somebody polls for the next change."""

    def init_with_config(self, connection: Any, config: Any) -> None:
        connection.want |= connection.capable & (_CAP_SPLICE_WRITE | _CAP_SPLICE_MOVE)
        self.ready.set()

    def destroy(self, path: str) -> None:
        for each in self._open.values():
            _release_waiter(each)
        self._open.clear()
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None

    def getattr(self, path: str, info: Any = None) -> dict[str, int]:
        if self.ending:
            mfusepy.fuse_exit()
            raise OSError(errno.ESHUTDOWN, "the guest has ended")
        common = {
            "st_uid": os.getuid(),
            "st_gid": os.getgid(),
            "st_nlink": 1,
            **dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), self._began),
        }
        if path == "/":
            return {**common, "st_mode": stat.S_IFDIR | 0o500, "st_nlink": 2}
        if path == MEMORY:
            return {
                **common,
                "st_mode": stat.S_IFREG | 0o600,
                "st_size": self.guest.size,
                "st_blocks": self.guest.data_bytes // 512,
                "st_blksize": 1 << 20,
            }
        if path in (STATES, CHANGES):
            return {**common, "st_mode": stat.S_IFREG | 0o400, "st_size": 0}
        raise OSError(errno.ENOENT, "no such file")

    def readdir(self, path: str, handle: int) -> list[str]:
        return [".", "..", *(name[1:] for name in (MEMORY, STATES, CHANGES))]

    def open(self, path: str, info: Any) -> int:
        if path not in (MEMORY, STATES, CHANGES):
            raise OSError(errno.ENOENT, "no such file")
        if info.flags & os.O_TRUNC:
            raise OSError(errno.EPERM, "memory has the size that it has")
        if len(self._open) >= MOST_OPEN:
            raise OSError(errno.ENFILE, "open too often")
        text = self.guest.states_text() if path == STATES else None
        announce = self._guarded(self._watcher(f"file:{_opener()}")) if path == MEMORY else None
        info.fh = self._next
        # Nothing is cached: a page may be private the next moment. Nor can it be mapped, then.
        info.direct_io = 1
        info.nonseekable = 0
        self._open[self._next] = _Open(announce, text)
        self._next += 1
        self.opens += 1
        return 0

    def _guarded(self, announce: Announce | None) -> Announce | None:
        """What a policy ends the run with ends it from here, too."""
        if announce is None:
            return None

        def ask(area: Any, is_write: bool, named: str | None) -> None:
            try:
                announce(area, is_write, named)
            except (PolicyKill, PolicyError) as error:
                self._fail(error)
                raise OSError(errno.EACCES, "a policy has ended the run") from None

        return ask

    def release(self, path: str, info: Any) -> int:
        each = self._open.pop(info.fh, None)
        if each is not None:
            _release_waiter(each)
        return 0

    def truncate(self, path: str, size: int) -> int:
        raise OSError(errno.EPERM, "memory has the size that it has")

    def moved(self, path: str, size: int, offset: int, info: Any) -> int | None:
        """Large reads of memory: how much is in the pipe `outlet`; None where it isn't done so."""
        if size < LARGE or path != MEMORY or self.pipe is None:
            return None
        each = self._of(info)
        if not self.pipe.has_room(size + offset % PAGE_SIZE):
            return None
        return self.guest.move_to(self.pipe.inlet, size, offset, each.announce)

    def read_into(self, path: str, buffer: memoryview, offset: int, info: Any) -> int:
        each = self._of(info)
        if path == MEMORY:
            return self.guest.read_into(buffer, offset, each.announce)
        if path == CHANGES and not offset:
            each.seen = self.guest.changes
            each.text = b"%d\n" % each.seen
        text = (each.text or b"")[offset : offset + len(buffer)]
        buffer[: len(text)] = text
        return len(text)

    def write_from(self, path: str, data: memoryview, offset: int, info: Any) -> int:
        if path != MEMORY:
            raise OSError(errno.EACCES, "not for writing")
        return self.guest.write(data, offset, self._of(info).announce)

    read_buf, write = read_into, write_from  # mfusepy looks for these names

    def lseek(self, path: str, offset: int, whence: int, info: Any) -> int:
        if path != MEMORY:
            raise OSError(errno.EINVAL, "no sparse file")
        self._of(info)
        return self.guest.seek(offset, whence)

    def poll(self, path: str, info: Any, handle: Any, ready: Any) -> int:
        """`changes` is readable when there is a number in it that this file hasn't read."""
        each = self._of(info)
        if path != CHANGES:
            if handle:
                _libfuse.fuse_pollhandle_destroy(handle)
            ready[0] = select.POLLIN | select.POLLOUT
            return 0
        if handle:
            _release_waiter(each)
            each.waiter = ctypes.cast(handle, ctypes.c_void_p)
            self.waiting = True
        ready[0] = select.POLLIN if each.seen != self.guest.changes else 0
        return 0

    def notify(self) -> None:
        """Wake who polls; on the loop's thread."""
        self.waiting = False
        for each in list(self._open.values()):
            waiter = each.waiter
            if waiter is not None and each.seen != self.guest.changes:
                _libfuse.fuse_notify_poll(waiter)

    def _of(self, info: Any) -> _Open:
        if self.ending:
            raise OSError(errno.ESHUTDOWN, "the guest has ended")
        each = self._open.get(info.fh)
        if each is None:
            raise OSError(errno.EBADF, "not open")
        return each


def _release_waiter(each: _Open) -> None:
    waiter, each.waiter = each.waiter, None
    if waiter is not None:
        _libfuse.fuse_pollhandle_destroy(waiter)


def _opener() -> str:
    """The name of the process whose request this is."""
    _, _, process = mfusepy.fuse_get_context()
    try:
        with open(f"/proc/{process}/comm", "rb") as file:
            return one_line(file.read(64).decode("utf-8", "replace").strip()) or _UNNAMED
    except OSError:
        return _UNNAMED


class _Fuse(mfusepy.FUSE):  # type: ignore[misc]  # it has no types
    """mfusepy's, with lseek, which it lacks, and with bytes moved once instead of twice."""

    operations: _Files

    def read_buf(self, path: bytes, answer: Any, size: int, offset: int, info: Any) -> int:
        """libfuse frees what it is given here."""
        name, files = path.decode(), self.operations
        moved = files.moved(name, size, offset, info.contents)
        if moved is not None:
            assert files.pipe is not None
            _give(answer, _BufferVector(1, 0, 0, moved, _BUF_IS_FD, None, files.pipe.outlet, 0))
            return 0
        memory = _libc.malloc(size)
        if not memory:
            raise OSError(errno.ENOMEM, "no memory")
        try:
            array = (ctypes.c_char * size).from_address(memory)
            done = files.read_into(name, memoryview(array).cast("B"), offset, info.contents)
            _give(answer, _BufferVector(1, 0, 0, done, 0, memory, -1, 0))
        except BaseException:
            _libc.free(memory)
            raise
        return 0

    def write(self, path: bytes, buffer: Any, size: int, offset: int, info: Any) -> int:
        return self.operations.write_from(path.decode(), _view(buffer, size), offset, info.contents)

    def lseek(self, path: bytes, offset: int, whence: int, info: Any) -> int:
        return self.operations.lseek(path.decode(), offset, whence, info.contents)


def _view(buffer: Any, size: int) -> memoryview:
    """libfuse's own buffer, for one call."""
    array = (ctypes.c_char * size).from_address(ctypes.addressof(buffer.contents))
    return memoryview(array).cast("B")


class _BufferVector(ctypes.Structure):
    """struct fuse_bufvec with its one struct fuse_buf (fuse_common.h), which libfuse frees."""

    _fields_ = (
        ("count", ctypes.c_size_t),
        ("idx", ctypes.c_size_t),
        ("off", ctypes.c_size_t),
        ("size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("mem", ctypes.c_void_p),
        ("fd", ctypes.c_int),
        ("pos", ctypes.c_int64),
    )


def _give(answer: Any, vector: _BufferVector) -> None:
    """Hand libfuse a copy of its own. Raises OSError."""
    size = ctypes.sizeof(vector)
    place = _libc.malloc(size)
    if not place:
        raise OSError(errno.ENOMEM, "no memory")
    ctypes.memmove(place, ctypes.addressof(vector), size)
    ctypes.cast(answer, ctypes.POINTER(ctypes.c_void_p))[0] = place


class _Pipe:
    """Where pages of memory wait for libfuse to send them; empty between two requests."""

    def __init__(self) -> None:
        self.outlet, self.inlet = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._room = fcntl.fcntl(self.inlet, fcntl.F_GETPIPE_SZ)
        with contextlib.suppress(OSError):  # a user's pipes have a limit, 1 MiB most often
            self._room = fcntl.fcntl(self.inlet, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def has_room(self, size: int) -> bool:
        """Whether that many bytes from a page's start on fit; what an earlier request has left,
        as nobody took its answer, is thrown away."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.outlet, 1 << 20):
                pass
        return size <= self._room

    def close(self) -> None:
        os.close(self.inlet)
        os.close(self.outlet)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """libfuse takes SIGTERM and SIGHUP for itself where nobody else has them: given back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class MemoryMount:
    """The mount, from `start` to `close`."""

    def __init__(
        self,
        place: Place,
        guest: GuestFile,
        watcher: Callable[[str], Announce | None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """`watcher` makes what asks the policies about one opener; `fail` takes, on the mount's
        thread, what a policy ended the run with."""
        self._place = place
        self._files = _Files(guest, watcher, fail)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="memory-file", daemon=True)

    def start(self, loop: EventLoop, set_on_change: Callable[[Callable[[], None]], None]) -> None:
        """Mount it. Raises HostError where that fails."""
        # Since libfuse 3.7. Before it, what goes wrong is printed twice.
        with contextlib.suppress(AttributeError):
            _libfuse.fuse_set_log_func(_no_log)
        with _own_signals():
            self._wait()

        def changed() -> None:
            if self._files.waiting:
                loop.set_timer(time.monotonic(), self._files.notify)

        set_on_change(changed)

    def _wait(self) -> None:
        """Start the thread, and wait until the kernel has asked it for the first time."""
        self._thread.start()
        deadline = time.monotonic() + MOUNT_SECONDS
        while not self._files.ready.wait(0.01):
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise HostError(
                    f"--memory-file {self._place.path}: FUSE can't be mounted there "
                    f"({self._failure or 'no answer'}); as another user than root it needs "
                    "fusermount3 (Debian: fuse3), in a container /dev/fuse and the right to mount"
                )

    def _serve(self) -> None:
        try:
            _Fuse(
                self._files,
                self._place.path,
                raw_fi=True,
                foreground=True,
                nothreads=True,
                fsname="pyvmm",
                subtype="pyvmm",
                default_permissions=True,
                nosuid=True,
                nodev=True,
                noexec=True,
                attr_timeout=0,
                entry_timeout=0,
            )
        except BaseException as failure:
            self._failure = failure

    def as_dict(self) -> dict[str, object]:
        """For the report."""
        return {"opens": self._files.opens, **self._files.guest.counts}

    def close(self) -> None:
        """Unmount; who has a file open finds it gone. Any number of times."""
        self._files.ending = True
        if self._thread.is_alive():
            # Any request has libfuse's loop look at whether it is to end.
            poke = threading.Thread(target=_stat, args=(self._place.path,), daemon=True)
            poke.start()
            self._thread.join(_END_SECONDS)
        self._place.leave(mounted=self._thread.is_alive())


def _stat(path: str) -> None:
    with contextlib.suppress(OSError):
        os.stat(os.path.join(path, "memory"))
