"""virtio-fs without its virtiofsd: each request has an answer."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from tests.support.back_end import BackEndDouble
from tests.support.virtio_driver import NEEDS_RESET
from tests.unit.devices.vhost_user.rig import Rig, Successors, requests
from vmm.devices.vhost_user.file_system import QUEUE_SIZE, VhostUserFs

IN_HEADER = struct.pack("<IIQQIIII", 40, 1, 0x1234, 1, 0, 0, 0, 0)
FORGET, REQUEST = 0, 1


@pytest.fixture
def back_end() -> Iterator[BackEndDouble]:
    double = BackEndDouble()
    yield double
    double.end()


@pytest.fixture
def rig(back_end: BackEndDouble) -> Iterator[Rig]:
    made = Rig(VhostUserFs("fs0", "/the/socket", Successors(back_end), b"shared"))
    yield made
    made.close()


def lost(rig: Rig, back_end: BackEndDouble) -> None:
    rig.machine.up()
    back_end.end()
    rig.machine.settle()


def test_config_has_the_tag_and_one_queue_for_requests(rig: Rig) -> None:
    assert rig.device.config() == b"shared".ljust(36, b"\0") + struct.pack("<I", 1)
    assert list(rig.device.queue_sizes) == [QUEUE_SIZE, QUEUE_SIZE]


def test_both_queues_are_handed_over(rig: Rig, back_end: BackEndDouble) -> None:
    rig.machine.up()

    back_end.wait_for(18, 2)  # SET_VRING_ENABLE
    assert requests(back_end).count("SET_VRING_ADDR") == 2
    assert "GET_CONFIG" not in requests(back_end)


def test_a_request_is_answered_with_not_connected(rig: Rig, back_end: BackEndDouble) -> None:
    lost(rig, back_end)
    header, name = rig.machine.place(IN_HEADER), rig.machine.place(b"file\0")
    reply, more = rig.machine.blank(16), rig.machine.blank(104)
    head = rig.machine.give(REQUEST, header, name, reply, more)

    rig.kick(REQUEST)
    rig.machine.settle()

    assert rig.machine.queues[REQUEST].collect() == [(head, 16)]
    assert rig.machine.text(reply, 16) == struct.pack("<IiQ", 16, -errno.ENOTCONN, 0x1234)
    assert rig.machine.text(more, 104) == b"\xcc" * 104


def test_a_reply_in_pieces_is_written_over_them(rig: Rig, back_end: BackEndDouble) -> None:
    lost(rig, back_end)
    header, first, second = (
        rig.machine.place(IN_HEADER), rig.machine.blank(10), rig.machine.blank(20),
    )  # fmt: skip
    rig.machine.give(REQUEST, header, first, second)

    rig.kick(REQUEST)
    rig.machine.settle()

    said = rig.machine.text(first, 10) + rig.machine.text(second, 6)
    assert said == struct.pack("<IiQ", 16, -errno.ENOTCONN, 0x1234)


def test_what_has_no_reply_comes_back_empty(rig: Rig, back_end: BackEndDouble) -> None:
    lost(rig, back_end)
    head = rig.machine.give(FORGET, rig.machine.place(IN_HEADER))

    rig.kick(FORGET)
    rig.machine.settle()

    assert rig.machine.queues[FORGET].collect() == [(head, 0)]


def test_a_request_without_a_header_needs_a_reset(rig: Rig, back_end: BackEndDouble) -> None:
    lost(rig, back_end)
    rig.machine.give(REQUEST, rig.machine.place(b"short"), rig.machine.blank(64))

    rig.kick(REQUEST)
    rig.machine.settle()

    assert rig.machine.driver.status & NEEDS_RESET
