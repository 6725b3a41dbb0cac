"""Port exits: single and string I/O in both directions, and ports that nobody answers."""

from __future__ import annotations

import pytest

from kvm_bindings.exits import IoExit
from tests.support.fake_vcpu import FakeVcpu, RecordingDevice, Rig, StreamDevice

BASE = 0x3F8


@pytest.mark.parametrize(
    ("size", "data", "value"),
    [(1, b"\x12", 0x12), (2, b"\x34\x12", 0x1234), (4, b"\x78\x56\x34\x12", 0x12345678)],
)
def test_out_of_each_size_reaches_the_device_with_its_offset(
    rig: Rig, size: int, data: bytes, value: int
) -> None:
    device = RecordingDevice()
    rig.ports.add(BASE, 8, device)

    rig.handle(IoExit(BASE + 3, size, 1, True, data))

    assert device.writes == [(3, size, value)]


@pytest.mark.parametrize(
    ("size", "value", "data"),
    [(1, 0xFF, b"\xff"), (2, 0x1234, b"\x34\x12"), (4, 0x80000001, b"\x01\x00\x00\x80")],
)
def test_in_of_each_size_gives_the_guest_the_devices_value(
    rig: Rig, size: int, value: int, data: bytes
) -> None:
    device = RecordingDevice(answers=[value])
    rig.ports.add(BASE, 8, device)

    vcpu = rig.handle(IoExit(BASE + 5, size, 1, False, b""))

    assert device.reads == [(5, size)]
    assert vcpu.io == [data]


@pytest.mark.parametrize(
    ("size", "data", "values"),
    [
        (1, b"abc", [0x61, 0x62, 0x63]),
        (2, b"\x01\x00\x02\x00", [1, 2]),
        (4, b"\x01\x00\x00\x00\xff\xff\xff\xff", [1, 0xFFFFFFFF]),
    ],
)
def test_string_out_advances_the_data_and_never_the_port(
    rig: Rig, size: int, data: bytes, values: list[int]
) -> None:
    device = RecordingDevice()
    rig.ports.add(BASE, 8, device)

    rig.handle(IoExit(BASE + 1, size, len(values), True, data))

    assert device.writes == [(1, size, value) for value in values]


@pytest.mark.parametrize(
    ("size", "values", "data"),
    [
        (1, [1, 2, 3], b"\x01\x02\x03"),
        (2, [1, 0x0203], b"\x01\x00\x03\x02"),
        (4, [1, 2], b"\x01\0\0\0\x02\0\0\0"),
    ],
)
def test_string_in_asks_once_per_item_and_answers_all_at_once(
    rig: Rig, size: int, values: list[int], data: bytes
) -> None:
    device = RecordingDevice(answers=list(values))
    rig.ports.add(BASE, 8, device)

    vcpu = rig.handle(IoExit(BASE + 2, size, len(values), False, b""))

    assert device.reads == [(2, size)] * len(values)
    assert vcpu.io == [data]


def test_string_out_to_a_stream_port_goes_over_in_one_piece(rig: Rig) -> None:
    device = StreamDevice()
    rig.ports.add(BASE, 8, device)

    rig.handle(IoExit(BASE, 1, 5, True, b"hello"))

    assert device.strings == [b"hello"]
    assert device.writes == []


@pytest.mark.parametrize(
    ("offset", "size", "count", "data"),
    [(1, 1, 2, b"ab"), (0, 2, 2, b"abcd"), (0, 1, 1, b"a")],
    ids=["another port", "wider items", "a single byte"],
)
def test_what_is_no_byte_string_for_the_stream_port_is_written_item_by_item(
    rig: Rig, offset: int, size: int, count: int, data: bytes
) -> None:
    device = StreamDevice()
    rig.ports.add(BASE, 8, device)

    rig.handle(IoExit(BASE + offset, size, count, True, data))

    assert device.strings == []
    assert len(device.writes) == count


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (4, 1), (1, 7), (4, 3)])
def test_in_from_an_unclaimed_port_reads_all_ones(rig: Rig, size: int, count: int) -> None:
    vcpu = rig.handle(IoExit(0x80, size, count, False, b""))

    assert vcpu.io == [b"\xff" * (size * count)]


def test_out_to_an_unclaimed_port_vanishes(rig: Rig) -> None:
    vcpu = rig.handle(IoExit(0x80, 1, 1, True, b"x"))

    assert vcpu.io == []
    assert rig.outcomes == []


@pytest.mark.parametrize("port", [0x0, 0x4FF, 0x520, 0xFFFF])
def test_ports_around_the_doorbell_are_unclaimed(rig: Rig, port: int) -> None:
    vcpu = rig.handle(IoExit(port, 4, 1, False, b""))

    assert vcpu.io == [b"\xff\xff\xff\xff"]


def test_writes_that_kvm_kept_back_are_carried_out_and_are_no_exits(rig: Rig) -> None:
    device, stream = RecordingDevice(), StreamDevice()
    rig.ports.add(0x70, 1, device)
    rig.ports.add(BASE, 8, stream)
    vcpu = FakeVcpu()
    vcpu.ring = [IoExit(0x70, 1, 1, True, b"\x0f"), IoExit(BASE, 1, 5, True, b"login")]

    rig.handlers.coalesced(vcpu)

    assert (device.writes, stream.strings) == ([(0, 1, 0x0F)], [b"login"])
    assert rig.handlers.port_counts() == {}
    assert not vcpu.ring


def test_exits_are_counted_by_port(rig: Rig) -> None:
    rig.ports.add(BASE, 8, RecordingDevice())

    for port in (BASE, 0x80, BASE):
        rig.handle(IoExit(port, 1, 1, True, b"x"))

    assert rig.handlers.port_counts() == {BASE: 2, 0x80: 1}
