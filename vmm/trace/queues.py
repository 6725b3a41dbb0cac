"""Writes the requests on a device's virtqueue into a trace."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from typing import Protocol

from vmm.trace.layout import HOST, Kind
from vmm.trace.recorder import Recorder

_now = time.monotonic_ns


class Request(Protocol):
    """A chain of buffers as (GPA, size): what the device may read, and what it may write."""

    @property
    def head(self) -> int: ...
    @property
    def readable(self) -> list[tuple[int, int]]: ...
    @property
    def writable(self) -> list[tuple[int, int]]: ...


class DeviceTrace:
    """The requests on a device's queues, and the ends it comes to."""

    def __init__(self, recorder: Recorder, name: str, shared_bit: int = 0) -> None:
        """`shared_bit`: what marks shared pages to the device, and is in no trace."""
        self._recorder = recorder
        self._number = recorder.name(name)
        self._shared_bit = shared_bit

    def queue(self, index: int) -> QueueTrace:
        return QueueTrace(self._recorder, self._number | index << 16, self._shared_bit)

    def stopped(self) -> None:
        self._recorder.record(
            Kind.IO_REFUSED, HOST, _now(), detail=self._number, errno=errno.EACCES
        )


class QueueTrace:
    """One row for each request, when its buffers go back to the guest.

    Its bytes are those of all buffers in the direction that has more, headers included; its
    latency is the time that the device held it, which for a receive queue is mostly waiting.
    """

    def __init__(self, recorder: Recorder, detail: int, shared_bit: int = 0) -> None:
        self._recorder = recorder
        self._detail = detail
        self._plain = ~shared_bit
        self._held: dict[int, tuple[int, int, int, int]] = {}

    def taken(self, requests: Sequence[Request]) -> None:
        """The device has taken these off the queue; one that was put back is taken again."""
        started = _now()
        for request in requests:
            readable, writable = request.readable, request.writable
            to_device = sum([size for _, size in readable])
            to_guest = sum([size for _, size in writable])
            if to_guest > to_device:
                held = (Kind.IO_IN, started, writable[0][0] & self._plain, to_guest)
            else:
                held = (Kind.IO_OUT, started, _data_gpa(readable) & self._plain, to_device)
            self._held[request.head] = held

    def returned(self, used: Sequence[tuple[int, int]]) -> None:
        """These heads go back to the guest."""
        for head, _ in used:
            held = self._held.pop(head, None)
            if held is not None:
                self._recorder.record(held[0], HOST, *held[1:], self._detail)


def _data_gpa(segments: list[tuple[int, int]]) -> int:
    """Where the data lies: a request's first buffer is its header."""
    return max(segments, key=lambda segment: segment[1])[0] if segments else 0
