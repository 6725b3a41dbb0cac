"""What a fuzz target is: bytes in; whatever they say, pyvmm stays in order."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NamedTuple

Run = Callable[[bytes], None]

MOST_CALLS = 200_000
"""Calls of functions that one input may cost, where a target says nothing else."""

_COUNTERS = {"_trace_branch", "_trace_cmp"}
"""What atheris has put into our code."""

_SHORTEST_CALL_NS = 40
"""Processor time that a call takes at least, whatever is called."""


class Target(NamedTuple):
    """`run` raises where pyvmm doesn't stay in order. Costs are counted, never timed."""

    name: str
    run: Run
    seeds: Callable[[], Iterable[bytes]]
    """Inputs made of real things, to begin with."""
    runs: int
    """Inputs that the ordinary test run tries beyond the corpus."""
    longest: int
    """Bytes of an input at most."""
    most_calls: int

    def __call__(self, data: bytes) -> None:
        """Run it, and look at how much work it was."""
        count = 0

        def called(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal count
            if event == "call" or (event == "c_call" and argument.__name__ not in _COUNTERS):
                count += 1

        before = sys.getprofile()
        sys.setprofile(called)
        try:
            self.run(data)
        finally:
            sys.setprofile(before)
        assert count <= self.most_calls, f"{count} calls for {len(data)} bytes"

    def quickly(self, data: bytes) -> None:
        """The same for those who try inputs by the million: what took too little time to be too
        many calls isn't counted, which takes longer than the run itself."""
        before = time.thread_time_ns()
        self.run(data)
        if time.thread_time_ns() - before > self.most_calls * _SHORTEST_CALL_NS:
            self(data)


TARGETS: dict[str, Target] = {}


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for one input, in memory where there is such a place: on a disk making and removing
    it would be most of the work."""
    memory = "/dev/shm"
    return tempfile.TemporaryDirectory(
        prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None
    )


def _none() -> Iterator[bytes]:
    return iter(())


def target(
    name: str,
    seeds: Callable[[], Iterable[bytes]] = _none,
    *,
    runs: int = 100,
    longest: int = 512,
    most_calls: int = MOST_CALLS,
) -> Callable[[Run], Run]:
    """Puts a function among the targets."""

    def put(run: Run) -> Run:
        assert name not in TARGETS, name
        TARGETS[name] = Target(name, run, seeds, runs, longest, most_calls)
        return run

    return put
