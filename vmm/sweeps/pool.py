"""Processes that carry out cells, as seen from where they are started.

A cell's process is its own: a policy that crashes, hangs, or prints without end takes nothing with
it but its cell.
"""

from __future__ import annotations

import collections
import json
import math
import os
import select
import selectors
import signal
import site
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vmm.core.errors import UsageError

_LOG = 64 << 10
"""Bytes of what a cell printed that are kept, the last ones."""
_PIECE = 16 << 10
_GRACE = 5.0
"""Seconds by which a guest's own time limit comes before the one for its process."""
_CHECK_SECONDS = 60.0
_START_SECONDS = 120.0
"""How long a process may take to begin: a busy machine's imports, not the cell's time."""

Place = tuple[str, list[str]]
"""Where a content is: folder, and names inside."""
Places = Mapping[str, Place]
"""By digest."""


class Stopped(Exception):
    """The sweep has ended while a cell was carried out."""


class Runner:
    """One such process. It is started by the first request, and after each that it didn't
    survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._told: set[str] = set()
        self._log: collections.deque[bytes] = collections.deque()
        self._log_size = 0
        self._closed = False
        self._lock = threading.Lock()

    def check(self, parts: Sequence[Mapping[str, Any]], places: Places) -> dict[str, str]:
        """Have parts of jobs loaded; the digests of their modules. Raises UsageError."""
        self._forget_log()
        answer = self._ask({"check": parts}, places, _CHECK_SECONDS)
        if "error" in answer:
            printed = self._printed().strip().rpartition("\n")[2] if "log" not in answer else ""
            raise UsageError(f"{answer['error']}: {printed}" if printed else answer["error"])
        modules: dict[str, str] = answer["modules"]
        return modules

    def run(self, words: Mapping[str, Any], places: Places) -> dict[str, Any]:
        """Carry out a job: {"figures", "ended", "seconds"}, or {"error", "log", "seconds"}.

        Raises Stopped when `close` was called meanwhile.
        """
        self._forget_log()
        answer = self._ask({"run": words}, places, float(words["seconds"]) + _GRACE)
        if "error" in answer:
            printed = b"".join(self._log).decode(errors="replace")
            answer["log"] = (answer.get("log") or "") + (
                f"\nprinted:\n{printed}" if printed else ""
            )
        return answer

    def _ask(self, request: Mapping[str, Any], places: Places, seconds: float) -> dict[str, Any]:
        began = time.monotonic()
        try:
            process = self._started()
            new = {digest: place for digest, place in places.items() if digest not in self._told}
            if new:
                self._send({"places": new})
                self._told |= new.keys()
            self._send(request)
            answer = self._answer(process, seconds)
        except (BrokenPipeError, ConnectionResetError):
            answer = None
        if self._closed:
            raise Stopped
        self._note_rest(process)
        if answer is not None:
            return answer
        status = self._end()
        if status is None:
            what = f"it took longer than its time limit of {seconds - _GRACE:g} s"
        elif status < 0:
            what = f"its process was ended by signal {-status} ({_signal_name(-status)})"
        else:
            what = f"its process ended with status {status} in the middle"
        return {"error": what, "seconds": time.monotonic() - began}

    def _printed(self) -> str:
        return b"".join(self._log).decode(errors="replace")

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise Stopped
            if self._process is not None and not _has_ended(self._process, 0):
                return self._process
        self._end()
        their_requests, self._requests = os.pipe()
        self._answers, their_answers = os.pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(_own_path()),
            "PYTHONHASHSEED": "0",  # a policy's sets come in one order in all processes
        }
        # -P: no module of the folder that the user is in takes the place of one of Python's.
        command = [sys.executable, "-P", "-m", "vmm.sweeps.runner"]
        process = subprocess.Popen(
            [*command, str(their_requests), str(their_answers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(their_requests, their_answers),
            env=environment,
            start_new_session=True,  # Ctrl-C is for whoever started the sweep
        )
        os.close(their_requests)
        os.close(their_answers)
        self._told = set()
        with self._lock:
            self._process = process
            closed = self._closed
        if closed:
            self._end()
            raise Stopped
        return process

    def _send(self, request: Mapping[str, Any]) -> None:
        data = json.dumps(request).encode() + b"\n"
        while data:
            data = data[os.write(self._requests, data) :]

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
        """None: it took longer, or the process has ended."""
        assert process.stdout is not None
        deadline = time.monotonic() + _START_SECONDS
        held = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            selector.register(process.stdout, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(None if left == math.inf else left):
                    data = os.read(key.fd, _PIECE)
                    if key.fd != self._answers:
                        self._note(data)
                        if not data:
                            selector.unregister(key.fileobj)
                        continue
                    if not data:
                        return None
                    held += data
                    while b"\n" in held:
                        line, _, held = held.partition(b"\n")
                        answer: dict[str, Any] = json.loads(line)
                        if "now" not in answer:
                            return answer
                        waits = answer["now"] == "waiting"
                        deadline = math.inf if waits else time.monotonic() + seconds
        return None

    def _forget_log(self) -> None:
        self._log.clear()
        self._log_size = 0

    def _note(self, data: bytes) -> None:
        self._log.append(data)
        self._log_size += len(data)
        while self._log_size > _LOG:
            self._log_size -= len(self._log.popleft())

    def _note_rest(self, process: subprocess.Popen[bytes]) -> None:
        """What was printed before the answer is in the pipe by now, and may not have been read."""
        assert process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        for _ in range(_LOG // _PIECE):  # as much as a pipe holds
            if not poll.poll(0):
                return
            data = os.read(process.stdout.fileno(), _PIECE)
            if not data:
                return
            self._note(data)

    def _end(self) -> int | None:
        """End the process and all that it has started; its status, None where we ended it."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return None
        # It may be on its way out by itself, which says more than that we have killed it.
        ended = _has_ended(process, 0 if self._closed else 0.5)
        # Before it is reaped: its number, and its group's, are nobody else's so far.
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        os.close(self._requests)
        os.close(self._answers)
        return status if ended else None

    def close(self) -> None:
        """End it, also from another thread than the one that waits for an answer."""
        with self._lock:
            self._closed = True
            process = self._process
            if process is not None:  # not reaped: that takes the lock first
                os.killpg(process.pid, signal.SIGKILL)

    def release(self) -> None:
        """After `close`: give back what is left, on the thread that used it."""
        self._closed = True
        self._end()


def _own_path() -> list[str]:
    """What is on Python's path here besides what each of its processes finds by itself: to have
    that twice would put installed modules before Python's own."""
    library = sysconfig.get_path("stdlib")
    archive = "python{}{}.zip".format(*sys.version_info)
    usual = {
        *site.getsitepackages(), site.getusersitepackages(), library,
        os.path.join(library, "lib-dynload"), os.path.join(os.path.dirname(library), archive),
    }  # fmt: skip
    return [each for each in dict.fromkeys(sys.path) if each and each not in usual]


def _has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ends within that time; it is not reaped."""
    pidfd = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(pidfd, selectors.EVENT_READ)
            return bool(selector.select(seconds))
    finally:
        os.close(pidfd)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
