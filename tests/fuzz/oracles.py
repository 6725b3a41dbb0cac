"""What a device may hold and do, whatever its driver asks: watched during every fuzzed life.

Costs are counted, not timed, so that a slow machine finds the same as a quick one.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

from tests.support.virtio_machine import VirtioMachine
from vmm.devices.virtio.budget import TURN_BYTES, TURN_CALLS
from vmm.memory import transfer

# A turn ends at the first place where it can after its budget is spent: a chain of up to 1,024
# descriptors behind that, each with a call of its own, and the rings.
MOST_CALLS = TURN_CALLS + 2 * 1024 + 512
MOST_BYTES = 2 * TURN_BYTES
# Containers of a device and its queues: connections, messages, chains under way.
MOST_HELD = 4096
MOST_HELD_BYTES = 32 << 20
# Over all the lives of a run: what the allocator keeps goes up and down by half a MiB.
MOST_GROWTH = 8 << 20

_VERBS = ("pread", "pwrite", "transfer_in", "transfer_out", "discard")
# Those of many pieces, which not every memory has: where the pieces are, how many numbers each has.
_MANY = {"read_many": (0, 2), "write_many": (0, 2), "move_in": (1, 3), "move_out": (0, 3)}


class TurnCost:
    """Counts what each turn of the machine's device does to guest memory."""

    def __init__(self, machine: VirtioMachine) -> None:
        self.calls = self.size = 0
        self.worst_calls = self.worst_size = 0
        memory: Any = machine.memory
        for verb in _VERBS:
            setattr(memory, verb, self._counted(verb, getattr(memory, verb)))
        for verb in _MANY:
            if hasattr(memory, verb):
                setattr(memory, verb, self._counted_many(verb, getattr(memory, verb)))
        notify = machine.transport.notify

        def turn(queue_index: int) -> None:
            self.calls = self.size = 0
            notify(queue_index)
            assert self.calls <= MOST_CALLS, f"{self.calls} accesses in a turn"
            assert self.size <= MOST_BYTES, f"{self.size} bytes in a turn"
            self.worst_calls = max(self.worst_calls, self.calls)
            self.worst_size = max(self.worst_size, self.size)

        machine.transport.notify = machine.device.serve = turn  # type: ignore[method-assign]

    def _counted(self, verb: str, call: Any) -> Any:
        size_at = {"pread": 0, "pwrite": 0, "transfer_in": 3, "transfer_out": 1, "discard": 1}[verb]

        def counted(*arguments: Any) -> Any:
            self.calls += 1
            what = arguments[size_at]
            self.size += what if isinstance(what, int) else len(what)
            return call(*arguments)

        return counted

    def _counted_many(self, verb: str, call: Any) -> Any:
        place, numbers = _MANY[verb]

        def counted(*arguments: Any) -> Any:
            pieces = arguments[place]
            self.calls += len(pieces) // numbers
            self.size += sum(pieces[numbers - 1 :: numbers])
            return call(*arguments)

        return counted


def held(root: object) -> tuple[int, int]:
    """Elements in all containers that `root` reaches within the project, and their bytes."""
    elements = size = 0
    seen: set[int] = set()
    todo = deque([root])
    while todo:
        one = todo.popleft()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, bytes | bytearray):
            size += len(one)
        elif isinstance(one, dict):
            elements += len(one)
            todo.extend(one.values())
        elif isinstance(one, list | tuple | set | frozenset | deque):
            elements += len(one)
            todo.extend(one)
        elif type(one).__module__.startswith("vmm.devices."):
            names = list(vars(one)) if hasattr(one, "__dict__") else []
            for kind in type(one).__mro__:
                names += getattr(kind, "__slots__", ())
            todo.extend(getattr(one, name, None) for name in names if not name.startswith("__"))
    return elements, size


def assert_holds_little(machine: VirtioMachine) -> None:
    """The device, its queues and its transport hold no more than they may."""
    elements, size = held(machine.device)
    assert elements <= MOST_HELD, f"the device holds {elements} elements"
    assert size <= MOST_HELD_BYTES, f"the device holds {size} bytes"
    for queue in machine.device._queues.values():
        assert queue.outstanding <= queue.size
    assert machine.transport.failure is None or len(machine.transport.failure) < 500


class Resources:
    """What this process holds, which a device gives back when it is closed: file descriptors and
    threads, and memory but for `MOST_GROWTH`. The first device's life is the measure for memory,
    as it imports things and fills caches."""

    def __init__(self) -> None:
        # This thread's own for ever, made when a transfer first needs them.
        transfer._scratches.own.pipe_ends()
        transfer._scratches.own.bounce()
        gc.collect()  # what earlier tests have left must not go, or be taken for ours, later
        self._fds, self._threads = self._now()
        self._resident: int | None = None

    @staticmethod
    def _now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def assert_given_back(self) -> None:
        """No more than there were."""
        fds, threads = self._now()
        # Fewer are no leak: something of an earlier test has gone meanwhile.
        assert fds <= self._fds and threads <= self._threads, f"{fds=} {threads=} {vars(self)}"
        gc.collect()
        resident = resident_bytes()
        if self._resident is None:
            self._resident = resident
        grown = resident - self._resident
        assert grown <= MOST_GROWTH, f"resident memory has grown by {grown} bytes"


def resident_bytes() -> int:
    """This process' resident memory (proc_pid_statm(5)), without shared pages: guest memory of
    whatever size is no leak."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
