"""What a device's process may say, taken apart: whatever it is, it is right or a ProtocolError."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.devices.process import protocol
from vmm.devices.process.protocol import WRITE_HEAD, ProtocolError, words

MOVE = words((0, 0x1000, 512))


def write(moves: int, pieces: int, after: int, numbers: bytes, data: bytes) -> memoryview:
    return memoryview(WRITE_HEAD.pack(moves, pieces, after) + numbers + data)


def test_write_with_all_parts_is_taken_apart() -> None:
    numbers = words((0, 0x1000, 512, 0x2000, 2, 0x3000, 1, 0x4000, 8))

    moves, pieces, then, data = protocol.write_in(write(1, 2, 1, numbers, b"abc"))

    assert protocol.moves_in(moves, 0, 512, False) == [0, 0x1000, 512]
    assert (pieces, then, bytes(data)) == ([0x2000, 2, 0x3000, 1], [0x4000, 8], b"abc")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        words((0x1000,)),
        words((0x1000, 0)),
        words((0x1000, protocol.MOST_DATA + 1)),
        words((0x1000, 1 << 63, 0x1000, 1 << 63)),
        words((0x1000, 1)) * (protocol.MOST_PIECES + 1),
        words((0x1000, 1)) + b"?",
    ],
)
def test_pieces_to_read_beyond_the_rules_are_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.pieces_in(memoryview(body))


@pytest.mark.parametrize(
    "body",
    [
        memoryview(b"too short"),
        write(0, 0, 0, b"", b""),
        write(0, 1, 0, words((0x1000, 3)), b"ab"),
        write(0, 1, 0, words((0x1000, 0)), b""),
        write(0, 2, 0, words((0x1000, 2)), b""),
        write(0, 1 << 31, 0, words((0x1000, 2)), b"ab"),
        write(1 << 31, 1, 0, words((0x1000, 2)), b"ab"),
        write(0, 1, 1 << 31, words((0x1000, 2)), b"ab"),
        write(0, 1, 1, words((0x1000, 2, 0x1000, 0)), b"ab"),
    ],
)
def test_write_beyond_the_rules_is_refused(body: memoryview) -> None:
    with pytest.raises(ProtocolError):
        protocol.write_in(body)


@pytest.mark.parametrize(
    ("moves", "whole"),
    [
        ((1, 0x1000, 512), False),  # a byte past the file
        ((1 << 63, 0x1000, 512), False),
        ((0, 0x1000, 0), False),
        ((0, 0x1000, 1 << 63), False),
        ((0, 0x1000, 1, 0, 0x1000, 1), True),
    ],
)
def test_moves_beyond_the_rules_are_refused(moves: tuple[int, ...], whole: bool) -> None:
    with pytest.raises(ProtocolError):
        protocol.moves_in(memoryview(words(moves)), 0, 512, whole)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_right_or_a_protocol_error(body: bytes) -> None:
    view = memoryview(body)
    for parse in (
        protocol.pieces_in,
        protocol.write_in,
        protocol.returned_in,
        lambda each: protocol.moves_in(each, 0, 1 << 20, False),
        lambda each: protocol.moves_in(each, 1, 1 << 20, True),
    ):
        try:
            parse(view)
        except ProtocolError:
            continue
