"""Who carries out a sweep's jobs: the protocol, and processes of this machine."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from vmm.core.errors import OutputError, UsageError
from vmm.sweeps.content import Content
from vmm.sweeps.jobs import Job
from vmm.sweeps.pool import Place, Places, Runner, Stopped

_LAST_SECONDS = 1.0


class Answer(NamedTuple):
    """What came of a job; `answer` is as `Runner.run` gives it."""

    key: str
    answer: Mapping[str, Any]
    worker: str


class Executor(Protocol):
    """Takes jobs, and gives answers in any order."""

    @property
    def slots(self) -> int:
        """How many jobs are carried out at once; 0 while nobody is there."""
        ...

    @property
    def room(self) -> int:
        """How many more jobs it takes, so that nobody is idle."""
        ...

    def submit(self, jobs: Sequence[Job], left: int) -> None:
        """Have them carried out; `left` more will come."""
        ...

    def take(self, seconds: float) -> list[Answer]:
        """The answers that have come, at least one unless none comes within that time."""
        ...

    def stop(self) -> list[Answer]:
        """Begin nothing more; the answers of what was under way and ends in a moment."""
        ...

    def close(self) -> None:
        """End everything at once."""
        ...


class Snapshot:
    """Contents on this machine: sources as they were, copied; all else where it is."""

    def __init__(self, contents: Mapping[str, Content]) -> None:
        """Raises OutputError."""
        self._folder = tempfile.mkdtemp(prefix="pyvmm-sweep-")
        self._contents = contents
        self.places: dict[str, Place] = {}
        for digest in contents:
            self.add(digest)

    def add(self, digest: str) -> None:
        """Give a content of the mapping its place. Raises OutputError."""
        each = self._contents[digest]
        folder = each.folder or os.path.join(self._folder, digest)
        if digest in self.places:
            return
        try:
            for name, path in each.files.items() if each.folder is None else ():
                there = os.path.join(folder, name)
                os.makedirs(os.path.dirname(there), exist_ok=True)
                shutil.copyfile(path, there)
        except OSError as error:
            raise OutputError(f"{folder} could not be made: {error.strerror}") from error
        self.places[digest] = (folder, list(each.files))

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self._folder, ignore_errors=True)


class LocalExecutor:
    """Processes on this machine, one cell at a time each."""

    def __init__(self, workers: int, places: Places, first: Runner) -> None:
        """`first` is one of them, which runs already; the caller releases it."""
        self.slots = workers
        self._places = places
        self._host = socket.gethostname()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._outstanding = 0
        self._runners = [first, *(Runner() for _ in range(workers - 1))]
        self._threads = [
            threading.Thread(target=self._serve, args=(runner,), name=f"cells {n}", daemon=True)
            for n, runner in enumerate(self._runners)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def room(self) -> int:
        return 2 * self.slots - self._outstanding

    def submit(self, jobs: Sequence[Job], left: int) -> None:
        for job in jobs:
            self._outstanding += 1
            self._jobs.put(job)

    def take(self, seconds: float) -> list[Answer]:
        taken = []
        with contextlib.suppress(queue.Empty):
            taken.append(self._answers.get(timeout=seconds))
            while True:
                taken.append(self._answers.get_nowait())
        self._outstanding -= len(taken)
        return taken

    def stop(self) -> list[Answer]:
        under_way = min(self._outstanding, self.slots)
        with contextlib.suppress(queue.Empty):
            while self._jobs.get_nowait() is not None:
                self._outstanding -= 1
        for _ in self._threads:
            self._jobs.put(None)
        taken: list[Answer] = []
        for thread in self._threads:
            thread.join(_LAST_SECONDS / len(self._threads))
        while len(taken) < under_way and (more := self.take(0)):
            taken += more
        return taken

    def close(self) -> None:
        for runner in self._runners:
            runner.close()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self, runner: Runner) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                answer = runner.run(job.words, self._places)
                self._answers.put(Answer(job.key, answer, self._host))
        except Stopped:
            pass
        finally:
            runner.release()


def default_workers() -> int:
    """As many as this process may use processors."""
    return len(os.sched_getaffinity(0))


def checked_workers(given: int | None) -> int:
    """Raises UsageError for a number that makes no sense."""
    if given is None:
        return default_workers()
    if not 1 <= given <= 1024:
        raise UsageError(f"--workers {given}: use 1 to 1024")
    return given
