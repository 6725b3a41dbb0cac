"""The lab machine's heartbeat, with a clock of the test's own."""

from __future__ import annotations

import pytest

from vmm.lab import heartbeat
from vmm.lab.heartbeat import Heartbeat, MachineStandsStill

BEAT = b"pyvmm-lab: alive\r\n"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


def watch(beats: Heartbeat, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        beats.check()


def test_machine_with_a_heartbeat_may_be_silent_otherwise_for_ever(clock: Clock) -> None:
    beats, log = Heartbeat(30), bytearray(b"a message\r\n")

    for _ in range(100):
        log += BEAT
        beats.take_from(log, len(BEAT))
        watch(beats, clock, 29)

    assert log == b"a message\r\n"
    assert beats.beats == 100


def test_machine_without_a_heartbeat_stands_still(clock: Clock) -> None:
    beats = Heartbeat(30)
    watch(beats, clock, 30)

    with pytest.raises(MachineStandsStill, match="no heartbeat for 30 s"):
        watch(beats, clock, 1)


def test_machine_that_nobody_listened_to_has_its_time_again(clock: Clock) -> None:
    beats = Heartbeat(30)
    clock.now += 1000

    watch(beats, clock, 30)

    with pytest.raises(MachineStandsStill):
        watch(beats, clock, 2)


@pytest.mark.parametrize("cut", range(1, len(BEAT)))
def test_beat_that_comes_in_two_pieces_counts_and_leaves_the_rest(clock: Clock, cut: int) -> None:
    beats, log = Heartbeat(30), bytearray()

    for piece in (b"before\r\n" + BEAT[:cut], BEAT[cut:] + b"after\r\n"):
        log += piece
        beats.take_from(log, len(piece))

    assert log == b"before\r\nafter\r\n"
    assert beats.beats == 1
