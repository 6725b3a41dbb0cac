"""The file system of `--memory-file DIR`: `memory`, `states` and `changes` in a FUSE mount.

libfuse on a thread of its own: its loop waits in C, and takes one request at a time. What it asks
for is done there, under GuestMemory's rules, as a device's accesses are.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable
from typing import Any

from vmm.control.memory_file.guest_file import Announce, GuestFile
from vmm.control.memory_file.libfuse import ROOT, Answer, Attributes, Library, Session
from vmm.control.memory_file.place import Place
from vmm.core.errors import HostError, in_words, one_line, tell
from vmm.core.event_loop import EventLoop
from vmm.exits.run_loop import KICK_SIGNAL, install_kick_handler
from vmm.policy import PolicyError, PolicyKill

MEMORY, STATES, CHANGES = 2, 3, 4
MOST_OPEN = 64
"""How many times the files may be open at once: a text of page states is held for each."""
MOUNT_SECONDS = 10.0
_END_SECONDS = 2.0
_AGAIN_SECONDS = 0.1
"""When what couldn't be woken is tried to be woken again."""
_UNNAMED = "?"
_MOST_DESCRIPTORS = 1 << 30
"""More than there can be (fs.nr_open)."""
_OPTIONS = "fsname=pyvmm,subtype=pyvmm,default_permissions,nosuid,nodev,noexec"


class _Open:
    """One open file: its text, if it has one, and for `changes` what polls for the next."""

    __slots__ = ("announce", "inode", "seen", "text", "waiter")

    def __init__(self, inode: int, announce: Announce | None, text: bytes | None) -> None:
        self.inode = inode
        self.announce = announce
        self.text = text
        self.seen = -1
        self.waiter: int | None = None


class _Files:
    """What libfuse asks for; see vmm.control.memory_file.libfuse.Files."""

    def __init__(
        self,
        library: Library,
        guest: GuestFile,
        watcher: Callable[[str], Announce | None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self.names = {b"memory": MEMORY, b"states": STATES, b"changes": CHANGES}
        self.began_ns = time.time_ns()
        self.guest = guest
        self.ending: Callable[[], None] | None = None
        """What leaves the session, once the guest has ended."""
        self._library = library
        self._watcher = watcher
        self.failed = fail
        self._open: dict[int, _Open] = {}
        self._next = 1
        self.opens = 0
        self.waiting = False
        """Whether somebody polls for the next change."""

    def give_up(self) -> None:
        """The session is over."""
        for each in self._open.values():
            self._release_waiter(each)
        self._open.clear()

    def attributes(self, inode: int) -> Attributes:
        self._require_guest()
        if inode == ROOT:
            return Attributes(stat.S_IFDIR | 0o500)
        if inode == MEMORY:
            blocks = self.guest.data_bytes // 512
            return Attributes(stat.S_IFREG | 0o600, self.guest.size, blocks)
        return Attributes(stat.S_IFREG | 0o400)

    def open(self, inode: int, flags: int, process: int) -> int:
        self._require_guest()
        if flags & os.O_TRUNC:
            raise OSError(errno.EPERM, "memory has the size that it has")
        if len(self._open) >= MOST_OPEN:
            raise OSError(errno.ENFILE, "open too often")
        text = self.guest.states_text() if inode == STATES else None
        announce = None
        if inode == MEMORY:
            announce = self._guarded(self._watcher(f"file:{_name_of(process)}"))
        handle = self._next
        self._open[handle] = _Open(inode, announce, text)
        self._next += 1
        self.opens += 1
        return handle

    def _guarded(self, announce: Announce | None) -> Announce | None:
        """What a policy ends the run with ends it from here, too."""
        if announce is None:
            return None

        def ask(area: Any, is_write: bool, named: str | None) -> None:
            try:
                announce(area, is_write, named)
            except (PolicyKill, PolicyError) as error:
                self.failed(error)
                raise OSError(errno.EACCES, "a policy has ended the run") from None

        return ask

    def release(self, handle: int) -> None:
        each = self._open.pop(handle, None)
        if each is not None:
            self._release_waiter(each)

    def read(self, handle: int, size: int, offset: int, answer: Answer) -> None:
        each = self._of(handle)
        if each.inode == MEMORY:
            self.guest.read(size, offset, each.announce, answer)
            return
        if each.inode == CHANGES and not offset:
            each.seen = self.guest.changes
            each.text = b"%d\n" % each.seen
        answer.data((each.text or b"")[offset : offset + size])

    def write(self, handle: int, data: memoryview, offset: int) -> int:
        each = self._of(handle)
        if each.inode != MEMORY:
            raise OSError(errno.EACCES, "not for writing")
        return self.guest.write(data, offset, each.announce)

    def seek(self, handle: int, offset: int, whence: int) -> int:
        if self._of(handle).inode != MEMORY:
            raise OSError(errno.EINVAL, "no sparse file")
        return self.guest.seek(offset, whence)

    def poll(self, handle: int, waiter: int | None) -> int:
        """`changes` is readable when there is a number in it that this file hasn't read."""
        try:
            each = self._of(handle)
        except OSError:
            if waiter is not None:
                self._library.give_back(waiter)
            raise
        if each.inode != CHANGES:
            if waiter is not None:
                self._library.give_back(waiter)
            return select.POLLIN | select.POLLOUT
        if waiter is not None:
            self._release_waiter(each)
            each.waiter = waiter
            self.waiting = True
        return select.POLLIN if each.seen != self.guest.changes else 0

    def notify(self) -> bool:
        """Wake what polls; on the loop's thread. Whether all are awake."""
        self.waiting = False
        for each in list(self._open.values()):
            waiter = each.waiter
            if waiter is not None and each.seen != self.guest.changes:
                self.waiting |= self._library.notify(waiter) not in (0, -errno.ENOENT)
        return not self.waiting

    def _of(self, handle: int) -> _Open:
        self._require_guest()
        each = self._open.get(handle)
        if each is None:
            raise OSError(errno.EBADF, "not open")
        return each

    def _require_guest(self) -> None:
        if self.ending is not None:
            self.ending()
            raise OSError(errno.ESHUTDOWN, "the guest has ended")

    def _release_waiter(self, each: _Open) -> None:
        waiter, each.waiter = each.waiter, None
        if waiter is not None:
            self._library.give_back(waiter)


def _name_of(process: int) -> str:
    try:
        with open(f"/proc/{process}/comm", "rb") as file:
            return one_line(file.read(64).decode("utf-8", "replace").strip()) or _UNNAMED
    except OSError:
        return _UNNAMED


class MemoryMount:
    """The mount, from `start` to `close`."""

    def __init__(
        self,
        place: Place,
        guest: GuestFile,
        watcher: Callable[[str], Announce | None],
        fail: Callable[[BaseException], None],
        at_start: Callable[[], None] | None = None,
    ) -> None:
        """`watcher` makes what asks the policies about one opener; `fail` takes, on the mount's
        thread, what the run is to end with: a policy's word, or a mistake of ours; `at_start` is
        called on that thread first. Raises HostError where libfuse can't be used."""
        self._place = place
        self._at_start = at_start
        try:
            library = Library()
            self._files = _Files(library, guest, watcher, fail)
            self._session = Session(library, self._files, _OPTIONS)
        except OSError as error:
            raise HostError(f"--memory-file {place.path}: {in_words(error)}") from error
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="memory-file", daemon=True)
        self._mounted = self._gone = False
        self._loop: EventLoop | None = None

    def start(self, loop: EventLoop, set_on_change: Callable[[Callable[[], None]], None]) -> None:
        """Mount it. Raises HostError where that fails."""
        install_kick_handler()
        try:
            self._session.mount(self._place.path)
        except OSError as error:
            raise self._unmountable(error.strerror) from None
        self._mounted = True
        self._loop = loop
        self._thread.start()
        self._await_answer()
        self._ready.set()

        def changed() -> None:
            if self._files.waiting:
                loop.set_timer(time.monotonic(), notify)

        def notify() -> None:
            if not self._gone and not self._files.notify():
                loop.set_timer(time.monotonic() + _AGAIN_SECONDS, notify)

        set_on_change(changed)

    def _await_answer(self) -> None:
        """Until somebody who asks has an answer: the kernel passes nothing on before it has
        libfuse's to its own first request. Raises HostError."""
        deadline = time.monotonic() + MOUNT_SECONDS
        asking = 0
        try:
            while True:
                asking = asking or _ask(self._place.path)
                ended, status = os.waitpid(asking, os.WNOHANG)
                if ended:
                    asking = 0
                    if status == 0:
                        return
                    # The question couldn't be read, perhaps: the next may be.
                self._thread.join(0.001)
                if not self._thread.is_alive():
                    self._gone = True
                    self._session.abandon()  # nobody waits for an answer any more
                    raise self._unmountable(_why(self._failure))
                if time.monotonic() > deadline:
                    raise self._unmountable("no answer")
        except OSError as error:
            raise self._unmountable(error.strerror) from None
        finally:
            if asking:
                os.kill(asking, signal.SIGKILL)
                os.waitpid(asking, 0 if self._gone else os.WNOHANG)

    def _unmountable(self, reason: object) -> HostError:
        return HostError(
            f"--memory-file {self._place.path}: FUSE can't be mounted there ({reason}); as another "
            "user than root it needs fusermount3 (Debian: fuse3), in a container /dev/fuse and the "
            "right to mount"
        )

    def _serve(self) -> None:
        try:
            if self._at_start is not None:
                self._at_start()
            self._session.serve()
        except BaseException as failure:
            self._failure = failure
            if self._ready.is_set() and not isinstance(failure, OSError):
                self._files.failed(failure)
                return
        if self._loop is not None and self._ready.is_set() and self._files.ending is None:
            # On its thread: there somebody may be about to wake what polls.
            self._loop.set_timer(time.monotonic(), self._lost)

    def _lost(self) -> None:
        """Nobody serves it any more, but the guest goes on, and so may nobody wait for it. It is
        unmounted at the end: a sandbox has no umount2(2)."""
        self._thread.join()
        self._gone = True
        self._files.give_up()
        self._session.abandon()
        why = "it was unmounted"
        if isinstance(self._failure, OSError):
            why = f"/dev/fuse: {in_words(self._failure)}"
        tell(f"--memory-file {self._place.path} is gone: {why}; the guest goes on without it")

    def as_dict(self) -> dict[str, object]:
        """For the report."""
        return {"opens": self._files.opens, **self._files.guest.counts}

    def close(self) -> None:
        """Unmount; what has a file open finds it gone. Any number of times."""
        self._files.ending = self._session.leave
        if self._thread.is_alive():  # else there may be no session any more
            self._session.leave()
        deadline = time.monotonic() + _END_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            # An interrupted read(2) has libfuse's loop look at whether it is to end; again, as it
            # may not have been in it yet. A request would do, too, but who waits for an answer of
            # the process that he is of can't be killed, and with him that process.
            assert self._thread.ident is not None
            signal.pthread_kill(self._thread.ident, KICK_SIGNAL)
            self._thread.join(0.01)
        if self._mounted and not self._gone and not self._thread.is_alive():
            self._mounted = False
            self._files.give_up()
            self._session.close()
        self._place.leave(mounted=self._mounted)
        if not self._thread.is_alive() and (left := self._place.left_behind()):
            tell(f"--memory-file {self._place.path}: {left}")


def _why(failure: BaseException | None) -> str:
    if failure is None:
        return "it was unmounted at once"
    return in_words(failure) if isinstance(failure, OSError) else repr(failure)


def _ask(path: str) -> int:
    """A process that asks, and doesn't have /dev/fuse open: one that has, and waits for an answer
    when all others are killed, keeps it open and waits for ever. Its status is 0 where it had an
    answer. Raises OSError."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.closerange(0, _MOST_DESCRIPTORS)
        os.stat(os.path.join(path, "memory"))
        status = 0
    finally:
        os._exit(status)
