"""Runs one piece of work in a forked child, whose memory is given back when it ends.

A zstd or xz kernel is decompressed through a window as large as the kernel itself: done here, the
VMM's own resident set never sees it, and a decoder that a hostile image brings down takes only the
child with it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from vmm.boot.errors import ImageError
from vmm.core.errors import HostError

_RESULT = b"="
_REFUSED = b"!"
_BROKEN = b"?"


def run_isolated(work: Callable[[], int], name: str) -> int:
    """`work()`'s result from a child that shares our file descriptors; its ImageError is ours.

    In a process that has threads already, fork is not safe (another thread's lock may be held for
    ever in the child): the work is then done right here. `name` starts messages ("kernel X").
    """
    if len(os.listdir("/proc/self/task")) != 1:
        return work()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError as exc:
        os.close(reader)
        os.close(writer)
        raise HostError(
            f"{name}: starting the decompressor failed: {exc.strerror}; free memory or processes"
        ) from exc
    if pid == 0:
        _child(work, writer)
    os.close(writer)
    try:
        answer = _read_all(reader)
    except BaseException:
        # Interrupted (Ctrl-C): the child must not go on writing behind our back.
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        _, status = os.waitpid(pid, 0)
    kind, text = answer[:1], answer[1:].decode(errors="replace")
    if kind == _RESULT:
        return int(text)
    if kind == _REFUSED:
        raise ImageError(text)
    code = os.waitstatus_to_exitcode(status)
    reason = f"was killed by signal {-code}" if code < 0 else f"failed: {text}"
    raise ImageError(
        f"{name}: its decompressor {reason}; the image is corrupt or the host is out of memory"
    )


def _child(work: Callable[[], int], writer: int) -> None:
    """Never returns: the parent's stack above us must not run twice."""
    try:
        try:
            answer = _RESULT + b"%d" % work()
        except ImageError as exc:
            answer = _REFUSED + str(exc).encode()
        except BaseException as exc:
            answer = _BROKEN + ascii(exc).encode()
        os.write(writer, answer[:4096])  # at most PIPE_BUF: one write, never short
    finally:
        os._exit(0)


def _read_all(fd: int) -> bytes:
    pieces = []
    while piece := os.read(fd, 4096):
        pieces.append(piece)
    return b"".join(pieces)
