"""All devices of a machine together: how long they are waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from vmm.wiring import devices as module
from vmm.wiring.devices import Devices


class Transports:
    """Each takes a second to come to rest, if it is given the time."""

    def __init__(self, count: int) -> None:
        self.now = 100.0
        self.held_now: list[int] = []
        self.waits: list[float] = []
        self.all: list[Any] = [SimpleNamespace(held=self._holder(n)) for n in range(count)]

    def _holder(self, number: int) -> Any:
        @contextmanager
        def held(timeout: float) -> Iterator[None]:
            self.waits.append(timeout)
            self.now += min(1.0, timeout)
            if timeout < 1.0:
                raise TimeoutError
            self.held_now.append(number)
            try:
                yield
            finally:
                self.held_now.remove(number)

        return held


@pytest.fixture
def transports(monkeypatch: pytest.MonkeyPatch) -> Transports:
    made = Transports(10)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def machine(transports: list[Any]) -> Devices:
    made = Devices.__new__(Devices)
    made._transports = transports
    return made


def test_devices_that_are_slow_together_are_not_waited_for_one_by_one(
    transports: Transports,
) -> None:
    with pytest.raises(TimeoutError):
        machine(transports.all).hold(2.5)

    assert transports.waits == [2.5, 1.5, 0.5]
    assert transports.now == 102.5
    assert transports.held_now == []  # the guest runs on


def test_devices_are_held_until_they_are_let_go(transports: Transports) -> None:
    held = machine(transports.all[:2]).hold(2.5)
    assert transports.held_now == [0, 1]

    held.close()

    assert transports.held_now == []
