"""What `ctl dump` and `ctl snapshot` have the running machine do: write memory into files that it
is handed, and say the rest. Only a run that is asked imports it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from vmm.control.operations import REST_SECONDS, Operations
from vmm.core.ranges import PAGE_SIZE, Range, page_align_up
from vmm.core.saved import NotSaved, State
from vmm.memory.backing import Backing
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.snapshot.core_file import data_offset

MOST_PIECES = 1 << 16
"""How many pieces of memory there are at most, besides runs of page states."""
_AT_ONCE = 64 << 20
_LOOKED_AT = 2 << 20
"""How much of a backing is asked about at once, where the kernel doesn't list what is there."""


class SavedPlatform(Protocol):
    """The part of vmm.arch.protocol.Platform that is needed."""

    def state(self) -> State: ...
    def core_vcpus(self) -> list[dict[str, Any]]: ...


class Saving:
    """On the event loop's thread."""

    def __init__(
        self,
        operations: Operations,
        memory: GuestMemory,
        platform: SavedPlatform,
        devices: Callable[[float], State],
        facts: Callable[[], State],
        policies: Callable[[], list[State]],
        alias: int = 0,
    ) -> None:
        """`devices(timeout)` is wiring.devices.Devices.state, `facts()` what the machine is; it
        raises NotSaved for one that can't be saved. `policies()`: what those know
        (vmm.policy.keeping). `alias`: the address bit of private pages."""
        self._operations = operations
        self._memory = memory
        self._platform = platform
        self._devices = devices
        self._facts = facts
        self._policies = policies
        self._alias = alias

    def dump(self, fd: int, *, private: bool = False) -> dict[str, Any]:
        """Shared memory into a file, and private memory if it is wanted, with room for a core
        file's headers before it. Raises NotSaved, OSError."""
        require_writable(fd)
        backing = self._memory.private
        if private:
            self._require_reachable(backing, "dump")
        with self._operations.still():
            vcpus = self._platform.core_vcpus()
            runs = self._runs()
            segments = len(runs) * (2 if private else 1)  # private pages have two addresses
            offset = data_offset(segments, len(vcpus))
            self._write(PageState.SHARED, self._memory.shared, fd, offset)
            if private and backing is not None:
                self._write(PageState.PRIVATE, backing, fd, offset)
            # The last run may end with pages that don't exist: they read as zeros.
            os.ftruncate(fd, offset + self._memory.ram[-1].end)
        return {"vcpus": vcpus, "pages": _rows(runs), "offset": offset, "alias": self._alias}

    def snapshot(self, fd: int, private: int | None) -> dict[str, Any]:
        """Shared memory into a file, offset = GPA, and private memory into another, if one is
        given. Raises NotSaved, OSError."""
        require_writable(fd)
        facts = self._facts()
        backing = self._memory.private
        if private is not None:
            require_writable(private)
            self._require_reachable(backing, "snapshot")
        with self._operations.still():
            state = {
                **facts,
                "platform": self._platform.state(),
                "devices": self._devices(REST_SECONDS),
                "policies": self._policies(),
            }
            runs = self._runs()
            answer: dict[str, Any] = {"state": state, "pages": _rows(runs)}
            answer["memory"] = self._write(PageState.SHARED, self._memory.shared, fd, 0)
            if private is not None and backing is not None:
                answer["private"] = self._write(PageState.PRIVATE, backing, private, 0)
        return answer

    def _require_reachable(self, backing: Backing | None, what: str) -> None:
        if backing is not None and backing.host_access == "kernel-refused":
            raise NotSaved(
                f"--with-private: the host's kernel keeps pyvmm out of {backing.name}; a {what} "
                "of the shared side needs no --with-private"
            )

    def _runs(self) -> list[tuple[Range, PageState]]:
        """Page states: to the guest a deferred page is private."""
        runs: list[tuple[Range, PageState]] = []
        for run, state in self._memory.states():
            if state not in (PageState.SHARED, PageState.PRIVATE):
                state = PageState.PRIVATE  # noqa: PLW2901 - deferred, or lent
            if runs and runs[-1][1] is state and runs[-1][0].end == run.start:
                runs[-1] = Range(runs[-1][0].start, runs[-1][0].size + run.size), state
            else:
                runs.append((run, state))
        return runs

    def _write(self, state: PageState, backing: Backing, fd: int, offset: int) -> list[list[int]]:
        """What there is of the pages in one state; the runs (gpa, size) that were written."""
        memory = self._memory
        grain = page_align_up(max(memory.ram[-1].end // MOST_PIECES, PAGE_SIZE))
        written: list[list[int]] = []
        for run in [run for run, each in self._runs() if each is state]:
            pieces = [(run, backing)]
            if state is PageState.PRIVATE:  # of common pages there is one side
                pieces = [(own, backing) for own in run.without(memory.common)]
                common = run.intersection(memory.common)
                pieces += [(common, memory.shared)] if common is not None else []
            for piece, side in sorted(pieces, key=lambda each: each[0].start):
                for part in resident(side, piece, grain):
                    _move(side, part, fd, offset)
                    written.append([part.start, part.size])
        return written


def require_writable(fd: int) -> None:
    """Raises NotSaved for anything but a regular file that can be written to at every place."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise NotSaved("the file to write to is no regular file")
    if flags & os.O_ACCMODE == os.O_RDONLY or flags & os.O_APPEND:
        raise NotSaved("the file to write to is not open for writing")


def _move(backing: Backing, part: Range, fd: int, offset: int) -> None:
    done = 0
    while done < part.size:
        size = min(part.size - done, _AT_ONCE)
        at = part.start + done
        moved = backing.transfer_out(at, size, fd, offset + at)
        if moved <= 0:
            raise OSError(errno.EIO, f"guest memory at {at:#x} can't be written to the file")
        done += moved


def resident(backing: Backing, area: Range, grain: int = PAGE_SIZE) -> Iterator[Range]:
    """What the kernel holds memory for, as far as it says: pages that nobody has touched are zero,
    and need no place in a file. `grain`: pieces have so many bytes at least, holes or not, since
    who touches every second page makes as many pieces as there are."""
    at = area.start
    while at < area.end:
        try:
            start = max(os.lseek(backing.fd, at, os.SEEK_DATA), at)
            end = os.lseek(backing.fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing from there on
                return
            start = end = at
        if start >= area.end:
            return
        if end <= start:  # this kind of file can't tell
            yield from _asked_for(backing, Range(at, area.end - at))
            return
        at = min(max(end, start + grain), area.end)
        yield Range(start, at - start)


def _asked_for(backing: Backing, area: Range) -> Iterator[Range]:
    for start in range(area.start, area.end, _LOOKED_AT):
        piece = Range(start, min(_LOOKED_AT, area.end - start))
        try:
            is_there = backing.resident_bytes(piece.start, piece.size) > 0
        except OSError:  # no cachestat(2)
            is_there = True
        if is_there:
            yield piece


def _rows(runs: list[tuple[Range, PageState]]) -> list[list[int | str]]:
    return [[*run, state.value] for run, state in runs]
