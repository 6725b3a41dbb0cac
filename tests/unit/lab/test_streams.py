"""The streams between lab machine and host, with this process at both ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vmm.lab.streams import EndMark, Pump, Stream, stream_pair


@dataclass
class Ends:
    pump: Pump
    stream: Stream
    guest: socket.socket
    received: bytearray
    process: int


@pytest.fixture
def ends() -> Iterator[Ends]:
    stream, guest = stream_pair("out")
    received = bytearray()
    stream.sink = received.extend
    read_end, write_end = os.pipe()  # readable like a pidfd once it is closed
    pump = Pump([stream], read_end)
    yield Ends(pump, stream, guest, received, write_end)
    pump.close()
    stream.socket.close()
    guest.close()
    for fd in (read_end, write_end):
        try:
            os.close(fd)
        except OSError:
            continue  # closed by the test


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_end_mark_is_found_however_the_stream_is_cut(size: int) -> None:
    mark = EndMark(b"<<end>")
    data = b"a<b<<c<<enx<<<end>"
    out = b"".join(mark.feed(data[i : i + size]) for i in range(0, len(data), size))

    assert out == b"a<b<<c<<enx<" and mark.complete


def test_end_mark_gives_back_what_only_looked_like_its_beginning() -> None:
    mark = EndMark(b"<<end>")

    assert mark.feed(b"x<<en") == b"x"
    assert mark.rest() == b"<<en" and not mark.complete


def test_pump_delivers_every_byte_value(ends: Ends) -> None:
    ends.guest.sendall(bytes(range(256)))

    ends.pump.pump(1)

    assert ends.received == bytes(range(256))


def test_pump_sends_more_than_the_socket_holds(ends: Ends) -> None:
    data = os.urandom(1 << 20)
    got = bytearray()

    ends.pump.send(ends.stream, data)
    while len(got) < len(data):
        got += ends.guest.recv(1 << 16)
        ends.pump.pump(0)

    assert got == data


def test_closing_the_sending_side_keeps_the_other_open(ends: Ends) -> None:
    ends.pump.send(ends.stream, b"last")
    ends.pump.close_sending(ends.stream)
    ends.guest.sendall(b"answer")
    ends.pump.pump(1)

    assert ends.guest.recv(100) == b"last" and ends.guest.recv(100) == b""
    assert ends.received == b"answer"


def test_input_file_is_passed_on_and_its_end_too(ends: Ends) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"typed")
    os.close(write_end)

    ends.pump.feed_from(read_end, ends.stream)
    ends.pump.pump(1)
    ends.pump.pump(1)
    os.close(read_end)

    assert ends.guest.recv(100) == b"typed" and ends.guest.recv(100) == b""


def test_input_waits_while_the_guest_does_not_take_it(ends: Ends) -> None:
    with open("/dev/zero", "rb") as zeros:
        ends.pump.feed_from(zeros.fileno(), ends.stream)
        for _ in range(200):
            ends.pump.pump(0)

        assert len(ends.stream.outgoing) < 1 << 18


def test_process_end_is_noticed_and_the_rest_drained(ends: Ends) -> None:
    ends.guest.sendall(b"x" * 100_000)
    ends.guest.close()
    os.close(ends.process)

    ends.pump.pump(1)
    ends.pump.drain()

    assert ends.pump.process_ended and len(ends.received) == 100_000
