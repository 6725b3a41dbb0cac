"""A sweep's jobs on a Dask cluster, which Dask distributes and carries on when a worker dies.

https://distributed.dask.org: `Client.submit` for batches of jobs, `Client.run` to learn what a
worker is and to send it what it needs. A worker without it says so, and gets it, once; so do those
that join later.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vmm.core.errors import OutputError, UsageError, one_line
from vmm.sweeps import far, versions
from vmm.sweeps.content import Content
from vmm.sweeps.executor import Answer
from vmm.sweeps.jobs import Job
from vmm.sweeps.pool import Places

CONNECT_SECONDS = 10.0
_PIECE = 4 << 20
_BATCH_SECONDS = 0.25
"""How long a task takes at least, where cells are short: what a task costs is little then."""
_TASKS_A_SECOND = 200
"""How many tasks all workers together end at most: a scheduler is busy with a few hundred."""
_MOST_BATCH = 256
_AHEAD = 3
"""Tasks for each slot, the one under way included, so that no worker waits for the next."""
_LOOK_SECONDS = 2.0
_LAST_SECONDS = 2.0


class DaskExecutor:
    """Batches of jobs as Dask tasks."""

    def __init__(self, address: str, contents: Mapping[str, Content], places: Places) -> None:
        """Raises UsageError for a scheduler that isn't there, or workers of other versions."""
        try:
            import distributed
        except ImportError:
            raise UsageError(
                "--scheduler needs Dask, which is not installed; pip install 'pyvmm[sweep]'"
            ) from None
        self._make_client: Callable[..., Any] = distributed.Client
        self._address = address
        self._contents = contents
        self._places = places
        self._sweep = secrets.token_hex(8)
        self._batches: dict[str, tuple[Any, list[Job], int]] = {}
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._number = 0
        self._outstanding = 0
        self._mean = 0.0
        self._slots = 0
        self._admitted: set[str] = set()
        # Contents sent, by worker and digest: how many tasks had been submitted by then.
        self._sent: dict[tuple[str, str], int] = {}
        self._looked = 0.0
        self._stopping = False
        self._quietened = logging.getLogger("distributed")
        self._level = self._quietened.level
        self._quietened.setLevel(logging.CRITICAL)  # what matters comes as errors
        try:
            self._client = self._connected(address)
        except BaseException:
            self._quietened.setLevel(self._level)
            raise
        try:
            self._look(first=True)
        except BaseException:
            self.close()
            raise

    def _connected(self, address: str) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # differing versions: `_admit` says it
                return self._make_client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError, RuntimeError, TypeError, ImportError) as error:
            reason = one_line(str(error)).strip() or type(error).__name__
            raise UsageError(
                f"--scheduler {address}: no Dask scheduler answers there: {reason[:200]}; start "
                "one with `dask scheduler`, and give the address that it prints"
            ) from None

    # -- the workers --------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        return self._slots

    def _look(self, *, first: bool = False) -> None:
        """Take note of who is there, now and then. Raises UsageError for who doesn't fit."""
        if not first and time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        info = self._asked(lambda: self._client.scheduler_info(n_workers=-1))
        workers: Mapping[str, Mapping[str, Any]] = info["workers"]
        self._slots = sum(int(each["nthreads"]) for each in workers.values())
        new = [address for address in workers if address not in self._admitted]
        if new:
            self._admit(new)
        self._looked = time.monotonic()

    def _admit(self, addresses: Sequence[str]) -> None:
        """Raises UsageError where a worker's pyvmm or Dask is another one."""
        found = self._told(addresses, far.described)
        mine = {**versions.described(), "distributed": versions.dask_version()}
        for address, theirs in found.items():
            if isinstance(theirs, OSError):
                continue  # it has gone again
            if isinstance(theirs, BaseException):
                raise UsageError(
                    f"worker {address} can't run pyvmm's cells: {one_line(repr(theirs))[:200]}; "
                    f"install pyvmm {mine['pyvmm']} there, with pip install 'pyvmm[sweep]'"
                )
            for what in ("pyvmm", "distributed"):
                if theirs[what] != mine[what]:
                    raise UsageError(
                        f"worker {address} on {theirs['host']} has {what} {theirs[what]}, and "
                        f"{mine[what]} is here; install the same on all machines"
                    )
            if theirs["code"] != mine["code"]:
                raise UsageError(
                    f"worker {address} on {theirs['host']} runs other sources of pyvmm "
                    f"{mine['pyvmm']} than are here; install the same on all machines, and start "
                    "the workers again"
                )
            self._admitted.add(address)

    def _note_lack(
        self, lacking: dict[str, list[str]], worker: str, digests: Sequence[str], task: int
    ) -> None:
        """Have contents sent to a worker that lacked them when it took that task."""
        for digest in digests:
            if task > self._sent.get((worker, digest), 0):  # else it has got it since
                self._sent[worker, digest] = self._number
                lacking.setdefault(digest, []).append(worker)

    def _supply(self, workers: Sequence[str], digest: str) -> None:
        """Send a content to workers, all at once. Raises UsageError for one that has changed, and
        for a worker that can't keep it. One that has gone gets nothing: Dask gives its tasks to
        others."""
        folder, names = self._places[digest]
        wrong = None
        try:
            for pieces in _pieces(folder, names):
                if wrong := self._send(workers, digest, pieces):
                    break
            else:
                wrong = self._complete(workers, digest, names)
        except FileNotFoundError as error:
            wrong = f"{error.filename} has gone"
        if wrong:
            raise UsageError(f"{self._contents[digest].name}: {wrong}")

    def _send(self, workers: Sequence[str], digest: str, pieces: Sequence[far.Piece]) -> str | None:
        told = self._told(workers, far.receive, self._sweep, digest, list(pieces))
        return _wrong(told)

    def _complete(self, workers: Sequence[str], digest: str, names: Sequence[str]) -> str | None:
        told = self._told(workers, far.complete, self._sweep, digest, list(names))
        return _wrong(told)

    # -- jobs ---------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        self._look()
        return self._slots * _AHEAD * self._batch - self._outstanding

    @property
    def _batch(self) -> int:
        """Cells in a task: many short ones, or one long one."""
        if not self._mean:
            return 1
        seconds = max(_BATCH_SECONDS, self._slots / _TASKS_A_SECOND)
        return max(1, min(int(seconds / self._mean), _MOST_BATCH))

    def submit(self, jobs: Sequence[Job], left: int) -> None:
        self._outstanding += len(jobs)
        # In the end, no worker has several cells to do while another has none.
        share = (len(jobs) + left) // max(self._slots, 1)
        size = max(1, min(self._batch, share))
        for start in range(0, len(jobs), size):
            self._submit(list(jobs[start : start + size]))

    def _submit(self, jobs: list[Job]) -> None:
        self._number += 1
        key = f"pyvmm-sweep-{self._sweep}-{self._number}"
        text = json.dumps(
            {
                "sweep": self._sweep,
                "code": versions.code_digest(),
                "jobs": [[job.key, job.words] for job in jobs],
            }
        )
        future = self._client.submit(far.run_batch, text, key=key, pure=False)
        self._batches[key] = (future, jobs, self._number)
        future.add_done_callback(lambda future: self._ended.put(future.key))

    def take(self, seconds: float) -> list[Answer]:
        ended = []
        try:
            ended.append(self._ended.get(timeout=seconds))
            while True:
                ended.append(self._ended.get_nowait())
        except queue.Empty:
            if not ended and self._client.status != "running" and not self._stopping:
                raise self._gone() from None
        answers = self._answers(ended)
        self._outstanding -= len(answers)
        return answers

    def _answers(self, ended: Sequence[str]) -> list[Answer]:
        """What tasks that have ended brought; those that couldn't be carried out are given anew."""
        finished = {
            key: future for key in ended if (future := self._batches[key][0]).status == "finished"
        }
        # All in one go: each question costs a round trip.
        told = self._asked(lambda: self._client.gather(finished, errors="skip")) if finished else {}
        answers: list[Answer] = []
        lacking: dict[str, list[str]] = {}
        again: list[list[Job]] = []
        for key in ended:
            future, jobs, number = self._batches.pop(key)
            # None: it came to another end while it was asked for.
            if (text := told.get(key)) is not None:
                brought = json.loads(text)
                mine, left = self._brought(brought, jobs)
                answers += mine
                again += [left] if left else []
                self._note_lack(lacking, brought["worker"], brought.get("missing", ()), number)
            elif future.status == "error":
                answers += self._failed(future, jobs)
            elif future.status != "cancelled":  # "lost": its worker died with the answer
                again.append(jobs)
            elif not self._stopping:  # the client cancels all when its connection breaks
                raise self._gone()
        if not self._stopping:
            for digest, workers in lacking.items():
                self._supply(workers, digest)
            for left in again:
                self._submit(left)
        return answers

    def _brought(self, told: Mapping[str, Any], jobs: list[Job]) -> tuple[list[Answer], list[Job]]:
        """The answers of a task, and the jobs that it didn't carry out."""
        if "unfit" in told:  # it has joined since
            self._admit([told["worker"]])
        answers = [Answer(key, answer, told["worker"]) for key, answer in told.get("answers", ())]
        for each in answers:
            seconds = float(each.answer["seconds"])
            self._mean = 0.9 * self._mean + 0.1 * seconds if self._mean else seconds
        done = {each.key for each in answers}
        return answers, [job for job in jobs if job.key not in done]

    def _failed(self, future: Any, jobs: list[Job]) -> list[Answer]:
        """A task that Dask gave up: a worker died under it once too often."""
        error = future.exception()
        if len(jobs) > 1 and not self._stopping:
            for job in jobs:  # one of them it was
                self._submit([job])
            return []
        reason = one_line(str(error))
        answer = {"error": f"Dask gave it up: {reason[:500]}", "log": repr(error), "seconds": 0.0}
        return [Answer(job.key, answer, "") for job in jobs]

    def _told(
        self, workers: Sequence[str], function: Callable[..., Any], *words: Any
    ) -> Mapping[str, Any]:
        """What that function gives on each of the workers, or what was raised: an OSError for one
        that has gone. Raises OutputError where the scheduler has gone."""
        return self._asked(  # type: ignore[no-any-return]
            lambda: self._client.run(function, *words, workers=list(workers), on_error="return")
        )

    def _asked(self, call: Callable[[], Any]) -> Any:
        """Raises OutputError where the scheduler has gone: what fails between the scheduler and a
        worker, Dask gives as an answer."""
        try:
            return call()
        except (OSError, TimeoutError) as error:  # CommClosedError is an OSError
            raise self._gone() from error

    def _gone(self) -> OutputError:
        return OutputError(
            f"the Dask scheduler at {self._address} has gone; what it had done is stored, and the "
            "same command goes on from there"
        )

    # -- the end ------------------------------------------------------------------------------

    def stop(self) -> list[Answer]:
        self._stopping = True
        with contextlib.suppress(Exception):
            self._client.run(far.dismiss, self._sweep, False, on_error="ignore")
        answers: list[Answer] = []
        until = time.monotonic() + _LAST_SECONDS
        while self._batches and (left := until - time.monotonic()) > 0:
            answers += self.take(left)
        return answers

    def close(self) -> None:
        self._stopping = True
        if self._client.status == "running":  # else there is nobody to wait for
            with contextlib.suppress(Exception):
                self._client.cancel([future for future, _, _ in self._batches.values()])
                self._client.run(far.dismiss, self._sweep, True, on_error="ignore")
        self._batches.clear()
        with contextlib.suppress(Exception):
            self._client.close(timeout=_LAST_SECONDS)
        self._quietened.setLevel(self._level)


def _wrong(told: Mapping[str, Any]) -> str | None:
    """What one of the workers says is wrong."""
    return next((wrong for wrong in told.values() if isinstance(wrong, str)), None)


def _pieces(folder: str, names: Sequence[str]) -> Iterator[list[far.Piece]]:
    """The files, in pieces that go together. Raises OSError."""
    held: list[far.Piece] = []
    size = 0
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            offset = 0
            while (data := file.read(_PIECE)) or not offset:
                held.append((name, offset, data))
                offset += len(data)
                size += len(data)
                if size >= _PIECE:
                    yield held
                    held, size = [], 0
                if len(data) < _PIECE:
                    break
    if held:
        yield held
