"""Runs one piece of work in a forked child, beside us, whose memory is given back at its end.

A zstd or xz kernel is decompressed through a window as large as the kernel itself: done here, the
VMM's own resident set never sees it, and a decoder that a hostile image brings down takes only the
child with it. One that it takes over finds itself in a sandbox: it may read and write what is open,
and load Python's own modules.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from vmm.boot.errors import ImageError
from vmm.core.errors import HostError
from vmm.sandbox.worker import enter_worker

_RESULT = b"="
_REFUSED = b"!"
_BROKEN = b"?"


class IsolatedWork:
    """`work()` in a child that shares our file descriptors, under way while we do other things.

    In a process that has threads already, fork is not safe (another thread's lock may be held for
    ever in the child): the work is then done right here, by `result`. `name` starts messages
    ("kernel X"). Take the result or `close` it: the child must not outlive us.
    """

    def __init__(self, work: Callable[[], int], name: str) -> None:
        """Starts the child. Raises HostError where it can't."""
        self._work = work
        self._name = name
        self._pid = 0
        self._reader = -1
        if len(os.listdir("/proc/self/task")) != 1:
            return
        self._reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._pid = os.fork()
        except OSError as exc:
            os.close(writer)
            os.close(self._reader)
            raise HostError(
                f"{name}: starting the decompressor failed: {exc.strerror}; "
                "free memory or processes"
            ) from exc
        if self._pid == 0:
            _child(work, writer)
        os.close(writer)

    def result(self) -> int:
        """Wait for the work's result; its ImageError is ours."""
        if self._pid == 0:
            return self._work()
        try:
            answer = _read_all(self._reader)
        except BaseException:
            self.close()  # interrupted (Ctrl-C): it must not go on writing behind our back
            raise
        status = self._reap()
        kind, text = answer[:1], answer[1:].decode()
        if kind == _RESULT:
            return int(text)
        if kind == _REFUSED:
            raise ImageError(text)
        code = os.waitstatus_to_exitcode(status)
        reason = f"was killed by signal {-code}" if code < 0 else f"failed: {text}"
        raise ImageError(
            f"{self._name}: its decompressor {reason}; "
            "the image is corrupt or the host is out of memory"
        )

    def close(self) -> None:
        """End the child if it still runs; any number of times."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._reap()

    def _reap(self) -> int:
        os.close(self._reader)
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return status


def _child(work: Callable[[], int], writer: int) -> None:
    """Never returns: the parent's stack above us must not run twice."""
    try:
        try:
            answer = _confined() or _RESULT + b"%d" % work()
        except ImageError as exc:
            answer = _REFUSED + str(exc).encode()
        except BaseException as exc:
            answer = _BROKEN + ascii(exc).encode()
        os.write(writer, answer[:4096])  # at most PIPE_BUF: one write, never short
    finally:
        os._exit(0)


def _confined() -> bytes:
    """Enter the sandbox; else the answer that says why not."""
    try:
        enter_worker()
    except OSError as exc:
        sentence = (
            f"the decompressor can't enter its sandbox: {exc}; give a kernel that is not "
            "compressed (vmlinux), which needs none"
        )
        return _REFUSED + sentence.encode()
    return b""


def _read_all(fd: int) -> bytes:
    pieces = []
    while piece := os.read(fd, 4096):
        pieces.append(piece)
    return b"".join(pieces)
