"""What a stock kernel did once, small enough to be kept: its requests and its devices' accesses.

A recording is made from a trace. Times are kept as pauses between one event's end and the next
one's beginning, in microseconds, and addresses as distances from the event before: both are small
numbers, which compress well.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.core.errors import UsageError
from vmm.core.ranges import PAGE_SIZE, Range, RangeMap

if TYPE_CHECKING:
    from vmm.trace.reader import Trace

FORMAT, VERSION = "pyvmm-recording", 1
SHARE, UNSHARE, TO_GUEST, TO_DEVICE = "suio"
"""An event's kind: the guest's requests, and a device's request whose data goes so."""
_MOST_BYTES = 64 << 20
"""Of a recording when it is unpacked."""
_MOST = 1 << 64
"""What addresses, sizes and times are below."""


class Recorded(NamedTuple):
    """One event; `pause`: microseconds since the event before was over. Bytes."""

    kind: str
    pause: int
    gpa: int
    size: int
    errno: int
    """Of a request's answer then; 0: it got what it asked for."""
    device: str
    """Of a device's access; empty for requests."""


class Recording(NamedTuple):
    """Events in the order in which they began, and the memory that they began with."""

    facts: dict[str, Any]
    ram: list[Range]
    shared: list[Range]
    """What was shared before the first event; all other RAM was private."""
    events: list[Recorded]

    def dump(self) -> bytes:
        """As a file's content; the same for the same recording."""
        accesses = [each.device for each in self.events if each.kind in (TO_GUEST, TO_DEVICE)]
        devices = sorted(set(accesses))
        gpas = [0, *(each.gpa for each in self.events)]
        content = {
            "format": FORMAT,
            "version": VERSION,
            "facts": self.facts,
            "ram": self.ram,
            "shared": self.shared,
            "devices": devices,
            "kinds": "".join(each.kind for each in self.events),
            "pauses_us": [each.pause for each in self.events],
            "distances": [b - a for a, b in pairwise(gpas)],
            "sizes": [each.size for each in self.events],
            "errnos": [each.errno for each in self.events],
            "device": [devices.index(each) for each in accesses],
        }
        packed = json.dumps(content, separators=(",", ":")).encode()
        return gzip.compress(packed, 9, mtime=0)


def parse(data: bytes, name: str) -> Recording:
    """What `dump` made. Raises UsageError for anything else, with `name` for the file."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise UsageError(f"{name}: a recording of more than {_MOST_BYTES >> 20} MiB")
        content = json.loads(text)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise UsageError(f"{name}: not a recording of version {VERSION}")
        events = list(_events(content))
        ram, shared = ([_area(each) for each in content[part]] for part in ("ram", "shared"))
        return Recording(dict(content["facts"]), ram, shared, events)
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"{name}: no recording, or a damaged one: {error!r}") from error


def _area(numbers: Sequence[Any]) -> Range:
    _check_numbers(numbers, 0)
    return Range(*numbers)


def _check_numbers(numbers: Sequence[Any], least: int) -> None:
    """Raises ValueError unless all are whole numbers that an address can be, from `least` on."""
    if set(map(type, numbers)) - {int} or not all(least <= each < _MOST for each in numbers):
        raise ValueError(f"numbers of {least} to {_MOST - 1} are wanted")


def _events(content: Mapping[str, Any]) -> Iterator[Recorded]:
    columns = ("kinds", "pauses_us", "distances", "sizes", "errnos")
    for name in ("pauses_us", "sizes", "errnos", "device"):
        _check_numbers(content[name], 0)
    _check_numbers(content["distances"], -_MOST)
    devices, of = content["devices"], content["device"]
    if set(content["kinds"]) - {SHARE, UNSHARE, TO_GUEST, TO_DEVICE}:
        raise ValueError("an event of no known kind")
    if set(map(type, devices)) - {str}:
        raise ValueError("a device without a name")
    gpa = accesses = 0
    for kind, pause, distance, size, errno in zip(*map(content.get, columns), strict=True):
        gpa += distance
        if gpa < 0:
            raise ValueError("an address below zero")
        device = ""
        if kind in (TO_GUEST, TO_DEVICE):
            device = devices[of[accesses]]
            accesses += 1
        yield Recorded(kind, pause, gpa, size, errno, device)


def of_trace(
    trace: Trace, facts: Mapping[str, Any], since_ns: int = 0, until_ns: int | None = None
) -> Recording:
    """What happened in a trace from one time to another. Raises UsageError for one that doesn't
    say how its memory began."""
    from vmm.trace.arrays import np
    from vmm.trace.layout import NO_ANSWER, Kind
    from vmm.trace.states import initial_states

    initial = initial_states(trace)
    if not initial:
        raise UsageError(f"{trace.path} does not say how the guest's memory began")
    kinds = {
        Kind.SHARE: SHARE, Kind.UNSHARE: UNSHARE, Kind.IO_IN: TO_GUEST, Kind.IO_OUT: TO_DEVICE,
    }  # fmt: skip
    wanted = np.flatnonzero(np.isin(trace["kind"], list(kinds)))
    times = trace["time_ns"][wanted].astype(np.int64)
    wanted, times = wanted[times >= since_ns], times[times >= since_ns]
    if until_ns is not None:
        wanted = wanted[times <= until_ns]
    # A row is written when its event is over: put them in the order in which they began.
    wanted = wanted[np.argsort(trace["time_ns"][wanted], kind="stable")]
    names = ("kind", "time_ns", "latency_ns", "gpa", "bytes", "errno", "detail")
    events: list[Recorded] = []
    over = since_ns
    columns = [trace[name][wanted].tolist() for name in names]
    for kind, at, took, gpa, size, answer, detail in zip(*columns, strict=True):
        is_request = kind in (Kind.SHARE, Kind.UNSHARE)
        device = "" if is_request else trace.name(detail & 0xFFFF)
        pause = max(at - over, 0) // 1000
        number = 0 if answer == NO_ANSWER or not is_request else answer
        events.append(Recorded(kinds[kind], pause, gpa, size, number, device))
        over = max(over, at + took if is_request else at)
    ram = [Range(gpa, size) for gpa, size, state in sorted(initial) if state]
    return Recording(dict(facts), ram, _shared_at(trace, initial, since_ns), events)


def _shared_at(trace: Trace, initial: list[tuple[int, int, int]], at_ns: int) -> list[Range]:
    from vmm.trace.states import SHARED, state_rows

    end = max(gpa + size for gpa, size, _ in initial)
    states: RangeMap[int] = RangeMap(Range(0, end), 0)
    for gpa, size, state in initial:
        states.set(Range(gpa, size), state)
    rows = state_rows(trace)
    columns = [column.tolist() for column in (rows.end, rows.gpa, rows.bytes, rows.state)]
    for when, gpa, size, state in zip(*columns, strict=True):
        area = Range(gpa, size).intersection(Range(0, end))
        if when < at_ns and area is not None:
            states.set(area, state)
    return [area for area, state in states.runs() if state == SHARED]


def first_page(event: Recorded) -> Range:
    """What a device's access is taken to touch: of a request of several buffers a trace has the
    first one's address and all of their bytes."""
    return Range(event.gpa, min(event.size, PAGE_SIZE - event.gpa % PAGE_SIZE))
