"""Frames of the remote protocol, whole, in pieces and damaged."""

from __future__ import annotations

import pytest

from vmm.control.gdb.packets import (
    LONGEST,
    Packet,
    Parser,
    TooLong,
    escaped,
    framed,
    unescaped,
)


def taken(*pieces: bytes) -> list[bytes | tuple[bytes, bool]]:
    parser = Parser()
    found: list[bytes | tuple[bytes, bool]] = []
    for piece in pieces:
        parser.feed(piece)
        found += [(e.data, e.intact) if isinstance(e, Packet) else e for e in parser.take()]
    return found


def test_packet_in_pieces_comes_once_it_is_whole() -> None:
    whole = framed(b"m1000,4")

    assert taken(*(bytes([byte]) for byte in whole)) == [(b"m1000,4", True)]


def test_several_packets_and_signs_come_in_order() -> None:
    assert taken(b"+" + framed(b"?") + b"-\x03" + framed(b"g")) == [
        b"+", (b"?", True), b"-", b"\x03", (b"g", True),
    ]  # fmt: skip


@pytest.mark.parametrize("end", [b"#00", b"#zz", b"#+1"])
def test_packet_with_a_wrong_checksum_is_not_intact(end: bytes) -> None:
    assert taken(b"$g" + end) == [(b"g", False)]


def test_noise_between_packets_is_left_out() -> None:
    assert taken(b"GET / HTTP/1.0\r\n" + framed(b"?")) == [(b"?", True)]


def test_noise_is_not_kept() -> None:
    parser = Parser()

    parser.feed(b"x" * 100_000)
    found = list(parser.take())

    assert found == [] and parser.waiting == 0


def test_packet_without_an_end_is_refused_at_its_longest() -> None:
    parser = Parser()
    parser.feed(b"$" + b"x" * LONGEST)
    assert list(parser.take()) == []

    parser.feed(b"x")

    with pytest.raises(TooLong):
        list(parser.take())


def test_longest_packet_is_taken() -> None:
    assert taken(framed(b"x" * LONGEST)) == [(b"x" * LONGEST, True)]


def test_interrupt_byte_within_a_packet_is_data() -> None:
    assert taken(framed(b"X\x03")) == [(b"X\x03", True)]


def test_binary_data_comes_back_through_escapes() -> None:
    every = bytes(range(256))

    assert not set(escaped(every)) & set(b"#$*")
    assert unescaped(escaped(every)) == every


def test_escape_with_nothing_after_it_is_left_out() -> None:
    assert unescaped(b"a}") == b"a"
