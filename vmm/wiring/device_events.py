"""Tells subscribers to a machine's events of its devices: that one has stopped."""

from __future__ import annotations

from vmm.conversion.events import EventFeed
from vmm.devices.virtio.device import DeviceObserver
from vmm.devices.virtio.queue import Chain, QueueObserver


class DeviceEvents:
    """A DeviceObserver that hands on what it is told to `also`, a trace's, where there is one."""

    def __init__(self, feed: EventFeed, name: str, also: DeviceObserver | None) -> None:
        self._feed = feed
        self._name = name
        self._also = also

    def queue(self, index: int) -> QueueObserver:
        return _NoRequests() if self._also is None else self._also.queue(index)

    def stopped(self) -> None:
        if self._also is not None:
            self._also.stopped()
        self._feed.note("device-stopped", device=self._name)


class _NoRequests:
    """Requests are no events: there are too many of them."""

    def taken(self, chains: list[Chain]) -> None:
        del chains

    def returned(self, used: list[tuple[int, int]]) -> None:
        del used
